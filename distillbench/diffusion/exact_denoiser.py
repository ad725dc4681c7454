"""The closed-form denoiser of a distribution, evaluated and counted like a network."""

from __future__ import annotations

from torch import Tensor, nn

from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.distributions import Distribution
from distillbench.diffusion.schedules import NoiseSchedule

__all__ = ["ExactDenoiser"]


class ClosedFormNetwork(nn.Module):
    """E[x_0 | x_t, component] of a distribution, on a schedule; it has no weights."""

    embedding_channels = 0

    def __init__(self, distribution: Distribution, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.distribution, self.schedule = distribution, schedule

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None, c: Condition) -> Tensor:
        t = time.view(-1, 1, 1, 1)
        return self.distribution.denoise(x, self.schedule.alpha(t), self.schedule.sigma(t), c.labels)


class ExactDenoiser(Denoiser):
    """The exact denoiser of a distribution. Its network takes the time in float64, as rounding is not exact."""

    def __init__(self, distribution: Distribution, schedule: NoiseSchedule) -> None:
        super().__init__(ClosedFormNetwork(distribution, schedule), schedule, "x0")

    def output(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL, embedding: Tensor | None = None) -> Tensor:
        return self.counted(x_t, t.flatten(), embedding, c)
