"""BOOT: data-free distillation of denoising diffusion models with bootstrapping.

Gu, Zhai, Zhang, Liu & Susskind 2023, arXiv:2306.05544. The student reads the same noise eps at every time t and
predicts the signal y_t = (x_t - sigma_t eps) / alpha_t of the teacher's trajectory that starts at eps. It is
bootstrapped along the Signal-ODE, dy/dt = -lam'_t (f(x_t, t) - y_t), from t_max, where L_BC fits it to the teacher.

    x_t  = alpha_t y_t + sigma_t eps                                            (definition of y_t)
    y_s  = r y_t + (1 - r) f(x_t, t),   r = alpha_t sigma_s / (alpha_s sigma_t)  (DDIM in y: the exact step)
    L_BS = E w | g(eps, s) - sg[y_s] |^2                                        (bootstrapping)
    L_BC = E | g(eps, t_max) - f(x_T, t_max) |^2,   x_T = sigma_T eps           (boundary)
    L    = L_BS + beta L_BC

| symbol   | meaning                                                             | shape            |
|----------|---------------------------------------------------------------------|------------------|
| eps      | noise; the student's only image input                               | (B,C,H,W)        |
| t, s     | times, s < t                                                        | (B,1,1,1)        |
| y_t, y_s | signal at t and s                                                   | (B,C,H,W)        |
| r        | signal ratio, exp(lam_s - lam_t) in (0, 1)                          | (B,1,1,1)        |
| f        | teacher, E[x_0 given x_t, c], guided where c says so                | (B,C,H,W)        |
| g        | student: teacher's network at t_max plus an embedding of the time   | (B,C,H,W)        |
| c        | condition: class and guidance of the teacher                        | of a batch       |

docs/methods.md lists our choices where the full text could not be read (weights, Heun's form, grid). L_BC is needed:
without it every y'(eps, t) = y(eps + C(eps), t) + sigma_t / alpha_t C(eps) has zero L_BS as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, Teacher, hookimpl, option
from distillbench.diffusion import DISTANCE_NAMES, TIME_GRIDS, UNCONDITIONAL, ddim, time_like, whole_grid, x_at_t_max
from distillbench.networks import TwoTimes
from distillbench.options import Among, Between, require_between, require_one_of, require_positive


class SignalNetwork(TwoTimes):
    """g(eps, t): the teacher's network at its fixed time t_max, with t in an embedding that starts at zero.

    So g(eps, t) = f(eps, t_max) for every t at the start, L_BC = 0, and L_BS starts as pure increments.
    """

    def forward(self, eps: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:  # type: ignore[override]  # at one x_t and t
        return super().forward(x_at_t_max(self.schedule, eps), time_like(eps, self.schedule.t_max), t, c)


class Boot(Method):
    name, label, title = "boot", "BOOT", "BOOT, data-free bootstrapping"
    paper = "Gu et al. 2023, arXiv:2306.05544"
    needs_data = False
    grid: Tensor

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        steps: int = option(8, "N, steps from t_max to t_min", search=Between(4, 32, log=True))
        times: str = option(
            "uniform",
            f"their grid ({', '.join(TIME_GRIDS)}), or continuous: any t, steps of delta",
            search=Among(["uniform", "uniform_lambda", "continuous"]),
        )
        target: str = option("heun", "y_s by exponential heun, or by an euler step", search=Among(["heun", "euler"]))
        metric: str = option("l2", f"|.|^2 of both losses, or another distance: {', '.join(DISTANCE_NAMES)}")
        weight: str = option("uniform", "w: uniform (1), inv_delta2 (1/delta^2) or inv_dlam2 (1/(1-r)^2)")
        beta: float = option(1.0, "weight of the boundary loss, to be read with w", search=Between(0.1, 10.0, log=True))
        boundary_share: float = option(0.25, "share of a batch for the boundary loss", search=Among([0.1, 0.25]))
        handover: float = option(0.0, "ours: nfe > 1 goes on with the teacher's DDIM from this share of the times")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "steps")
            require_between(self, 0, float("inf"), "beta")
            require_between(self, 1e-6, 1, "boundary_share")
            require_between(self, 0, 1, "handover")
            require_one_of(self, "times", (*TIME_GRIDS, "continuous"))
            require_one_of(self, "target", ("euler", "heun"))
            require_one_of(self, "metric", DISTANCE_NAMES)
            require_one_of(self, "weight", ("uniform", "inv_delta2", "inv_dlam2"))

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self.student = SignalNetwork(teacher.student())
        self.t_min, self.t_max = teacher.schedule.t_min, teacher.schedule.t_max
        self.evaluations = teacher.conditioning.evaluations
        self.delta = (self.t_max - self.t_min) / config.steps
        if config.times != "continuous":
            self.register_buffer("grid", whole_grid(config.times, teacher.schedule, config.steps), persistent=False)

    def time_pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """t and the time s one step below, each (B,1,1,1)."""
        if self.config.times == "continuous":
            t = batch.uniform(self.t_min + self.delta, self.t_max)
            return t, (t - self.delta).clamp(min=self.t_min)
        return self.grid[k := batch.integers(1, self.config.steps + 1)], self.grid[k - 1]

    def target(self, eps: Tensor, y_t: Tensor, f_t: Tensor, t: Tensor, s: Tensor, c: Condition) -> Tensor:
        """y_s from y_t along the teacher's Signal-ODE; f_t is f(x_t, t)."""
        schedule = self.teacher.schedule
        r, one_minus_r = schedule.signal_ratio(t, s)
        y_s = r * y_t + one_minus_r * f_t
        if self.config.target == "heun":
            f_s = self.teacher.denoise(schedule.noised(y_s, s, eps), s, c)
            y_s = r * y_t + one_minus_r * (f_t + f_s) / 2
        return y_s

    def weight(self, t: Tensor, s: Tensor) -> Tensor | float:
        if self.config.weight == "inv_dlam2":
            return self.teacher.schedule.signal_ratio(t, s)[1] ** -2
        return self.delta**-2 if self.config.weight == "inv_delta2" else 1.0

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        g, schedule, eps, c = self.student, self.teacher.schedule, batch.noise(), batch.c
        (t, s), n = self.time_pair(batch), math.ceil(self.config.boundary_share * batch.size)
        x_T, t_max = x_at_t_max(schedule, eps[:n]), time_like(eps[:n], self.t_max)
        both = torch.arange(batch.size + n, device=eps.device) % batch.size  # L_BS of all and L_BC of n: one evaluation
        with torch.no_grad():
            y_t = g(eps, t, c)
            x_t = schedule.noised(y_t, t, eps)
            x, times = torch.cat([x_t, x_T]), torch.cat([t, t_max])
            f_t, y_T = self.teacher.denoise(x, times, c[both]).split([batch.size, n])
            y_s = self.target(eps, y_t, f_t, t, s, c)
        g_s, g_T = g(eps[both], torch.cat([s, t_max]), c[both]).split([batch.size, n])
        d = self.distances[self.config.metric]
        yield g, d(g_s, y_s, self.weight(t, s)) + self.config.beta * d(g_T, y_T)

    def supports(self, nfe: int) -> bool:
        return nfe == 1 or (self.config.handover > 0 and nfe > 1 and (nfe - 1) % self.evaluations == 0)

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        eps, schedule = noise(0), self.teacher.schedule
        if nfe == 1:
            return self.student(eps, time_like(eps, self.t_min), c)  # y at t_min is an image already
        t = time_like(eps, tau := self.t_min + self.config.handover * (self.t_max - self.t_min))
        x_tau = schedule.noised(self.student(eps, t, c), t, eps)
        times = torch.linspace(self.t_min, tau, (nfe - 1) // self.evaluations + 1, dtype=torch.float64)
        return ddim(partial(self.teacher.denoise, c=c), schedule, x_tau, times)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(Boot)
