"""Requests for noise-image pairs of the Gaussian teacher, and the pairs that come of them."""

from __future__ import annotations

from pathlib import Path

import torch

from analytic import gaussian_teacher, make_workspace
from distillbench.diffusion.conditioning import Condition
from distillbench.training.pairs import PairStore
from recorded_progress import RecordingProgress

RECIPE = {"solver": "test", "steps": 3}


class Solver:
    """Three evaluations of the teacher per image; counts its images."""

    def __init__(self, teacher) -> None:
        self.teacher, self.solved = teacher, 0

    def __call__(self, eps: torch.Tensor, c: Condition) -> torch.Tensor:
        self.solved += len(eps)
        x = eps
        for _ in range(3):
            x = self.teacher.denoise(x, torch.full((len(x), 1, 1, 1), 0.5, dtype=torch.float64))
        return x


def request_pairs(
    folder: Path, count: int = 12, seed: int = 0, recipe=RECIPE, sha256: str = "gaussian", dry: bool = False
):
    """(pairs, number of images solved, meter, printed lines) of one request."""
    teacher = gaussian_teacher()
    teacher.sha256 = sha256
    workspace = make_workspace(teacher, folder, seed=seed, dry=dry)
    workspace.progress = RecordingProgress()
    solver = Solver(teacher)
    return workspace.pairs(solver, count, recipe), solver.solved, workspace.meter, workspace.progress.lines


def read_all(pairs: PairStore) -> tuple[torch.Tensor, torch.Tensor]:
    """(eps, x_0) of all pairs, each (N,C,H,W)."""
    return pairs.read(torch.arange(len(pairs)))[:2]
