"""Progressive distillation: a student learns to make one DDIM step of two of its teacher's, in several phases.

Salimans & Ho 2022, arXiv:2202.00512, algorithm 2. In the phase with n student steps, with i ~ U{1..n}:

    t = i/n, t' = t - 1/(2n), t'' = t - 1/n;   z_t = alpha_t x_0 + sigma_t eps
    z_t'  = DDIM(z_t, x^(z_t, t), t -> t');    z_t'' = DDIM(z_t', x^(z_t', t'), t' -> t'')     (teacher x^)
    x~    = (z_t'' - (sigma_t''/sigma_t) z_t) / (alpha_t'' - (sigma_t''/sigma_t) alpha_t)      (algorithm 2)
    L     = w | x~ - x^_student(z_t, t) |^2,   w = max(SNR, 1), SNR + 1 or SNR + 4             (eq. 9, 10; EDM's)

then the student becomes the teacher, n is halved, and the optimiser starts anew.

| symbol         | meaning                                                       | shape     |
|----------------|---------------------------------------------------------------|-----------|
| z_t            | noisy image (the paper's letter for x_t)                      | (B,C,H,W) |
| t > t' > t''   | times on the grid; [0, 1] is stretched over the schedule's    | (B,1,1,1) |
| x^             | data prediction, of the phase's teacher or of the student     | (B,C,H,W) |
| x~             | target: the x_0 from which one DDIM step lands on z_t''       | (B,C,H,W) |
| SNR            | alpha_t^2 / sigma_t^2                                         | (B,1,1,1) |
| c              | condition; only the first teacher is guided                   | of a batch|
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, Phase, Teacher, UserError, hookimpl, option
from distillbench.diffusion import SNR_WEIGHTS, TIME_GRIDS, ddim, ddim_step, mean_square, x_at_top
from distillbench.options import Among, Between, require_one_of


class ProgressiveDistillation(Method):
    name, label, title = "pd", "PD", "progressive distillation"
    paper = "Salimans & Ho 2022, arXiv:2202.00512"
    needs_data = True
    times: Tensor

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam, in every phase", search=Between(3e-4, 1e-2, log=True))
        lr_decay: str = option("linear", "in a phase: constant, linear or cosine", search=Among(["constant", "linear"]))
        ema_halflife_kimg: float = option(0.0, "half-life of the weights' average in 1000 images; 0: none, as released")
        steps: int = option(
            16,
            "N, steps of the first teacher, a power of two; log2 N phases end at one step",
            search=Among([16, 32, 64]),
        )
        weight: str = option(
            "truncated_snr", "w: truncated_snr, max(SNR, 1), snr_plus_one, or edm, SNR + 4", search=Among(SNR_WEIGHTS)
        )
        times: str = option("uniform", f"grid of the first teacher's steps: {', '.join(TIME_GRIDS)}")
        clip: bool = option(
            False,
            "clip x^ of each step of sampling to [-1, 1] (released); not for latents",
            sampling=True,
            search=Among([False, True]),
        )
        shares: list[float] = option(
            [], "relative budgets, one number for each phase or for all; empty: 2 for the last two phases, else 1"
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "weight", SNR_WEIGHTS)
            require_one_of(self, "times", TIME_GRIDS)
            if self.steps < 2 or self.steps & (self.steps - 1):
                raise UserError(f"steps must be a power of two, at least 2, got {self.steps}")
            count = self.steps.bit_length() - 1
            if len(self.shares) not in (0, 1, count) or not all(0 < share < float("inf") for share in self.shares):
                wanted = f"{count} positive numbers, one for each phase, or a single one for all"
                raise UserError(f"shares must be {wanted}, got {self.shares}")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if self.student.prediction == "eps":
            raise UserError("pd: a one-step student cannot predict eps (1/alpha at t_max); take an x0 or v teacher")
        self.register_buffer("times", TIME_GRIDS[config.times](teacher.schedule, config.steps), persistent=False)
        self.halvings = [config.steps >> k for k in range(1, config.steps.bit_length())]  # n: N/2, ..., 2, 1
        self.frozen_copy = teacher.frozen_copy()  # copy that takes a student's weights: the teacher of later phases
        self.students = nn.ModuleDict({str(n): teacher.student().freeze() for n in self.halvings})

    def phases(self) -> list[Phase]:
        shares = self.config.shares or [2.0 if n <= 2 else 1.0 for n in self.halvings]
        shares = shares * len(self.halvings) if len(shares) == 1 else shares
        return [Phase(f"{2 * n} to {n} steps", share) for n, share in zip(self.halvings, shares, strict=True)]

    def start_phase(self, index: int) -> None:
        self.n = self.halvings[index]
        self.grid = self.grid_of(2 * self.n)  # t_j = j/(2n), j = 0, ..., 2n
        self.taught_by = self.teacher.denoise if index == 0 else self.frozen_copy.forward

    def grid_of(self, n: int) -> Tensor:
        """Every (N/n)-th time of the first teacher's grid: n steps."""
        return self.times[:: self.config.steps // n]

    def times_at(self, i: Tensor) -> tuple[Tensor, ...]:
        """t = i/n, t' and t'', a half and a whole step below."""
        return self.grid[2 * i], self.grid[2 * i - 1], self.grid[2 * i - 2]

    def target(self, z_t: Tensor, i: Tensor, times: tuple[Tensor, ...], c: Condition) -> Tensor:
        """x~ for z_t at t."""
        schedule, x_hat = self.teacher.schedule, self.taught_by
        t, t_1, t_2 = times
        z_1 = ddim_step(schedule, z_t, x_hat(z_t, t, c), t, t_1)
        x_1 = x_hat(z_1, t_1, c)
        z_2 = ddim_step(schedule, z_1, x_1, t_1, t_2)
        ratio = schedule.sigma(t_2) / schedule.sigma(t)
        x_tilde = torch.addcmul(z_2, ratio, z_t, value=-1) / (schedule.alpha(t_2) - ratio * schedule.alpha(t))
        return torch.where(i == 1, x_1, x_tilde)  # the last step ends on the data prediction

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        schedule = self.teacher.schedule
        x_0, eps, c = batch.x_0, batch.noise(), batch.c
        i = batch.integers(1, self.n + 1)
        t, *_ = times = self.times_at(i)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        z_t = alpha * x_0 + sigma * eps
        with torch.no_grad():
            x_tilde = self.target(z_t, i, times, c)
        w = SNR_WEIGHTS[self.config.weight]((alpha / sigma) ** 2)
        yield self.student, mean_square(self.student(z_t, t, c), x_tilde, w)

    def end_phase(self, index: int, average: nn.Module) -> None:
        for network in (self.frozen_copy, self.student, self.students[str(self.n)]):
            network.load_state_dict(average.state_dict())

    def supports(self, nfe: int) -> bool:
        return nfe in self.halvings

    def ready(self, nfe: int, phase: int) -> bool:
        return nfe in self.halvings[:phase]  # a phase's student is stored when it ends

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        schedule, grid, x_hat = self.teacher.schedule, self.grid_of(nfe), partial(self.students[str(nfe)], c=c)
        clipped = lambda z_t, t: x_hat(z_t, t).clamp(-1, 1)
        return ddim(clipped if self.config.clip else x_hat, schedule, x_at_top(schedule, noise(0), grid), grid)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(ProgressiveDistillation)
