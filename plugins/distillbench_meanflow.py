"""MeanFlow: the average velocity between two times, distilled from the teacher or trained on data.

Geng, Deng, Bai, Kolter & He 2025, "Mean Flows for One-step Generative Modeling", arXiv:2505.13447, algorithm 1. It
works on the schedule of flow matching, x_t = (1 - t) x_0 + t eps, on which a teacher is read at equal SNR.

    u(x_t, t, s) = (x_t - x_s) / (t - s)     with x_s on the ODE through x_t, so that u(x_t, t, t) = v           (eq. 3)
    u = v - (t - s) du/dt,                   du/dt = du/dx v + du/dt along the ODE, at constant s                (eq. 6)
    L = E w | u - sg[v - (t - s) du/dt] |^2,   w = 1 / (sg|e|^2 + c)^p,   e the difference           (eqs. 9, 10 and 22)

v is the teacher's velocity (x_t - f) / t, or that of a pair, eps - x_0, whose mean given x_t it is.

| symbol | meaning                                                                     | shape      |
|--------|-----------------------------------------------------------------------------|------------|
| t, s   | times, s <= t                                                               | (B,1,1,1)  |
| v      | velocity dx_t/dt of the ODE                                                 | (B,C,H,W)  |
| u      | student: average velocity from t to s                                       | (B,C,H,W)  |
| f      | teacher's data prediction, guided where c says so                           | (B,C,H,W)  |
| h      | step of the finite difference, exact: 0; t stays h away from both ends      | float      |
| c      | condition, to networks; in w a constant                                     |            |

u = (x_t - D) / t for the student D(x_t, t, s), the teacher's network with an embedding of s that starts at zero: at
first u is the teacher's velocity for every s, unless its weights are fresh. The paper's times are logit-normal, which
hardly ever draws the t where sampling starts; so half of ours are uniform. They are the larger and the smaller of two
draws, or, as released for CIFAR-10, t and min(t, s) with a distribution of its own for s. The paper's p = 1 is slow
from a bad start, and with random v any p > 0 moves the optimum from the mean towards a mode, so p is 0 here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, Teacher, UserError, hookimpl, option
from distillbench.diffusion import UNCONDITIONAL, derivative, lognormal_time, time_like
from distillbench.networks import TwoTimes, smooth_times
from distillbench.options import Between, require_between, require_one_of, require_positive


class AverageVelocity(TwoTimes):
    """u(x_t, t, s, c) on the schedule of flow matching."""

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        return (x_t - super().forward(x_t, t, s, c)) / t.to(x_t)


class MeanFlow(Method):
    name, label, title = "meanflow", "MeanFlow", "mean flow, the average velocity"
    paper = "Geng et al. 2025, arXiv:2505.13447"
    needs_data, can_start_fresh = True, True
    student: AverageVelocity

    @dataclass
    class Config(MethodConfig):
        lr: float = option(1e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        schedule: str = option("flow_matching", "noise schedule that it works on; no other is possible")
        source: str = option("teacher", "of v: the teacher, or data, eps - x_0")
        start: str = option("teacher", "weights that the student starts from: the teacher's, or fresh (published)")
        smooth: int = option(8, "degree of the polynomials in which the student sees time; 0: as the teacher sees it")
        exact: bool = option(False, "du/dt by torch.func.jvp instead of a finite difference")
        embeds: str = option("s", "second time that the student embeds: s, or difference (released: t - s)")
        step: float = option(5e-3, "h, step of the finite difference in t", search=Between(1e-3, 2e-2, log=True))
        ratio: float = option(0.75, "share of a batch with s < t; else s = t, where u is v", search=Between(0.25, 1.0))
        uniform: float = option(0.5, "ours: share of uniform times; others are logit-normal", search=Between(0.0, 1.0))
        p_mean: float = option(-0.4, "mean of logit t of the logit-normal times", search=Between(-2.0, 1.0))
        p_std: float = option(1.0, "standard deviation of logit t of the logit-normal times")
        p_mean_s: float | None = option(None, "mean of logit s, drawn apart from t; null: of the two, s is the smaller")
        p_std_s: float = option(1.6, "standard deviation of logit s where it is drawn apart")
        p: float = option(0.0, "power of the weight (the paper: 1, and .75 for CIFAR-10)", search=Between(0.0, 1.0))
        c: float = option(1e-3, "constant of the weight")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "schedule", ("flow_matching",))
            require_one_of(self, "source", ("teacher", "data"))
            require_one_of(self, "start", ("fresh", "teacher"))
            require_one_of(self, "embeds", ("s", "difference"))
            require_positive(self, "p_std", "p_std_s", "c")
            require_between(self, 0, 1, "ratio", "uniform", "p")
            require_between(self, 0, float("inf"), "smooth")
            require_between(self, 1e-5, 0.1, "step")

    @property
    def uses_teacher(self) -> bool:
        return self.config.source == "teacher"

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if config.source == "data" and teacher.conditioning.guided:
            raise UserError("meanflow with source=data cannot be guided: leave guidance at 1, or use source=teacher")
        denoiser = teacher.student(fresh=config.start == "fresh")
        denoiser = smooth_times(denoiser, config.smooth) if config.smooth else denoiser
        self.student = AverageVelocity(denoiser, embeds=config.embeds)
        self.h = 0.0 if config.exact else config.step
        self.t_min, self.t_max = teacher.schedule.t_min, teacher.schedule.t_max - self.h

    def time(self, batch: Batch, mean: float, std: float) -> Tensor:
        """Uniform or logit-normal, (B,1,1,1)."""
        # logit t = lam, so a logit-normal t is a log-normal noise level
        t = lognormal_time(self.teacher.schedule, batch.uniform(), mean, std)
        t = t.clamp(self.t_min, self.t_max)
        return torch.where(batch.uniform() < self.config.uniform, batch.uniform(self.t_min, self.t_max), t)

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """t, and s where it is below t; t is h or more above the lowest time."""
        config, apart = self.config, self.config.p_mean_s is not None
        a = self.time(batch, config.p_mean, config.p_std)
        b = self.time(batch, *((config.p_mean_s, config.p_std_s) if apart else (config.p_mean, config.p_std)))
        t = (a if apart else torch.maximum(a, b)).clamp(min=self.t_min + self.h)
        return t, torch.minimum(t if apart else a, b)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        config, x_0, eps, c = self.config, batch.x_0, batch.noise(), batch.c
        t, below = self.times(batch)
        s = torch.where(batch.uniform() < config.ratio, below, t)
        x_t = self.teacher.schedule.noised(x_0, t, eps)
        with torch.no_grad():
            v = eps - x_0 if config.source == "data" else (x_t - self.teacher.denoise(x_t, t, c)) / t.to(x_t)
        along = (v, torch.ones_like(t))
        u, du = derivative(self.student, (x_t, t), along, s, c, exact=config.exact, step=config.step)
        square = (u - (v - (t - s).to(v) * du)).square().flatten(1)
        w = (square.detach().sum(dim=1, keepdim=True) + config.c) ** -config.p
        yield self.student, (w * square).mean()

    def supports(self, nfe: int) -> bool:
        return nfe >= 1

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        """x_s = x_t - (t - s) u down equal steps from t_max; from the last t to 0, where x is an image."""
        times = torch.linspace(self.t_max, self.t_min, nfe + 1, dtype=torch.float64).tolist()
        x = self.teacher.schedule.sigma(time_like(noise(0), self.t_max)) * noise(0)
        for k in range(nfe):
            t, s = time_like(x, times[k]), time_like(x, times[k + 1])
            end = s if k < nfe - 1 else torch.zeros_like(s)
            x = x - (t - end).to(x) * self.student(x, t, s, c)
        return x


@hookimpl(api=2)
def register_methods(register) -> None:
    register(MeanFlow)
