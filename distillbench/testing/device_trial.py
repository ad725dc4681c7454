"""Trial of a method on a simulated GPU, in a separate process: the function behind the conformance check ``device``."""

from __future__ import annotations

import inspect
import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench.simulated_cuda.installation import install
from distillbench.simulated_cuda.record import Record, recording

if TYPE_CHECKING:
    from distillbench.testing.method_bench import MethodBench
    from distillbench.training.method import Method

GPU = "cuda:0"
CYCLES = 2  # of each phase's steps; the first may fill caches, so waits are taken from the second
MOST_NFE = 3  # numbers of evaluations to sample with


@dataclass
class Trial:
    """The result, over all conditionings that the method supports."""

    fault: str = ""  # the first failure, and where
    fault_on_cpu: str = ""  # the failure, if it fails on the CPU too
    waits: dict[str, int] = field(
        default_factory=dict
    )  # operation and line -> number of waits for the device in one step


def try_method(pickled: bytes) -> Trial:
    """Train some steps of each phase and sample; `pickled` are a method's class, its config and labels of benches."""
    install()
    import torch

    from distillbench.errors import UserError
    from distillbench.simulated_cuda.checks import DevicesMixed
    from distillbench.testing.method_bench import CONDITIONINGS, MethodBench

    torch.set_num_threads(1)
    cls, config, labels = pickle.loads(pickled)
    trial = Trial()
    for label in labels:
        try:
            _try_on(MethodBench(label, cls, config, CONDITIONINGS[label], 0, device=GPU), trial)
        except UserError:  # the method does not support this conditioning
            continue
        except Exception as error:  # a method is third-party code
            trial.fault_on_cpu = "" if isinstance(error, DevicesMixed) else _failure_on_cpu(label, cls, config)
            trial.fault = "" if trial.fault_on_cpu else f"{label}: {_in_words(error, cls)}"
            break
    return trial


def _failure_on_cpu(label: str, cls: type[Method], config: Any) -> str:
    """The error of the same trial on the CPU; "" if it succeeds."""
    from distillbench.testing.method_bench import CONDITIONINGS, MethodBench

    try:
        _try_on(MethodBench(label, cls, config, CONDITIONINGS[label], 0), Trial())
    except Exception as error:
        return f"{label}: {type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _try_on(bench: MethodBench, trial: Trial) -> None:
    from distillbench.testing.method_bench import USUAL_NFE

    method = bench.method()
    for cycle, take in bench.steps_of(method, CYCLES):
        with recording() as record:
            take()
        if cycle:
            _note(record, trial)
    method.eval()
    for n in [n for n in USUAL_NFE if method.supports(n)][:MOST_NFE]:
        bench.sample(n, method).cpu()


def _note(record: Record, trial: Trial) -> None:
    step: dict[str, int] = {}
    for wait in record.waits:
        line = f"{wait.place} ({wait.what})"
        step[line] = step.get(line, 0) + 1
    for line, count in step.items():
        trial.waits[line] = max(count, trial.waits.get(line, 0))


def _in_words(error: Exception, cls: type[Method]) -> str:
    """An error in one line, with the last line of the method's file in its traceback."""
    from distillbench.simulated_cuda.checks import DevicesMixed

    lines = _lines_of(error, cls)
    if isinstance(error, DevicesMixed):
        where = f"{lines[-1]}, " if lines and lines[-1] != str(error.place) else ""
        return f"uses a tensor on another device: {where}{error.where} at {error.place}, {error.devices}"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"fails on a GPU: {text}" + (f" ({lines[-1]})" if lines else "")


def _lines_of(error: Exception, cls: type[Method]) -> Sequence[str]:
    try:
        file: Any = inspect.getfile(cls)
    except (TypeError, OSError):
        return []
    return [
        f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__) if f.filename == file
    ]
