"""The check of a method on a GPU, which is a simulated one: see :mod:`distillbench.simulated_cuda`."""

from __future__ import annotations

import pickle

from distillbench.checking import Doubt, Fault, NotApplicable, some
from distillbench.device_trial import try_method
from distillbench.processes import ProcessError, call_in_fresh_process
from distillbench.testbench import CONDITIONINGS, Bench

LIMIT_SECONDS = 600.0  # it takes a few


def device(bench: Bench) -> str:
    """Every tensor is on the device of its method, and no step waits for it. Tried under all conditionings at once."""
    labels = [label for label, value in CONDITIONINGS.items() if bench.conditioning == value or not bench.conditional]
    try:
        pickled = pickle.dumps((bench.cls, bench.given, labels))
    except Exception as error:  # a class that was made within a function, for one
        raise NotApplicable(f"it is tried in another process, which does not find it: {error}") from error
    try:
        trial = call_in_fresh_process(try_method, pickled, LIMIT_SECONDS)
    except ProcessError as error:
        raise NotApplicable(f"it could not be tried in another process: {error}") from error
    if trial.elsewhere:
        raise NotApplicable(f"it fails on the CPU as well, {trial.elsewhere}")
    if trial.fault:
        raise Fault(f"{trial.fault}. Make tensors with device=x.device, and keep them in buffers (register_buffer)")
    if trial.waits:
        told = [f"{count} times a step at {line}" for line, count in trial.waits.items()]
        return Doubt(f"waits for the device {some(told)}: a GPU stands still meanwhile")
    return "on a simulated GPU all tensors are on its device, and no step waits for it"
