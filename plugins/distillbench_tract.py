"""TRACT: from any time in a group of the teacher's steps, a student learns to reach the group's end in one step.

Berthelot et al. 2023, arXiv:2303.04248, as released (apple/ml-tract). In the phase from T_p to T_p+1 steps a
group is S = T_p / T_p+1 steps of the grid. t is uniform on the grid, t' the next time down, t'' the end of t's group:

    x_t   = alpha_t x_0 + sigma_t eps;          x_t' = DDIM(x_t, f(x_t, t), t -> t')               (teacher f)
    x_t'' = DDIM(x_t', g(x_t', t'), t' -> t'')  if t' > t'',  x_t' otherwise                  (self-teacher g)
    x~    = (sigma_t'' x_t - sigma_t x_t'') / (alpha_t sigma_t'' - alpha_t'' sigma_t)
    L     = w | x~ - x^(x_t, t) |^2,   w = max(SNR, 1), SNR + 1 or SNR + 4, SNR = 1 / tau^2;      student x^
    weights of g += (weights of x^ - weights of g) (1 - mu) / (1 - mu^k)               after the k-th update

x~ is the x_0 for which one DDIM step gives x_t''. Without x_t and x_t'' it is computed without cancellation:

    x~ = a f + (1 - a) g,   a = tau'' (tau - tau') / (tau' (tau - tau'')),   tau = sigma_t / alpha_t

At the grid's end tau'' is 0, as in the EDM variant: the last step ends on the data prediction. (The release on log SNR
ends at tau'' = e^-10: up to .5 % of the loss.) Heun's step, of the EDM variant, is DDIM's with the prediction
f + tau / (2 tau') (f(x_t', t') - f), and DDIM's own if it ends at tau' = 0. Neither f nor g has dropout.
After a phase the student's average becomes the teacher; the student, its optimiser, g and k continue.

| symbol         | meaning                                                       | shape     |
|----------------|---------------------------------------------------------------|-----------|
| t > t' >= t''  | times t_j, t_j-1, t_e of the phase's grid; j > e, S divides e | (B,1,1,1) |
| tau            | noise level, float64                                          | (B,1,1,1) |
| f, g, x^       | data predictions: teacher, self-teacher, student; see `clip`  | (B,C,H,W) |
| x~             | target                                                        | (B,C,H,W) |
| k              | updates of the self-teacher, over all phases                  | () int64  |
| c              | condition; only the first teacher is guided                   | of a batch|
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, Phase, Teacher, UserError, Workspace, hookimpl, option
from distillbench.diffusion import SNR_WEIGHTS, TIME_GRIDS, check_heun, ddim, ddim_step, mean_square, x_at_top
from distillbench.networks import MovingAverage
from distillbench.options import Among, Between, require_fraction, require_one_of


class Tract(Method):
    name, label, paper, needs_data = "tract", "TRACT", "Berthelot et al. 2023, arXiv:2303.04248", True
    k: Tensor
    times: Tensor

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        lr_decay: str = option("linear", "constant (released), linear or cosine", search=Among(["constant", "linear"]))
        steps: list[int] = option([16, 2, 1], "T_0, T_1, ...: steps of the first teacher, then of each phase's student")
        times: str = option("uniform", f"grid of the first teacher's steps: {', '.join(TIME_GRIDS)}")
        teacher_step: str = option("ddim", "the first teacher's: ddim, or heun (two evaluations; on times: karras)")
        mu: float = option(0.5, "decay of the self-teacher; 0: the student itself", search=Among([0.0, 0.5, 0.9, 0.99]))
        weight: str = option("truncated_snr", "max(SNR, 1), snr_plus_one, or edm, SNR + 4", search=Among(SNR_WEIGHTS))
        clip: bool = option(False, "clip the predictions of DDIM's steps, also in sampling, to [-1, 1] (released)")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_fraction(self, "mu")
            require_one_of(self, "weight", SNR_WEIGHTS)
            require_one_of(self, "times", TIME_GRIDS)
            require_one_of(self, "teacher_step", ("ddim", "heun"))
            if len(self.steps) < 2 or not all(a > b > 0 and a % b == 0 for a, b in pairwise(self.steps)):
                raise UserError(f"steps must fall, each a divisor of the one before, such as 16,4,1, got {self.steps}")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if self.student.prediction == "eps":
            raise UserError("tract: a one-step student cannot predict eps (1/alpha at t_max); take an x0 or v teacher")
        self.register_buffer("times", TIME_GRIDS[config.times](teacher.schedule, config.steps[0]), persistent=False)
        self.self_teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.following = MovingAverage(self.self_teacher, self.student)
        self.register_buffer("k", torch.zeros((), dtype=torch.int64))
        self.updates = 0  # k as a Python number, read without waiting for the device
        self.register_load_state_dict_post_hook(lambda method, _: setattr(method, "updates", int(method.k)))
        self.frozen_copy = teacher.frozen_copy()  # copy that takes an average's weights: the teacher of later phases
        self.students = nn.ModuleDict({str(n): teacher.student().freeze() for n in config.steps[1:]})

    def prepare(self, workspace: Workspace) -> None:
        if self.config.teacher_step == "heun":
            check_heun(self.teacher.schedule, self.times[1:])

    def phases(self) -> list[Phase]:
        return [Phase(f"{a} to {b} steps", fresh=a == self.config.steps[0]) for a, b in pairwise(self.config.steps)]

    def start_phase(self, index: int) -> None:
        before, self.n = self.config.steps[index : index + 2]
        self.grid, self.group = self.grid_of(before), before // self.n
        self.taught_by = self.teacher.denoise if index == 0 else self.frozen_copy.forward
        self.heun = index == 0 and self.config.teacher_step == "heun"  # later teachers have learnt DDIM's jumps

    def grid_of(self, n: int) -> Tensor:
        """The first teacher's grid, thinned to n steps."""
        return self.times[:: self.config.steps[0] // n]

    def clipped(self, x_0: Tensor) -> Tensor:
        return x_0.clamp(-1, 1) if self.config.clip else x_0

    def target(self, x_t: Tensor, j: Tensor, e: Tensor, times: tuple[Tensor, ...], c: Condition) -> Tensor:
        """x~ for x_t at t_j, whose group ends at t_e."""
        schedule, (t, t_1, t_2) = self.teacher.schedule, times
        tau, tau_1, tau_2 = (schedule.noise_level(r) for r in (t, t_1, t_2))
        f = self.taught_by(x_t, t, c) if self.heun else self.clipped(self.taught_by(x_t, t, c))
        if self.heun:
            f_1 = self.taught_by(ddim_step(schedule, x_t, f, t, t_1), t_1, c)
            f = f + (tau / (2 * tau_1)).to(f.dtype) * (f_1 - f)
        g = self.clipped(self.self_teacher(ddim_step(schedule, x_t, f, t, t_1), t_1, c))
        a = torch.where(e == 0, 0.0, tau_2 * (tau - tau_1) / (tau_1 * (tau - tau_2))).to(f.dtype)
        return torch.where(j - 1 == e, f, torch.lerp(g, f, a))  # a f + (1 - a) g

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        x_0, eps, c, j = batch.x_0, batch.noise(), batch.c, batch.integers(1, len(self.grid))
        e = (j - 1) // self.group * self.group
        t, *_ = times = self.grid[j], self.grid[(j - 1).clamp(min=1)], self.grid[e]  # t' = t where x~ is f
        alpha, sigma = self.teacher.schedule.alpha(t), self.teacher.schedule.sigma(t)
        x_t = alpha * x_0 + sigma * eps
        with torch.no_grad():
            x_tilde = self.target(x_t, j, e, times, c)
        w = SNR_WEIGHTS[self.config.weight]((alpha / sigma) ** 2)
        yield self.student, mean_square(self.student(x_t, t, c), x_tilde, w)

    def after_step(self) -> None:
        self.k += 1
        self.updates += 1
        self.following.move((1 - self.config.mu) / (1 - self.config.mu**self.updates))

    def end_phase(self, index: int, average: nn.Module) -> None:
        for network in (self.frozen_copy, self.students[str(self.n)]):
            network.load_state_dict(average.state_dict())

    def supports(self, nfe: int) -> bool:
        return nfe in self.config.steps[1:]

    def ready(self, nfe: int, phase: int) -> bool:
        return nfe in self.config.steps[1 : phase + 1]  # a phase's student is stored when it ends

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        schedule, grid, student = self.teacher.schedule, self.grid_of(nfe), self.students[str(nfe)]
        return ddim(lambda x, t: self.clipped(student(x, t, c=c)), schedule, x_at_top(schedule, noise(0), grid), grid)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(Tract)
