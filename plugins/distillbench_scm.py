"""Simplified continuous-time consistency models: consistency along the ODE itself, without steps between times.

Lu & Song 2024, "Simplifying, stabilizing and scaling continuous-time consistency models", arXiv:2410.11081. In its
TrigFlow time (theta), tan theta = tau / sd and x = cos(theta) x^, the consistency function is the denoiser:

    f(x_t, t) = cos(theta) x - sin(theta) sd F                                   (section 3.1; exact at tau = 0)
    dx/dtheta = (cos(theta) x - D) / sin(theta);  cos(theta) sin(theta) d/dtheta = d/dlam, lam = log tau
    g  = cos(theta) df/dtheta = df/dlam / sin(theta)
       = (cos^2(theta) (f - D) + [df/dlam - cos^2(theta) (f - D)]) / sin(theta)  [...] is multiplied by r, growing to 1
    g <- g / (|g| + c)                                                           (tangent normalisation, section 4.1)
    L  = E e^-u / tau  |F - sg[F] - g|^2 / pixels  +  u                          (adaptive weighting u(t), section 4.1)

So one step moves f against df/dlam: it becomes constant along trajectories. sCD (`source=teacher`) follows the ODE of
the teacher's D, sCT (`source=data`) the one whose D is x_0, which is the same on average.

| symbol     | meaning                                                             | shape            |
|------------|---------------------------------------------------------------------|------------------|
| t, theta   | time of the schedule; TrigFlow's                                    | (B,1,1,1)        |
| tau, sd    | noise level sigma_t / alpha_t; standard deviation of the data       | (B,1,1,1), float |
| f, D       | the student as a denoiser; the teacher's f, or x_0                  | (B,C,H,W)        |
| df         | df/dlam along the ODE through x_t                                   | (B,C,H,W)        |
| F, g       | sd F = (cos(theta) x - f) / sin(theta); its tangent                 | (B,C,H,W)        |
| u          | learned log-variance of the loss at each time                       | (B,1,1,1)        |

df is a finite difference in lam by default: the paper's forward-mode product is `derivative=exact`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Denoiser, Method, MethodConfig, Teacher, UserError, hookimpl, option
from distillbench.diffusion import derivative, tangent, time_like
from distillbench.options import require_between, require_one_of, require_positive


class ConsistencyStudent(nn.Module):
    """f and the weight u of its loss, which are trained together."""

    def __init__(self, f: Denoiser) -> None:
        super().__init__()
        self.f = f
        self.log_variance = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), output := nn.Linear(64, 1))
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

    def u(self, lam: Tensor) -> Tensor:
        """(B,1,1,1)."""
        out: Tensor = self.log_variance(lam.view(-1, 1).to(torch.get_default_dtype()))
        return out.view(-1, 1, 1, 1)


class ContinuousConsistency(Method):
    name = "scm"
    paper = "Lu & Song 2024, arXiv:2410.11081"
    needs_data = True
    student: ConsistencyStudent
    steps: Tensor

    @dataclass
    class Config(MethodConfig):
        source: str = option("teacher", "D: of the teacher (sCD), or x_0 of the data (sCT)")
        derivative: str = option("finite", "df: finite differences (two evaluations), or exact (torch.func.jvp)")
        step: float = option(1e-2, "h of the finite differences, in lam")
        normalise: float = option(0.1, "c of g / (|g| + c); 0: g as it is, for random targets on few pixels")
        warmup_steps: int = option(0, "training steps in which r grows from 0 to 1 (the paper: 10,000)")
        adaptive: bool = option(True, "learn u; false: u = 0")
        p_mean: float = option(-1.0, "mean of ln tau in training, log-normal within sigma_min and sigma_max")
        p_std: float = option(1.4, "standard deviation of ln tau in training")
        middle: float = option(0.821, "noise level tau at which a second step starts")
        sigma_min: float = option(0.002, "smallest noise level")
        sigma_max: float = option(80.0, "largest noise level, where sampling starts")
        sigma_data: float = option(0.5, "sd, standard deviation of the data")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "source", ("teacher", "data"))
            require_one_of(self, "derivative", ("finite", "exact"))
            require_positive(self, "step", "p_std", "sigma_min", "sigma_data")
            require_between(self, 0, math.inf, "normalise", "warmup_steps")
            if not self.sigma_min < self.middle < self.sigma_max:
                raise UserError(f"middle must lie between sigma_min and sigma_max, got {self.middle}")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if config.source == "data" and teacher.conditioning.guided:
            raise UserError("source=data does not use the teacher and cannot be guided: leave guidance at 1")
        low, high = teacher.schedule.lam_range  # differences reach h beyond a time
        self.levels = teacher.schedule.restricted(
            max(low + config.step, math.log(config.sigma_min)), min(high - config.step, math.log(config.sigma_max))
        )
        self.student = ConsistencyStudent(teacher.student())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        config, schedule, sd, student = self.config, self.teacher.schedule, self.config.sigma_data, self.student
        x_0, eps, c = batch.x_0, batch.noise(), batch.c
        t = self.levels.lognormal(batch.uniform(), config.p_mean, config.p_std)
        x_t = schedule.alpha(t) * x_0 + schedule.sigma(t) * eps
        with torch.no_grad():
            D = self.teacher.denoise(x_t, t, c) if config.source == "teacher" else x_0
            along = tangent(schedule, x_t, t, D)
        exact = config.derivative == "exact"
        f, df = derivative(student.f, (x_t, t), along, c, exact=exact, step=config.step)
        tau = schedule.noise_level(t).to(f.dtype)
        sin, cos = (torch.sin(theta := torch.atan(tau / sd)), torch.cos(theta))
        g = self.tangent_of(f.detach(), df, D, sin, cos)
        e = (f - f.detach()) / (sd * sin) + g  # -(F - sg[F] - g)
        u = student.u(schedule.lam(t)) if config.adaptive else torch.zeros_like(tau)
        yield student, (torch.exp(-u) / tau * e.square().mean(dim=(1, 2, 3), keepdim=True) + u).mean()

    def tangent_of(self, f: Tensor, df: Tensor, D: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        """g, (B,C,H,W)."""
        r = (self.steps / self.config.warmup_steps).clamp(max=1) if self.config.warmup_steps else 1.0
        first = cos**2 * (f - D)
        g = (first + r * (df - first)) / sin
        if not self.config.normalise:
            return g
        return g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + self.config.normalise)

    def after_step(self) -> None:
        self.steps += 1

    def supports(self, nfe: int) -> bool:
        return nfe in (1, 2)

    def keeps_noise(self, nfe: int) -> bool:
        return nfe == 1

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        schedule, f = self.teacher.schedule, self.student.f
        t = time_like(noise(0), self.levels.t_max)
        x_0 = f(schedule.sigma(t) * noise(0), t, c)
        if nfe == 1:
            return x_0
        t = schedule.t_of_lam(torch.full_like(t, math.log(self.config.middle)))
        return f(schedule.alpha(t) * x_0 + schedule.sigma(t) * noise(1), t, c)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(ContinuousConsistency)
