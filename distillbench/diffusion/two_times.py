"""Networks of two times: of the noisy image, and of where on its trajectory the answer lies."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.embeddings import ScalarEmbedding, TimedNetwork
from distillbench.diffusion.samplers import time_like, x_at_top
from distillbench.diffusion.schedules import NoiseSchedule
from distillbench.errors import UserError, unknown

__all__ = ["TwoTimes", "gamma_sampling"]


EMBEDDED = ("s", "network", "difference")


class TwoTimes(nn.Module):
    """f(x_t, t, s, c): a network with an embedding of a second time s, added to its embedding of time.

    The embedding starts at zero, so at first f(x_t, t, s, c) = `denoiser`(x_t, t, c) for every s. It works with every
    network that a :class:`~distillbench.diffusion.denoiser.Denoiser` has: the package's own, EDM's and diffusers'.

    `embeds` says of what:

    - "s": of (s - t_min) / (t_max - t_min), or with `in_lambda` the same of lam(s), which tells small noise levels
      apart on every schedule, by sines of frequencies from 1 to 1000;
    - "network": of s as the network sees time, by copies of its own features: those of ln(s) / 4 for EDM's networks;
    - "difference": of t - s, by the same features. Their frequencies are those of the network (at most 1 in EDM's
      DDPM++ and ADM), so the derivative in t is as smooth as the network's own.

    Raises UserError for another `embeds`, and for a network whose features of time are not known.
    """

    def __init__(self, denoiser: Denoiser, in_lambda: bool = False, embeds: str = "s") -> None:
        super().__init__()
        if embeds not in EMBEDDED:
            raise unknown("embedding of a second time", embeds, EMBEDDED)
        self.denoiser, self.in_lambda, self.embeds = denoiser, in_lambda, embeds
        self.target_time: nn.Module
        if embeds == "s":
            schedule = denoiser.schedule
            ends = schedule.lam_range if in_lambda else (schedule.t_min, schedule.t_max)
            self.target_time = ScalarEmbedding(denoiser.embedding_channels, *ends)
        else:
            self.target_time = NetworkTimeEmbedding(denoiser, embeds)

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        """(B,C,H,W), for x_t (B,C,H,W) and times t and s (B,1,1,1)."""
        return self.denoiser(x_t, t, c, self._embedding(t, s))

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
        return self.denoiser.features(names, x_t, t, c, self._embedding(t, s), f_gradient)

    def _embedding(self, t: Tensor, s: Tensor) -> Tensor:
        """Of the second time: (B, embedding_channels)."""
        if self.embeds == "difference":
            return cast(Tensor, self.target_time((t - s).flatten()))
        if self.embeds == "network":
            return cast(Tensor, self.target_time(self.denoiser.network_time(s.clamp(min=self.schedule.t_min))))
        return cast(Tensor, self.target_time(self.schedule.lam(s) if self.in_lambda else s))


class NetworkTimeEmbedding(nn.Sequential):
    """Of a time as a network is given it, (B,) -> (B, channels): two layers on copies of the network's own features.

    It is zero until it is trained. Raises UserError if the features are not known, or if they are of the logarithm and
    it `embeds` a difference, which may be 0.
    """

    def __init__(self, denoiser: Denoiser, embeds: str) -> None:
        network, channels = denoiser.network, denoiser.embedding_channels
        if not isinstance(network, TimedNetwork):
            raise UserError(
                f"the features of time of a {type(network).__name__} are not known, so no second time can be embedded "
                f"by them (embeds={embeds}). Possible: embeds=s"
            )
        placed = network.time_features()
        if placed.logarithmic and embeds == "difference":
            raise UserError(
                f"a {type(network).__name__} sees the logarithm of its time, and t - s may be 0: embeds=difference is "
                "not possible. Possible: s, network"
            )
        features = copy.deepcopy(placed.owners[0].get_submodule(placed.name))
        device = next(network.parameters()).device
        width = features(torch.ones(1, device=device)).shape[-1]
        output = nn.Linear(channels, channels)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        super().__init__(features, nn.Linear(width, channels), nn.SiLU(), output)
        self.argument = placed.argument

    def forward(self, time: Tensor) -> Tensor:
        features, *layers = self
        e = features(self.argument(time)).to(layers[0].weight.dtype)
        for layer in layers:
            e = layer(e)
        return cast(Tensor, e)


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
