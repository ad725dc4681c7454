"""Pairs of times for consistency training: how they are distributed, and how they draw closer in training.

On a grid, t and s are neighbours; in continuous time, s follows from t. n is the number of steps of the grid:

    grid:        t = t_{j+1}, s = t_j;   P(j) = Phi_{j+1} - Phi_j,   Phi_j = Phi((ln tau_j - p_mean) / p_std)
    continuous:  tau_s = tau_t max(0, 1 - (1 + k sigmoid(-b tau_t)) / n),   in place of n a power q^a, a = 1, 2, ...

At tau_s = 0 a trajectory is at its end: there the target is x_0, or a teacher's prediction of it.

| symbol | meaning                                                                  | shape             |
|--------|--------------------------------------------------------------------------|-------------------|
| t, s   | times of a pair, s < t                                                   | (B,1,1,1) float64 |
| tau    | noise level sigma_t / alpha_t                                            | (B,1,1,1) float64 |
| k, b   | pairs far below tau = 1/b are farther apart, by a factor of 1 + k/2      | float             |
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distillbench.diffusion.schedules import NoiseSchedule
from distillbench.diffusion.training_times import lognormal_time
from distillbench.errors import UserError

__all__ = ["CURRICULA", "GRID_LEVELS", "continuous_pair", "inverse_length"]


def _doubling(s0: int, s1: int) -> list[tuple[int, float]]:
    """n = min(s0 2^i, s1) in stage i, each 1 / (log2 [s1/s0] + 1) of training, the last the rest (arXiv:2310.14189)."""
    length = math.log2(s1 // s0) + 1
    return [(min(s0 * 2**i, s1), min(1.0, length - i)) for i in range(math.ceil(length))]


def _square_root(s0: int, s1: int) -> list[tuple[int, float]]:
    """n = ceil(y - 1), y^2 = p ((s1 + 1)^2 - s0^2) + s0^2 at progress p, so n < y <= n + 1 lasts 2n + 1 parts
    (Song et al. 2023, arXiv:2303.01469)."""
    return [(n, 2 * n + 1) for n in range(s0, s1 + 1)]


# The stages of n from s0 to s1: n, and how long it lasts relative to the others.
CURRICULA: dict[str, Callable[[int, int], list[tuple[int, float]]]] = {"doubling": _doubling, "sqrt": _square_root}


def _uniform(schedule: NoiseSchedule, grid: Tensor, p_mean: float, p_std: float) -> Tensor:
    n = len(grid) - 1
    return torch.arange(1, n + 1, dtype=torch.float64, device=grid.device) / n


def _lognormal(schedule: NoiseSchedule, grid: Tensor, p_mean: float, p_std: float) -> Tensor:
    """Song & Dhariwal 2023, arXiv:2310.14189, section 3.5. Raises UserError if no step of the grid has any weight."""
    total = torch.special.ndtr((schedule.lam(grid) - p_mean) / p_std).diff().cumsum(0)
    if not total[-1] > 0:
        raise UserError("the log-normal of p_mean and p_std gives no weight to levels from sigma_min to sigma_max")
    return total / total[-1]


# P(0) + ... + P(j) for the ascending times of a grid, (n+1,): (n,) float64, the last is 1.
GRID_LEVELS: dict[str, Callable[[NoiseSchedule, Tensor, float, float], Tensor]] = {
    "uniform": _uniform,
    "lognormal": _lognormal,
}


def continuous_pair(
    schedule: NoiseSchedule, u: Tensor, n: float, p_mean: float, p_std: float, k: float = 8.0, b: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """t, s and tau_s in continuous time, (B,1,1,1) float64, for uniform u (Geng et al. 2024, arXiv:2406.14548).

    ln tau_t is normal, clamped to the schedule's range. A tau_s below that range counts as 0, with s at t_min.
    """
    t = lognormal_time(schedule, u, p_mean, p_std)
    tau_t = schedule.noise_level(t)
    tau_s = tau_t * (1 - (1 + k * torch.sigmoid(-b * tau_t)) / n)
    tau_s = torch.where(tau_s < math.exp(schedule.lam_range[0]), 0.0, tau_s)
    return t, schedule.t_of_lam(tau_s.log()), tau_s


def inverse_length(tau_t: Tensor, tau_s: Tensor) -> Tensor:
    """1 / (tau_t - tau_s), (B,1,1,1) in the default dtype: the weight of a pair."""
    return 1 / (tau_t - tau_s).to(torch.get_default_dtype())
