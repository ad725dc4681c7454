"""The closed-form denoiser of a distribution (:mod:`distillbench.laws`), evaluated and counted like a network."""

from __future__ import annotations

from torch import Tensor, nn

from distillbench.conditions import UNCONDITIONAL, Condition
from distillbench.denoiser import Denoiser
from distillbench.laws import Law
from distillbench.schedules import NoiseSchedule

__all__ = ["ExactDenoiser"]


class LawNetwork(nn.Module):
    """E[x_0 | x_t, component] of a distribution, on a schedule; it has no weights."""

    embedding_channels = 0

    def __init__(self, law: Law, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.law, self.schedule = law, schedule

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None, c: Condition) -> Tensor:
        t = time.view(-1, 1, 1, 1)
        return self.law.denoise(x, self.schedule.alpha(t), self.schedule.sigma(t), c.labels)


class ExactDenoiser(Denoiser):
    """The exact denoiser of a distribution. Its network takes the time in float64, as rounding is not exact."""

    def __init__(self, law: Law, schedule: NoiseSchedule) -> None:
        super().__init__(LawNetwork(law, schedule), schedule, "x0")

    def output(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL, embedding: Tensor | None = None) -> Tensor:
        return self.counted(x_t, t.flatten(), embedding, c)
