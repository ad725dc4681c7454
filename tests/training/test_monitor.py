"""Looks at samples along training: the training does not notice, and the scores have closed forms."""

from __future__ import annotations

import random
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from analytic import gaussian_teacher, make_workspace, mlp_teacher, same_weights, weights_of
from distillbench.diffusion.conditioning import Conditioning
from distillbench.diffusion.samplers import ddim, uniform_times, x_at_t_max
from distillbench.evaluation.progress_scores import PixelScores
from distillbench.system.progress import Step
from distillbench.system.signals import Interrupted
from distillbench.testing.method_bench import StopAfter
from distillbench.training.budget import BudgetConfig, Limit
from distillbench.training.compute import Sampling
from distillbench.training.data_parallel import Ranks
from distillbench.training.loop import Loop, train
from distillbench.training.monitor import Monitor, averaged
from distillbench.training.resume import Resume, States
from distillbench.training.share import Share
from recorded_progress import RecordingProgress
from tiny_training import BATCH, IMAGES, METHODS, NFE, SILENT, averaged_method


def scores(images=12, batch=5, dataset=None) -> PixelScores:
    return PixelScores(dataset, images, batch, Sampling(), "cpu")


def monitor(look=None, every=0.2, lines=None, most=1e9) -> Monitor:
    return Monitor(look or scores(), every, NFE, ([] if lines is None else lines).append, most)


def run(method, folder, seen=None, kept=None, stop_after=10**6, budget=None, step=SILENT, ranks=None):
    generator = torch.Generator().manual_seed(7)
    read = lambda n: (torch.randn(n, 2, 1, 1, generator=generator), None)
    workspace = make_workspace(method.teacher, folder, budget or BudgetConfig(images=IMAGES))
    resume = None if kept is None else Resume(kept, 1e9, {"read": generator}, stop=StopAfter(stop_after))
    loop = Loop(BATCH) if ranks is None else Loop(BATCH, ranks=ranks)
    given = read if method.needs_data else None
    return train(method, method.config, workspace, given, loop, step, resume=resume, monitor=seen)


def counted(cost):
    return {name: value for name, value in vars(cost).items() if "seconds" not in name}


# --- the training does not notice ------------------------------------------------------------------------------------


def impolite(method):
    """`method`, whose samples draw from every generator that there is."""
    sample, method.own = method.sample, torch.Generator().manual_seed(5)

    def drawing(noise, nfe, c):
        torch.rand(3), torch.rand(2, generator=method.own), np.random.rand(), random.random()
        return sample(noise, nfe, c)

    method.sample = drawing
    return method


