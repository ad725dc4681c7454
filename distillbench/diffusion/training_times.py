"""Distributions of the times on which networks are trained, as functions of uniform draws.

| symbol | meaning                                                   | shape             |
|--------|-----------------------------------------------------------|-------------------|
| u      | draws, uniform in [0, 1) (``batch.uniform()``)            | (B,1,1,1) float64 |
| t      | time for each image                                       | (B,1,1,1) float64 |
| tau    | noise level sigma_t / alpha_t (EDM's sigma), lam = ln tau | (B,1,1,1) float64 |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillbench.diffusion.schedules import NoiseSchedule

__all__ = ["karras_time", "lognormal_time"]

SMALLEST = 1e-12  # of u and 1 - u, so that the normal quantile is finite


def lognormal_time(schedule: NoiseSchedule, u: Tensor, p_mean: float, p_std: float) -> Tensor:
    """t with ln tau ~ N(p_mean, p_std^2), clamped to the schedule's range (Karras et al. 2022, arXiv:2206.00364)."""
    return schedule.t_of_lam(p_mean + p_std * torch.special.ndtri(u.clamp(SMALLEST, 1 - SMALLEST)))


def karras_time(schedule: NoiseSchedule, u: Tensor, low: float, high: float, rho: float = 7.0) -> Tensor:
    """t with tau^(1/rho) uniform from `low`^(1/rho) to `high`^(1/rho).

    It is Karras et al.'s grid (2022, eq. 5) with infinitely many levels; u = 0 gives `low`, u = 1 `high`. Both are
    first moved into the schedule's range, so that no times pile up at its ends.
    """
    ends = [math.exp(lam) for lam in schedule.lam_range]
    first, last = max(low, ends[0]) ** (1 / rho), min(high, ends[1]) ** (1 / rho)
    return schedule.t_of_lam(rho * torch.log(first + u.double() * (last - first)))
