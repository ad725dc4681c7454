"""Consistency training: a consistency function learned from data alone, without a teacher.

Song, Dhariwal, Chen & Sutskever 2023, "Consistency Models", arXiv:2303.01469, algorithm 3; as settings, improvements of
Song & Dhariwal 2023, arXiv:2310.14189 (iCT). The teacher's solver is replaced by a second noisy image with the same
noise: E[x_0 + tau_s eps given x_t] is one Euler step of the data's probability-flow ODE.

    x_t = alpha_t x_0 + sigma_t eps,   x_s = alpha_s x_0 + sigma_s eps
    L   = lambda d( F(x_t, t, c), sg[F^-(x_s, s, c)] )        (F: distillbench.diffusion.consistency; F = x^ at tau = e)
    weights of F^- <- mu weights of F^- + (1 - mu) weights of F                               (mu = 0: F^- is F)
    t = t_{n+1}, s = t_n;   P(n) is uniform, or Phi_{n+1} - Phi_n with Phi_n = Phi((ln tau_n - p_mean) / p_std)

    doubling: N = min(s0 2^i, s1) + 1 in stage i, each 1 / (log2 [s1/s0] + 1) of training, the last the rest (iCT)
    sqrt:     N = ceil(y - 1) + 1, y^2 = p ((s1+1)^2 - s0^2) + s0^2 at progress p; N - 1 < y <= N lasts 2N - 1 parts

| symbol | meaning                                                            | shape      |
|--------|--------------------------------------------------------------------|------------|
| t, s   | neighbouring times of a Karras grid of N levels, s < t             | (B,1,1,1)  |
| tau, e | noise level sigma_t / alpha_t; the smallest one, same for all N    | (B,1,1,1)  |
| c      | class of x_0                                                       | of a batch |
| F, F^- | consistency function of the student and of the target network      | (B,C,H,W)  |

If networks have dropout, F and F^- drop the same features, as in iCT. For infinite N the optimum is the map of the
data's ODE, which is also an exact teacher's: so one-step samples are compared with the teacher's for the same noise.
At finite N the optimum of pseudo_huber is further from it than that of l2: it estimates medians, not means, until
|F - F^-| is below its c.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, Phase, Teacher, UserError, hookimpl, option
from distillbench.diffusion import DISTANCES, STEP_WEIGHTS, ConsistencyFunction, karras_times, multistep, one_mask
from distillbench.networks import MovingAverage
from distillbench.options import require_between, require_fraction, require_one_of, require_positive


class ConsistencyTraining(Method):
    name = "ct"
    paper = "Song et al. 2023, arXiv:2303.01469; Song & Dhariwal 2023, arXiv:2310.14189"
    needs_data, uses_teacher = True, False
    can_start_fresh = True
    student: ConsistencyFunction
    last: Tensor

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam")
        start: str = option("fresh", "weights that the student starts from: fresh, or the teacher's (teacher)")
        curriculum: str = option("doubling", "how N grows: doubling (arXiv:2310.14189) or sqrt (arXiv:2303.01469)")
        s0: int = option(10, "smallest N - 1")
        s1: int = option(20, "largest N - 1 (arXiv:2310.14189: 10 to 1280; arXiv:2303.01469: 2 to 150)")
        mu: float = option(0.95, "decay of the target network; 0: the student itself, stop-gradient")
        metric: str = option("l2", "d: l2 (squared), or pseudo_huber, whose optimum is biased for few pixels")
        weight: str = option("inv_step", "lambda: uniform (1), or inv_step, 1/(tau_t - tau_s)")
        levels: str = option("lognormal", "distribution of a batch's noise levels: lognormal, or uniform over the grid")
        p_mean: float = option(-1.1, "mean of ln tau of that log-normal")
        p_std: float = option(2.0, "standard deviation of ln tau of that log-normal")
        sigma_min: float = option(0.002, "e, smallest noise level")
        sigma_max: float = option(80.0, "largest noise level")
        sigma_data: float = option(0.5, "standard deviation of the data")
        rho: float = option(7.0, "curvature of the grid")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "sigma_min", "sigma_max", "sigma_data", "rho", "p_std")
            require_between(self, 1, float("inf"), "s0")
            require_between(self, self.s0, float("inf"), "s1")
            require_fraction(self, "mu")
            require_one_of(self, "start", ("fresh", "teacher"))
            require_one_of(self, "curriculum", ("doubling", "sqrt"))
            require_one_of(self, "metric", DISTANCES)
            require_one_of(self, "weight", STEP_WEIGHTS)
            require_one_of(self, "levels", ("uniform", "lognormal"))
            if self.sigma_min >= self.sigma_max:
                raise UserError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if teacher.conditioning.guided:
            raise UserError("ct learns from data and cannot be guided: leave guidance at 1")
        self.stages = self.curriculum(config)
        self.register_buffer("last", self.times(self.stages[-1][0]), persistent=False)  # what is sampled on
        e = teacher.schedule.noise_level(self.last[:1]).item()  # the schedule may not reach down to sigma_min
        self.student = ConsistencyFunction(teacher.student(fresh=config.start == "fresh"), e, config.sigma_data)
        self.target = copy.deepcopy(self.student).requires_grad_(False) if config.mu else self.student
        self.following = MovingAverage(self.target, self.student)

    @staticmethod
    def curriculum(config: Config) -> list[tuple[int, float]]:
        """N of each stage, and how long it lasts relative to the others."""
        s0, s1 = config.s0, config.s1
        if config.curriculum == "sqrt":
            return [(N, 2 * N - 1) for N in range(s0 + 1, s1 + 2)]
        length = math.log2(s1 // s0) + 1
        return [(min(s0 * 2**i, s1) + 1, min(1.0, length - i)) for i in range(math.ceil(length))]

    def times(self, N: int) -> Tensor:
        """Ascending times of N noise levels, (N,)."""
        return karras_times(self.teacher.schedule, N, self.config.sigma_min, self.config.sigma_max, self.config.rho)

    def phases(self) -> list[Phase]:
        return [Phase(f"N = {N}", share, fresh=False) for N, share in self.stages]

    def start_phase(self, index: int) -> None:
        grid, config = self.times(self.stages[index][0]), self.config
        weights = torch.ones(len(grid) - 1, dtype=torch.float64)
        if config.levels == "lognormal":
            weights = torch.special.ndtr((self.teacher.schedule.lam(grid) - config.p_mean) / config.p_std).diff()
        total = weights.cumsum(0)
        if not total[-1] > 0:
            raise UserError("the log-normal of p_mean and p_std gives no weight to levels from sigma_min to sigma_max")
        self.grid, self.cumulative = grid.to(self.last.device), (total / total[-1]).to(self.last.device)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        schedule, grid = self.teacher.schedule, self.grid
        x_0, eps, c = batch.x_0, batch.noise(), batch.c
        n = torch.searchsorted(self.cumulative, batch.uniform(), right=True)
        t, s = grid[n + 1], grid[n]
        x_t, x_s = (schedule.alpha(r) * x_0 + schedule.sigma(r) * eps for r in (t, s))
        with one_mask(self.student, self.target):
            with torch.no_grad():
                target = self.target(x_s, s, c)
            F = self.student(x_t, t, c)
        weight, distance = STEP_WEIGHTS[self.config.weight](schedule, t, s), DISTANCES[self.config.metric]
        yield self.student, distance(F, target, weight)

    def after_step(self) -> None:
        if self.config.mu:
            self.following.move(1 - self.config.mu)

    def supports(self, nfe: int) -> bool:
        return 1 <= nfe < len(self.last)

    def keeps_noise(self, nfe: int) -> bool:
        return nfe == 1

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        return multistep(self.student, self.last, noise, nfe, c)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(ConsistencyTraining)