@pytest.mark.parametrize("limit", [Limit.images, Limit.nfe])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("cm, mu 0", "pd", "sid") else pytest.mark.nightly) for n in METHODS]
)
def test_weights_and_costs_are_the_same_with_and_without_looks(name, limit, tmp_path):
    budget = BudgetConfig(limit=limit, images=IMAGES, nfe=2000)
    ends = []
    for seen in (monitor(), None):
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        method = impolite(averaged_method(name))
        trained = run(method, tmp_path, seen, budget=budget)
        drawn = torch.rand(1).item(), np.random.rand(), random.random(), method.own.initial_seed()
        ends.append((weights_of(method), counted(trained.cost), [p.loss for p in trained.curve], drawn))
        if seen is not None:
            assert len(seen.points) >= 3 and seen.points[-1].fraction == 1.0
            assert all(m.training for m in method.student.modules()), "modes are restored"
    assert same_weights(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


def test_a_look_is_due_at_each_share_and_at_the_end(tmp_path):
    seen = monitor(every=0.3)
    run(averaged_method("cm"), tmp_path, seen)
    steps = IMAGES // BATCH
    assert [p.images for p in seen.points] == [6 * BATCH, 12 * BATCH, 18 * BATCH, IMAGES]
    assert [p.fraction for p in seen.points] == pytest.approx([6 / steps, 12 / steps, 18 / steps, 1.0])


def test_the_averaged_student_is_sampled_under_all_its_names(tmp_path):
    """Consistency distillation with mu = 0 has its student as its target, too."""
    method = averaged_method("cm, mu 0")
    average, student = averaged_method("cm, mu 0").student, method.student
    with averaged(method, average):
        assert method.student is method.target is average and not method.training
    assert method.student is method.target is student and method.training


def test_an_interrupted_training_has_the_same_looks(tmp_path):
    whole, parts = monitor(), []
    run(averaged_method("sid"), tmp_path / "whole", whole)
    kept = States(tmp_path / "resume", 2, RecordingProgress())
    for stop_after in (7, 3, 10**6):
        parts.append(monitor())
        with suppress(Interrupted):
            run(averaged_method("sid"), tmp_path, parts[-1], kept, stop_after)
    assert parts[-1].points == whole.points and parts[-1].spent == whole.spent
    assert len(parts[0].points) == 1


class Second(Ranks):
    """The second of two ranks, whose messages arrive at once."""

    share = Share(1, 2)
    flags = 0

    def broadcast_flag(self, decision: bool) -> bool:
        self.flags += 1
        return decision


def test_another_rank_waits_and_does_not_sample(tmp_path):
    ranks, seen = Second(), monitor()
    method = averaged_method("boot")
    method.sample = None
    run(method, tmp_path, seen, ranks=ranks)
    assert ranks.flags == 6 and not seen.points


def test_the_progress_line_has_the_last_look(tmp_path):
    notes = []
    run(averaged_method("boot"), tmp_path, monitor(), step=Step(lambda fraction, note: notes.append(note)))
    assert "FD" not in notes[0]
    assert "; at 80% with 1 NFE: FD of 8x8 pixels " in notes[-1] and ", spread " in notes[-1]


# --- cost and errors -------------------------------------------------------------------------------------------------


def test_looks_take_at_most_their_share_of_the_evaluations(tmp_path):
    """12 images of one evaluation and, once, 16 of the teacher: 204, then 12; boot itself takes 2,160."""
    for most, expected in ((0.0, 0), (0.999 * 204 / 2160, 0), (1.001 * 204 / 2160, 1), (1.001 * 228 / 2160, 3)):
        seen = monitor(most=most)
        cost = run(averaged_method("boot"), tmp_path, seen).cost
        assert cost.teacher_nfe + cost.student_nfe == 2160
        assert len(seen.points) == expected


def test_an_error_of_the_method_ends_the_looks_only(tmp_path):
    def sample(noise, nfe, c):
        raise ValueError("boom")

    lines, method = [], averaged_method("boot")
    method.sample = sample
    seen = monitor(lines=lines)
    assert run(method, tmp_path, seen).cost.images == IMAGES
    assert lines == ["no scores along training from 20% on: ValueError: boom"] and not seen.points


# --- the scores ------------------------------------------------------------------------------------------------------


class Images:
    """A dataset of `count` images of 16x16 pixels, in blocks of 2x2 of one colour."""

    shape = (2, 16, 16)

    def __init__(self, count=40) -> None:
        generator = torch.Generator().manual_seed(3)
        self.small = torch.rand(count, 2, 8, 8, generator=generator) - 0.5

    def __len__(self):
        return len(self.small)

    def read(self, indices):
        return self.small[indices].repeat_interleave(2, 2).repeat_interleave(2, 3)


def method_of(make):
    """A method whose samples of images i are ``make(i)``."""
    teacher = gaussian_teacher(mean=(0.0, 0.0), variance=(1.0, 1.0))
    return SimpleNamespace(teacher=teacher, sample=lambda noise, nfe, c: make(torch.tensor(noise.indices)))


@pytest.mark.parametrize(("factor", "shift"), [(1.0, 0.0), (1.0, 0.25), (0.4, 0.1)])
def test_the_score_of_moved_and_shrunk_images(factor, shift):
    """With m' = k m + b and S' = k^2 S: d^2 = |m' - m|^2 + (1 - k)^2 tr S, and the spread is k."""
    data = Images()
    look = scores(40, 7, data)
    found, spread = look(method_of(lambda i: factor * data.read(i) + shift), 1)
    x = data.small.double().flatten(1)
    mean = x.mean(0)
    expected = (factor * mean + shift - mean).square().sum() + (1 - factor) ** 2 * x.var(0).sum()
    assert found == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert spread == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_samples_that_are_not_finite_have_no_score(bad):
    data = Images()
    one = lambda i: torch.where(i == 3, bad, 0.0).view(-1, 1, 1, 1)
    assert scores(40, 7, data)(method_of(lambda i: data.read(i) + one(i)), 1) == (None, None)


def test_without_real_images_the_reference_are_the_teachers_samples_of_the_same_noise():
    """The teacher's own chain is at distance 0."""
    teacher = mlp_teacher()
    chain = lambda noise, nfe, c: ddim(
        partial(teacher.denoise, c=c), teacher.schedule, x_at_t_max(teacher.schedule, noise(0)),
        uniform_times(teacher.schedule, 16),
    ).clamp(-1, 1)  # fmt: skip
    look = scores(30, 7)
    found, spread = look(SimpleNamespace(teacher=teacher, sample=chain), 1)
    assert look.reference == "the teacher's samples"
    assert found == pytest.approx(0.0, abs=1e-9) and spread == pytest.approx(1.0)


def test_samples_have_classes_from_the_whole_range():
    teacher = SimpleNamespace(conditioning=Conditioning(classes=100), shape=(1, 2, 2))
    labels = torch.cat([c.labels for _, c in scores(20, 7)._inputs(teacher)])
    assert labels.tolist() == list(range(0, 100, 5))


# --- the warning -----------------------------------------------------------------------------------------------------


class Told:
    """Looks that see the given spreads."""

    reference = "real images"

    def __init__(self, spreads) -> None:
        self.spreads = iter(spreads)

    def evaluations(self, nfe):
        return 0

    def preparation(self, method):
        return 0

    def __call__(self, method, nfe):
        spread = next(self.spreads)
        return (None, None) if spread is None else (1.0, spread)


@pytest.mark.parametrize(
    ("spreads", "warning"),
    [
        ([0.1, 0.4, 0.8, 0.9, 1.0], ""),  # one-step students begin blurred
        ([0.8, 0.9, 0.51, 0.6, 0.7], ""),
        ([0.8, 0.3, 0.2, 0.9, 0.9], "was 0.30 of that of real images at 40% of the budget"),
        ([0.1, 0.2, 0.2, 0.2, 0.4], "was 0.20 of that of real images at 60% of the budget"),
        ([0.8, None, 0.9, 0.9, 0.1], "was 0.10 of that of real images at 100% of the budget"),
        ([None] * 5, ""),
    ],
)
def test_a_collapse_is_said_once_and_noted(spreads, warning, tmp_path):
    lines = []
    seen = monitor(Told(spreads), lines=lines)
    run(averaged_method("boot"), tmp_path, seen)
    assert [p.spread for p in seen.points] == spreads
    assert len(lines) == bool(warning) and all(warning in line for line in lines)
    assert warning in seen.note if warning else not seen.note
    if spreads[1] == 0.3:
        assert seen.note.endswith("at 40% of the budget, 0.90 at 100%")
