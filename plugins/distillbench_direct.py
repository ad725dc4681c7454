"""Direct distillation: regress the teacher's deterministic sample from each noise.

Luhman & Luhman 2021, "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
arXiv:2101.02388. Data-free: it learns from noise-image pairs that the teacher makes.

    L = E_eps | g(eps) - ODE-Solver(f, eps, T -> 0) |^2                         (BOOT paper, eq. 2)

| symbol | meaning                                              | shape     |
|--------|------------------------------------------------------|-----------|
| eps    | noise; x_T = sigma_T eps                             | (B,C,H,W) |
| x_0    | the teacher's sample from eps                        | (B,C,H,W) |
| f      | teacher, f(x_t, t) = E[x_0 given x_t]                | (B,C,H,W) |
| g      | student: the teacher's network at the fixed time T   | (B,C,H,W) |
| c      | condition: class and guidance of the teacher         | of a batch|

Online, every batch is solved anew (N teacher evaluations per image). Offline (the paper), `pairs` are made ahead and
used repeatedly. They are stored in float32; with `eight_bit`, x_0 is truncated to 8-bit values when they are read.

With `held_out` (the authors' code) the student is not the last average g but, of those at `checks` equal parts of
training, the one with the lowest L on pairs that are not trained on. Both are charged, and the row says which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, Phase, Teacher, UserError, Workspace, hookimpl, option
from distillbench.diffusion import DISTANCE_NAMES, SAMPLERS, Solver, time_like, x_at_t_max
from distillbench.options import Among, Between, require_between, require_one_of, require_positive


class Direct(Method):
    name, label, title = "direct", "direct", "direct distillation"
    paper = "Luhman & Luhman 2021, arXiv:2101.02388"
    needs_data = False
    can_start_fresh = True
    losses: Tensor

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam", search=Between(3e-4, 1e-2, log=True))
        steps: int = option(64, "N, steps of the teacher's sampler", search=Among([16, 32, 64]))
        solver: str = option("ddim", f"the teacher's sampler, SAMPLER or SAMPLER/GRID: {', '.join(SAMPLERS)}")
        loss: str = option(
            "l2", f"{', '.join(DISTANCE_NAMES)} (the paper's choice for CIFAR-10: l1)", search=Among(["l2", "l1"])
        )
        online: bool = option(False, "solve for every batch instead of making pairs ahead")
        pairs: int = option(32_768, "noise-image pairs made ahead (offline)", search=Among([8192, 16_384, 32_768]))
        eight_bit: bool = option(False, "truncate x_0 to [-1, 1] in 8 bits, rounding down (released)")
        held_out: int = option(0, "pairs on which the best average is chosen; 0: the last (released: 51,200)")
        checks: int = option(25, "averages that are compared on held-out pairs, evenly along training")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "steps", "pairs", "checks")
            require_between(self, 0, float("inf"), "held_out")
            if self.held_out and self.online:
                raise UserError("held_out needs pairs that are made ahead: online=false")
            require_one_of(self, "loss", DISTANCE_NAMES)
            if not Solver.parse(self.solver).deterministic:
                raise UserError(f"solver must be deterministic, got {self.solver!r}, which adds noise of its own")

    def __init__(self, config: Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if config.held_out:
            self.best = teacher.student().freeze()
            self.register_buffer("losses", torch.full((config.checks,), torch.inf, dtype=torch.float64))  # of averages

    @property
    def inputs(self) -> str:
        return "noise" if self.config.online else "pairs"

    def phases(self) -> list[Phase]:
        checks = self.config.checks if self.config.held_out else 1
        return Phase.starting_at([k / checks for k in range(checks)])

    def solve(self, eps: Tensor, c: Condition) -> Tensor:
        """ODE-Solver(f, eps, T -> 0): the teacher's sample in N steps."""
        solver = Solver.parse(self.config.solver)
        return solver.solve(partial(self.teacher.denoise, c=c), self.teacher.schedule, eps, self.config.steps)

    def g(self, student: nn.Module, eps: Tensor, c: Condition) -> Tensor:
        schedule = self.teacher.schedule
        return student(x_at_t_max(schedule, eps), time_like(eps, schedule.t_max), c)

    def prepare(self, workspace: Workspace) -> None:
        solver = Solver.parse(self.config.solver)
        solver.check(self.teacher.schedule, self.config.steps)
        recipe = {"solver": solver.name, "steps": self.config.steps, "schedule": self.config.schedule}
        self.store = None if self.config.online else workspace.pairs(self.solve, self.config.pairs, recipe)
        if self.config.held_out:
            self.workspace = workspace
            self.held = workspace.pairs(self.solve, self.config.held_out, recipe, held_out=True)

    def target(self, x_0: Tensor) -> Tensor:
        """x_0, or its 8-bit value k / 127.5 - 1, k = 0, ..., 255."""
        return (x_0.clamp(-1, 1) * 127.5 + 127.5).floor() / 127.5 - 1 if self.config.eight_bit else x_0

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor, Condition]:
        if self.store is not None:
            return self.store.read(batch.integers(0, len(self.store)))
        eps, c = batch.noise(), batch.c
        with torch.no_grad():
            return eps, self.solve(eps, c), c

    def L(self, student: nn.Module, eps: Tensor, x_0: Tensor, c: Condition) -> Tensor:
        return self.distances[self.config.loss](self.g(student, eps, c), self.target(x_0))  # (BOOT paper, eq. 2)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        yield self.student, self.L(self.student, *self.pair(batch))

    def end_phase(self, index: int, average: nn.Module) -> None:
        if self.config.held_out:
            self.losses[index] = self.workspace.mean_loss(self.held, partial(self.L, average))
            if self.losses.argmin() == index:
                self.best.load_state_dict(average.state_dict())

    @property
    def note(self) -> str:
        if not self.config.held_out:
            return ""
        losses = self.losses.tolist()
        share, lowest, last = (self.losses.argmin().item() + 1) / len(losses), min(losses), losses[-1]
        return f"the average after {share:.0%} of training: loss {lowest:.4g} on held-out pairs (the last: {last:.4g})"

    def ready(self, nfe: int, phase: int) -> bool:
        return self.supports(nfe) and (phase > 0 or not self.config.held_out)

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        return self.g(self.best if self.config.held_out else self.student, noise(0), c)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(Direct)
