"""Small methods whose steps differ: a DMD2 with a ratio across steps, a CTM with random solver steps, one in groups."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, Phase, hookimpl, option
from distillbench.diffusion import ddim, rollout, time_like, uniform_times, x_at_t_max
from distillbench.registry import Registry, Source, installed, load_registry


class Dmd2(Method):
    """DMD2 without the GAN: two steps, trained on the student's own chain; the fake score has 4 of 5 updates.

    grad = (D_fake(x_r) - D(x_r)) / mean |x - D(x_r)|,   L_student = 1/2 |x - sg[x - grad]|^2,   x = G(x_t, t)
    """

    name, paper, needs_data, inputs = "dmd2_toy", "Yin et al. 2024, arXiv:2405.14867", False, "rollout"

    @dataclass
    class Config(MethodConfig):
        ratio: int = option(5, "steps of a cycle, the last of which trains the generator")

    def __init__(self, config: Config, teacher) -> None:
        super().__init__(config, teacher)
        self.fake = teacher.trainable_copy()
        self.register_buffer("times", uniform_times(teacher.schedule, 2)[1:], persistent=False)

    def phases(self) -> list[Phase]:
        return [Phase(cycle=self.config.ratio)]

    def G(self, batch: Batch, c: Condition) -> Tensor:
        f = lambda x_t, t: self.student(x_t, t, c)
        k = batch.integers(0, len(self.times))
        return f(*rollout(f, self.teacher.schedule, self.times, batch.noise, k))

    def noised(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        schedule, r = self.teacher.schedule, batch.uniform(0.02, 0.98)
        return schedule.alpha(r) * x + schedule.sigma(r) * batch.noise(), r

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        c = batch.c
        if batch.step % self.config.ratio != self.config.ratio - 1:
            with torch.no_grad():
                x = self.G(batch, c)
            yield self.fake, (self.fake(*self.noised(x, batch), c) - x).square().mean()
            return
        x = self.G(batch, c)
        with torch.no_grad():
            x_r, r = self.noised(x, batch)
            real, fake = self.teacher.denoise(x_r, r, c), self.fake(x_r, r, c)
            grad = (fake - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True)
            target = x - grad
        yield self.student, 0.5 * (x - target).square().mean()

    def supports(self, nfe: int) -> bool:
        return nfe == 2

    def keeps_noise(self, nfe: int) -> bool:
        return False

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        schedule, last = self.teacher.schedule, self.times[0].item()
        x_0 = self.student(x_at_t_max(schedule, noise(0)), time_like(noise(0), schedule.t_max), c)
        t = time_like(x_0, last)
        return self.student(schedule.alpha(t) * x_0 + schedule.sigma(t) * noise(1), t, c)


class Ctm(Method):
    """A regression on the teacher's n-step sample, where each step draws n for all its images, as CTM does."""

    name, paper, needs_data, Config = "ctm_toy", "Kim et al. 2023, arXiv:2310.02279", False, MethodConfig
    most = 6  # CTM: 17

    def phases(self) -> list[Phase]:
        return [Phase(cost_varies=True)]

    def g(self, eps: Tensor, c: Condition) -> Tensor:
        schedule = self.teacher.schedule
        return self.student(x_at_t_max(schedule, eps), time_like(eps, schedule.t_max), c)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        eps, c, schedule = batch.noise(), batch.c, self.teacher.schedule
        times = uniform_times(schedule, batch.one_integer(1, self.most + 1))
        with torch.no_grad():
            x_0 = ddim(lambda x_t, t: self.teacher.denoise(x_t, t, c), schedule, x_at_t_max(schedule, eps), times)
        yield self.student, (self.g(eps, c) - x_0).square().mean()

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        return self.g(noise(0), c)


class Groups(Ctm):
    """An unbiased MMD^2 with a Gaussian kernel, within groups of M neighbours, as in IMM."""

    name, paper = "groups_toy", "Zhou et al. 2025, arXiv:2503.07565"

    @dataclass
    class Config(MethodConfig):
        M: int = option(4, "images of a group")

    @property
    def group_size(self) -> int:
        return self.config.M

    def phases(self) -> list[Phase]:
        return [Phase()]

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        c, schedule = batch.c, self.teacher.schedule
        y, eps = self.g(batch.noise(), c), batch.noise()
        with torch.no_grad():
            times = uniform_times(schedule, 2)
            z = ddim(lambda x_t, t: self.teacher.denoise(x_t, t, c), schedule, x_at_t_max(schedule, eps), times)
        y, z = (x.flatten(1).unflatten(0, (-1, self.config.M)) for x in (y, z))
        different = 1 - torch.eye(self.config.M, device=y.device)
        kernel = lambda a, b: (-(a[:, :, None] - b[:, None]).square().mean(dim=3)).exp()
        pairs = kernel(y, y) + kernel(z, z) - 2 * kernel(y, z)
        yield self.student, (different * pairs).sum(dim=(1, 2)).mean() / (self.config.M * (self.config.M - 1))

    def keeps_noise(self, nfe: int) -> bool:
        return False


@hookimpl(api=2)
def register_methods(register: Callable[[type], None]) -> None:
    for cls in (Dmd2, Ctm, Groups):
        register(cls)


def registry() -> Registry:
    """The built-in plugins, and these methods."""
    return load_registry([*installed(), Source("stepwise", "stepwise", "1", lambda: sys.modules[__name__])])
