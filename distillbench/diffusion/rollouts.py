"""Backward simulation: images on a few-step student's own chain, on which its steps are trained.

Yin et al. 2024 (DMD2), arXiv:2405.14867, section 4.5. In sampling a step gets what the steps before it have made. If it
is trained on noised real images instead, it never sees their errors. The chain starts at sigma_T eps with T = t_0:

    x_0 = f(x_t, t),   x_s = alpha_s x_0 + sigma_s eps,   t = t_k,  s = t_(k+1),  with fresh noise eps in each step

| symbol           | meaning                                   | shape             |
|------------------|-------------------------------------------|-------------------|
| t_0 > t_1 > ...  | the student's N times, from the noisiest  | (B,1,1,1) float64 |
| k                | steps that are behind an image            | 0, ..., N - 1     |
| f                | the student, x_0 from x_t                 | (B,C,H,W)         |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distillbench.diffusion.samplers import DenoiseFunction, time_like, x_at_top
from distillbench.diffusion.schedules import NoiseSchedule
from distillbench.errors import UserError
from distillbench.system.transfers import to_device

__all__ = ["chain_times", "rollout"]

ROUNDING = 1e-9  # of lam at the lower end of a schedule


def chain_times(schedule: NoiseSchedule, levels: Sequence[float]) -> Tensor:
    """The times of a chain whose steps begin at these noise levels tau, which fall; ascending, (N,) float64.

    The first is at most the schedule's highest level, that of pure noise. Raises UserError unless they then fall and
    are levels of the schedule.
    """
    low, high = schedule.lam_range
    lam = torch.tensor([*levels][::-1], dtype=torch.float64).log()  # not a number for a level below 0
    lam[-1:].clamp_(max=high)
    if not levels or not (lam.diff() > 0).all() or not lam[0] >= low - ROUNDING:
        ends = f"{math.exp(low):g} to {math.exp(high):g}"
        raise UserError(f"levels must fall, within those of the schedule, {ends}, got {[*levels]}")
    return schedule.t_of_lam(lam)


def rollout(
    f: DenoiseFunction, schedule: NoiseSchedule, times: Tensor, noise: Callable[[], Tensor], k: Tensor | int
) -> tuple[Tensor, Tensor]:
    """x_t and t after k steps of the student's chain, (B,C,H,W) and (B,1,1,1) float64; without gradient.

    `times` (N,) are ascending, as in all grids: the chain starts at times[-1]. `noise()` gives new standard normal
    noise (B,C,H,W) at each call, such as ``batch.noise``.

    A tensor `k`, (B,1,1,1) int64, has a number for each image (``batch.integers(0, N)``): all images take N - 1 steps,
    so the cost is always the same. An int is for all images (``batch.one_integer(0, N)``) and costs k evaluations; then
    declare ``Phase(cost_varies=True)``. Raises UserError for an int that is not in 0, ..., N - 1.
    """
    last = len(times) - 1
    if isinstance(k, int) and not 0 <= k <= last:
        raise UserError(f"a chain of {len(times)} times has the steps 0 to {last}, got {k}")
    with torch.no_grad():
        x_t = x_at_top(schedule, noise(), times)
        for step in range(k if isinstance(k, int) else last):
            t, s = time_like(x_t, times[last - step]), time_like(x_t, times[last - step - 1])
            x_s = schedule.alpha(s) * f(x_t, t) + schedule.sigma(s) * noise()
            x_t = x_s if isinstance(k, int) else torch.where(k > step, x_s, x_t)
    if isinstance(k, int):
        return x_t, time_like(x_t, times[last - k])
    return x_t, to_device(times, x_t.device).to(torch.float64)[last - k]
