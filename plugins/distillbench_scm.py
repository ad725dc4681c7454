"""sCM: consistency models in continuous time, distilled from the teacher (sCD) or trained on data (sCT).

Lu & Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", arXiv:2410.11081, alg. 1.
Noise levels are EDM's, tau = sigma_t / alpha_t, so it works on any schedule: x^ = x_t / alpha_t = x_0 + tau eps. The
paper's angle is theta = atan(tau / sd), its F is -1 times EDM's, and cos sin d/dtheta = d/dlam with lam = log tau:

    f(x_t, t) = cos x - sd sin F,   x = cos x^                        (the student's data prediction; f = x^ at tau = 0)
    g  = cos df/dtheta = ( cos^2 (f - f_T) + r [df/dlam - cos^2 (f - f_T)] ) / sin,     g <- g / (|g| + c)
    L  = E [ e^-u / tau |F - sg[F + g]|^2 / D + u ],   ln tau ~ N(p_mean, p_std^2)                            (eq. 8)

df/dlam is along the path of the data prediction f_T: dx^/dlam = x^ - f_T. With the teacher's f_T that is its
probability-flow ODE (sCD), with f_T = x_0 the path of x_t at constant noise, whose mean given x_t is the ODE (sCT).

| symbol     | meaning                                                                  | shape      |
|------------|--------------------------------------------------------------------------|------------|
| t, tau     | time, noise level                                                        | (B,1,1,1)  |
| sin, cos   | of theta: tau / n and sd / n, n^2 = tau^2 + sd^2                         | (B,1,1,1)  |
| f, F       | student's data prediction, and the output of a network for it            | (B,C,H,W)  |
| f_T        | teacher's data prediction, guided where c says so, or x_0                | (B,C,H,W)  |
| g          | tangent; 0 if f is constant along the path                               | (B,C,H,W)  |
| u          | logarithm of the mean |g|^2 / (tau D) at each time, learned with F       | (B,1,1,1)  |
| r          | grows from 0 to 1 in the first updates (warm-up)                         | (,)        |
| D, c, sd   | pixels; constant of the normalisation; standard deviation of the data    |            |

At the optimum the student is the map of the exact ODE: there is no error of a solver. The features of time are made
smooth, as the paper does, since df/dlam would otherwise be that of the fastest feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Denoiser, MultistepMethod, Teacher, UserError, hookimpl, option
from distillbench.diffusion import (
    ConsistencyFunction,
    derivative,
    karras_times,
    lognormal_time,
    multistep,
    tangent,
)
from distillbench.networks import ScalarEmbedding, smooth_times
from distillbench.options import Between, require_between, require_one_of, require_positive


class WeightedConsistency(ConsistencyFunction):
    """f of a denoiser, which is the denoiser itself (e = 0), and u.

    u starts at -lam, where e^-u / tau = 1: from 0 it would take long until high noise levels have any weight.
    """

    def __init__(self, denoiser: Denoiser, sd: float) -> None:
        super().__init__(denoiser, 0.0, sd)
        self.log_weight = ScalarEmbedding(64, *denoiser.schedule.lam_range)  # zero at first

    def u(self, t: Tensor) -> Tensor:
        lam = self.schedule.lam(t)
        return self.log_weight(lam).mean(dim=1).view(-1, 1, 1, 1) - lam.to(torch.get_default_dtype())


class ContinuousConsistency(MultistepMethod):
    name, label, title = "scm", "sCM", "continuous-time consistency model"
    paper = "Lu & Song 2024, arXiv:2410.11081"
    needs_data = True
    student: WeightedConsistency
    updates: Tensor

    @dataclass
    class Config(MultistepMethod.Config):
        lr: float = option(2e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        source: str = option("teacher", "of f_T: the teacher (sCD), or data, x_0 itself (sCT)")
        smooth: int = option(8, "degree of the polynomials in which the student sees time; 0: as the teacher sees it")
        exact: bool = option(False, "df/dlam by torch.func.jvp instead of a finite difference")
        step: float = option(1e-2, "h, step of the finite difference in lam", search=Between(1e-3, 1e-1, log=True))
        c: float = option(0.1, "constant of the tangent, g / (|g| + c); 0: g", search=Between(0.01, 1.0, log=True))
        warmup: int = option(0, "updates until r = 1 (the paper: 10,000, for large networks)")
        p_mean: float = option(-1.0, "mean of ln tau", search=Between(-2.0, 0.5))
        p_std: float = option(1.4, "standard deviation of ln tau", search=Between(1.0, 2.5))
        sigma_min: float = option(0.002, "smallest noise level")
        sigma_max: float = option(80.0, "largest noise level, where sampling starts")
        sigma_data: float = option(0.5, "sd, standard deviation of the data")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "source", ("teacher", "data"))
            require_positive(self, "step", "p_std", "sigma_min", "sigma_max", "sigma_data")
            require_between(self, 0, float("inf"), "smooth", "c", "warmup")
            if self.sigma_min >= self.sigma_max:
                raise UserError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @property
    def uses_teacher(self) -> bool:
        return self.config.source == "teacher"

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if config.source == "data" and teacher.conditioning.guided:
            raise UserError("scm with source=data cannot be guided: leave guidance at 1, or use source=teacher")
        denoiser = teacher.student()
        self.student = WeightedConsistency(
            smooth_times(denoiser, config.smooth) if config.smooth else denoiser, config.sigma_data
        )
        self.within = teacher.schedule.restricted(math.log(config.sigma_min), math.log(config.sigma_max))
        levels = karras_times(teacher.schedule, 18, config.sigma_min, config.sigma_max)  # of several evaluations
        self.register_buffer("grid", levels, persistent=False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # so far, for r

    def times(self, batch: Batch) -> Tensor:
        return lognormal_time(self.within, batch.uniform(), self.config.p_mean, self.config.p_std)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        config, schedule, x_0, eps, c = self.config, self.teacher.schedule, batch.x_0, batch.noise(), batch.c
        t, sd = self.times(batch), config.sigma_data
        tau = schedule.noise_level(t)
        n = (tau**2 + sd**2).sqrt()
        tau, sin, cos2 = (value.to(x_0) for value in (tau, tau / n, (sd / n) ** 2))
        x_t = schedule.noised(x_0, t, eps)
        with torch.no_grad():
            f_T = x_0 if config.source == "data" else self.teacher.denoise(x_t, t, c)
        along = tangent(schedule, x_t, t, f_T)
        f, df = derivative(self.student, (x_t, t), along, c, exact=config.exact, step=config.step)
        r = ((self.updates + 1) / config.warmup).clamp(max=1).to(x_0) if config.warmup else 1.0
        g = (1 - r) * cos2 * (f.detach() - f_T) / sin + r * df / sin
        if config.c:
            g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + config.c)
        F = -f / (sd * sin)  # less cos x / (sd sin), which F - sg[F + g] does not see
        square = (F - (F.detach() + g)).square().mean(dim=(1, 2, 3), keepdim=True)
        u = self.student.u(t)
        yield self.student, ((-u).exp() / tau * square + u).mean()

    def after_step(self) -> None:
        self.updates += 1

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        return multistep(self.student, self.sampling_times(nfe), noise, nfe, c)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(ContinuousConsistency)
