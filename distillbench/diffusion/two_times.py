"""Networks of two times: of the noisy image, and of where on its trajectory the answer lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.embeddings import ScalarEmbedding
from distillbench.diffusion.samplers import time_like, x_at_top
from distillbench.diffusion.schedules import NoiseSchedule

__all__ = ["TwoTimes", "gamma_sampling"]


class TwoTimes(nn.Module):
    """f(x_t, t, s, c): a network with an embedding of a second time s, added to its embedding of time.

    The embedding starts at zero, so at first f(x_t, t, s, c) = `denoiser`(x_t, t, c) for every s. It works with every
    network that a :class:`~distillbench.diffusion.denoiser.Denoiser` has: the package's own, EDM's and diffusers'.

    s is embedded as (s - t_min) / (t_max - t_min), or with `in_lambda` as the same of lam(s), which tells small noise
    levels apart on every schedule.
    """

    def __init__(self, denoiser: Denoiser, in_lambda: bool = False) -> None:
        super().__init__()
        self.denoiser, self.in_lambda = denoiser, in_lambda
        schedule = denoiser.schedule
        ends = schedule.lam_range if in_lambda else (schedule.t_min, schedule.t_max)
        self.target_time = ScalarEmbedding(denoiser.embedding_channels, *ends)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        """(B,C,H,W), for x_t (B,C,H,W) and times t and s (B,1,1,1)."""
        return self.denoiser(x_t, t, c, self._embedding(s))

    def features(
        self,
        names: Sequence[str],
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        c: Condition = UNCONDITIONAL,
        f_gradient: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """f(x_t, t, s, c), and features of the network: see ``Denoiser.features``."""
        return self.denoiser.features(names, x_t, t, c, self._embedding(s), f_gradient)

    def _embedding(self, s: Tensor) -> Tensor:
        """Of the second time: (B, embedding_channels)."""
        return cast(Tensor, self.target_time(self.schedule.lam(s) if self.in_lambda else s))


def gamma_sampling(
    G: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    grid: Tensor,
    noise: Callable[[int], Tensor],
    nfe: int,
    gamma: float = 0.0,
) -> Tensor:
    """x^ at the lowest level e of the ascending `grid` (N,), by `nfe` jumps G(x_t, t, s) -> x_s; (B,C,H,W).

    The levels are spread evenly over the grid's indices. With gamma = 0 every jump ends on the next of them: that
    follows the trajectory of noise(0). Otherwise it ends below, at tau_s = e + sqrt(1 - gamma^2) (tau - e), and noise
    of variance tau^2 - tau_s^2 is added. With gamma = 1 all jumps end at e, as those of consistency models do (Kim et
    al. 2023, arXiv:2310.02279, gamma sampling as released).
    """
    levels = grid[torch.linspace(len(grid) - 1, 0, nfe + 1).round().long().to(grid.device)]
    x, x_t, t = noise(0), x_at_top(schedule, noise(0), grid), time_like(noise(0), levels[0])
    e = schedule.noise_level(levels[-1])
    for k in range(1, nfe + 1):
        after = time_like(x, levels[k])
        tau = schedule.noise_level(after)
        s = schedule.t_of_lam((e + math.sqrt(1 - gamma**2) * (tau - e)).log()) if gamma else after
        x = G(x_t, t, s) / schedule.alpha(s)
        if gamma and k < nfe:
            x = x + (tau**2 - schedule.noise_level(s) ** 2).clamp(min=0).sqrt().to(x.dtype) * noise(k)
        x_t, t = schedule.alpha(after) * x, after
    return x
