"""Inductive moment matching: a student of any number of steps, whose distributions at s agree from t and from r < t.

Zhou, Ermon & Song 2025, "Inductive Moment Matching", arXiv:2503.07565; training as two reimplementations have it.
The teacher is only what the student starts from. Times are those of flow matching between images and noise of equal
std, as in the paper; networks are evaluated at equal noise level, sd eta.

    x_t = (1 - t) x_0 + t sd eps,   x_r from the same x_0 and eps,   eta(t) = t / (1 - t)
    f(x_t, t, s) = s/t x_t + (1 - s/t) D(x_t, t, s)                         (DDIM from t to s; f = x_t at s = t)
    r(s, t) = max(s, min(t - 1e-4, t of eta(t) - 160 / 2^k))
    L = E w(t) 1/M^2 sum_ij [ k(y_i, y_j) + k(y'_i, y'_j) - 2 k(y_i, y'_j) ],   y = f(x_t, t, s),  y' = sg[f(x_r, r, s)]
    k(y, y') = exp( -max(|y - y'|, 1e-8) / (D (t - s) sd) )
    w(t) = 1/2 sigmoid(b - logsnr) (-dlogsnr/dt) (1 - t)^a / (t^2 + (1 - t)^2),   logsnr = -2 log eta

The M images of a group share s, r and t. Terms i = j, of one x_0 and eps, are a consistency loss of weight 1/M, with a
gradient at the exact map where y' is random given x_t. `diagonal=false`: i != j of equal classes, over M (M - 1).

| symbol   | meaning                                                                  | shape             |
|----------|--------------------------------------------------------------------------|-------------------|
| s, r, t  | times, s <= r < t, the same in a group                                   | (B,1,1,1) float64 |
| D        | student, x_0 from x_t on the way to s; in k: the number of pixels        | (B,C,H,W)         |
| y, y'    | student's images at s; y' has no gradient                                | (B,C,H,W)         |
| sd, M, k | std of the data; images of a group; 2^k steps of eta lead from 160 to 0  |                   |
| c        | class                                                                    | of a batch        |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, Teacher, UserError, hookimpl, option
from distillbench.diffusion import one_mask, time_like
from distillbench.networks import TwoTimes
from distillbench.options import Among, Between, require_between, require_one_of, require_positive

ETA_MAX, SMALLEST_STEP, SMALLEST_DISTANCE = 160.0, 1e-4, 1e-8


class InductiveMomentMatching(Method):
    name, label, title = "imm", "IMM", "inductive moment matching"
    paper = "Zhou et al. 2025, arXiv:2503.07565"
    needs_data, uses_teacher = True, False
    can_start_fresh = True
    student: TwoTimes

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam (published: 1e-4)", search=Between(3e-4, 1e-2, log=True))
        grad_clip: float = option(0.0, "largest norm of gradients; 0: not clipped, as weights differ by factors of 100")
        schedule: str = option("flow_matching", "noise schedule that it works on; no other is possible")
        start: str = option("teacher", "weights that the student starts from: the teacher's, or fresh (published)")
        group_size: int = option(4, "M, images of a group, a divisor of the batch's", search=Among([4, 8, 16]))
        diagonal: bool = option(True, "whether the sum has its terms i = j (published); false: the unbiased estimator")
        k: int = option(5, "2^k steps of eta from 160 to 0 (published: 12, 15 for CIFAR-10)", search=Between(3, 9))
        a: float = option(0.0, "power of 1 - t in the weight (published: 1 or 2)", search=Among([0.0, 1.0, 2.0]))
        b: float = option(2.0, "shift of log SNR in the weight (published: 4 or 5)", search=Between(0.0, 5.0))
        t_max: float = option(0.994, "largest t, where sampling starts")
        to_image: float = option(0.5, "ours: share of groups with the least s (published: 0)", search=Between(0.0, 0.8))
        sigma_data: float = option(0.5, "sd, standard deviation of the data")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "schedule", ("flow_matching",))
            require_one_of(self, "start", ("fresh", "teacher"))
            require_between(self, 1 if self.diagonal else 2, float("inf"), "group_size")
            require_between(self, 1, 30, "k")
            require_between(self, 0.01, 0.9999, "t_max")
            require_between(self, 0, 0.9, "to_image")
            require_positive(self, "sigma_data")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if teacher.conditioning.guided:
            raise UserError("imm learns from data and cannot be guided: leave guidance at 1")
        self.student = TwoTimes(teacher.student(fresh=config.start == "fresh"))
        ends = torch.tensor(teacher.schedule.lam_range, dtype=torch.float64) - math.log(config.sigma_data)
        self.low, self.high = ends.sigmoid().clamp(max=config.t_max).tolist()  # as far as the schedule reaches

    @property
    def group_size(self) -> int:
        return int(self.config.group_size)

    def f(self, x: Tensor, t: Tensor, s: Tensor, c: Condition) -> Tensor:
        schedule = self.teacher.schedule
        at, to = (schedule.t_of_lam(math.log(self.config.sigma_data) + q.logit()) for q in (t, s))
        D = self.student(schedule.alpha(at) / (1 - t).to(x) * x, at, to, c)
        return torch.lerp(D, x, (s / t).to(x))

    def r(self, s: Tensor, t: Tensor) -> Tensor:
        eta = (t / (1 - t) - ETA_MAX / 2**self.config.k).clamp(min=0)
        return torch.maximum(s, torch.minimum(t - SMALLEST_STEP, eta / (1 + eta)))

    def w(self, t: Tensor) -> Tensor:
        shape = (1 - t) ** self.config.a / (t**2 + (1 - t) ** 2)
        return torch.sigmoid(self.config.b + 2 * t.logit()) / (t * (1 - t)) * shape  # -dlogsnr/dt = 2 / (t (1 - t))

    def mmd(self, y: Tensor, target: Tensor, h: Tensor, c: Condition) -> Tensor:
        """Of each group, (B/M,); h (B,1,1,1) is the kernel's width for each pixel."""
        M = self.group_size
        y, target = (x.flatten(1).unflatten(0, (-1, M)) for x in (y, target))
        width = y.shape[2] * h[::M].flatten(1, 2)

        def k(a: Tensor, b: Tensor) -> Tensor:
            square = (a[:, :, None] - b[:, None]).square().sum(dim=3)
            return torch.exp(-square.clamp(min=SMALLEST_DISTANCE**2).sqrt() / width)

        pairs = k(y, y) + k(target, target) - 2 * k(y, target)  # (B/M,M,M)
        if self.config.diagonal:
            return pairs.mean(dim=(1, 2))
        counted = 1 - torch.eye(M, device=y.device)
        if c.labels is not None:
            counted = counted * (c.labels.view(-1, M, 1) == c.labels.view(-1, 1, M))
        return (counted * pairs).sum(dim=(1, 2)) / (M * (M - 1))

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        config, M, x_0, c = self.config, self.group_size, batch.x_0, batch.c
        noise = config.sigma_data * batch.noise()
        t, u = (q[::M].repeat_interleave(M, dim=0) for q in (batch.uniform(self.low, self.high), batch.uniform()))
        s = self.low + ((u - config.to_image) / (1 - config.to_image)).clamp(min=0) * (t - self.low)
        r = self.r(s, t)
        x_t, x_r = (torch.lerp(x_0, noise, q.to(x_0)) for q in (t, r))
        with one_mask(self.student):
            with torch.no_grad():
                target = self.f(x_r, r, s, c)
            y = self.f(x_t, t, s, c)
        h, w = ((t - s).clamp(min=SMALLEST_STEP) * config.sigma_data).to(y), self.w(t[::M]).flatten().to(y)
        yield self.student, (w * self.mmd(y, target, h, c)).mean()

    def supports(self, nfe: int) -> bool:
        return nfe >= 1

    def keeps_noise(self, nfe: int) -> bool:
        return False  # only distributions are compared

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        times = torch.linspace(self.high, 0, nfe + 1, dtype=torch.float64).tolist()
        x = self.high * self.config.sigma_data * noise(0)
        for t, s in pairwise(times):  # down equal steps, to 0
            x = self.f(x, time_like(x, t), time_like(x, s), c)
        return x


@hookimpl(api=2)
def register_methods(register) -> None:
    register(InductiveMomentMatching)
