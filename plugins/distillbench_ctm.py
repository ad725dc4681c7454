"""CTM: from any time of a teacher's trajectory, a student jumps to any earlier one.

Kim et al. 2023, arXiv:2310.02279, as released, but without the adversarial loss. Noise levels tau = sigma_t / alpha_t
and x^ = x_t / alpha_t = x_0 + tau eps are EDM's; d compares x^, with one dropout mask. A gradient passes through G-.

    G(x_t, t, s)^ = tau_s / tau_t x^ + (1 - tau_s / tau_t) g(x_t, t, s),    so that G(x_t, t, t) = x_t
    x_u = n steps of Heun with the teacher, t -> u,    P(n) ~ n, one n for all images
    L   = d( G-(G(x_t, t, s), s, e), G-(sg[G](x_u, u, s), s, e) ),    e <= s <= u < t        (compare = soft)
    L   = d( G(x_t, t, s), G-(x_u, u, s) )                                                   (compare = local)
    L  += w (1 / tau^2 + 1 / sd^2) |g(x_t, t, t) - x_0|^2,    since g(x_t, t, t) = E[x_0 given x_t]
    weights of g- <- mu weights of g- + (1 - mu) weights of g

| symbol     | meaning                                                                            | shape     |
|------------|------------------------------------------------------------------------------------|-----------|
| t, u, s, e | times of a grid of N noise levels; e is the lowest                                 | (B,1,1,1) |
| g, g-      | student: the teacher's network with an embedding of s, zero at first; its target   | (B,C,H,W) |
| G, G-      | x_s on the trajectory through x_t: DDIM's step with the data prediction g or g-    | (B,C,H,W) |
| c, w, sd   | condition; weight (adaptive: times the ratio of two gradients' norms); EDM's .5    |           |
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, MultistepMethod, Phase, Teacher, Workspace, hookimpl, option
from distillbench.diffusion import (
    DISTANCE_NAMES,
    check_heun,
    ddim_step,
    denoising_weight,
    gamma_sampling,
    gradient_ratio,
    heun_step,
    karras_time,
    karras_times,
    lognormal_time,
    mean_square,
    one_mask,
    with_gradient_of,
)
from distillbench.networks import MovingAverage, TwoTimes, frozen_weights
from distillbench.options import Among, Between, require_between, require_fraction, require_one_of, require_positive


class ConsistencyTrajectory(MultistepMethod):
    name, label, paper, needs_data = "ctm", "CTM", "Kim et al. 2023, arXiv:2310.02279", True
    student: TwoTimes

    @dataclass
    class Config(MultistepMethod.Config):
        lr: float = option(1e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        steps: int = option(18, "N, noise levels of the grid (the paper: 18, 40)", search=Between(17, 40, log=True))
        solver_steps: int = option(5, "largest n (the paper: N - 1, any level to the lowest)", search=Between(1, 5))
        compare: str = option("soft", "at the lowest level (soft) or at s (local)", search=Among(["soft", "local"]))
        metric: str = option("l2", f"d: {', '.join(DISTANCE_NAMES)}", search=Among(["l2", "pseudo_huber"]))
        mu: float = option(0.95, "decay of the target (released: .999); 0: student", search=Among([0.9, 0.95, 0.999]))
        denoising: float = option(0.1, "w, weight of denoising; 0: none", search=Between(0.01, 1.0, log=True))
        adaptive: bool = option(False, "w times the ratio of both losses' gradients in the last layer (the paper)")
        gamma: float = option(0.0, "noise of several steps, 0 (ODE) to 1 (CM)", sampling=True, search=Between(0.0, 1.0))
        embeds: str = option("s", "embedding of s: s (of lam), network (released: of ln(s)/4 on EDM) or difference")
        sigma_min: float = option(0.002, "smallest noise level")
        sigma_max: float = option(80.0, "largest noise level")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "sigma_min", "sigma_max")
            require_between(self, 2, float("inf"), "steps")
            require_between(self, 1, self.steps - 1, "solver_steps")
            require_between(self, 0, float("inf"), "denoising")
            require_between(self, 0, 1, "gamma")
            require_fraction(self, "mu")  # with 1 the target network would never learn
            require_one_of(self, "compare", ("soft", "local"))
            require_one_of(self, "metric", DISTANCE_NAMES)

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        levels = karras_times(teacher.schedule, config.steps, config.sigma_min, config.sigma_max)
        self.register_buffer("grid", levels, persistent=False)
        self.student = TwoTimes(teacher.student(), in_lambda=True, embeds=config.embeds)
        self.target = copy.deepcopy(self.student).requires_grad_(False) if config.mu else self.student
        self.following = MovingAverage(self.target, self.student)
        self.w = 0 if teacher.conditioning.guided else config.denoising  # a guided g(x_t, t, t) is no mean of x_0

    def phases(self) -> list[Phase]:
        return [Phase(cost_varies=True)]

    def prepare(self, workspace: Workspace) -> None:
        check_heun(self.teacher.schedule, self.grid)

    def G(self, g: nn.Module, x_t: Tensor, t: Tensor, s: Tensor, c: Condition) -> Tensor:
        return ddim_step(self.teacher.schedule, x_t, g(x_t, t, s, c), t, s)

    def draw_n(self, batch: Batch) -> int:
        k = batch.one_integer(0, self.config.solver_steps * (self.config.solver_steps + 1) // 2)
        return (math.isqrt(8 * k + 1) + 1) // 2  # P(n) ~ n: 1 for k = 0, 2 for the next two, 3 for the next three

    def consistency_loss(self, batch: Batch) -> Tensor:
        schedule, grid, c, n = self.teacher.schedule, self.grid, batch.c, self.draw_n(batch)
        t, u, s = grid[k := batch.integers(n, len(grid))], grid[k - n], grid[(batch.uniform() * (k - n + 1)).long()]
        x_t = x_u = schedule.noised(batch.x_0, t, batch.noise())
        soft, d = self.config.compare == "soft", self.distances[self.config.metric]
        end = grid[torch.zeros_like(k)] if soft else s
        with one_mask(self.student, self.target):
            with torch.no_grad():
                for i in range(n):
                    x_u = heun_step(schedule, partial(self.teacher.denoise, c=c), x_u, grid[k - i], grid[k - i - 1])
                b = self.G(self.student if soft else self.target, x_u, u, s, c)
            x_s = self.G(self.student, x_t, t, s, c)
            a = cut = x_s.detach().requires_grad_() if self.config.adaptive else x_s
            if soft:
                with frozen_weights(self.target):
                    a, b = (self.G(self.target, x, s, end, c) for x in (a, b))
        return with_gradient_of(d(a / schedule.alpha(end), b / schedule.alpha(end)), cut, x_s)

    def denoising_loss(self, batch: Batch) -> Tensor:
        schedule, u = self.teacher.schedule, batch.uniform()
        high = karras_time(schedule, 1 - 0.7 * u, self.config.sigma_min, self.config.sigma_max)
        t = torch.where(batch.uniform() < 0.5, lognormal_time(schedule, u, -1.2, 1.2), high)  # as released
        x_t = schedule.noised(batch.x_0, t, batch.noise())
        return mean_square(self.student(x_t, t, t, batch.c), batch.x_0, denoising_weight(schedule, t).to(x_t))

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        denoising, consistency = self.denoising_loss(batch) if self.w else torch.zeros(()), self.consistency_loss(batch)
        if self.w and self.config.adaptive:
            last = self.student.denoiser.last_weight(self.teacher.shape, self.teacher.conditioning)
            denoising = gradient_ratio(consistency, denoising, last) * denoising
        yield self.student, self.w * denoising + consistency

    def after_step(self) -> None:
        if self.config.mu:
            self.following.move(1 - self.config.mu)

    def keeps_noise(self, nfe: int) -> bool:
        return nfe == 1 or self.config.gamma == 0

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        G = partial(self.G, self.student, c=c)
        return gamma_sampling(G, self.teacher.schedule, self.sampling_times(nfe), noise, nfe, self.config.gamma)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(ConsistencyTrajectory)
