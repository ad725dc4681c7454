"""A method that trains by the derivative along the teacher's ODE: continuous-time consistency distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, option
from distillbench.diffusion import derivative, tangent, time_like, x_at_t_max


class ContinuousTime(Method):
    """The student f is constant along the ODE: L = |f - sg(f - df)|^2, whose gradient is that of 2 f df.

    Song et al. 2023, arXiv:2303.01469, theorem 5, at distance |.|^2 and with lam = log(sigma / alpha) as the time.
    """

    name, paper, needs_data = "continuous_time", "Song et al. 2023, arXiv:2303.01469", False

    @dataclass
    class Config(MethodConfig):
        exact: bool = option(False, "the derivative is a forward-mode product, not a difference")

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        schedule, c, t = self.teacher.schedule, batch.c, batch.uniform(0.1, 0.9)
        x_t = schedule.alpha(t) * 0.5 * batch.noise() + schedule.sigma(t) * batch.noise()
        along = tangent(schedule, x_t, t, self.teacher.denoise(x_t, t, c))
        f, df = derivative(self.student, (x_t, t), along, c, exact=self.config.exact)
        yield self.student, (f - (f - df).detach()).square().mean()

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        schedule, eps = self.teacher.schedule, noise(0)
        return self.student(x_at_t_max(schedule, eps), time_like(eps, schedule.t_max), c)
