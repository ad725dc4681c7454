"""MeanFlow: a network of two times learns the average velocity of the ODE between them, and so jumps of any length.

Geng, Deng, Bai, Kolter & He 2025, "Mean flows for one-step generative modeling", arXiv:2505.13447. In flow-matching
coordinates z = (1-q) x_0 + q eps with q = tau / (1 + tau), at equal noise level tau on any schedule:

    v = (z - f) / q,   v(z, p, q) = (1/(q-p)) int_p^q v dq      (average velocity, eq. 3; p < q is the time of s)
    v(z, p, q) = v - (q-p) dv(z, p, q)/dq                       (MeanFlow identity, eq. 6)
    L = E |e|^2 / sg[|e|^2 + c]^power,  e = v_theta - sg[v - (q-p) dv_theta/dq]             (eqs. 9 and 22)

Written with the denoiser G of two times that gives the average velocity, v_theta = (z - G) / q, and in lam, with
d/dq = 1/(q (1-q)) d/dlam:

    e = (G - G*) / q,   G* = f + (1 - p/q) (G - f - dG/dlam / (1-q));   a jump from t to s is DDIM's step with G

| symbol | meaning                                                               | shape     |
|--------|-----------------------------------------------------------------------|-----------|
| t, s   | times of the schedule, s <= t; lam = log tau                          | (B,1,1,1) |
| q, p   | flow-matching times of t and s, q = sigmoid(lam)                      | (B,1,1,1) |
| f      | the teacher's data prediction at x_t (`source=teacher`), or x_0       | (B,C,H,W) |
| G      | G(x_t, t, s): the student; at first its teacher, for every s          | (B,C,H,W) |
| dG     | dG/dlam along the ODE through x_t, at constant s                      | (B,C,H,W) |

dG is a finite difference in lam by default: the paper's forward-mode product is `derivative=exact`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, Teacher, UserError, hookimpl, option
from distillbench.diffusion import ddim_step, derivative, tangent, time_like
from distillbench.networks import TwoTimes
from distillbench.options import require_between, require_one_of, require_positive


class MeanFlow(Method):
    name = "meanflow"
    paper = "Geng et al. 2025, arXiv:2505.13447"
    needs_data = True
    student: TwoTimes

    @dataclass
    class Config(MethodConfig):
        source: str = option("teacher", "f: of the teacher, or x_0 of the data")
        derivative: str = option("finite", "dG: finite differences (two evaluations), or exact (torch.func.jvp)")
        step: float = option(1e-2, "h of the finite differences, in lam")
        ratio: float = option(0.75, "share of images with s < t; the others learn f (the paper: .25)")
        power: float = option(0.0, "of the adaptive weight; 0: squared error (the paper: 1)")
        c: float = option(1e-2, "added to |e|^2 in the adaptive weight")
        p_mean: float = option(-0.4, "mean of logit q, normal within sigma_min and sigma_max")
        p_std: float = option(1.0, "standard deviation of logit q")
        uniform: float = option(0.5, "share of times that are uniform in q instead: the normal never draws t_max")
        sigma_min: float = option(0.002, "smallest noise level")
        sigma_max: float = option(80.0, "largest noise level, where sampling starts")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "source", ("teacher", "data"))
            require_one_of(self, "derivative", ("finite", "exact"))
            require_positive(self, "step", "p_std", "sigma_min", "sigma_max", "c")
            require_between(self, 0, 1, "ratio", "uniform")
            require_between(self, 0, math.inf, "power")
            if self.sigma_min >= self.sigma_max:
                raise UserError(f"sigma_min must be below sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if config.source == "data" and teacher.conditioning.guided:
            raise UserError("source=data does not use the teacher and cannot be guided: leave guidance at 1")
        low, high = teacher.schedule.lam_range  # differences reach h beyond a time
        self.levels = teacher.schedule.restricted(
            max(low + config.step, math.log(config.sigma_min)), min(high - config.step, math.log(config.sigma_max))
        )
        self.student = TwoTimes(teacher.student(), in_lambda=True)

    def time(self, batch: Batch) -> Tensor:
        """A random time of each image, (B,1,1,1)."""
        p, q = torch.sigmoid(torch.tensor(self.levels.lam_range)).tolist()
        uniform = self.levels.t_of_lam(torch.logit(batch.uniform(p, q)))
        normal = self.levels.lognormal(batch.uniform(), self.config.p_mean, self.config.p_std)
        return torch.where(batch.uniform() < self.config.uniform, uniform, normal)

    def times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """t and s <= t, each (B,1,1,1)."""
        one, other = self.time(batch), self.time(batch)
        t = torch.maximum(one, other)
        return t, torch.where(batch.uniform() < self.config.ratio, torch.minimum(one, other), t)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        config, schedule = self.config, self.teacher.schedule
        x_0, eps, c = batch.x_0, batch.noise(), batch.c
        t, s = self.times(batch)
        x_t = schedule.alpha(t) * x_0 + schedule.sigma(t) * eps
        with torch.no_grad():
            f = self.teacher.denoise(x_t, t, c) if config.source == "teacher" else x_0
            along = tangent(schedule, x_t, t, f)
        exact = config.derivative == "exact"
        G, dG = derivative(self.student, (x_t, t), along, s, c, exact=exact, step=config.step)
        e = (G - self.target(G.detach(), dG, f, t, s)) / torch.sigmoid(schedule.lam(t)).to(G.dtype)
        square = e.square().sum(dim=(1, 2, 3))
        yield self.student, (square / (square.detach() + config.c) ** config.power).mean()

    def target(self, G: Tensor, dG: Tensor, f: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """G*, (B,C,H,W)."""
        q, p = (torch.sigmoid(self.teacher.schedule.lam(r)) for r in (t, s))
        share, scale = (1 - p / q).to(G.dtype), (1 / (1 - q)).to(G.dtype)
        return f + share * (G - f - scale * dG)

    def supports(self, nfe: int) -> bool:
        return nfe >= 1

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        low, high = self.levels.lam_range
        q = torch.linspace(0, 1, nfe + 1, dtype=torch.float64) * torch.sigmoid(torch.tensor(high).double())
        schedule, times = self.teacher.schedule, self.levels.t_of_lam(torch.logit(q).clamp(low, high))
        t = time_like(noise(0), times[-1])
        x = schedule.sigma(t) * noise(0)
        for k in range(nfe - 1, 0, -1):
            s = time_like(x, times[k])
            x, t = ddim_step(schedule, x, self.student(x, t, s, c), t, s), s
        return self.student(x, t, time_like(x, times[0]), c)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(MeanFlow)
