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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from distillbench import Batch, Condition, Method, MethodConfig, PairStore, UserError, Workspace, hookimpl, option
from distillbench.diffusion import DISTANCE_NAMES, SAMPLERS, Solver, time_like, x_at_t_max
from distillbench.options import Among, Between, require_one_of, require_positive


class Direct(Method):
    name = "direct"
    paper = "Luhman & Luhman 2021, arXiv:2101.02388"
    needs_data = False
    can_start_fresh = True

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

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "steps", "pairs")
            require_one_of(self, "loss", DISTANCE_NAMES)
            if not Solver.parse(self.solver).deterministic:
                raise UserError(f"solver must be deterministic, got {self.solver!r}, which adds noise of its own")

    @property
    def inputs(self) -> str:
        return "noise" if self.config.online else "pairs"

    def solve(self, eps: Tensor, c: Condition) -> Tensor:
        """ODE-Solver(f, eps, T -> 0): the teacher's sample in N steps."""
        solver = Solver.parse(self.config.solver)
        return solver.solve(partial(self.teacher.denoise, c=c), self.teacher.schedule, eps, self.config.steps)

    def g(self, eps: Tensor, c: Condition) -> Tensor:
        schedule = self.teacher.schedule
        return self.student(x_at_t_max(schedule, eps), time_like(eps, schedule.t_max), c)

    def prepare(self, workspace: Workspace) -> None:
        Solver.parse(self.config.solver).check(self.teacher.schedule, self.config.steps)
        self.store: PairStore | None = None
        if not self.config.online:
            solver = Solver.parse(self.config.solver).name
            recipe = {"solver": solver, "steps": self.config.steps, "schedule": self.config.schedule}
            self.store = workspace.pairs(self.solve, self.config.pairs, recipe)

    def target(self, x_0: Tensor) -> Tensor:
        """x_0, or its 8-bit value k / 127.5 - 1, k = 0, ..., 255."""
        return (x_0.clamp(-1, 1) * 127.5 + 127.5).floor() / 127.5 - 1 if self.config.eight_bit else x_0

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor, Condition]:
        if self.store is not None:
            return self.store.read(batch.integers(0, len(self.store)))
        eps, c = batch.noise(), batch.c
        with torch.no_grad():
            return eps, self.solve(eps, c), c

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        eps, x_0, c = self.pair(batch)
        yield self.student, self.distances[self.config.loss](self.g(eps, c), self.target(x_0))  # (BOOT paper, eq. 2)

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        return self.g(noise(0), c)


@hookimpl(api=2)
def register_methods(register) -> None:
    register(Direct)
