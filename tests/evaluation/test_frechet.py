"""The Frechet distance compared with closed forms and torch_fidelity, and moments added up in blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from distillbench.evaluation import frechet
from distillbench.evaluation.frechet import GaussianStatistics, Moments, frechet_distance, frechet_influence

pytestmark = pytest.mark.usefixtures("float64")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator(seed)))[0]


def statistics(n: int, features: int, seed: int) -> GaussianStatistics:
    mixing = torch.randn(features, features, generator=generator(seed + 100))
    return GaussianStatistics.of(torch.randn(n, features, generator=generator(seed)) @ mixing + seed)


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


# --- the influence of an image ---------------------------------------------------------------------------------------


def weighted_distance(x: np.ndarray, weights: np.ndarray, other: GaussianStatistics) -> float:
    """The distance if feature i counts `weights[i]` times, from the eigenvalues of the product of the covariances."""
    share = weights / weights.sum()
    mean = share @ x
    covariance = (x - mean).T * share @ (x - mean) * len(x) / (len(x) - 1)
    values = np.linalg.eigvals(covariance @ other.covariance.numpy()).real
    roots = np.sqrt(values[values > 1e-10 * values.max()]).sum()  # the others are rounding errors of 0
    off = mean - other.mean.numpy()
    return off @ off + np.trace(covariance) + other.covariance.trace().item() - 2 * roots


@pytest.mark.parametrize(
    ("n", "features", "real"),
    [(40, 5, 60), (12, 20, 60), (40, 20, 15), (9, 20, 15)],
    ids=["full", "few", "few real", "few of both"],
)
def test_the_influence_is_the_derivative_by_the_weight_of_an_image(n, features, real, monkeypatch):
    monkeypatch.setattr(frechet, "AT_ONCE", 16)
    other = statistics(real, features, 3)
    x = torch.randn(n, features, generator=generator(4)) @ torch.randn(features, features, generator=generator(5))
    influence = frechet_influence(x, other)
    for i in range(0, n, 5):
        change = 1e-4 * np.eye(n)[i]
        ends = [weighted_distance(x.numpy(), 1 + step, other) for step in (change, -change)]
        assert influence[i].item() == pytest.approx(n * (ends[0] - ends[1]) / 2e-4, rel=1e-4, abs=1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize(("n", "low", "high"), [(160, 0.92, 1.12), (24, 1.0, 1.6), (8, 1.0, 1.6)])
def test_the_influence_gives_the_standard_deviation_over_samples(n, low, high):
    """Of the distance and of the difference of two on common noise; too large, but not too small, for n < 2 D."""
    D = 16
    mixing = [torch.eye(D) + 0.3 * torch.randn(D, D, generator=generator(seed)) / D**0.5 for seed in (6, 7)]
    real, random = GaussianStatistics(10**6, torch.zeros(D), torch.eye(D)), generator(8)
    distances, estimates = [], []
    for _ in range(400):
        noise = torch.randn(n, D, generator=random)
        sides = [noise @ mixing[0] + 0.3, noise @ mixing[1] - 0.1]
        found = [frechet_distance(real, GaussianStatistics.of(x)) for x in sides]
        moved = [frechet_influence(x, real) for x in sides]
        distances.append([found[0], found[0] - found[1]])
        estimates.append([moved[0].var().item() / n, (moved[0] - moved[1]).var().item() / n])
    ratio = np.sqrt(np.mean(estimates, axis=0)) / np.std(distances, axis=0)
    assert (ratio > low).all() and (ratio < high).all()


@pytest.mark.nightly
def test_the_influence_agrees_with_the_bootstrap_over_images():
    """Resampled images have the same spread of the distance, apart from the bias of a resample."""
    real = statistics(500, 8, 1)
    x = torch.randn(600, 8, generator=generator(9)) @ torch.randn(8, 8, generator=generator(10))
    picks = torch.randint(600, (800, 600), generator=generator(11))
    spread = np.std([frechet_distance(real, GaussianStatistics.of(x[pick])) for pick in picks])
    assert (frechet_influence(x, real).var().item() / 600) ** 0.5 == pytest.approx(spread, rel=0.1)
