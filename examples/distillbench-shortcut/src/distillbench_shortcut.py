"""Shortcut models: one long step is trained to end where two steps of half its length do.

Frans, Hafner, Levine & Abbeel 2024, "One Step Diffusion via Shortcut Models", arXiv:2410.12557. The paper trains on
data; here the velocity is a teacher's, and steps have any length. The paper's time runs from noise to data; here, as
everywhere, t = 0 is data:

    x_t = (1 - t) x_0 + t eps
    x_s = x_t - (t - s) u(x_t, t, s)                                                   (a step from t to s)
    u(x_t, t, t) = v(x_t, t) = (x_t - f(x_t, t)) / t                                   (the shortest step: the teacher's)
    u(x_t, t, s) = [u(x_t, t, r) + u(x_r, r, s)] / 2,   r = (t + s)/2                  (a long step: two half steps)
    L = E | u(x_t, t, s) - target |^2,   target = v(x_t, t) for a share of images, which have s = t,
                                         and [u-(x_t, t, r) + u-(x_r, r, s)] / 2 for the others
    weights of u- <- mu weights of u- + (1 - mu) weights of u

| symbol  | meaning                                                                | shape      |
|---------|------------------------------------------------------------------------|------------|
| x_0     | real images                                                            | (B,C,H,W)  |
| eps     | standard normal noise                                                  | (B,C,H,W)  |
| t, r, s | times, s < r < t                                                       | (B,1,1,1)  |
| f, v    | teacher as a denoiser, and its velocity dx/dt                          | (B,C,H,W)  |
| u       | student: average velocity between t and s                              | (B,C,H,W)  |
| u-      | target: the same of averaged weights, without gradient                 | (B,C,H,W)  |
| mu      | decay of this average                                                  | float      |
| c       | condition: class and guidance of the teacher                           | of a batch |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from distillbench import Batch, Condition, Method, MethodConfig, Teacher, UserError, hookimpl, option
from distillbench.diffusion import mean_square, time_like, x_at_t_max
from distillbench.networks import MovingAverage, TwoTimes
from distillbench.options import Between, require_fraction, require_one_of
from torch import Tensor, nn


class Shortcut(Method):
    name = "shortcut"
    paper = "Frans et al. 2024, arXiv:2410.12557"
    needs_data = True
    can_start_fresh = True

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam")
        schedule: str = option("flow_matching", "the method is defined on flow_matching, and on no other schedule")
        shortest: float = option(0.25, "share of a batch with s = t (released: 7/8)", search=Between(0.1, 0.9))
        mu: float = option(0.95, "decay of the target's average (released: .999)")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "schedule", ("flow_matching",))
            require_fraction(self, "shortest", "mu")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        denoiser = teacher.student()
        if denoiser.prediction == "eps":
            raise UserError("shortcut: eps does not give a velocity at t_max (1/alpha); take an x0 or v teacher")
        self.student = TwoTimes(denoiser)
        self.target = copy.deepcopy(self.student).requires_grad_(False)
        self.following = MovingAverage(self.target, self.student)

    def u(self, network: nn.Module, x_t: Tensor, t: Tensor, s: Tensor, c: Condition) -> Tensor:
        """(x_t - network) / t: the network predicts where the straight line along u would end, at t = 0."""
        return (x_t - network(x_t, t, s, c)) / t.to(x_t)

    @torch.no_grad()
    def two_halves(self, x_t: Tensor, t: Tensor, s: Tensor, c: Condition) -> Tensor:
        """The average velocity of two steps of the target, from t to r and from r to s."""
        r = (t + s) / 2
        first = self.u(self.target, x_t, t, r, c)
        x_r = x_t - (t - r).to(x_t) * first
        return (first + self.u(self.target, x_r, r, s, c)) / 2

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        schedule, c = self.teacher.schedule, batch.c
        t = batch.uniform(schedule.t_min, schedule.t_max)
        s = schedule.t_min + batch.uniform() * (t - schedule.t_min)
        s = torch.where(batch.uniform() < self.config.shortest, t, s)
        x_t = schedule.noised(batch.x_0, t, batch.noise())
        with torch.no_grad():
            v = (x_t - self.teacher.denoise(x_t, t, c)) / t.to(x_t)
        target = torch.where(s < t, self.two_halves(x_t, t, s, c), v)
        yield self.student, mean_square(self.u(self.student, x_t, t, s, c), target)

    def after_step(self) -> None:
        self.following.move(1 - self.config.mu)

    def supports(self, nfe: int) -> bool:
        return nfe >= 1

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        schedule = self.teacher.schedule
        x = x_at_t_max(schedule, noise(0))
        times = torch.linspace(schedule.t_max, schedule.t_min, nfe + 1, dtype=torch.float64).tolist()
        for t, s in pairwise(times):
            x = x - (t - s) * self.u(self.student, x, time_like(x, t), time_like(x, s), c)
        return x


@hookimpl(api=2)
def register_methods(register) -> None:
    register(Shortcut)
