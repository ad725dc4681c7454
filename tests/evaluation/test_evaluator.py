"""What the evaluator guarantees: the same noise for every sampler, counted evaluations, checked samples."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from analytic import ddim_chain, gaussian_teacher, time
from distillbench.builtin.pixels import TeacherRmse
from distillbench.diffusion.denoiser import NetworkCall
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.diffusion.samplers import Solver, uniform_times
from distillbench.errors import DivergedError, UserError
from distillbench.evaluation import evaluator as evaluate
from distillbench.evaluation.evaluator import Evaluator, teacher_sampler
from distillbench.evaluation.features import Networks
from distillbench.evaluation.metric import Metric
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.system.progress import Progress, Step
from random_pictures import Pictures

pytestmark = pytest.mark.usefixtures("float64")


class Broken(Metric):
    name, unit, direction, protocol = "broken", "", "lower", "broken/1"

    def score(self, samples):
        return math.nan


def evaluator(**changes) -> Evaluator:
    plain = {"images": 10, "batch_size": 4, "teacher_steps": [1, 8]}
    metrics = {cls.name: cls for cls in changes.pop("metrics", (TeacherRmse,))}
    teacher = changes.pop("teacher", None) or gaussian_teacher()
    real = RealImages(Pictures(), Networks(Path("nowhere"), "cpu"), Path("nowhere"))  # these metrics do not read it
    noise = changes.pop("noise", evaluate.EVALUATION)
    return Evaluator(EvaluationConfig(**plain | changes), metrics, real, teacher, Progress(None), noise=noise)


class Sampler:
    """One evaluation of the teacher per step; records the noise of images (not of timing) that it gets."""

    def __init__(self, teacher, evaluations=None, result=lambda x: x) -> None:
        self.teacher, self.evaluations, self.result, self.seen = teacher, evaluations, result, []

    def __call__(self, noise, nfe, c):
        x = noise(0)
        if isinstance(noise, Noise):
            self.seen.append((noise.stream, x))
        for _ in range(nfe if self.evaluations is None else self.evaluations):
            self.teacher.denoise(x, time([0.5]).expand(len(x), 1, 1, 1))
        return self.result(x)


def test_every_sampler_gets_the_same_noise_in_batches_of_any_size():
    seen = []
    for batch_size in (3, 4, 10):
        judge = evaluator(batch_size=batch_size)
        for nfe in (1, 2):
            sampler = Sampler(judge.teacher)
            judge.measure(sampler, nfe, 0, True, "test")
            seen.append(torch.cat([x for _, x in sampler.seen]))
            assert {stream for stream, _ in sampler.seen} == {stream_key("evaluation", 0)}
    assert all(torch.equal(x, seen[0]) for x in seen) and seen[0].shape == (10, 2, 1, 1)
    other = evaluator()
    sampler = Sampler(other.teacher)
    other.measure(sampler, 1, 1, True, "test")
    assert not torch.equal(torch.cat([x for _, x in sampler.seen]), seen[0])


def test_the_reference_is_the_teacher_with_most_steps_on_that_noise():
    """Closed-form DDIM with 8 steps, clipped: a sampler that gives the same has distance 0."""
    judge = evaluator(teacher_steps=[1, 8, 4])
    eps = Noise(stream_key("evaluation", 0), range(10), (2, 1, 1))(0)
    expected = ddim_chain(judge.teacher.schedule, eps, uniform_times(judge.teacher.schedule, 8)).clamp(-1, 1)
    assert torch.allclose(judge.teacher_samples(0)[0].tensor, expected, rtol=0, atol=1e-8)
    sampler = teacher_sampler(judge.teacher, Solver.parse("ddim"))
    assert judge.measure(sampler, 8, 0, True, "test").scores == {"teacher_rmse": 0.0}
    assert judge.measure(sampler, 1, 0, True, "test").scores["teacher_rmse"] > 0.1


@pytest.mark.parametrize("evaluations", [0, 1, 3])
def test_a_wrong_number_of_evaluations_is_refused(evaluations):
    judge = evaluator()
    with pytest.raises(RuntimeError, match=f"requested 2 evaluations per image, counted {evaluations}"):
        judge.measure(Sampler(judge.teacher, evaluations), 2, 0, True, "test")


def test_evaluations_of_students_count_too():
    judge = evaluator()
    student = judge.teacher.student()

    def sampler(noise, nfe, c):
        x = noise(0)
        return student(x, time([0.5]).expand(len(x), 1, 1, 1)).detach()

    judge.measure(sampler, 1, 0, True, "test")
    with pytest.raises(RuntimeError, match="counted 1"):
        judge.measure(sampler, 2, 0, True, "test")


@pytest.mark.parametrize("result", [lambda x: x[:-1], lambda x: x.flatten(1), lambda x: torch.cat([x, x], dim=1)])
def test_samples_of_the_wrong_shape_are_refused(result):
    judge = evaluator()
    with pytest.raises(RuntimeError, match="shape"):
        judge.measure(Sampler(judge.teacher, result=result), 1, 0, True, "test")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_samples_that_are_not_finite_raise_diverged_error(bad):
    def spoil(x):
        x = x.clone()
        x[-1, -1] = bad
        return x

    judge = evaluator()
    with pytest.raises(DivergedError):
        judge.measure(Sampler(judge.teacher, result=spoil), 1, 0, True, "test")


def test_samples_are_checked_only_on_the_host(monkeypatch):
    """An earlier check would wait for a GPU. Here all batches are computed before the first one is on the host."""
    judge, made = evaluator(), []

    def sampler(noise, nfe, c):
        made.append(len(noise.indices))
        x = judge.teacher.denoise(x := noise(0), time([0.5]).expand(len(x), 1, 1, 1))
        return x * math.nan if len(made) == 2 else x

    monkeypatch.setattr(evaluate, "to_host", lambda batches, device: iter(list(batches)))
    fractions = []
    with pytest.raises(DivergedError):
        judge._sample(sampler, 1, 0, Step(lambda fraction, note: fractions.append(fraction)), None, list().append)
    assert made == [4, 4, 2] and fractions == [0.4]


def test_networks_are_captured_once_for_all_rows_of_a_cell(monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate, "sampling_call", lambda *arguments: calls.append(NetworkCall()) or calls[-1])
    judge, used = evaluator(), []

    def sampler(noise, nfe, c):
        used.append(judge.teacher.teacher_rows.call)
        return Sampler(judge.teacher)(noise, nfe, c)

    for nfe in (1, 2):
        judge.measure(sampler, nfe, 0, True, "test")
    assert len(used) == 6 and set(used) == set(calls) and len(calls) == 1
    judge.release()
    judge.measure(sampler, 1, 0, True, "test")
    assert len(calls) == 2 and judge.teacher.teacher_rows.call is not calls[1]


def test_samples_are_clipped_and_undefined_scores_have_a_reason():
    judge = evaluator(metrics=(TeacherRmse, Broken))
    measured = judge.measure(Sampler(judge.teacher, result=lambda x: torch.full_like(x, 5.0)), 1, 0, True, "test")
    expected = (1 - judge.teacher_samples(0)[0].tensor).square().mean().sqrt().item()
    assert measured.scores["teacher_rmse"] == pytest.approx(expected, rel=1e-12)
    assert measured.scores["broken"] is None and "nan" in measured.missing["broken"]
    assert (measured.shown == 255).all() and measured.shown.dtype is torch.uint8
    fresh = judge.measure(Sampler(judge.teacher), 1, 0, False, "test")
    assert fresh.scores["teacher_rmse"] is None and fresh.missing["teacher_rmse"]


def test_nfe_may_be_empty_but_teacher_steps_may_not():
    assert EvaluationConfig(nfe=[]).nfe == []
    with pytest.raises(UserError, match="teacher_steps"):
        EvaluationConfig(teacher_steps=[])


def test_latents_are_decoded_before_they_are_scored():
    teacher = dataclasses.replace(gaussian_teacher(), decode=lambda z: z[:, :1].repeat(1, 3, 2, 2))
    judge = evaluator(teacher=teacher)
    measured = judge.measure(Sampler(teacher), 1, 0, True, "test")
    assert measured.shown.shape == (10, 3, 2, 2) and judge.teacher_samples(0)[0].tensor.shape == (10, 3, 2, 2)


@pytest.mark.parametrize("values", [[], [1, 1], [-1]])
def test_sampling_seeds_must_be_different_and_not_negative(values):
    with pytest.raises(UserError, match=r"evaluation\.seeds"):
        EvaluationConfig(seeds=values)


@pytest.mark.parametrize("values", [[0], [1, 1], [2, -1]])
@pytest.mark.parametrize("name", ["nfe", "teacher_steps"])
def test_lists_of_evaluations_must_be_positive_and_different(name, values):
    with pytest.raises(UserError, match=name):
        EvaluationConfig(**{name: values})


class Copied(TeacherRmse):
    """Reads the teacher's samples of a copy."""

    name = "copied"

    def score(self, samples):
        return super().score(dataclasses.replace(samples, labels=None))


@pytest.mark.parametrize("metric", [Broken, TeacherRmse, Copied])
def test_the_teacher_is_sampled_only_for_metrics_that_compare_with_it(metric):
    """And the score is that of samples that are there before."""
    before, lazy = evaluator(metrics=(metric,)), evaluator(metrics=(metric,))
    before.teacher_samples(0)
    rows = lazy.teacher.teacher_rows.rows
    given = Sampler(lazy.teacher, result=lambda x: x / 2), 2, 0, True, "x"
    scored = lazy.measure(*given)
    assert lazy.teacher.teacher_rows.rows - rows == 10 * (2 if metric is Broken else 2 + 8)
    assert scored.scores == before.measure(Sampler(before.teacher, result=lambda x: x / 2), *given[1:]).scores


def test_samples_of_another_purpose_have_other_noise():
    scored, searched = evaluator(), evaluator(noise="search")
    both = [Sampler(one.teacher) for one in (scored, searched)]
    for one, sampler in zip((scored, searched), both, strict=True):
        one.measure(sampler, 1, 0, True, "x")
    streams = [{stream for stream, _ in sampler.seen} for sampler in both]
    assert streams == [{stream_key("evaluation", 0)}, {stream_key("search", 0)}] and streams[0] != streams[1]
