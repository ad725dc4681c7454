"""A denoiser of two times: of the noisy image, and of where on its trajectory the answer lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.embeddings import ScalarEmbedding
from distillbench.diffusion.schedules import NoiseSchedule

__all__ = ["TwoTimes"]


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
