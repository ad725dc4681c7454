"""The check of a method on a simulated GPU (:mod:`distillbench.simulated_cuda`)."""

from __future__ import annotations

import pickle

from distillbench.errors import first_of
from distillbench.system.subprocesses import ProcessError, call_in_fresh_process
from distillbench.testing.bench_networks import USUALLY_COMPUTED
from distillbench.testing.checks import Doubt, Fault, NotApplicable
from distillbench.testing.device_trial import try_method
from distillbench.testing.method_bench import CONDITIONINGS, MethodBench

LIMIT_SECONDS = 600.0  # usually a few are enough


def device(bench: MethodBench) -> str:
    """Every tensor is on the method's device. Steps that wait for the device are reported. Covers all conditionings."""
    if bench.computed != USUALLY_COMPUTED:
        raise NotApplicable("it runs on the usual network in float32 only")
    labels = [label for label, value in CONDITIONINGS.items() if bench.conditioning == value or not bench.conditional]
    try:
        pickled = pickle.dumps((bench.cls, bench.given, labels))
    except Exception as error:  # for example, a class defined in a function
        raise NotApplicable(f"the check runs in another process, which cannot import the class: {error}") from error
    try:
        trial = call_in_fresh_process(try_method, pickled, LIMIT_SECONDS)
    except ProcessError as error:
        raise NotApplicable(f"it could not be tried in another process: {error}") from error
    if trial.fault_on_cpu:
        raise NotApplicable(f"it fails on the CPU as well, {trial.fault_on_cpu}")
    if trial.fault:
        raise Fault(f"{trial.fault}. Make tensors with device=x.device, and keep them in buffers (register_buffer)")
    if trial.waits:
        waits = [f"{count} times per step at {line}" for line, count in trial.waits.items()]
        return Doubt(f"waits for the device {first_of(waits)}: a GPU is idle meanwhile")
    return "on a simulated GPU all tensors are on its device, and no step waits for it"
