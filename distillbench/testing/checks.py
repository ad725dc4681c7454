"""How conformance checks are run: one after the other on benches, each with a message for the author of the class.

A check is a function of a bench. If the class meets the contract, it returns a message; if not, it raises Fault; if the
check does not apply, NotApplicable. Any other error is reported as a fault; the other checks still run.
"""

from __future__ import annotations

import inspect
import pickle
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distillbench import registry
from distillbench.errors import first_of
from distillbench.runs.config import describe_options


class Fault(Exception):
    """A violation of the contract. The message says what was expected, what was found and how to fix it."""


class NotApplicable(Exception):
    """Why a check does not apply."""


class Doubt(str):
    """A finding that may be right or wrong; only the author of the class can tell."""


@dataclass(frozen=True)
class Finding:
    """The result of a check: `ok` is None if it does not apply; `message` says what was found and why.

    With `doubt`, `ok` is True, and the author of the class should confirm that what `message` says is intended.
    """

    check: str
    ok: bool | None
    message: str
    doubt: bool = False


class Bench(Protocol):
    """What a class is checked on, such as a way of conditioning or a kind of images."""

    @property
    def label(self) -> str: ...

    @property
    def cls(self) -> type: ...

    @property
    def conditional(self) -> bool:
        """Whether the class is checked with class labels."""


@dataclass(frozen=True)
class Result:
    """What a check found on each bench, by the bench's label."""

    passed: dict[str, str]
    faults: dict[str, str]
    excused: dict[str, str]
    closed: dict[str, str]  # benches closed to checks that need this one: the check that failed, "" for a refusal

    def finding(self, check: Check) -> Finding:
        if self.faults:
            return Finding(check.name, False, self._in_words(self.faults))
        if self.passed:
            first = next(iter(self.passed.values()))
            first = next((seen for seen in self.passed.values() if isinstance(seen, Doubt)), first)
            message = f"{first}; {self._in_words(self.excused)}" if self.excused else str(first)
            return Finding(check.name, True, message, isinstance(first, Doubt))
        if self.excused:
            return Finding(check.name, False if check.must_apply else None, self._in_words(self.excused))
        causes = ", ".join(sorted(set(filter(None, self.closed.values()))))
        refused = "not run: the class refuses what it needs" if self.closed else "not run: it applies to no bench"
        return Finding(check.name, None, f"not run: {causes} must pass first" if causes else refused)

    def _in_words(self, by_label: dict[str, str]) -> str:
        """The first message, preceded by the benches that have one, unless all have."""
        message = next(iter(by_label.values()))
        count = len(self.passed) + len(self.faults) + len(self.excused)
        return message if len(by_label) == count else f"{', '.join(by_label)}: {message}"


@dataclass(frozen=True)
class Check:
    """A check and the benches that it runs on: "every" one, the "first", or those with classes ("conditional").

    It does not run on a bench where a check that it `needs` has failed. With `must_apply` it fails if it applies to no
    bench.
    """

    run: Callable[[Any], str]
    needs: tuple[str, ...] = ()
    benches: str = "every"
    must_apply: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__

    def on(self, benches: Sequence[Bench], closed: dict[str, dict[str, str]]) -> Result:
        """Run on all benches that earlier checks have not closed; `closed`, by check, is :attr:`Result.closed`."""
        shut = {label: cause for need in self.needs for label, cause in closed[need].items()}
        result = Result({}, {}, {}, shut)
        for bench in self._chosen([bench for bench in benches if bench.label not in shut]):
            try:
                with isolated():
                    result.passed[bench.label] = self.run(bench)
            except NotApplicable as reason:
                result.excused[bench.label] = str(reason)
            except Fault as fault:
                result.faults[bench.label] = str(fault)
            except (Exception, SystemExit) as error:  # third-party code may fail in any way
                result.faults[bench.label] = where(error, bench.cls)
        for bench in benches:
            if bench.label in result.faults or (self.benches == "first" and result.faults):
                shut.setdefault(bench.label, self.name)
            elif self.must_apply and bench.label in result.excused:
                shut.setdefault(bench.label, "" if result.passed else self.name)
        return result

    def _chosen(self, benches: list[Bench]) -> list[Bench]:
        if self.benches == "conditional":
            return [bench for bench in benches if bench.conditional]
        return benches[:1] if self.benches == "first" else benches


def examine(checks: Sequence[Check], benches: Sequence[Bench]) -> Iterator[Finding]:
    """The finding of each check, yielded when it is known."""
    closed: dict[str, dict[str, str]] = {}  # by check: its Result.closed
    for check in checks:
        result = check.on(benches, closed)
        closed[check.name] = result.closed
        yield result.finding(check)


# --- what is declared ------------------------------------------------------------------------------------------------


def check_declared(kind: str, cls: type) -> None:
    """Raise Fault unless the registry accepts the class."""
    try:
        registry.check_class(kind, cls)
    except registry.PluginError as error:
        raise Fault(f"the registry would reject this plugin: {error}") from error


def settings_with_help(config: type) -> int:
    """The number of settings of a Config; raises Fault unless each has a help text."""
    options = describe_options(config)
    silent = [name for name, _, text in options if not text.strip()]
    if silent:
        raise Fault(f"settings without a help text: {first_of(silent)}. Write NAME: TYPE = option(DEFAULT, WHAT_IT_IS)")
    return len(options)


# --- global state ----------------------------------------------------------------------------------------------------


@contextmanager
def isolated() -> Iterator[None]:
    """One thread, float32 and gradients inside; restores all global state afterwards."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    dtype, threads, gradients = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    try:
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
        torch.set_grad_enabled(True)
        yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def global_generators() -> dict[str, Any]:
    """The states of the global random generators."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": pickle.dumps(np.random.get_state()),
        "Python's random": random.getstate(),
    }


def seed_global_generators(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def undisturbed(what: str, instead: str) -> Iterator[None]:
    """Raise Fault if the block draws from a global random generator; `instead` says what to draw from."""
    before = global_generators()
    yield
    used = [name for name, state in global_generators().items() if state != before[name]]
    if used:
        raise Fault(f"{what} draws from the global generator of {' and '.join(used)}: {instead}")


# --- words and comparisons -------------------------------------------------------------------------------------------

# What is in the message of an error of torch -> what the author of a class can do.
REMEDIES = {
    "forward AD": "torch's fused attention has no forward-mode derivative: use distillbench.diffusion.derivative, or "
    "sdpa_kernel(SDPBackend.MATH) around torch.func.jvp",
    "CheckpointError": "torch.func.jvp does not go with activation checkpointing (compute.recompute): use "
    "distillbench.diffusion.derivative",
    "must have the same dtype": "features inside a network are in the precision of compute.precision, and outside of a "
    "denoiser there is no autocast: convert them, .float()",
}


def where(error: BaseException, cls: type) -> str:
    """An error in one line, with the last line of its traceback in the file that defines `cls`."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    remedy = next((f". {words}" for part, words in REMEDIES.items() if part in text), "")
    return _first_sentence(text, remedy) + _line_of(error, cls) + remedy


def _first_sentence(text: str, remedy: str) -> str:
    """`text`; with a `remedy` its first sentence, since torch then adds paragraphs of other advice."""
    return text.partition(". ")[0].rstrip(".") if remedy else text


def _line_of(error: BaseException, cls: type) -> str:
    """The last line of the error's traceback in the file of `cls`, in brackets."""
    try:
        file = inspect.getfile(cls)
    except (TypeError, OSError):
        return ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" (line {frames[-1].lineno} of {Path(file).name}, in {frames[-1].name})" if frames else ""


def differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.equal(a, b)
