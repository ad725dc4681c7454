"""Checkpoints during training: they change nothing, are not charged, and hold the student of that moment."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import distillbench.metering.stopwatch
import distillbench.training.loop
import distillbench_pd
import distillbench_tract
from analytic import gaussian_images, gaussian_teacher, make_workspace, mlp_teacher, same_weights, weights_of
from by_day import by_day
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.noise import FixedNoise
from distillbench.errors import UserError
from distillbench.metering.energy import Energy
from distillbench.storage.files import sha256_file
from distillbench.training.budget import BudgetConfig, Limit
from distillbench.training.checkpoints import Checkpoints
from distillbench.training.loop import Loop, train
from distillbench.training.optimizers import Average
from tiny_training import BATCH, FRACTIONS, IMAGES, METHODS, NFE, SILENT, Ramp, averaged_method, optimizer

READY = {  # numbers of evaluations at each checkpoint
    "pd": [[], [2], [2]],  # 4 steps: phases of 2 and of 1 step, half of the budget each; tract likewise
    "tract": [[], [2], [2]],
    "cm": [[1, 2, 4]] * 3,
    "boot": [[1]] * 3,
}


def run(method, folder, checkpoints=None, budget=None):
    images = gaussian_images(1)
    read = (lambda n: (images(n)[0].float(), None)) if method.needs_data else None
    workspace = make_workspace(method.teacher, folder, budget or BudgetConfig(images=IMAGES))
    return train(method, method.config, workspace, read, Loop(BATCH), SILENT, checkpoints)


def answers(method, nfe: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = FixedNoise([torch.randn(6, 2, 1, 1, generator=generator) for _ in range(nfe)])
    with torch.no_grad():
        return method.sample(noise, nfe, UNCONDITIONAL)


@pytest.mark.parametrize("name", by_day(METHODS, READY))
def test_checkpoints_do_not_change_the_training(name, tmp_path):
    with_some, without = averaged_method(name), averaged_method(name)
    run(with_some, tmp_path / "a", Checkpoints(FRACTIONS, tmp_path / "checkpoints", NFE))
    run(without, tmp_path / "b")
    assert same_weights(weights_of(with_some), weights_of(without))


@pytest.mark.parametrize("name", METHODS)
def test_a_restored_checkpoint_samples_as_the_method_did(name, tmp_path, monkeypatch):
    """As a copy taken at that moment with the average in its student. A phase of pd or tract must have ended for it."""
    averages, copies = [], []

    class Remembered(Average):
        def __init__(self, *parts) -> None:
            super().__init__(*parts)
            averages.append(self)

    monkeypatch.setattr(distillbench.training.loop, "Average", Remembered)
    method = averaged_method(name)
    ready = method.ready

    def recorded(nfe: int, phase: int) -> bool:
        if nfe == NFE[0]:
            copies.append(copy.deepcopy(method))
            copies[-1].student.load_state_dict(averages[-1].module.state_dict())
        return ready(nfe, phase)

    method.__dict__["ready"] = recorded
    trained = run(method, tmp_path / "cache", Checkpoints(FRACTIONS, tmp_path, NFE))
    assert name not in READY or [c.ready for c in trained.checkpoints] == READY[name]
    assert [c.fraction for c in trained.checkpoints] == list(FRACTIONS)
    assert [c.images for c in trained.checkpoints] == [c.cost.images for c in trained.checkpoints] == [120, 240, 360]
    seen = []
    for checkpoint, then in zip(trained.checkpoints, copies, strict=True):
        path = tmp_path / checkpoint.file
        assert checkpoint.sha256 == sha256_file(path)
        restored = averaged_method(name)
        restored.load_state_dict(load_file(path))
        for nfe in checkpoint.ready:
            assert torch.equal(answers(restored, nfe), answers(then, nfe))
        if 1 in checkpoint.ready:
            seen.append(answers(restored, 1))
    final = answers(method, 1)
    assert torch.isfinite(final).all() and len(seen) == (0 if name in ("pd", "tract") else 3)
    for earlier, later in pairwise([*seen, final]):
        assert not torch.equal(earlier, later)


def test_a_phase_that_ends_makes_its_student_ready():
    pd = distillbench_pd.ProgressiveDistillation(distillbench_pd.ProgressiveDistillation.Config(steps=8), mlp_teacher())
    assert [[n for n in (1, 2, 4, 8) if pd.ready(n, phase)] for phase in range(3)] == [[], [4], [2, 4]]
    tract = distillbench_tract.Tract(distillbench_tract.Tract.Config(steps=[16, 4, 2, 1]), mlp_teacher())
    assert [[n for n in (1, 2, 4, 16) if tract.ready(n, phase)] for phase in range(3)] == [[], [4], [2, 4]]


def test_checkpoints_are_outside_a_budget_in_seconds(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(distillbench.metering.stopwatch, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Slow(Ramp):
        def train_step(self, batch):
            clock.now += 1
            yield from super().train_step(batch)

        def ready(self, nfe, phase):
            clock.now += 1000
            return True

    method = Slow()
    budget = BudgetConfig(limit=Limit.seconds, seconds=8.0)
    workspace = make_workspace(gaussian_teacher(), tmp_path, budget)
    trained = train(method, optimizer(), workspace, None, Loop(10), SILENT, Checkpoints((0.2, 0.5), tmp_path, (1,)))
    assert len(method.sizes) == 8 and trained.cost.seconds == trained.cost.other_seconds == 8.0
    assert [(c.cost.seconds, c.images) for c in trained.checkpoints] == [(2.0, 20), (4.0, 40)]
    assert [c.energy for c in trained.checkpoints] == [Energy(None, "not measured")] * 2


def test_two_fractions_in_one_step_and_one_in_the_last_step(tmp_path):
    """One step passes 0.1 and 0.2; only the last step reaches 0.9, which therefore has no checkpoint."""
    workspace = make_workspace(gaussian_teacher(), tmp_path, BudgetConfig(images=40))
    checkpoints = Checkpoints((0.1, 0.2, 0.9), tmp_path)
    trained = train(Ramp(), optimizer(), workspace, None, Loop(10), SILENT, checkpoints)
    assert [(c.fraction, c.images, c.file) for c in trained.checkpoints] == [
        (0.1, 10, "checkpoint-1.safetensors"),
        (0.2, 10, "checkpoint-2.safetensors"),
    ]
    assert load_file(tmp_path / "checkpoint-1.safetensors")["student.w"].item() == pytest.approx(0.5)  # one step


@pytest.mark.parametrize("fractions", [(0.0, 0.5), (0.5, 0.5), (0.5, 0.25), (0.5, 1.0), (math.nan,)])
def test_fractions_rise_between_0_and_1(tmp_path, fractions):
    with pytest.raises(UserError, match="rising"):
        Checkpoints(fractions, tmp_path)
