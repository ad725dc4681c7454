"""Moment matching distillation: a student of K ancestral steps, whose x_0 have the teacher's mean given any z_s.

Salimans, Mensink, Heek & Hoogeboom 2024, "Multistep Distillation of Diffusion Models via Moment Matching",
arXiv:2406.04103, algorithm 2 (alternating). We could not read the paper's text; the loss is as two reimplementations
have it. Even and odd steps have batches of their own:

    s = clock(u),  t = clock(min(1, u + d)),   u ~ U(0, 1),  d ~ U(0, 1/K);   t = t_max for K = 1
    z_t = alpha_t x_0 + sigma_t eps,   x = g_eta(z_t, t),   z_s ~ q(z_s given z_t, x_0 = x)    (the DDPM posterior)

    even:  L_phi = E w(s) ( |sg[x] - g_phi(z_s, s)|^2 + |g_theta(z_s, s) - g_phi(z_s, s)|^2 )
    odd:   L_eta = E w(s) x . sg[ g_phi(z_s, s) - g_theta(z_s, s) ],                 without gradient through z_s

The optimal g_phi is (E[x given z_s] + g_theta) / 2, so the gradient of L_eta moves x against the difference of the two
means, and is zero where E[x given z_s] = g_theta(z_s, s). The value of L_eta does not show progress. z_s must be drawn:
if it were DDIM's, it would tell z_t, and another moment would be matched.

| symbol  | meaning                                                                          | shape             |
|---------|----------------------------------------------------------------------------------|-------------------|
| u, d    | position on the clock: 0 is t_min, 1 is t_max; a step of at most 1/K             | (B,1,1,1) float64 |
| s, t    | times, s <= t                                                                    | (B,1,1,1) float64 |
| g_eta   | student, x_0 from z_t                                                            | (B,C,H,W)         |
| g_theta | teacher, E[x_0 given z_s, c], guided where c says so                             | (B,C,H,W)         |
| g_phi   | auxiliary network; all three start from the teacher's weights                    | (B,C,H,W)         |
| w       | weight of a time                                                                 | (B,1,1,1)         |
| c       | condition: class and guidance of the teacher                                     | of a batch        |

The clock is that of the cosine schedule, where arctan(sigma_t / alpha_t) is linear, whatever the teacher's schedule.
For K = 1 sampling starts from pure noise, and so does training: alpha_t = 0 on every schedule, so no real image is
read, and z_s ~ q(z_s given x_0 = x). The true z_t would stay in z_s and tell x; then x would be too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, NetworkConfig, Phase, Teacher, hookimpl, option
from distillbench.diffusion import SNR_WEIGHTS, ancestral, ancestral_step, mean_square, x_at_t_max
from distillbench.options import Among, Between, require_between, require_one_of

WEIGHTS = {"uniform": torch.ones_like, **SNR_WEIGHTS}  # of squared errors of x_0, from SNR


class MomentMatching(Method):
    name, label, title = "moment", "moment matching", "moment matching distillation"
    paper = "Salimans et al. 2024, arXiv:2406.04103"
    needs_data = True
    grid: Tensor

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam, of both networks", search=Between(3e-4, 1e-2, log=True))
        beta1: float = option(0.0, "Adam's first decay rate, as published", search=Among([0.0, 0.5, 0.9]))
        beta2: float = option(0.99, "Adam's second decay rate, as published", search=Among([0.9, 0.99, 0.999]))
        steps: int = option(4, "K, steps of the student (published: 1 to 8); 1 is data-free")
        weight: str = option(
            "uniform", f"w, from SNR: {', '.join(WEIGHTS)} (published: not found)", search=Among(WEIGHTS)
        )
        auxiliary: NetworkConfig = option(
            NetworkConfig(), "of the auxiliary network", search={"lr": Among([None, 3e-4, 1e-3, 3e-3, 1e-2])}
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            require_between(self, 1, float("inf"), "steps")
            require_one_of(self, "weight", WEIGHTS)

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self.auxiliary = teacher.trainable_copy()
        times = self.clock(torch.linspace(0, 1, config.steps + 1, dtype=torch.float64))
        self.register_buffer("grid", times, persistent=False)

    @classmethod
    def reads_data(cls, config: Config) -> bool:
        return config.steps > 1

    def phases(self) -> list[Phase]:
        return [Phase(cycle=2)]

    def clock(self, u: Tensor) -> Tensor:
        """The time at u in [0, 1], float64."""
        schedule = self.teacher.schedule
        low, high = torch.tensor(schedule.lam_range, dtype=torch.float64).exp().atan().tolist()
        return schedule.t_of_lam((low + u * (high - low)).tan().log())

    def start(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """z_t, t and s."""
        schedule, K = self.teacher.schedule, self.config.steps
        u = batch.uniform()
        if K == 1:
            t = self.clock(torch.ones_like(u))
            return x_at_t_max(schedule, batch.noise()), t, self.clock(u)
        t = self.clock((u + batch.uniform(0, 1 / K)).clamp(max=1))
        return schedule.noised(batch.x_0, t, batch.noise()), t, self.clock(u)

    @torch.no_grad()
    def at_s(self, z_t: Tensor, x: Tensor, z: Tensor, t: Tensor, s: Tensor, c: Condition) -> tuple[Tensor, Tensor]:
        """z_s from noise z, and g_theta(z_s, s)."""
        schedule = self.teacher.schedule
        z_s = schedule.noised(x, s, z) if self.config.steps == 1 else ancestral_step(schedule, z_t, x, z, t, s)
        return z_s, self.teacher.denoise(z_s, s, c)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        c, (z_t, t, s) = batch.c, self.start(batch)
        w = WEIGHTS[self.config.weight]((self.teacher.schedule.noise_level(s) ** -2).to(z_t))
        if batch.step % 2 == 0:
            with torch.no_grad():
                x = self.student(z_t, t, c)
            z_s, g_theta = self.at_s(z_t, x, batch.noise(), t, s, c)
            g_phi = self.auxiliary(z_s, s, c)
            yield self.auxiliary, mean_square(x, g_phi, w) + mean_square(g_theta, g_phi, w)
        else:
            x = self.student(z_t, t, c)
            z_s, g_theta = self.at_s(z_t, x, batch.noise(), t, s, c)
            with torch.no_grad():
                difference = self.auxiliary(z_s, s, c) - g_theta
            yield self.student, (w * x * difference).mean()

    def supports(self, nfe: int) -> bool:
        return nfe == self.config.steps

    def keeps_noise(self, nfe: int) -> bool:
        return False  # its steps are random

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        f = lambda z_t, t: self.student(z_t, t, c)
        return ancestral(f, self.teacher.schedule, x_at_t_max(self.teacher.schedule, noise(0)), self.grid, noise)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(MomentMatching)
