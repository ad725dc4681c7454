"""How checks are run, whatever they look at: one by one on benches, each with a finding in words.

A check is a function of a bench. It returns what it saw where a promise of the contract is kept, raises Fault where it
is not, and NotApplicable where there is nothing to look at. An error of its own is its finding, and the others go on.
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
from distillbench.config import describe_options


class Fault(Exception):
    """What is wrong, in words for the author: what was expected, what was seen, what to do."""


class NotApplicable(Exception):
    """Why there is nothing to look at."""


class Doubt(str):
    """What a check saw that may be right or wrong, as only the author can know."""


@dataclass(frozen=True)
class Finding:
    """What a check found. `ok` is None where it does not apply; `message` says in words what was seen, and why.

    With `doubt` it is ok if the author meant it.
    """

    check: str
    ok: bool | None
    message: str
    doubt: bool = False


class Bench(Protocol):
    """A situation in which a class is tried."""

    @property
    def label(self) -> str: ...

    @property
    def cls(self) -> type: ...

    @property
    def conditional(self) -> bool:
        """Whether images are asked for by class."""


@dataclass(frozen=True)
class Result:
    """What a check said on each bench, by the bench's label."""

    passed: dict[str, str]
    faults: dict[str, str]
    excused: dict[str, str]
    closed: dict[str, str]  # benches of no use to the checks that need this one: the check at fault; "": a refusal

    def finding(self, check: Check) -> Finding:
        if self.faults:
            return Finding(check.name, False, self._told(self.faults))
        if self.passed:
            first = next(iter(self.passed.values()))
            first = next((seen for seen in self.passed.values() if isinstance(seen, Doubt)), first)
            message = f"{first}; {self._told(self.excused)}" if self.excused else str(first)
            return Finding(check.name, True, message, isinstance(first, Doubt))
        if self.excused:
            return Finding(check.name, False if check.must_apply else None, self._told(self.excused))
        causes = ", ".join(sorted(set(filter(None, self.closed.values()))))
        refused = "what it would look at is refused" if self.closed else "no bench for it"
        return Finding(check.name, None, f"not looked at before {causes} is ok" if causes else refused)

    def _told(self, by_label: dict[str, str]) -> str:
        """The first message, with the benches on which there is one unless it is all of them."""
        message = next(iter(by_label.values()))
        count = len(self.passed) + len(self.faults) + len(self.excused)
        return message if len(by_label) == count else f"{', '.join(by_label)}: {message}"


@dataclass(frozen=True)
class Check:
    """A check and where it is run: on "every" bench, on the "first" one, or on those with classes ("conditional").

    It is not run where a check that it `needs` has failed. With `must_apply` it fails where it applies to no bench.
    """

    run: Callable[[Any], str]
    needs: tuple[str, ...] = ()
    benches: str = "every"
    must_apply: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__

    def on(self, benches: Sequence[Bench], closed: dict[str, dict[str, str]]) -> Result:
        """Run where it can be; `closed` is what the checks before have closed."""
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
            except (Exception, SystemExit) as error:  # a stranger's code may fail in any way
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
    """What each check finds, one by one as it is known."""
    closed: dict[str, dict[str, str]] = {}  # check: benches closed to those that need it, each with the check at fault
    for check in checks:
        result = check.on(benches, closed)
        closed[check.name] = result.closed
        yield result.finding(check)


# --- what is declared ------------------------------------------------------------------------------------------------


def check_declared(kind: str, cls: type) -> None:
    """The class is one that the registry takes."""
    try:
        registry.check_class(kind, cls)
    except registry.PluginError as error:
        raise Fault(f"as a plugin it would be left out: {error}") from error


def settings_with_help(config: type) -> int:
    """How many settings a Config has; each must say what it is."""
    options = describe_options(config)
    silent = [name for name, _, text in options if not text.strip()]
    if silent:
        raise Fault(f"settings without a help text: {some(silent)}. Write NAME: TYPE = option(DEFAULT, WHAT_IT_IS)")
    return len(options)


# --- global state ----------------------------------------------------------------------------------------------------


@contextmanager
def isolated() -> Iterator[None]:
    """One thread, float32 and gradients inside; afterwards all global state is as it was."""
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
    """The states of the random generators that belong to nobody."""
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
    """Raise Fault if what is done inside moves a global random generator; `instead` says what to draw from."""
    before = global_generators()
    yield
    moved = [name for name, state in global_generators().items() if state != before[name]]
    if moved:
        raise Fault(f"{what} draws from the global generator of {' and '.join(moved)}: {instead}")


# --- words and comparisons -------------------------------------------------------------------------------------------


def where(error: BaseException, cls: type) -> str:
    """An error in one line, with the last line of the author's own file that it came through."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    try:
        file = inspect.getfile(cls)
    except (TypeError, OSError):
        return text
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{text} (line {frames[-1].lineno} of {Path(file).name}, in {frames[-1].name})" if frames else text


def some(names: Sequence[str]) -> str:
    """At most three of them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or not torch.equal(a, b)
