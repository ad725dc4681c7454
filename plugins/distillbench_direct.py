"""Direct distillation: regress the teacher's deterministic answer to each noise.

Luhman & Luhman 2021, "Knowledge Distillation in Iterative Generative Models for Improved Sampling Speed",
arXiv:2101.02388. Data-free: it learns from noise-image pairs that the teacher makes.

    L = E_eps | g(eps) - ODE-Solver(f, eps, T -> 0) |^2                         (BOOT paper, eq. 2)

| symbol | meaning                                              | shape     |
|--------|------------------------------------------------------|-----------|
| eps    | noise; x_T = sigma_T eps                             | (B,C,H,W) |
| x_0    | the teacher's answer to eps                          | (B,C,H,W) |
| f      | teacher, f(x_t, t) = E[x_0 given x_t]                | (B,C,H,W) |
| g      | student: the teacher's network at the fixed time T   | (B,C,H,W) |

Online, every batch is solved anew (N teacher evaluations an image). Offline (the paper), `pairs` are made ahead and
used again and again. Unlike the released code, targets are not stored as truncated 8-bit values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillbench import Batch, Method, MethodConfig, PairStore, Workspace, hookimpl, option
from distillbench.options import require_one_of, require_positive
from distillbench.samplers import ddim, time_like, uniform_times, x_at_t_max


class Direct(Method):
    name = "direct"
    paper = "Luhman & Luhman 2021, arXiv:2101.02388"
    needs_data = False

    @dataclass
    class Config(MethodConfig):
        lr: float = option(2e-3, "peak learning rate of Adam")
        steps: int = option(64, "N, DDIM steps of the teacher's answer")
        loss: str = option("l2", "l2 (squared) or l1 (the paper's choice for CIFAR-10)")
        online: bool = option(False, "solve for every batch instead of making pairs ahead")
        pairs: int = option(32_768, "noise-image pairs made ahead (offline)")

        def __post_init__(self) -> None:
            super().__post_init__()
            require_positive(self, "steps", "pairs")
            require_one_of(self, "loss", ("l1", "l2"))

    def solve(self, eps: Tensor) -> Tensor:
        """ODE-Solver(f, eps, T -> 0): the teacher's DDIM with N steps."""
        schedule = self.teacher.schedule
        times = uniform_times(schedule, self.config.steps)
        return ddim(self.teacher.denoise, schedule, x_at_t_max(schedule, eps), times)

    def g(self, eps: Tensor) -> Tensor:
        schedule = self.teacher.schedule
        return self.student(x_at_t_max(schedule, eps), time_like(eps, schedule.t_max))

    def prepare(self, workspace: Workspace) -> None:
        self.store: PairStore | None = None
        if not self.config.online:
            recipe = {"solver": "ddim", "grid": "uniform", "steps": self.config.steps}
            self.store = workspace.pairs(self.solve, self.config.pairs, recipe)

    def pair(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.store is not None:
            return self.store.read(batch.integers(0, len(self.store)))
        eps = batch.noise()
        with torch.no_grad():
            return eps, self.solve(eps)

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        eps, x_0 = self.pair(batch)
        difference = self.g(eps) - x_0  # (BOOT paper, eq. 2)
        yield self.student, (difference.abs() if self.config.loss == "l1" else difference.square()).mean()

    def sample(self, noise: Callable[[int], Tensor], nfe: int) -> Tensor:
        return self.g(noise(0))


@hookimpl
def register_methods(register) -> None:
    register(Direct)
