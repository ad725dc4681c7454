"""Samplers of the probability-flow ODE as pure functions over one denoiser type ``f(x_t, t) -> x_0``.

| symbol | meaning                              | shape     |
|--------|--------------------------------------|-----------|
| x_t    | noisy image                          | (B,C,H,W) |
| t > s  | times, float64                       | (B,1,1,1) |
| f      | denoiser, E[x_0 given x_t]           | (B,C,H,W) |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distillbench.denoiser import implied_eps
from distillbench.schedules import NoiseSchedule

DenoiseFunction = Callable[[Tensor, Tensor], Tensor]


def time_like(x: Tensor, value: float | Tensor) -> Tensor:
    """The time `value` for every image of x: (B,1,1,1) float64 on x's device."""
    return torch.as_tensor(value, dtype=torch.float64, device=x.device).expand(len(x), 1, 1, 1)


def x_at_t_max(schedule: NoiseSchedule, eps: Tensor) -> Tensor:
    """Where sampling starts: x_T = sigma_T eps, which is eps itself where sigma_T = 1 (VP) and 80 eps for EDM's VE."""
    return schedule.sigma(time_like(eps, schedule.t_max)) * eps


def uniform_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """t_0 < ... < t_N, uniform in t from t_min to t_max, shape (N+1,) float64 (the grid t = i/N of Salimans & Ho)."""
    return torch.linspace(schedule.t_min, schedule.t_max, steps + 1, dtype=torch.float64)


def karras_times(schedule: NoiseSchedule, points: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Karras et al. (2022) eq. 5: `points` noise levels from `low` to `high`, ascending, as times of `schedule`.

    Shape (points,) float64. Levels outside the schedule's own range are moved to its ends.
    """
    ramp = torch.linspace(0, 1, points, dtype=torch.float64)
    levels = (low ** (1 / rho) + ramp * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    return schedule.t_of_lam(levels.log())


def ddim_step(schedule: NoiseSchedule, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM from t to s given the data prediction: alpha_s x_0 + sigma_s eps (Song et al. 2021, eq. 12 with eta = 0)."""
    eps = implied_eps(x_t, x_0, schedule.alpha(t), schedule.sigma(t))
    return schedule.alpha(s) * x_0 + schedule.sigma(s) * eps


def heun_step(schedule: NoiseSchedule, f: DenoiseFunction, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Heun in EDM's coordinates (Karras et al. 2022, algorithm 1): two evaluations of f.

    The second evaluation has weight (s^_t - s^_s) / (2 s^_s), so consecutive noise levels should be within a factor
    of about three (a Karras grid is; a coarse grid uniform in t is not).
    """
    level_t, level_s = schedule.noise_level(t).to(x_t.dtype), schedule.noise_level(s).to(x_t.dtype)
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    x_hat = x_t / alpha_t
    d_t = (x_hat - f(x_t, t)) / level_t
    x_euler = x_hat + (level_s - level_t) * d_t
    d_s = (x_euler - f(alpha_s * x_euler, s)) / level_s
    return alpha_s * (x_hat + (level_s - level_t) * (d_t + d_s) / 2)


def ddim(f: DenoiseFunction, schedule: NoiseSchedule, x_T: Tensor, times: Tensor) -> Tensor:
    """DDIM down the grid `times` (N+1 ascending values): N evaluations, the last of which is the returned x_0.

    The last step ends on the data prediction itself, as every step to sigma = 0 does.
    """
    x_t = x_T
    for k in range(len(times) - 1, 0, -1):
        t, s = time_like(x_t, times[k]), time_like(x_t, times[k - 1])
        x_0 = f(x_t, t)
        if k > 1:
            x_t = ddim_step(schedule, x_t, x_0, t, s)
    return x_0
