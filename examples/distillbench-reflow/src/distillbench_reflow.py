"""Reflow: straighten the paths from noise to the teacher's samples, then distil the straight flow into one step.

Liu, Gong & Liu 2022, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
arXiv:2209.03003, algorithm 1. The teacher's probability flow is the first flow, its samples are the coupling (as in
InstaFlow, arXiv:2309.06380). Data-free. The paper's time runs from noise to data; here, as everywhere, t = 0 is data:

    (z_T, x_0)  z_T = sigma_T eps,  x_0 = ODE-Solver(teacher, z_T)                           (coupling)
    z_t = x_0 + t/T (z_T - x_0),  t ~ U[t_low, T]                                            (straight path)
    L   = E | (z_T - x_0)/T - v(z_t, t) |^2,   v(z, t) = (z - f(z, t)) / t                   (eq. 1: reflow)
    z_s = z_t + (s - t) v(z_t, t)                                                            (Euler)
    L   = E | (z_T - x_0)/T - v(z_T, T) |^2                                                  (eq. 1 at t = T: distil)

| symbol | meaning                                                            | shape      |
|--------|--------------------------------------------------------------------|------------|
| eps    | standard normal noise                                              | (B,C,H,W)  |
| T      | t_max of the schedule alpha = 1 - t, sigma = t: 1 - 1e-4, or less  | float      |
| z_T    | where sampling starts                                              | (B,C,H,W)  |
| x_0    | the sample for z_T: the end of its path                            | (B,C,H,W)  |
| z_t    | point of the straight path from x_0 to z_T                         | (B,C,H,W)  |
| t, s   | times, s < t                                                       | (B,1,1,1)  |
| f, v   | student as a denoiser, and its velocity dz/dt                      | (B,C,H,W)  |
| c      | condition: class and guidance of the teacher                       | of a batch |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from distillbench import Batch, Condition, Method, MethodConfig, Phase, Teacher, UserError, Workspace, hookimpl, option
from distillbench.diffusion import SAMPLERS, Solver, time_like, x_at_t_max
from distillbench.options import require_between, require_one_of, require_positive
from torch import Tensor, nn


class Reflow(Method):
    name = "reflow"
    paper = "Liu et al. 2022, arXiv:2209.03003"
    needs_data = False
    can_start_fresh = True

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam, in both phases")
        schedule: str = option("flow_matching", "the method is defined on flow_matching, and on no other schedule")
        steps: int = option(64, "N, steps of the teacher's sampler, and of the flow with distil_from=flow")
        solver: str = option("ddim", f"the teacher's sampler, SAMPLER or SAMPLER/GRID: {', '.join(SAMPLERS)}")
        pairs: int = option(32_768, "noise-image pairs generated before training; 0: new ones in each batch")
        t_low: float = option(1e-3, "smallest t of training, as in the released code")
        distil_share: float = option(0.5, "budget of the distillation, relative to reflow's; 0: no such phase")
        distil_from: str = option("teacher", "samples to distil: teacher (its pairs again), or flow (the paper)")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "steps")
            require_between(self, 0, float("inf"), "pairs", "distil_share")
            require_between(self, 1e-4, 0.1, "t_low")
            require_one_of(self, "schedule", ("flow_matching",))
            require_one_of(self, "distil_from", ("teacher", "flow"))
            if not Solver.parse(self.solver).deterministic:
                raise UserError(f"solver must be deterministic, and {self.solver!r} adds noise")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if self.student.prediction == "eps":
            raise UserError("reflow: eps does not give a velocity at t_max (1/alpha); take an x0 or v teacher")
        self.flow = teacher.student().freeze()  # the straight flow, after the first phase
        self.T, self.t_low = teacher.schedule.t_max, max(config.t_low, teacher.schedule.t_min)

    @property
    def inputs(self) -> str:
        return "pairs" if self.config.pairs else "noise"

    def phases(self) -> list[Phase]:
        distil = [Phase("distil", self.config.distil_share)] if self.config.distil_share else []
        return [Phase("reflow"), *distil]

    def start_phase(self, index: int) -> None:
        self.distils = index == 1

    def solve(self, eps: Tensor, c: Condition) -> Tensor:
        """x_0, the teacher's sample from eps in N steps."""
        solver = Solver.parse(self.config.solver)
        return solver.solve(partial(self.teacher.denoise, c=c), self.teacher.schedule, eps, self.config.steps)

    def prepare(self, workspace: Workspace) -> None:
        solver, count = Solver.parse(self.config.solver), self.config.pairs
        solver.check(self.teacher.schedule, self.config.steps)
        recipe = {"solver": solver.name, "steps": self.config.steps, "schedule": self.config.schedule}
        self.store = workspace.pairs(self.solve, count, recipe) if count else None

    @torch.no_grad()
    def coupling(self, batch: Batch) -> tuple[Tensor, Tensor, Condition]:
        """(z_T, x_0) and their conditioning."""
        if self.distils and self.config.distil_from == "flow":
            z_T, c = x_at_t_max(self.teacher.schedule, batch.noise()), batch.c
            return z_T, self.euler(self.flow, z_T, self.config.steps, c), c
        if self.store is not None:
            eps, x_0, c = self.store.read(batch.integers(0, len(self.store)))
        else:
            eps, c = batch.noise(), batch.c
            x_0 = self.solve(eps, c)
        return x_at_t_max(self.teacher.schedule, eps), x_0, c

    def v(self, f: nn.Module, z_t: Tensor, t: Tensor, c: Condition) -> Tensor:
        """dz/dt at z_t: (z_t - f) / sigma_t, and sigma_t = t."""
        return (z_t - f(z_t, t, c)) / self.teacher.schedule.sigma(t)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        z_T, x_0, c = self.coupling(batch)
        t = time_like(z_T, self.T) if self.distils else batch.uniform(self.t_low, self.T)
        z_t = x_0 + (t / self.T).to(x_0) * (z_T - x_0)
        target = (z_T - x_0) / self.T
        yield self.student, (target - self.v(self.student, z_t, t, c)).square().mean()  # (eq. 1)

    def end_phase(self, index: int, average: nn.Module) -> None:
        if index == 0:
            self.flow.load_state_dict(average.state_dict())
            self.student.load_state_dict(average.state_dict())  # distillation starts from the flow

    def supports(self, nfe: int) -> bool:
        return nfe >= 1

    def ready(self, nfe: int, phase: int) -> bool:
        return nfe == 1 or phase == 1  # the flow exists after its phase

    def euler(self, f: nn.Module, z: Tensor, steps: int, c: Condition) -> Tensor:
        """The end at t = 0 of the path from z = z_T."""
        times = torch.linspace(self.T, 0, steps + 1, dtype=torch.float64)
        for t, s in pairwise(times):
            z = z + (s - t) * self.v(f, z, time_like(z, t), c)
        return z

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        z_T = x_at_t_max(self.teacher.schedule, noise(0))
        return self.euler(self.student if nfe == 1 else self.flow, z_T, nfe, c)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(Reflow)
