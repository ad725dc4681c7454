"""Metrics of features against their definitions written out, and against Gaussians with a known distance."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distillbench import Unavailable
from distillbench.evaluation import feature_metrics
from distillbench.evaluation.feature_metrics import nearest
from distillbench.evaluation.features import FeatureNetwork, ImageSet, Networks
from distillbench.evaluation.frechet import GaussianStatistics
from distillbench.evaluation.metric import Samples


class Given(FeatureNetwork):
    """A network whose features are given."""

    name, protocol, width = "given", "given/1", 0

    def __init__(self, file: Path, device: str) -> None: ...

    def __call__(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class Known(ImageSet):
    """Images whose features (N,D) are given."""

    def __init__(self, features: Tensor) -> None:
        super().__init__(lambda: [], len(features), (3, 1, 1), Networks(Path(), "cpu"))
        self.known = features

    def features(self, network: type[FeatureNetwork]) -> Tensor:
        return self.known.float()

    def statistics(self, network: type[FeatureNetwork]) -> GaussianStatistics:
        return GaussianStatistics.of(self.known)


def on(score: type[feature_metrics.FeatureMetric]) -> feature_metrics.FeatureMetric:
    return type(score.__name__, (score,), {"name": "test", "network": Given})()


def samples(ours: Tensor, real: Tensor, teacher: Tensor | None = None, labels: Tensor | None = None) -> Samples:
    x = torch.zeros(len(ours), 3, 1, 1)
    return Samples(x, x, Known(ours), Known(ours if teacher is None else teacher), Known(real), True, labels)


def normal(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- neighbours ------------------------------------------------------------------------------------------------------

OURS, REAL = 1.3 * normal(30, 6, 0) + 0.9, normal(40, 6, 1)


def distance(a: Tensor, b: Tensor) -> float:
    return float(np.sqrt(np.square(a.numpy() - b.numpy()).sum()))


def radius(points: Tensor, i: int, k: int) -> float:
    """The distance of point i to its k-th neighbour among the others."""
    return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


def inside(centres: Tensor, others: Tensor, k: int) -> np.ndarray:
    """(centre, other): whether the other is in the ball of the centre up to its k-th neighbour."""
    found = np.zeros((len(centres), len(others)), dtype=bool)
    for i in range(len(centres)):
        reach = radius(centres, i, k)
        found[i] = [distance(centres[i], other) <= reach for other in others]
    return found


def test_precision_and_recall_count_balls_up_to_the_third_neighbour():
    found = [on(score).score(samples(OURS, REAL)) for score in (feature_metrics.Precision, feature_metrics.Recall)]
    expected = [inside(REAL, OURS, 3).any(axis=0).mean(), inside(OURS, REAL, 3).any(axis=0).mean()]
    assert found == pytest.approx(expected, rel=1e-6)
    assert min(found) > 0.1 and max(found) < 0.95 and found[0] != found[1]


def test_density_and_coverage_count_balls_up_to_the_fifth_neighbour():
    found = [on(score).score(samples(OURS, REAL)) for score in (feature_metrics.Density, feature_metrics.Coverage)]
    balls = inside(REAL, OURS, 5)
    assert found == pytest.approx([balls.sum() / (5 * len(OURS)), balls.any(axis=1).mean()], rel=1e-6)
    assert min(found) > 0.1 and max(found) < 0.95


def test_shares_do_not_depend_on_the_blocks_of_distances(monkeypatch):
    both = feature_metrics.Density, feature_metrics.Coverage, feature_metrics.Precision, feature_metrics.Recall
    whole = [on(score).score(samples(OURS, REAL)) for score in both]
    for limit, value in (("ROWS", 7), ("MOST_DISTANCES", 100)):
        with monkeypatch.context() as patched:
            patched.setattr(feature_metrics, limit, value)
            assert [on(score).score(samples(OURS, REAL)) for score in both] == whole


def test_precision_and_recall_share_one_computation(monkeypatch):
    calls = []
    monkeypatch.setattr(feature_metrics, "_precision_and_recall", lambda *_: calls.append(1) or (0.25, 0.75))
    both = samples(OURS, REAL)
    assert (
        on(feature_metrics.Precision).score(both) == 0.25
        and on(feature_metrics.Recall).score(both) == 0.75
        and calls == [1]
    )


@pytest.mark.parametrize(
    "score", [feature_metrics.Precision, feature_metrics.Recall, feature_metrics.Density, feature_metrics.Coverage]
)
def test_neighbours_need_images(score):
    with pytest.raises(Unavailable, match=r"neighbour \d needs more than"):
        on(score).score(samples(OURS, REAL[:3]))


def test_nearest_real_is_a_ratio_of_medians():
    ours = [min(distance(a, b) for b in REAL) for a in OURS]
    real = [radius(REAL, i, 1) for i in range(len(REAL))]
    ratio = torch.tensor(ours).median() / torch.tensor(real).median()  # torch takes the lower of two middle ones
    assert on(feature_metrics.NearestReal).score(samples(OURS, REAL)) == pytest.approx(ratio.item(), rel=1e-5)


FAR_OURS = (0.95 * normal(20, 64, 0) + 300.1).float().double()  # a mean of 300 times the spread, as float32 has it
FAR_REAL = (normal(80, 64, 1) + 300).float().double()


def test_neighbours_are_accurate_if_the_mean_is_large_beside_the_spread():
    """Expected values come from squared differences in float64. (In float32, density was 14.5 instead of 12.8.)"""
    far = samples(FAR_OURS, FAR_REAL)
    across = (FAR_REAL[:, None] - FAR_OURS).square().sum(dim=2).sqrt()
    among_real = (FAR_REAL[:, None] - FAR_REAL).square().sum(dim=2).sqrt().sort(dim=1).values
    among_ours = (FAR_OURS[:, None] - FAR_OURS).square().sum(dim=2).sqrt().sort(dim=1).values
    within = across < among_real[:, 5:6]
    truth = {
        feature_metrics.Density: within.double().sum() / (5 * 20),
        feature_metrics.Coverage: within.any(dim=1).double().mean(),
        feature_metrics.Precision: (across <= among_real[:, 3:4]).any(dim=0).double().mean(),
        feature_metrics.Recall: (across <= among_ours[:, 3]).any(dim=1).double().mean(),
        feature_metrics.NearestReal: across.min(dim=0).values.median() / among_real[:, 1].median(),
    }
    found = {score: on(score).score(far) for score in truth}
    assert found == {score: pytest.approx(value.item(), rel=1e-9) for score, value in truth.items()}
    assert (
        0 < found[feature_metrics.Coverage] < 1
        and 0 < found[feature_metrics.Precision] < 1
        and found[feature_metrics.Density] > 0.1
    )


def test_neighbours_and_kernels_agree_with_torch_fidelity():
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    class Small(feature_metrics.KernelDistance):
        subset = 15

    for ours, real in ((OURS, REAL), (FAR_OURS, FAR_REAL)):
        near = samples(ours, real)
        ours, real = ours.float().double(), real.float().double()
        theirs = prc_features_to_metric(
            ours, real, prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=True, verbose=False
        )
        found = on(feature_metrics.Precision).score(near), on(feature_metrics.Recall).score(near)
        assert found == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
        kernel = kid_features_to_metric(
            ours, real, kid_subsets=100, kid_subset_size=15, kid_kernel="poly", kid_kernel_poly_degree=3,
            kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0, rng_seed=feature_metrics.SEED, verbose=False,
        )["kernel_inception_distance_mean"]  # fmt: skip
        assert on(Small).score(near) == pytest.approx(kernel, rel=1e-6)


def test_copies_of_real_images_have_distance_zero():
    """Also far from the origin, where torch.cdist is inaccurate."""
    real = normal(60, 500, 3) + 3
    assert on(feature_metrics.NearestReal).score(samples(real[:20], real)) == 0
    close = real[:20] + 1e-3 * normal(20, 500, 4)
    expected = (close - real[:20]).norm(dim=1)
    torch.testing.assert_close(nearest(close.float(), real.float()).double(), expected, rtol=1e-3, atol=0)
    with pytest.raises(Unavailable, match="duplicates"):
        on(feature_metrics.NearestReal).score(samples(real[:20], torch.cat([real, real])))


# --- kernel distance -------------------------------------------------------------------------------------------------


def test_kernel_distance_is_the_unbiased_mmd():
    """With subsets of the size of the whole set."""

    class Whole(feature_metrics.KernelDistance):
        subset = 30

    a, b = OURS.numpy(), REAL[:30].numpy()

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / 6 + 1) ** 3

    pairs = [(i, j) for i, j in product(range(30), range(30)) if i != j]
    within = np.mean([kernel(a[i], a[j]) for i, j in pairs]) + np.mean([kernel(b[i], b[j]) for i, j in pairs])
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert on(Whole).score(samples(OURS, REAL[:30])) == pytest.approx(within - 2 * across, rel=1e-5)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    """Else it is E k(x,x') + E k(y,y') - 2 E k(x,y), here from moments of normals with D = 1 and means 0 and 1."""

    class Small(feature_metrics.KernelDistance):
        subset = 200

    same = on(Small).score(samples(normal(4000, 1, 5), normal(4000, 1, 6)))
    other = on(Small).score(samples(normal(4000, 1, 5) + 1, normal(4000, 1, 6)))
    # (u + 1)^3 = u^3 + 3 u^2 + 3 u + 1 with u = x y; E x^k E y^k of N(1,1): 1, 2, 4; of N(0,1): 0, 1, 0
    expected = (16 + 3 * 4 + 3 * 1 + 1) + (0 + 3 * 1 + 0 + 1) - 2 * (0 + 3 * 2 + 0 + 1)
    assert abs(same) < 0.1 and other == pytest.approx(expected, rel=0.1)


def test_kernel_distance_needs_a_subset_of_images():
    with pytest.raises(Unavailable, match="1000"):
        on(feature_metrics.KernelDistance).score(samples(OURS, REAL))


# --- Frechet distances -----------------------------------------------------------------------------------------------


def whitened(n: int, width: int, seed: int) -> Tensor:
    """Points (n,width) with mean 0 and identity covariance (over n - 1), exactly."""
    x = normal(n, width, seed)
    q = torch.linalg.qr(x - x.mean(dim=0))[0]
    return q * (n - 1) ** 0.5


def test_frechet_distance_of_fitted_gaussians_is_the_closed_form():
    """|m|^2 + sum (s - 1)^2 for covariances 1 and diag(s^2)."""
    s, m = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([1.0, 0, -2, 0.5], dtype=torch.float64)
    ours = whitened(50, 4, 0) * s + m
    expected = m.square().sum() + (s - 1).square().sum()
    both = samples(ours, whitened(80, 4, 1), teacher=whitened(60, 4, 2))
    assert on(feature_metrics.FrechetDistance).score(both) == pytest.approx(expected.item(), rel=1e-9)
    assert on(feature_metrics.FrechetDistanceToTeacher).score(both) == pytest.approx(expected.item(), rel=1e-9)
    assert on(feature_metrics.FrechetDistanceToTeacher).score(samples(ours, REAL)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("decay", [0, 1])
@pytest.mark.parametrize("multiple", [4, 8])
def test_extrapolation_removes_most_of_the_bias(decay, multiple, seed):
    """Independent normal features, 4 D or 8 D of them; the covariance of the real ones is exact."""
    width, shift, scale = 64, 0.03, 1.1
    s = torch.arange(1, width + 1, dtype=torch.float64) ** (-decay / 2)
    s = s * (width / s.square().sum()).sqrt()
    true = width * shift**2 + ((scale - 1) * s).square().sum().item()
    ours = normal(multiple * width, width, seed) * s * scale + shift
    both = samples(ours, whitened(width + 1, width, 9) * s)
    plain = on(feature_metrics.FrechetDistance).score(both) - true
    extrapolated = on(feature_metrics.FrechetDistanceExtrapolated).score(both) - true
    assert plain > 1 and abs(extrapolated) < 0.35 * plain


def test_extrapolation_needs_enough_samples():
    score = on(feature_metrics.FrechetDistanceExtrapolated)
    assert score.score(samples(normal(24, 6, 0), REAL)) is not None
    with pytest.raises(Unavailable, match="needs 24 samples, got 23"):
        score.score(samples(normal(23, 6, 0), REAL))


# --- comparisons with the teacher ------------------------------------------------------------------------------------


def test_feature_distance_to_teacher_is_a_mean_over_pairs():
    teacher = normal(30, 6, 7)
    expected = np.mean([distance(a, b) for a, b in zip(OURS, teacher, strict=True)])
    found = on(feature_metrics.FeatureDistanceToTeacher).score(samples(OURS, REAL, teacher))
    assert found == pytest.approx(expected, rel=1e-6)


def test_spread_is_the_scale_whatever_the_mean():
    assert on(feature_metrics.FeatureSpread).score(samples(0.4 * OURS + 7, REAL, OURS)) == pytest.approx(0.4, rel=1e-6)


def test_spread_within_classes_ignores_the_distance_between_them():
    labels = torch.arange(30) % 3
    apart = 100.0 * labels[:, None].double()
    score = on(feature_metrics.FeatureSpread)
    assert score.score(samples(2 * OURS + apart, REAL, OURS, labels)) == pytest.approx(2, rel=1e-5)
    assert score.score(samples(2 * OURS + apart, REAL, OURS)) > 20


def test_spread_is_undefined_for_a_constant_teacher():
    with pytest.raises(Unavailable, match="are all equal"):
        on(feature_metrics.FeatureSpread).score(samples(OURS, REAL, torch.ones(30, 6)))


# --- the influence of an image ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "score", [feature_metrics.Precision, feature_metrics.Density, feature_metrics.FeatureDistanceToTeacher]
)
def test_the_influence_of_an_image_on_a_mean_is_what_the_mean_loses_without_it(score):
    teacher = OURS + 0.1 * normal(30, 6, 3)
    influence, whole = on(score).influence(samples(OURS, REAL, teacher)), on(score).score(samples(OURS, REAL, teacher))
    for i in (0, 7, 29):
        rest = [j for j in range(30) if j != i]
        without = on(score).score(samples(OURS[rest], REAL, teacher[rest]))
        assert influence[i].item() == pytest.approx(29 * (whole - without), abs=1e-6)


def test_the_influence_on_a_kernel_distance_is_what_each_of_its_two_means_loses():
    """Without image i the mean over pairs loses 2 (h_i - U) / (n - 2), that over real images (v_i - V) / (n - 1)."""

    def kernel(a, b):
        return (a.numpy() @ b.numpy().T / 6 + 1) ** 3

    def means(x):
        inner = kernel(x, x)
        return (inner.sum() - inner.trace()) / (len(x) * (len(x) - 1)), kernel(x, REAL).mean()

    ours = OURS.float().double()
    influence, (among, across) = on(feature_metrics.KernelDistance).influence(samples(ours, REAL.float())), means(ours)
    for i in (0, 7, 29):
        fewer = means(ours[[j for j in range(30) if j != i]])
        expected = 28 * (among - fewer[0]) - 2 * 29 * (across - fewer[1])
        assert influence[i].item() == pytest.approx(expected, rel=1e-5)


def test_other_noise_moves_both_sides_of_the_distance_to_the_teacher():
    """The sum of the derivatives by the weight of an image on each side; 0 where both are equal."""
    score = on(feature_metrics.FrechetDistanceToTeacher)
    assert score.influence(samples(OURS, REAL, OURS)).abs().max() < 1e-5
    moved = score.influence(samples(OURS, REAL, OURS + 1))
    assert moved.abs().max() < 1e-5  # a shift of both together
    assert score.influence(samples(OURS, REAL, 2 * OURS)).abs().max() > 0.1
