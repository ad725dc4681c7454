"""The check that a method which differentiates a network in time gets a network whose derivative says something.

| symbol  | meaning                                                                     | shape     |
|---------|-----------------------------------------------------------------------------|-----------|
| x_t, t  | noisy image and its time                                                    | (B,C,H,W) |
| F       | output of the student's network at the start of training                    | (B,C,H,W) |
| dF/dlam | its derivative in lam = log(sigma_t / alpha_t) at constant x_t              | (B,C,H,W) |
"""

from __future__ import annotations

import torch

from distillbench.diffusion.denoiser import Denoiser, NetworkCall
from distillbench.diffusion.derivatives import derivative, tangent
from distillbench.testing.checks import Doubt
from distillbench.testing.method_bench import MethodBench
from distillbench.training.method import Method

LARGEST_CHANGE = 2.0  # trained networks have about .5, and random ones with frequencies up to 1000 about 15
TIMES = 256


def times(bench: MethodBench) -> str:
    """Where a step differentiates a network, the network does not change faster in time than along its path."""
    method: Method | None = None
    for event in bench.walk():
        method = event.method
    assert method is not None
    counters = method.teacher.student_rows, method.teacher.teacher_rows
    if not any(counter.rows_along or counter.rows_of_differences for counter in counters):
        return "no step differentiates a network"
    start = bench.method()
    found = [change_in_time(part, bench) for part in start.student.modules() if isinstance(part, Denoiser)]
    if not found:
        return "no Denoiser to measure in the student"
    seen = f"at the start the output of the network changes by {max(found):.2g} of its size per unit of lam"
    if max(found) > LARGEST_CHANGE:
        return Doubt(
            f"{seen}, at constant x_t. More than {LARGEST_CHANGE:g} is not the path's change but that of features of "
            "time with high frequencies, and a loss with a derivative learns those. Give the student low ones: "
            "networks.smooth_times(teacher.student())"
        )
    return f"{seen}; {LARGEST_CHANGE:g} is allowed"


def change_in_time(denoiser: Denoiser, bench: MethodBench) -> float:
    """rms(dF/dlam) / rms(F) of the denoiser's network, over times that are uniform in lam."""
    schedule, generator = denoiser.native, torch.Generator(bench.device).manual_seed(0)  # the times of `output`
    low, high = denoiser.schedule.lam_range
    lam = torch.linspace(low, high, TIMES, dtype=torch.float64, device=bench.device).view(-1, 1, 1, 1)
    t = schedule.t_of_lam(lam)
    x_0, eps = torch.randn((2, TIMES, *bench.shape), generator=generator, device=bench.device)
    x_t = schedule.noised(x_0, t, eps)
    _, dt = tangent(schedule, x_t, t, x_0)
    plain = NetworkCall()  # `output` is no module, so `derivative` leaves its network in the precision of training
    with torch.no_grad(), denoiser.counted.counter.calling(plain):
        at, along = (x_t, t), (torch.zeros_like(x_t), dt)
        F, dF = derivative(denoiser.output, at, along, bench.c(range(TIMES)), exact=True)
    return (dF.square().mean() / F.square().mean()).sqrt().item()
