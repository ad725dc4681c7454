"""Latent consistency models: the guided teacher's trajectories, mapped to their ends for every guidance weight.

Luo, Tan, Huang, Li & Zhao 2023, "Latent Consistency Models", arXiv:2310.04378, sections 4.1 to 4.3, with the details
of its training script in huggingface/diffusers. It works in latents and in pixels. The solver skips: its steps are 20
of 1,000 times long, on a grid of N = 50 steps. The teacher is guided, with a w that is drawn for each image and is an
input of the student (`guidance_range`), so a guided sample takes one evaluation a step. `w_input=projected` is the
release's input: ``time_cond_proj_dim`` of diffusers' U-Nets of texts, random at first.

    F(x_t, t, c) = c_skip x_t + c_out D,   c_skip = sd^2 / (tau^2 + sd^2),   c_out = tau / sqrt(tau^2 + sd^2)
    x_t = alpha_t x_0 + sigma_t eps,   x_s = one DDIM step of f_w from t to s,   f_w = f_0 + w (f_c - f_0)
    L   = mean over all values of sqrt( (F(x_t, t, c) - sg[F^-(x_s, s, c)])^2 + h^2 ) - h
    weights of F^- <- mu weights of F^- + (1 - mu) weights of F

`segments=K` is a phased consistency model (Wang et al. 2024, arXiv:2405.18407) without adversarial loss: in place of
c_skip and c_out, F and F^- are one DDIM step each of the network's own prediction to the start e_j of t's segment.

| symbol   | meaning                                                                     | shape      |
|----------|-----------------------------------------------------------------------------|------------|
| t, s     | neighbouring times of the solver's grid, s < t                              | (B,1,1,1)  |
| e_j      | edges of the K segments, times of the grid, e_j < t <= e_(j+1)              | (B,1,1,1)  |
| tau      | scaling i, where the index i of t runs from 0 to 999: not a noise level     | (B,1,1,1)  |
| c        | condition: class or text, and guidance weight w                             | of a batch |
| f_w      | teacher, E[x_0 given x_t, c], guided where c says so                        | (B,C,H,W)  |
| D        | student as a denoiser, given c and w                                        | (B,C,H,W)  |
| F, F^-   | consistency function of the student and of the target network               | (B,C,H,W)  |
| sd, h    | `sigma_data`, `huber_c`                                                     | float      |

c_out has no factor sd, unlike EDM's, because D predicts data; it is above .998 from i = 1 on. F's answer is x at t_min.
The paper's w is ours less 1. If networks have dropout, F and F^- drop the same features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Denoiser, SegmentedMethod, Teacher, hookimpl, option
from distillbench.diffusion import (
    DISTANCE_NAMES,
    ConsistencyFunction,
    ddim_step,
    one_mask,
    whole_grid,
)
from distillbench.networks import MovingAverage, project_guidance
from distillbench.options import Among, Between, require_between, require_fraction, require_one_of, require_positive

INDICES = 1000  # of the schedules of diffusers


class ScaledConsistencyFunction(ConsistencyFunction):
    """F, with F = x_t exactly at t_min."""

    def __init__(self, denoiser: Denoiser, scaling: float, sd: float) -> None:
        super().__init__(denoiser, 0.0, sd)  # e = 0: its answer is taken for an image without noise
        self.scaling = scaling

    def coefficients(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        schedule, sd = self.schedule, self.sd
        i = (INDICES - 1) * (t - schedule.t_min) / (schedule.t_max - schedule.t_min)
        tau = self.scaling * i
        square = tau**2 + sd**2
        return (sd**2 / square).to(dtype), (tau / square.sqrt()).to(dtype)


class LatentConsistency(SegmentedMethod):
    name, label, title = "lcm", "LCM", "latent consistency model"
    paper = "Luo et al. 2023, arXiv:2310.04378"
    needs_data = True
    can_start_fresh = True
    student: ScaledConsistencyFunction

    @dataclass
    class Config(SegmentedMethod.Config):
        lr: float = option(2e-3, "peak learning rate of Adam (published: 8e-6)", search=Between(3e-4, 1e-2, log=True))
        steps: int = option(50, "N, steps of the solver's grid", search=Between(17, 100, log=True))
        times: str = option("trailing", "solver's grid: trailing (as released), uniform (in t) or uniform_lambda")
        mu: float = option(0.95, "decay of the target; 0: the student itself", search=Among([0.0, 0.9, 0.95, 0.99]))
        loss: str = option("huber", f"huber, the pseudo-Huber loss of each value, or {', '.join(DISTANCE_NAMES)}")
        huber_c: float = option(1e-3, "h, below which the Huber loss is quadratic", search=Between(1e-4, 1.0, log=True))
        sigma_data: float = option(0.5, "sd of c_skip and c_out")
        scaling: float = option(10.0, "tau of c_skip and c_out by index", search=Between(0.1, 10.0, log=True))
        w_input: str = option("added", "how students get w: added to the embedding of time, or projected (as released)")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_between(self, 2, INDICES - 1, "steps")
            require_between(self, 1, self.steps, "segments")
            require_one_of(self, "times", ("trailing", "uniform", "uniform_lambda"))
            require_one_of(self, "loss", ("huber", *DISTANCE_NAMES))
            require_one_of(self, "w_input", ("added", "projected"))
            require_fraction(self, "mu")  # with 1 the target network would never learn
            require_positive(self, "huber_c", "sigma_data", "scaling")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self.register_buffer("grid", whole_grid(config.times, teacher.schedule, config.steps), persistent=False)
        denoiser = teacher.student() if config.w_input == "added" else project_guidance(teacher.student())
        self.student = ScaledConsistencyFunction(denoiser, config.scaling, config.sigma_data)
        self.target = copy.deepcopy(self.student).requires_grad_(False) if config.mu else self.student
        self.following = MovingAverage(self.target, self.student)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        schedule, grid, c = self.teacher.schedule, self.grid, batch.c
        n = batch.integers(1, len(grid))
        t, s = grid[n], grid[n - 1]
        end = self.segment_end(t)
        x_t = schedule.noised(batch.x_0, t, batch.noise())
        with torch.no_grad():
            x_s = ddim_step(schedule, x_t, self.teacher.denoise(x_t, t, c), t, s)
        with one_mask(self.student, self.target):
            with torch.no_grad():
                target = self.target(x_s, s, c, *end)
            F = self.student(x_t, t, c, *end)
        yield self.student, self.distance(F, target)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        if self.config.loss != "huber":
            return self.distances[self.config.loss](a, b)
        h = self.config.huber_c
        return (((a - b).square() + h**2).sqrt() - h).mean()

    def after_step(self) -> None:
        if self.config.mu:
            self.following.move(1 - self.config.mu)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(LatentConsistency)
