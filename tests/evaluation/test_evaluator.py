"""The Frechet distance against closed forms and torch_fidelity, and the guarantees of the evaluator."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from analytic import ddim_chain, gaussian_teacher, time
from distillbench.builtin.pixels import NearestRealRmse, Spread, TeacherRmse
from distillbench.datasets.dataset import Dataset, to_float, to_uint8
from distillbench.diffusion.denoiser import NetworkCall
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.diffusion.samplers import Solver, uniform_times
from distillbench.errors import DivergedError, Unavailable, UserError
from distillbench.evaluation import evaluator as evaluate
from distillbench.evaluation.evaluator import Evaluator, teacher_sampler
from distillbench.evaluation.features import Networks
from distillbench.evaluation.frechet import GaussianStatistics, Moments, frechet_distance
from distillbench.evaluation.metric import Metric, Samples, check_needs
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.system.progress import Progress, Step

pytestmark = pytest.mark.usefixtures("float64")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator(seed)))[0]


def statistics(n: int, features: int, seed: int) -> GaussianStatistics:
    mixing = torch.randn(features, features, generator=generator(seed + 100))
    return GaussianStatistics.of(torch.randn(n, features, generator=generator(seed)) @ mixing + seed)


# --- the Frechet distance --------------------------------------------------------------------------------------------


def test_frechet_distance_of_commuting_covariances():
    """|m_a - m_b|^2 + sum (sqrt a_i - sqrt b_i)^2 where both have the same eigenvectors."""
    Q = rotation(5)
    a, b = torch.tensor([4.0, 1.0, 0.25, 9.0, 2.0]), torch.tensor([1.0, 1.0, 16.0, 0.5, 0.0])
    mean = torch.tensor([0.5, -1.0, 0.0, 2.0, 0.0])
    distance = frechet_distance(
        GaussianStatistics(9, mean, Q @ a.diag() @ Q.T), GaussianStatistics(9, torch.zeros(5), Q @ b.diag() @ Q.T)
    )
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert distance == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("features", [3, 24])
def test_frechet_distance_agrees_with_torch_fidelity_and_with_a_matrix_root(features):
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    a, b = statistics(200, features, 0), statistics(300, features, 1)
    sigma_a, sigma_b = a.covariance.numpy(), b.covariance.numpy()
    theirs = fid_statistics_to_metric(
        {"mu": a.mean.numpy(), "sigma": sigma_a}, {"mu": b.mean.numpy(), "sigma": sigma_b}, False
    )
    distance = frechet_distance(a, b)
    assert distance == pytest.approx(next(iter(theirs.values())), rel=1e-8)
    trace = np.trace(sigma_a + sigma_b - 2 * sqrtm(sigma_a @ sigma_b)).real
    assert distance == pytest.approx((a.mean - b.mean).square().sum().item() + trace, rel=1e-8)


def test_frechet_distance_of_a_single_feature():
    """(m_a - m_b)^2 + (s_a - s_b)^2 in one dimension."""
    x, y = torch.randn(50, 1, generator=generator()), 3 * torch.randn(50, 1, generator=generator(1)) + 1
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    distance = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    assert distance == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_of_fewer_images_than_features():
    """An isometry into 60 dimensions changes no distance: the rank-deficient case has the value of the small one."""
    Q = rotation(60)[:, :4]
    x, y = torch.randn(30, 4, generator=generator()), 2 * torch.randn(30, 4, generator=generator(1)) + 1
    small = frechet_distance(GaussianStatistics.of(x), GaussianStatistics.of(y))
    large = frechet_distance(GaussianStatistics.of(x @ Q.T), GaussianStatistics.of(y @ Q.T))
    assert large == pytest.approx(small, rel=1e-6) and small > 1


def test_frechet_distance_is_symmetric_and_zero_for_equal_statistics():
    a, b = statistics(100, 6, 0), statistics(100, 6, 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert torch.allclose(a.root.T @ a.root, a.covariance) and torch.allclose(a.cholesky.T @ a.cholesky, a.covariance)


def test_frechet_distance_of_two_singular_covariances():
    """Constant features: the expected value is a matrix root of the others alone. No Cholesky factor exists."""

    def dead(s):
        return GaussianStatistics(
            s.n, torch.cat([s.mean, s.mean.new_zeros(3)]), given=torch.block_diag(s.covariance, torch.zeros(3, 3))
        )

    a, b = statistics(200, 6, 0), statistics(300, 6, 1)
    assert dead(a).cholesky is None
    assert frechet_distance(dead(a), dead(b)) == pytest.approx(frechet_distance(a, b), rel=1e-7)


@pytest.mark.parametrize("cuts", [[50], [1] * 50, [3, 30, 17], [20, 30]])
def test_moments_do_not_depend_on_blocks(cuts):
    """Few features (n <= D) are stored as rows, more are folded: both against numpy, with a large mean."""
    x = 1e3 + torch.randn(50, 20, generator=generator())
    moments = Moments()
    for part in x.split(cuts):
        moments.add(part)
    found = moments.statistics()
    assert found.n == 50 and found.rows is None
    np.testing.assert_allclose(found.mean, x.numpy().mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(x.numpy().T), rtol=1e-9)
    few = GaussianStatistics.of(x[:20])
    assert few.rows is not None
    np.testing.assert_allclose(few.covariance, np.cov(x[:20].numpy().T), rtol=1e-9, atol=1e-12)


def test_moments_of_several_processes_are_merged():
    x = 5 + torch.randn(90, 20, generator=generator())
    whole, merged = Moments(), Moments()
    whole.add(x)
    for part in x.split([10, 5, 40, 35]):
        one = Moments()
        one.add(part)
        merged.merge(one)
    a, b = whole.statistics(), merged.statistics()
    assert a.n == b.n == 90
    assert torch.allclose(a.mean, b.mean, rtol=1e-13) and torch.allclose(a.covariance, b.covariance, rtol=1e-11)


def test_one_feature_vector_has_no_covariance():
    moments = Moments()
    moments.add(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="at least two"):
        moments.statistics()


def test_statistics_are_computed_in_float64_with_n_minus_1():
    """float32 features with a large mean, against numpy in float64."""
    features = (1000 + torch.randn(50, 3, generator=generator())).float()
    ours = GaussianStatistics.of(features)
    np.testing.assert_allclose(ours.mean, features.numpy().astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(ours.covariance, np.cov(features.numpy().astype(np.float64).T), rtol=1e-9)


# --- 8 bits and the distance to the teacher --------------------------------------------------------------------------


def test_images_are_rounded_to_the_nearest_of_256_levels():
    levels = torch.arange(256) / 127.5 - 1
    assert to_uint8(levels).tolist() == list(range(256))
    assert to_uint8(levels + 0.49 / 127.5).tolist() == list(range(256))  # truncation would do as well here ...
    assert to_uint8(levels - 0.49 / 127.5).tolist() == list(range(256))  # ... but not here
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def samples(x, y, keeps_noise=True, labels=None):
    return Samples(x, y, None, None, None, keeps_noise, labels)


def test_teacher_rmse_is_a_root_mean_square_and_undefined_for_samples_with_fresh_noise():
    x = torch.zeros(3, 2, 1, 1)
    y = x.clone()
    y[0, 0], y[2, 1] = 0.3, -0.4
    assert TeacherRmse().score(samples(x, y)) == pytest.approx(math.sqrt((0.09 + 0.16) / 6), rel=1e-12)
    with pytest.raises(Unavailable):
        check_needs(TeacherRmse, samples(x, y, False))


def test_spread_is_relative_to_the_teacher_and_within_classes():
    """Half the distance to the mean: 0.5. Two different classes, each collapsed to a point: 0."""
    y = torch.randn(64, 1, 4, 4, generator=generator())
    assert Spread().score(samples(y / 2, y)) == pytest.approx(0.5, rel=1e-12)
    labels = torch.arange(64) % 2
    collapsed = labels.double().view(-1, 1, 1, 1).expand_as(y)
    assert Spread().score(samples(collapsed, y, labels=labels)) == pytest.approx(0, abs=1e-12)
    assert Spread().score(samples(collapsed, y)) > 0.1
    with pytest.raises(Unavailable):
        Spread().score(samples(y, torch.zeros_like(y)))


class Three(Dataset):
    """Three grey images of one level each."""

    name, licence, sha256, shape = "three", "none", "0" * 64, (1, 2, 2)
    levels = torch.tensor([0, 128, 255], dtype=torch.uint8)

    def __init__(self, config=None):
        pass

    def __len__(self):
        return 3

    def read(self, indices):
        return self.levels[indices].view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def real_images(tmp_path=Path("nowhere"), dataset=None):
    return RealImages(dataset or Three(), Networks(Path("nowhere"), "cpu"), tmp_path)


def test_nearest_real_rmse_finds_copies():
    copies = to_float(Three().read(torch.tensor([0, 1, 2, 1])))
    near = Samples(copies, copies, None, None, real_images(), True)
    assert NearestRealRmse().score(near) == pytest.approx(0, abs=1e-6)
    off = Samples(copies - 0.25, copies, None, None, real_images(), True)
    assert NearestRealRmse().score(off) == pytest.approx(0.25, rel=1e-5)


# --- evaluation ------------------------------------------------------------------------------------------------------


class Broken(Metric):
    name, unit, direction, protocol = "broken", "", "lower", "broken/1"

    def score(self, samples):
        return math.nan


def evaluator(**changes) -> Evaluator:
    plain = {"images": 10, "batch_size": 4, "teacher_steps": [1, 8]}
    metrics = {cls.name: cls for cls in changes.pop("metrics", (TeacherRmse,))}
    teacher = changes.pop("teacher", None) or gaussian_teacher()
    return Evaluator(EvaluationConfig(**plain | changes), metrics, real_images(), teacher, Progress(None))


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
    assert torch.allclose(judge.teacher_samples(0)[0], expected, rtol=0, atol=1e-8)
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
    told = []
    with pytest.raises(DivergedError):
        judge._sample(sampler, 1, 0, Step(lambda fraction, note: told.append(fraction)), None)
    assert made == [4, 4, 2] and told == [0.4]


def test_networks_are_captured_once_for_all_rows_of_a_cell(monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate, "sampling_call", lambda *told: calls.append(NetworkCall()) or calls[-1])
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
    expected = (1 - judge.teacher_samples(0)[0]).square().mean().sqrt().item()
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
    assert measured.shown.shape == (10, 3, 2, 2) and judge.teacher_samples(0)[0].shape == (10, 3, 2, 2)


@pytest.mark.parametrize("values", [[], [1, 1], [-1]])
def test_sampling_seeds_must_be_different_and_not_negative(values):
    with pytest.raises(UserError, match=r"evaluation\.seeds"):
        EvaluationConfig(seeds=values)


@pytest.mark.parametrize("values", [[0], [1, 1], [2, -1]])
@pytest.mark.parametrize("name", ["nfe", "teacher_steps"])
def test_lists_of_evaluations_must_be_positive_and_different(name, values):
    with pytest.raises(UserError, match=name):
        EvaluationConfig(**{name: values})
