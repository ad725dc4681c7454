"""Easy consistency tuning: a diffusion model becomes a consistency model while the steps of its training shrink.

Geng, Pokle, Luo, Lin & Kolter 2024, "Consistency Models Made Easy", arXiv:2406.14548, as in the authors' code. Noise
levels are EDM's, tau = sigma_t / alpha_t, so it works on any schedule (the paper's t and r are our tau_t and tau_s).

    ln tau_t ~ N(p_mean, p_std^2),   tau_s = tau_t max(0, 1 - q^-a (1 + k sigmoid(-b tau_t))),   a = 1, 2, ... by stage
    x_t = alpha_t x_0 + sigma_t eps,   x_s = alpha_s f + sigma_s (x_t - alpha_t f) / sigma_t
    L   = d( F(x_t, t, c), sg[F(x_s, s, c)] ) / (tau_t - tau_s),   with f in place of F(x_s, s, c) where tau_s = 0
    d   = |.|^2 / pixels,  or  sqrt(|.|^2 + C^2) - C,  which is |.| for the released C = 0

With f = x_0, x_s is x_0 with the same noise (ECT, which needs no teacher but for its weights). With the teacher's f it
is one step of Euler's method on the teacher's ODE: consistency distillation in the same stages (ECD).

| symbol | meaning                                                                   | shape      |
|--------|---------------------------------------------------------------------------|------------|
| t, s   | times, s < t                                                              | (B,1,1,1)  |
| tau    | noise level                                                               | (B,1,1,1)  |
| f      | x_0, or the teacher's data prediction, guided where c says so             | (B,C,H,W)  |
| F      | student: its data prediction D; in sampling, F = x^ at `boundary`         | (B,C,H,W)  |
| a      | stage; stages have equal shares of the training images                    | int        |
| c      | class, guidance                                                           | of a batch |

Where q^a is small, tau_s is 0 for all but high noise levels, and there L is that of a denoiser. D is x_t / alpha_t at
tau = 0, but for networks that predict x_0 themselves: they learn it. F(x_t) and F(x_s) drop the same features. For
large q^a the optimum is the map of the ODE, of the data or of the teacher. For random x_s (ECT) this holds for the
squared error only: other d estimate medians, until |F(x_t) - F(x_s)| is below C. In thousands of dimensions the
difference is small, in a few it is not; so the default is the squared error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, MultistepMethod, Phase, Teacher, UserError, hookimpl, option
from distillbench.diffusion import (
    DISTANCE_NAMES,
    SIGMA_DATA,
    ConsistencyFunction,
    continuous_pair,
    ddim_step,
    inverse_length,
    karras_times,
    multistep,
    one_mask,
    pseudo_huber,
)
from distillbench.options import Among, Between, require_between, require_one_of, require_positive


class EasyConsistencyTuning(MultistepMethod):
    name, label, title = "ect", "ECT", "easy consistency tuning"
    paper = "Geng et al. 2024, arXiv:2406.14548"
    needs_data = True
    can_start_fresh = True
    student: ConsistencyFunction

    @dataclass
    class Config(MultistepMethod.Config):
        replaced = {"mid": "sampling_levels=[[LEVEL]]"}
        lr: float = option(2e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        source: str = option("data", "of f: data, x_0 itself (ECT), or the teacher (ECD)")
        q: float = option(4.0, "q of the stages (released: 2, 4, 256 for one hour)", search=Among([2.0, 4.0, 16.0]))
        stages: int = option(4, "number of stages (released: 8 for CIFAR-10, 1 for one hour)", search=Between(1, 8))
        k: float = option(8.0, "k, how much longer steps at low noise levels are", search=Between(2.0, 32.0, log=True))
        b: float = option(1.0, "b, 1 / the noise level below which steps are longer")
        metric: str = option("l2", f"d: {', '.join(DISTANCE_NAMES)}; released: pseudo_huber, biased for few pixels")
        huber_c: float = option(0.0, "C of pseudo_huber (released: 0)")
        p_mean: float = option(-1.1, "mean of ln tau", search=Between(-2.0, 0.5))
        p_std: float = option(2.0, "standard deviation of ln tau", search=Between(1.0, 2.5))
        sigma_min: float = option(0.002, "smallest noise level; below, tau_s is 0")
        sigma_max: float = option(80.0, "largest noise level, where sampling starts")
        bounded: bool = option(True, "cut levels of training to these; false: to what the network takes (released)")
        boundary: float = option(
            0.0, "noise level where F is x^; 0: none (released: .003)", sampling=True, search=Among([0.0, 0.003])
        )
        sampling_levels: list = option(
            [[0.821]],
            "noise levels where steps after the first begin (ImageNet: [[1.526]])",
            sampling=True,
            search=Among([[], [[0.2]], [[0.4]], [[0.821]], [[1.526]], [[3.0]], [[6.0]]]),
        )

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "source", ("data", "teacher"))
            require_one_of(self, "metric", DISTANCE_NAMES)
            require_positive(self, "p_std", "sigma_min", "sigma_max")
            require_between(self, 0, float("inf"), "k", "b", "huber_c")
            require_between(self, 1, float("inf"), "stages")
            if not self.q > 1:
                raise UserError(f"q must be above 1, so that steps shrink from stage to stage, got {self.q}")
            require_between(self, self.sigma_min, float("inf"), "sigma_max")

    @property
    def uses_teacher(self) -> bool:
        return self.config.source == "teacher"

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if config.source == "data" and teacher.conditioning.guided:
            raise UserError("ect with source=data cannot be guided: leave guidance at 1, or use source=teacher")
        self.student = ConsistencyFunction(teacher.student(), 0.0, SIGMA_DATA)
        within = teacher.schedule.restricted(math.log(config.sigma_min), math.log(config.sigma_max))
        self.within = within if config.bounded else self.student.denoiser.every_level
        grid = karras_times(within, 18, config.sigma_min, config.sigma_max)
        self.register_buffer("grid", grid, persistent=False)  # of several evaluations
        begins = within.noise_level(grid[1]).item(), *itertools.chain(*config.sampling_levels)
        require_between(config, 0, min(begins), "boundary")

    def phases(self) -> list[Phase]:
        return [Phase(f"q^a = {self.config.q**a:g}", fresh=False) for a in range(1, self.config.stages + 1)]

    def start_phase(self, index: int) -> None:
        self.n = self.config.q ** (index + 1)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        config, schedule, x_0, eps, c = self.config, self.within, batch.x_0, batch.noise(), batch.c
        u, settings = batch.uniform(), (config.p_mean, config.p_std, config.k, config.b)
        t, s, tau_s = continuous_pair(schedule, u, self.n, *settings)
        x_t = schedule.noised(x_0, t, eps)
        with torch.no_grad():
            f = x_0 if config.source == "data" else self.teacher.denoise(x_t, t, c)
            x_s = ddim_step(schedule, x_t, f, t, s)
        with one_mask(self.student):
            with torch.no_grad():
                target = torch.where(tau_s > 0, self.student(x_s, s, c), f)
            F = self.student(x_t, t, c)
        w = inverse_length(schedule.noise_level(t), tau_s)
        huber = config.metric == "pseudo_huber"
        d = partial(pseudo_huber, c=config.huber_c) if huber else self.distances[config.metric]
        yield self.student, d(F, target, w)

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        e, F = self.config.boundary, self.student
        return multistep(
            ConsistencyFunction(F.denoiser, e, SIGMA_DATA) if e else F, self.sampling_times(nfe), noise, nfe, c
        )


@hookimpl(api=2)
def register_methods(register) -> None:
    register(EasyConsistencyTuning)
