"""The check that the FLOPs counted for a training step are those that torch counts while the step runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distillbench.errors import Unavailable
from distillbench.testing.checks import Fault, NotApplicable
from distillbench.testing.method_bench import WALKED_PHASES, MethodBench, workspace_of
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.flops import denoisers_of, measured_flops, training_flops
from distillbench.training.method import Batch
from distillbench.training.network_rows import sum_of_rows
from distillbench.training.optimizers import Optimizers

FLOPS_ERROR = 0.05  # relative
MOST_PASSES = 3  # a layer outside of the counted networks runs forward and backward: at most 3 times its forward FLOPs


class _Flops(TorchDispatchMode):
    """FLOPs by torch's formulas: all, and those outside of counted networks before a loss is differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.outside = 0
        self.inside = self.updating = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            self.all += flops
            self.outside += 0 if self.inside or self.updating else flops
        return out

    @contextmanager
    def network(self) -> Iterator[None]:
        """A block in which a counted network is evaluated."""
        before, self.inside = self.inside, True
        try:
            yield
        finally:
            self.inside = before


def flops(bench: MethodBench) -> str:
    """The FLOPs counted for a cycle are those that torch counts while it runs, layers outside of networks excepted."""
    if bench.computed.recompute:
        raise NotApplicable("what is computed again in a backward pass is not counted")
    method, read = bench.method(), bench.read()
    generator = torch.Generator(bench.device).manual_seed(0)
    workspace = workspace_of(method, Path(), BudgetConfig(), dry=True, device=bench.device)
    method.prepare(workspace)
    optimizers = Optimizers(method.config, settings_of=method.settings_of)
    meter = Meter(BudgetConfig(), method.teacher, bench.device)
    meter.stop()
    seen = []
    about = bench.images, bench.shape, generator, bench.device, read, bench.conditioning, bench.share
    for phase, stage in enumerate(method.phases()[:WALKED_PHASES]):
        meter.look_again()
        method.start_phase(phase)
        method.prepare_phase(phase, workspace)
        ran, before = _Flops(), meter.cost().networks
        counters = method.teacher.teacher_rows, method.teacher.student_rows
        timed = [counter.timed for counter in counters]
        try:
            for counter in counters:
                counter.timed = ran.network
            for step in range(stage.cycle):
                with ran:
                    for network, loss in method.train_step(Batch(*about, step, phase)):
                        ran.updating = True
                        optimizers.update(network, loss, 1.0)
                        ran.updating = False
                    method.after_step()
        finally:
            for counter, one in zip(counters, timed, strict=True):
                counter.timed = one
        rows = sum_of_rows(meter.cost().networks, before)
        try:
            counted = training_flops(rows, measured_flops(rows, method.teacher, denoisers_of(method), bench.device))
        except Unavailable as reason:
            raise NotApplicable(str(reason)) from reason
        what = "a step" if stage.cycle == 1 else "a cycle"
        seen.append(_compared(counted, ran, f"{what} of phase {phase}"))
        method.end_phase(phase, method.student)
    return "; ".join(dict.fromkeys(seen))


def _compared(counted: int, ran: _Flops, what: str) -> str:
    """The result in words; raises Fault if the FLOPs of networks are not those that ran."""
    least = max(0, ran.all - MOST_PASSES * ran.outside)
    found = f"{what} is counted as {counted / 1e6:.3g} MFLOP, torch counts {ran.all / 1e6:.3g}"
    if ran.outside:
        found += f", of which {ran.outside / 1e6:.3g} forward in layers outside of the networks"
    if counted > (1 + FLOPS_ERROR) * ran.all:
        raise Fault(
            f"{found}: is a network evaluated with gradient whose output is detached? Evaluate it under "
            "torch.no_grad(), or in networks.frozen_weights if the gradient reaches its input only"
        )
    if counted < (1 - FLOPS_ERROR) * least:
        raise Fault(
            f"{found}: is a network called without its denoiser (.network), or does a gradient flow through a "
            "derivative (detach the tangent of torch.func.jvp), or through one evaluation more than once?"
        )
    return f"{counted / 1e6:.3g} MFLOP counted, {ran.all / 1e6:.3g} made" + (
        f" ({ran.outside / 1e6:.3g} forward in layers outside of the networks, which are not counted)"
        if ran.outside
        else ""
    )
