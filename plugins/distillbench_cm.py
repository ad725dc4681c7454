"""Consistency distillation: every point of a teacher's trajectory is mapped to the trajectory's end.

Song, Dhariwal, Chen & Sutskever 2023, "Consistency Models", arXiv:2303.01469, algorithm 2. Noise levels are EDM's,
tau = sigma_t / alpha_t, so it works on any schedule: x^ = x_t / alpha_t = x_0 + tau eps.

    F(x_t, t) = c_skip(tau) x^ + c_out(tau) NN,   F = x^ at tau = e    (eq. 5; distillbench/diffusion/consistency.py)
    x_t = alpha_t x_0 + sigma_t eps;   x_s = one step of a solver with the teacher, t -> s            (eq. 6)
    L   = lambda d( F(x_t, t), sg[F^-(x_s, s)] )                                                    (eq. 7)
    weights of F^- <- mu weights of F^- + (1 - mu) weights of F                                     (eq. 8)

`segments=K` is multistep consistency distillation (Heek et al. 2024, arXiv:2403.06807): F(x_t, t, e_j) and F^-(x_s, s,
e_j) are one DDIM step each of the network's own prediction, to the start of the segment with e_j < t <= e_(j+1).

| symbol     | meaning                                                               | shape            |
|------------|-----------------------------------------------------------------------|------------------|
| t, s       | neighbouring times of a grid of N levels, s < t                        | (B,1,1,1)        |
| e_j        | edges of the K segments, times of the grid                            | (B,1,1,1)        |
| tau        | noise level sigma_t / alpha_t                                          | (B,1,1,1)        |
| e, sd      | smallest noise level, standard deviation of the data                   | float            |
| c          | condition: class and guidance of the teacher                           | of a batch       |
| F, F^-     | consistency function of the student and of the target network          | (B,C,H,W)        |

If networks have dropout, F and F^- drop the same features, as released; the teacher has no dropout.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distillbench import Batch, SegmentedMethod, Teacher, UserError, Workspace, hookimpl, option
from distillbench.diffusion import (
    DISTANCE_NAMES,
    ONE_STEP,
    STEP_WEIGHTS,
    TIME_GRIDS,
    ConsistencyFunction,
    NoiseSchedule,
    check_heun,
    karras_times,
    one_mask,
)
from distillbench.networks import MovingAverage
from distillbench.options import Among, Between, require_between, require_fraction, require_one_of, require_positive


class ConsistencyDistillation(SegmentedMethod):
    name, label, title = "cm", "CM", "consistency distillation"
    paper = "Song et al. 2023, arXiv:2303.01469"
    needs_data = True
    can_start_fresh = True
    student: ConsistencyFunction

    @dataclass
    class Config(SegmentedMethod.Config):
        lr: float = option(2e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        steps: int = option(12, "N, noise levels of the grid (the paper: 18, 40)", search=Between(9, 40, log=True))
        solver: str = option("heun", "teacher step: heun (two evaluations) or ddim (one)", search=Among(ONE_STEP))
        times: str = option("karras", "grid of the levels: karras, uniform (in t) or uniform_lambda")
        mu: float = option(0.95, "decay of the target; 0: the student itself", search=Among([0.0, 0.9, 0.95, 0.99]))
        metric: str = option("l2", f"d: {', '.join(DISTANCE_NAMES)}", search=Among(["l2", "pseudo_huber"]))
        weight: str = option(
            "inv_step", "lambda: uniform (1) or inv_step, 1/(tau_t - tau_s)", search=Among(STEP_WEIGHTS)
        )
        sigma_min: float = option(0.002, "e, smallest noise level")
        sigma_max: float = option(80.0, "largest noise level")
        sigma_data: float = option(0.5, "sd, standard deviation of the data")
        rho: float = option(7.0, "curvature of the grid")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "sigma_min", "sigma_max", "sigma_data", "rho")
            require_between(self, 2, float("inf"), "steps")
            require_between(self, 1, self.steps - 1, "segments")
            require_fraction(self, "mu")  # with 1 the target network would never learn
            require_one_of(self, "solver", ONE_STEP)
            require_one_of(self, "times", ("karras", "uniform", "uniform_lambda"))
            require_one_of(self, "weight", STEP_WEIGHTS)
            require_one_of(self, "metric", DISTANCE_NAMES)
            if self.sigma_min >= self.sigma_max:
                raise UserError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self.register_buffer("grid", self.levels(config, teacher.schedule), persistent=False)
        e = teacher.schedule.noise_level(self.grid[:1]).item()  # the schedule may not reach down to sigma_min
        self.student = ConsistencyFunction(teacher.student(), e, config.sigma_data)
        self.target = copy.deepcopy(self.student).requires_grad_(False) if config.mu else self.student
        self.following = MovingAverage(self.target, self.student)

    @staticmethod
    def levels(config: Config, schedule: NoiseSchedule) -> Tensor:
        """The times of N noise levels from sigma_min to sigma_max, as far as the schedule has them."""
        if config.times == "karras":
            return karras_times(schedule, config.steps, config.sigma_min, config.sigma_max, config.rho)
        within = schedule.restricted(math.log(config.sigma_min), math.log(config.sigma_max))
        return TIME_GRIDS[config.times](within, config.steps - 1)

    def prepare(self, workspace: Workspace) -> None:
        if self.config.solver == "heun":
            check_heun(self.teacher.schedule, self.grid)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        schedule, grid = self.teacher.schedule, self.grid
        x_0, eps, c = batch.x_0, batch.noise(), batch.c
        n = batch.integers(0, len(grid) - 1)
        t, s = grid[n + 1], grid[n]
        end = self.segment_end(t)
        x_t = schedule.noised(x_0, t, eps)
        with torch.no_grad():
            x_s = ONE_STEP[self.config.solver](schedule, partial(self.teacher.denoise, c=c), x_t, t, s)
        with one_mask(self.student, self.target):
            with torch.no_grad():
                target = self.target(x_s, s, c, *end)
            F = self.student(x_t, t, c, *end)
        weight, distance = STEP_WEIGHTS[self.config.weight](schedule, t, s), self.distances[self.config.metric]
        yield self.student, distance(F, target, weight)

    def after_step(self) -> None:
        if self.config.mu:
            self.following.move(1 - self.config.mu)  # (eq. 8)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(ConsistencyDistillation)
