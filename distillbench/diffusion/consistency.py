"""Shared parts of consistency models: the boundary-exact function, segments, weights, samplers.

Song, Dhariwal, Chen & Sutskever 2023, arXiv:2303.01469. Noise levels are EDM's, tau = sigma_t / alpha_t, so it works on
any schedule: x^ = x_t / alpha_t = x_0 + tau eps.

    F(x_t, t, c) = c_skip(tau) x^ + c_out(tau) NN,   c_skip = sd^2 / ((tau - e)^2 + sd^2),
                                                     c_out  = (tau - e) sd / sqrt(tau^2 + sd^2)       (eq. 5 and app. C)

NN is computed from the denoiser D = k_skip x^ + k_out NN, with EDM's k_skip and k_out, so any parameterisation works:
F = (c_skip - (1 - e/tau) k_skip) x^ + (1 - e/tau) D. For an EDM network this equals the paper's F. For e = 0, F is D.

With K segments (Heek et al. 2024, arXiv:2403.06807; Wang et al. 2024, arXiv:2405.18407) each part of the trajectory is
mapped to its own start, by one DDIM step of the student's own prediction. From t to t it is the identity:

    F(x_t, t, c, e_j) = r x_t + (alpha_j - r alpha_t) D,   r = sigma_j / sigma_t,   e_j < t <= e_(j+1)

| symbol         | meaning                                          | shape     |
|----------------|--------------------------------------------------|-----------|
| e, sd          | smallest noise level, standard deviation of x_0  | float     |
| e_0, ..., e_K  | edges of the segments, times of the grid         | (K+1,)    |
| tau            | noise level sigma_t / alpha_t                    | (B,1,1,1) |
| D              | student as a denoiser                            | (B,C,H,W) |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.diffusion.consistency_times import inverse_length
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.samplers import ddim_step, time_like, x_at_top
from distillbench.diffusion.schedules import NoiseSchedule

__all__ = [
    "STEP_WEIGHTS", "ConsistencyFunction", "multistep", "segment_edges", "segment_start", "segmentwise",
]  # fmt: skip


class ConsistencyFunction(nn.Module):
    """F(x_t, t, c), with F = x^ exactly at tau = e; F(x_t, t, c, end), with F = x_t exactly at t = end. (B,C,H,W)."""

    def __init__(self, denoiser: Denoiser, e: float, sd: float) -> None:
        super().__init__()
        self.denoiser, self.e, self.sd = denoiser, e, sd

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL, end: Tensor | None = None) -> Tensor:
        D = self.denoiser(x_t, t, c)
        if end is not None:
            return ddim_step(self.schedule, x_t, D, t, end)
        skip, ratio = self.coefficients(t, x_t.dtype)
        return torch.addcmul(skip * x_t, ratio, D)

    def coefficients(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors of x_t and of the denoiser's output, (B,1,1,1)."""
        e, sd, schedule = self.e, self.sd, self.schedule
        tau = schedule.noise_level(t)  # float64: at tau = 80 the two terms nearly cancel
        c_skip, k_skip, ratio = sd**2 / ((tau - e) ** 2 + sd**2), sd**2 / (tau**2 + sd**2), 1 - e / tau
        return (c_skip - ratio * k_skip).to(dtype) / schedule.alpha(t), ratio.to(dtype)


def segment_edges(grid: Tensor, segments: int) -> Tensor:
    """e_0 < ... < e_K, (K+1,): K segments of an ascending `grid` of N+1 times, at its indices floor(j N / K)."""
    return grid[torch.arange(segments + 1, device=grid.device) * (len(grid) - 1) // segments]


def segment_start(edges: Tensor, t: Tensor) -> Tensor:
    """e_j with e_j < t <= e_(j+1), for times above e_0; shape of t."""
    return edges[torch.searchsorted(edges, t) - 1]


def inverse_step(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
    """1 / (tau_t - tau_s), (B,1,1,1) (Song & Dhariwal 2023, arXiv:2310.14189)."""
    return inverse_length(schedule.noise_level(t), schedule.noise_level(s))


# lambda, the weight of a step from t to s.
STEP_WEIGHTS: dict[str, Callable[[NoiseSchedule, Tensor, Tensor], Tensor | float]] = {
    "uniform": lambda schedule, t, s: 1.0,
    "inv_step": inverse_step,
}


def multistep(
    F: ConsistencyFunction, grid: Tensor, noise: Callable[[int], Tensor], nfe: int, c: Condition = UNCONDITIONAL
) -> Tensor:
    """Algorithm 1: jump to the end, noise again to a lower level of the ascending `grid` (N,), jump again.

    The levels are spread evenly over the grid's indices. F still contains noise of variance e^2, so noise of variance
    tau^2 - e^2 is added to it. Shape (B,C,H,W).
    """
    schedule = F.schedule
    levels = torch.linspace(len(grid) - 1, 0, nfe + 1)[:-1].round().long()
    T = time_like(noise(0), grid[-1])
    x = F(schedule.sigma(T) * noise(0), T, c)
    for k in range(1, nfe):
        t = time_like(x, grid[levels[k]])
        tau = schedule.noise_level(t).to(x.dtype)
        x = F(schedule.alpha(t) * (x + (tau**2 - F.e**2).sqrt() * noise(k)), t, c)
    return x


def segmentwise(F: ConsistencyFunction, edges: Tensor, eps: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
    """K evaluations from sigma_T eps at T = e_K: from each edge to the next below, without fresh noise.

    Returns x^ = x / alpha at e_0, (B,C,H,W).
    """
    schedule, x, t = F.schedule, x_at_top(F.schedule, eps, edges), time_like(eps, edges[-1])
    for k in range(len(edges) - 2, -1, -1):
        end = time_like(eps, edges[k])
        x, t = F(x, t, c, end), end
    return x / schedule.alpha(t)
