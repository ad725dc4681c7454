"""Reflow: straight paths from noise to the teacher's samples, which few steps of Euler's method can follow.

Liu, Gong & Liu 2022, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
arXiv:2209.03003, one round of algorithm 1. The first flow is the teacher's ODE, as in InstaFlow (Liu et al. 2023,
arXiv:2309.06380). Data-free. The paper's time runs from noise to data; here, as everywhere, t = 0 is data:

    x_0 = M(eps) = ODE-Solver(teacher, eps),   x_T = T eps                                   (coupling)
    x_t = x_0 + t/T (x_T - x_0),   t in [t_low, T]                                           (straight path)
    L   = E | (x_T - x_0)/T - v(x_t, t) |^2,   v(x, t) = (x - f(x, t)) / t                   (eq. 1)
    x_s = x_t + (s - t) v(x_t, t)                                                            (Euler)

At the optimum v(x_T, T) = (x_T - M(eps))/T: one step gives M(eps). For t < T it is a mean over the paths through x_t:
if no two cross, as in one dimension, any number of steps is exact. A second phase distils the flow into k steps: L, or
d(f, x_0), at t = T/k, 2T/k, ..., T, with the same pairs or, as published, with the flow's own, made from new eps.

| symbol | meaning                                                                                 | shape      |
|--------|-----------------------------------------------------------------------------------------|------------|
| eps    | noise                                                                                   | (B,C,H,W)  |
| x_0    | M(eps), the teacher's sample, or the flow's: the end of the path                        | (B,C,H,W)  |
| T, x_T | t_max of the schedule x_t = (1 - t) x_0 + t eps: a float, almost 1; start of sampling   | (B,C,H,W)  |
| t, s   | times, s < t                                                                            | (B,1,1,1)  |
| f, v   | student as a denoiser, and its velocity dx/dt: at first the teacher's                   | (B,C,H,W)  |
| c      | condition: class and guidance of the teacher                                            | of a batch |

With uniform t hardly any pair has t near T, where one step is taken. u_shaped is the distribution of Lee, Lin & Fanti
2024, "Improving the Training of Rectified Flows", arXiv:2405.20320: p(t) ~ e^(at) + e^(a(1-t)) with a = 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, Phase, Teacher, UserError, Workspace, hookimpl, option
from distillbench.diffusion import DISTANCE_NAMES, SAMPLERS, Solver, mean_square, time_like, x_at_t_max
from distillbench.options import Among, Between, require_between, require_one_of, require_positive

A = 4.0  # of u_shaped times
SMALLEST_ALPHA = 1e-3  # at T, of a student that predicts eps: the error of its velocity there is 1/alpha times as large


class Reflow(Method):
    name, label, title = "reflow", "reflow", "rectified flow"
    paper, needs_data, can_start_fresh, inputs = "Liu et al. 2022, arXiv:2209.03003", False, True, "pairs"

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam, in both phases", search=Between(3e-4, 1e-2, log=True))
        schedule: str = option("flow_matching", "noise schedule that it works on; no other is possible")
        steps: int = option(64, "N, steps of the teacher's sampler", search=Among([16, 32, 64]))
        solver: str = option("ddim", f"the teacher's sampler, SAMPLER or SAMPLER/GRID: {', '.join(SAMPLERS)}")
        pairs: int = option(32_768, "noise-image pairs made before training", search=Among([8192, 16_384, 32_768]))
        times: str = option("u_shaped", "u_shaped t, or uniform (the paper)", search=Among(["u_shaped", "uniform"]))
        t_low: float = option(1e-3, "smallest t of training, as released", search=Between(1e-4, 1e-1, log=True))
        distil_share: float = option(0.0, "budget of distillation, relative to reflow", search=Among([0.0, 0.25, 1.0]))
        distil_steps: int = option(1, "k, number of steps that the flow is distilled into")
        distil_pairs: str = option("teacher", "for distillation: the teacher's again, or own, of the flow (published)")
        distil_metric: str = option("l2", f"L again (l2), or f is compared with x_0: {', '.join(DISTANCE_NAMES)}")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_one_of(self, "schedule", ("flow_matching",))
            require_one_of(self, "times", ("u_shaped", "uniform"))
            require_positive(self, "steps", "pairs", "distil_steps")
            require_one_of(self, "distil_metric", DISTANCE_NAMES)
            require_one_of(self, "distil_pairs", ("teacher", "own"))
            require_between(self, 1e-4, 0.1, "t_low")
            require_between(self, 0, float("inf"), "distil_share")
            if not Solver.parse(self.solver).deterministic:
                raise UserError(f"solver must be deterministic, got {self.solver!r}, which adds noise of its own")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        self.T, self.t_low = teacher.schedule.t_max, max(config.t_low, teacher.schedule.t_min)
        if self.student.prediction == "eps" and 1 - self.T < SMALLEST_ALPHA:
            raise UserError("reflow: eps does not give a velocity at t_max (1/alpha); take an x0 or v teacher")
        if config.distil_share:
            self.flow = teacher.student().freeze()  # the average of the first phase

    def phases(self) -> list[Phase]:
        return [Phase("reflow"), Phase("distil", share)] if (share := self.config.distil_share) else [Phase("reflow")]

    def start_phase(self, index: int) -> None:
        self.distils = index == 1

    def end_phase(self, index: int, average: nn.Module) -> None:
        if self.config.distil_share and index == 0:
            self.flow.load_state_dict(average.state_dict())
            self.student.load_state_dict(average.state_dict())  # distillation starts from the flow

    def make_pairs(self, workspace: Workspace, teacher: Teacher, flow: nn.Module | None = None) -> None:
        """eps and x_0 = M(eps), by the teacher or by `flow`, in N steps on the schedule of `teacher`."""
        f, solver, steps = flow or teacher.denoise, Solver.parse(self.config.solver), self.config.steps
        solver.check(teacher.schedule, steps)
        recipe = {"solver": solver.name, "steps": steps, "schedule": self.config.schedule if flow else ""}  # as others
        M = lambda eps, c: solver.solve(lambda x, t: f(x, t, c), teacher.schedule, eps, steps)
        self.store = workspace.pairs(M, self.config.pairs, recipe, flow)

    def prepare(self, workspace: Workspace) -> None:
        self.make_pairs(workspace, self.teacher.native)  # on its own schedule, whichever one training is on

    def prepare_phase(self, index: int, workspace: Workspace) -> None:
        if index == 1 and self.config.distil_pairs == "own":
            self.make_pairs(workspace, self.teacher, self.flow)

    def v(self, flow: nn.Module, x_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        return (x_t - flow(x_t, t, c)) / t.to(x_t)

    def time(self, batch: Batch) -> Tensor:
        """(B,1,1,1), between t_low and T."""
        if self.distils:
            return batch.integers(1, (k := self.config.distil_steps) + 1).double() * (self.T / k)
        u = batch.uniform()
        if self.config.times == "u_shaped":  # by its inverse distribution function
            u = 0.5 + torch.asinh((2 * u - 1) * math.sinh(A / 2)) / A
        return self.t_low + u * (self.T - self.t_low)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        eps, x_0, c = self.store.read(batch.integers(0, len(self.store)))
        t, x_T, metric = self.time(batch), x_at_t_max(self.teacher.schedule, eps), self.config.distil_metric
        x_t = x_0 + (t / self.T).to(x_0) * (x_T - x_0)
        if self.distils and metric != "l2":
            yield self.student, self.distances[metric](self.student(x_t, t, c), x_0)
        else:
            yield self.student, mean_square((x_T - x_0) / self.T, self.v(self.student, x_t, t, c))  # (eq. 1)

    def supports(self, nfe: int) -> bool:
        return nfe >= 1

    def _distilled(self, nfe: int) -> bool:
        return not self.config.distil_share or nfe == self.config.distil_steps  # otherwise the first phase's flow

    def ready(self, nfe: int, phase: int) -> bool:
        return self.supports(nfe) and (self._distilled(nfe) or phase == 1)

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        flow, x = self.student if self._distilled(nfe) else self.flow, x_at_t_max(self.teacher.schedule, noise(0))
        for t, s in pairwise(torch.linspace(self.T, 0, nfe + 1, dtype=torch.float64).tolist()):
            x = x + (s - t) * self.v(flow, x, time_like(x, t), c)
        return x


@hookimpl(api=2)
def register_methods(register) -> None:
    register(Reflow)
