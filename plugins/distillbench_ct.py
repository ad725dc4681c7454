"""Consistency training: a consistency function learned from data alone, without a teacher.

Song, Dhariwal, Chen & Sutskever 2023, "Consistency Models", arXiv:2303.01469, algorithm 3; as settings, improvements of
Song & Dhariwal 2023, arXiv:2310.14189 (iCT), and continuous times as in ECT, arXiv:2406.14548. The teacher's solver is
replaced by a second image with the same noise: E[x_0 + tau_s eps given x_t] is an Euler step of the data's ODE.

    x_t = alpha_t x_0 + sigma_t eps,   x_s = alpha_s x_0 + sigma_s eps
    L   = lambda d( F(x_t, t, c), sg[F^-(x_s, s, c)] )        (F: distillbench.diffusion.consistency; F = x^ at tau = e)
    weights of F^- <- mu weights of F^- + (1 - mu) weights of F                               (mu = 0: F^- is F)
    t = t_{n+1}, s = t_n;   P(n) is uniform, or Phi_{n+1} - Phi_n with Phi_n = Phi((ln tau_n - p_mean) / p_std)
    or, continuous: ln tau_t is normal, and tau_s = tau_t max(0, 1 - (1 + 8 sigmoid(-tau_t)) / (N - 1)) with e = 0

| symbol | meaning                                                            | shape      |
|--------|--------------------------------------------------------------------|------------|
| t, s   | neighbouring times of a Karras grid of N levels, s < t             | (B,1,1,1)  |
| tau, e | noise level sigma_t / alpha_t; the smallest one, same for all N    | (B,1,1,1)  |
| c      | class of x_0                                                       | of a batch |
| F, F^- | consistency function of the student and of the target network      | (B,C,H,W)  |

With `segments=K` F maps to the start of the segment of t, and s is at least there (arXiv:2403.06807).
N grows in stages (distillbench.diffusion.CURRICULA). If networks have dropout, F and F^- drop the same features. For
infinite N the optimum is the map of the data's ODE, that of an exact teacher, so one-step samples are compared with it.
At finite N the optimum of pseudo_huber is further from it than that of l2: it estimates medians until |F - F^-| < c.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Phase, SegmentedMethod, Teacher, UserError, hookimpl, option
from distillbench.diffusion import (
    CURRICULA,
    DISTANCE_NAMES,
    GRID_LEVELS,
    ConsistencyFunction,
    continuous_pair,
    inverse_length,
    karras_times,
    one_mask,
)
from distillbench.networks import MovingAverage
from distillbench.options import Among, Between, require_between, require_fraction, require_one_of, require_positive


class ConsistencyTraining(SegmentedMethod):
    name, label, title = "ct", "CT", "consistency training"
    paper = "Song et al. 2023, arXiv:2303.01469; Song & Dhariwal 2023, arXiv:2310.14189"
    needs_data, uses_teacher, can_start_fresh = True, False, True
    student: ConsistencyFunction
    last: Tensor
    sampling_grid = property(lambda self: self.last)

    @dataclass
    class Config(SegmentedMethod.Config):
        lr: float = option(2e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        start: str = option("fresh", "weights that the student starts from: fresh, or the teacher's (teacher)")
        fourier_scale: float = option(0.0, "of a fresh NCSN++'s features of time; 0: 16 (arXiv:2310.14189: .02)")
        curriculum: str = option("doubling", "how N grows: doubling (arXiv:2310.14189) or sqrt (arXiv:2303.01469)")
        s0: int = option(10, "smallest N - 1", search=Between(2, 16, log=True))
        s1: int = option(20, "largest N - 1 (released: 1280 and 150, from 10 and 2)", search=Between(20, 160, log=True))
        mu: float = option(0.95, "decay of the target; 0: the student itself", search=Among([0.0, 0.9, 0.95, 0.99]))
        mu_grows: bool = option(False, "the decay is mu^(s0 / (N - 1)), mu in the first stage (arXiv:2303.01469)")
        metric: str = option("l2", f"d: {', '.join(DISTANCE_NAMES)}; for few pixels only l2 is unbiased")
        weight: str = option("inv_step", "lambda: uniform (1), or inv_step, 1/(tau_t - tau_s)")
        levels: str = option("lognormal", "noise levels of a batch: lognormal or uniform on a grid, or continuous")
        p_mean: float = option(-1.1, "mean of ln tau of that log-normal", search=Between(-2.0, 0.5))
        p_std: float = option(2.0, "standard deviation of ln tau of that log-normal", search=Between(1.0, 2.5))
        sigma_min: float = option(0.002, "smallest noise level; it is e, unless levels=continuous")
        sigma_max: float = option(80.0, "largest noise level")
        sigma_data: float = option(0.5, "standard deviation of the data; not used by levels=continuous")
        rho: float = option(7.0, "curvature of the grid")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "sigma_min", "sigma_max", "sigma_data", "rho", "p_std")
            require_between(self, 1, float("inf"), "s0")
            require_between(self, self.s0, float("inf"), "s1")
            require_fraction(self, "mu")
            require_one_of(self, "start", ("fresh", "teacher"))
            require_between(self, 0, 1000, "fourier_scale")
            require_one_of(self, "curriculum", CURRICULA)
            require_one_of(self, "metric", DISTANCE_NAMES)
            require_one_of(self, "weight", ("uniform", "inv_step"))
            require_one_of(self, "levels", (*GRID_LEVELS, "continuous"))
            require_between(self, 0, self.sigma_max, "sigma_min")
            require_between(self, 1, self.s1, "segments")
            if self.segments > 1 and self.levels == "continuous":
                raise UserError(f"segments={self.segments} needs levels on a grid, got levels=continuous")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if teacher.conditioning.guided:
            raise UserError("ct learns from data and cannot be guided: leave guidance at 1")
        self.stages = [(n + 1, share) for n, share in CURRICULA[config.curriculum](config.s0, config.s1)]
        self.register_buffer("last", self.times(self.stages[-1][0]), persistent=False)  # cut to the schedule
        self.within = teacher.schedule.restricted(math.log(config.sigma_min), math.log(config.sigma_max))
        e = 0.0 if config.levels == "continuous" else teacher.schedule.noise_level(self.last[:1]).item()
        start = teacher.student(fresh=config.start == "fresh", fourier_scale=config.fourier_scale)
        self.student = ConsistencyFunction(start, e, config.sigma_data)
        self.target = copy.deepcopy(self.student).requires_grad_(False) if config.mu else self.student
        self.following = MovingAverage(self.target, self.student)

    def times(self, N: int) -> Tensor:
        """Ascending times of N noise levels, (N,)."""
        return karras_times(self.teacher.schedule, N, self.config.sigma_min, self.config.sigma_max, self.config.rho)

    def phases(self) -> list[Phase]:
        return [Phase(f"N = {N}", share, fresh=False) for N, share in self.stages]

    def start_phase(self, index: int) -> None:
        config, self.grid = self.config, self.times(self.stages[index][0]).to(self.last.device)
        self.mu = config.mu ** (config.s0 / (len(self.grid) - 1)) if config.mu_grows else config.mu
        if config.levels in GRID_LEVELS:
            self.cumulative = GRID_LEVELS[config.levels](self.teacher.schedule, self.grid, config.p_mean, config.p_std)

    def pair(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """t, s and tau_s, (B,1,1,1)."""
        if self.config.levels == "continuous":
            return continuous_pair(self.within, u, len(self.grid) - 1, self.config.p_mean, self.config.p_std)
        n = torch.searchsorted(self.cumulative, u, right=True)
        return self.grid[n + 1], self.grid[n], self.teacher.schedule.noise_level(self.grid[n])

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        schedule, config, x_0, eps, c = self.teacher.schedule, self.config, batch.x_0, batch.noise(), batch.c
        t, s, tau_s = self.pair(batch.uniform())
        if end := self.segment_end(t):  # its edges are levels of the last stage
            s = torch.maximum(s, *end)
            tau_s = schedule.noise_level(s)
        x_t, x_s = schedule.noised(x_0, t, eps), schedule.noised(x_0, s, eps)
        with one_mask(self.student, self.target):
            with torch.no_grad():
                target = torch.where(tau_s > 0, self.target(x_s, s, c, *end), x_0)
            F = self.student(x_t, t, c, *end)
        weight = inverse_length(schedule.noise_level(t), tau_s) if config.weight == "inv_step" else 1.0
        yield self.student, self.distances[config.metric](F, target, weight)

    def after_step(self) -> None:
        if self.config.mu:
            self.following.move(1 - self.mu)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(ConsistencyTraining)
