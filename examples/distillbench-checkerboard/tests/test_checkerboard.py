"""Dataset and teacher meet the contract; the denoiser agrees with the posterior's mean by quadrature and sampling."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from distillbench import Conditioning, Progress, UserError
from distillbench.diffusion import WITHOUT_CLASSES, VPCosine
from distillbench.testing import assert_conforms
from scipy.integrate import quad
from scipy.stats import norm, truncnorm
from torch import Tensor

from distillbench_checkerboard import Checkerboard, CheckerboardTeacher, UniformOnFields


def board(**settings) -> Checkerboard:
    return Checkerboard(Checkerboard.Config(**settings))


def source(conditioning: Conditioning = WITHOUT_CLASSES, dataset=None, **settings) -> CheckerboardTeacher:
    config = CheckerboardTeacher.Config(**settings)
    return CheckerboardTeacher(config, board() if dataset is None else dataset, Path(), "cpu", conditioning)


def test_they_conform():
    assert_conforms(Checkerboard)
    assert_conforms(CheckerboardTeacher, CheckerboardTeacher.Config(width=16, depth=1), dataset=board(count=500))


def points(count: int, reach: float) -> Tensor:
    return (2 * torch.rand(count, 2, 1, 1, generator=torch.Generator().manual_seed(0)).double() - 1) * reach


def weights(n: int, reach: float, x: float, y: float, tau: float) -> dict[tuple[int, int], tuple[float, float, float]]:
    """(i, j): (mass under N((x, y), tau^2), mean of x, mean of y), by scipy, for the dark fields."""
    side, found = 2 * reach / n, {}
    for i in range(n):
        for j in range(n):
            if (i + j) % 2 == 0:
                ends = [(k * side - reach, (k + 1) * side - reach) for k in (i, j)]
                masses = [norm.cdf(b, at, tau) - norm.cdf(a, at, tau) for (a, b), at in zip(ends, (x, y), strict=True)]
                means = [
                    truncnorm.mean((a - at) / tau, (b - at) / tau, loc=at, scale=tau)
                    for (a, b), at in zip(ends, (x, y), strict=True)
                ]
                found[i, j] = (math.prod(masses), *means)
    return found


@pytest.mark.parametrize("tau", [0.1, 0.4, 2.0])
def test_the_denoiser_agrees_with_scipys_truncated_normals(tau):
    distribution, alpha = board(fields=4, reach=0.8).distribution, 0.6
    x_hat = points(20, 1.0)
    f = distribution.denoise(alpha * x_hat, torch.tensor(alpha), torch.tensor(alpha * tau).expand(20, 1, 1, 1))
    for (x, y), found in zip(x_hat.view(-1, 2).tolist(), f.view(-1, 2), strict=True):
        fields = np.array(list(weights(4, 0.8, x, y, tau).values()))
        expected = fields[:, 0] @ fields[:, 1:] / fields[:, 0].sum()
        np.testing.assert_allclose(found, expected, atol=1e-7)


def test_the_denoiser_of_a_field_is_an_integral():
    """E[u] under N(x^, tau^2) on [a, b] by adaptive quadrature, from inside and from far away."""
    distribution = UniformOnFields(torch.tensor([[-0.4, 0.1]]).double(), torch.tensor([[0.2, 0.3]]).double())
    for x, tau in [(0.0, 0.1), (0.9, 0.2), (-1.0, 0.05), (0.3, 3.0)]:
        found = distribution.denoise(torch.full((1, 2, 1, 1), x).double(), torch.ones(1), torch.tensor([tau]).double())
        for (a, b), value in zip([(-0.4, 0.2), (0.1, 0.3)], found.flatten().tolist(), strict=True):
            nearest = min(max(x, a), b)  # where the density is largest: taken out, so that nothing underflows
            density = lambda u, x=x, tau=tau, n=nearest: math.exp(((n - x) ** 2 - (u - x) ** 2) / (2 * tau**2))
            mass, _ = quad(density, a, b, epsabs=0, epsrel=1e-11, limit=200)
            mean, _ = quad(lambda u, d=density: u * d(u), a, b, epsabs=1e-14, epsrel=1e-11, limit=200)
            assert value == pytest.approx(mean / mass, abs=1e-8)


def test_the_denoiser_is_the_best_one():
    """E |f - x_0|^2 is lowest at f: a little more or less of it, or an offset, is worse, at every noise level."""
    distribution, schedule, generator = board().distribution, VPCosine(), torch.Generator().manual_seed(0)
    x_0, _ = distribution.draw(50_000, generator)
    eps = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
    for time in (0.1, 0.3, 0.6, 0.9):
        t = torch.full((len(x_0), 1, 1, 1), time).double()
        alpha, sigma = schedule.alpha(t).double(), schedule.sigma(t).double()
        x_t = alpha * x_0 + sigma * eps
        f = distribution.denoise(x_t, alpha, sigma)
        # the error of the conditional mean is uncorrelated with every function of x_t (orthogonality)
        for g in (torch.ones_like(x_t), x_t, f, x_t**3, x_t.sin(), x_t.flip(1)):
            product = (f - x_0) * g
            assert abs(product.mean()) < 5 * product.std() / product.numel() ** 0.5


def test_at_both_ends_of_the_noise():
    """With almost no noise f is x_t, on its field; with almost only noise the mean; far away the nearest point."""
    distribution, schedule = board().distribution, VPCosine()
    x_0, field = distribution.draw(500, torch.Generator().manual_seed(0))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    low, high = (torch.full((500, 1, 1, 1), t).double() for t in (0.0, 1.0))
    alpha, sigma = schedule.alpha(low).double(), schedule.sigma(low).double()
    assert (distribution.denoise(alpha * x_0 + sigma * eps, alpha, sigma) - x_0).abs().max() < 5e-4
    mean, covariance = distribution.moments()
    f = distribution.denoise(eps, schedule.alpha(high).double(), schedule.sigma(high).double())
    # to first order in alpha / sigma, f = m + alpha S x_t
    linear = mean + schedule.alpha(high).double().view(-1, 1) * eps.flatten(1) @ covariance
    assert (f.flatten(1) - linear).abs().max() < 1e-6
    corner = distribution.denoise(
        torch.full((1, 2, 1, 1), 50.0).double(), torch.ones(1), torch.full((1,), 0.01).double()
    )
    torch.testing.assert_close(corner, torch.full((1, 2, 1, 1), 0.8).double(), rtol=0, atol=1e-4)
    asked = distribution.denoise(eps, schedule.alpha(low).double(), schedule.sigma(low).double(), field).flatten(1)
    assert ((asked >= distribution.a[field] - 1e-9) & (asked <= distribution.b[field] + 1e-9)).all()


def test_gradients_are_those_of_finite_differences_at_low_noise():
    """Also where a point is many standard deviations inside its field."""
    distribution, size = board().distribution, 1e-6
    x, tau = points(200, 1.0).requires_grad_(), torch.full((200,), 0.002).double()
    f = lambda x: distribution.denoise(x, torch.ones(200), tau)
    (gradient,) = torch.autograd.grad(f(x).sum(), x)
    with torch.no_grad():
        shift = torch.tensor([size, 0]).double().view(1, 2, 1, 1)
        differences = torch.cat([(f(x + d) - f(x - d)).sum(dim=1) / (2 * size) for d in (shift, shift.flip(1))], dim=1)
    torch.testing.assert_close(gradient.flatten(1), differences.flatten(1), rtol=1e-3, atol=1e-3)


def test_given_the_field_only_that_field_counts():
    distribution = board().distribution
    x_t, alpha, sigma = points(8, 1.0), torch.ones(1), torch.full((8, 1, 1, 1), 0.5).double()
    for k in range(distribution.components):
        alone = UniformOnFields(distribution.a[k : k + 1], distribution.b[k : k + 1]).denoise(x_t, alpha, sigma)
        torch.testing.assert_close(
            distribution.denoise(x_t, alpha, sigma, torch.full((8,), k)), alone, rtol=0, atol=1e-12
        )
    unasked = distribution.denoise(x_t, alpha, sigma, torch.full((8,), distribution.components))
    assert torch.equal(unasked, distribution.denoise(x_t, alpha, sigma))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_points_lie_on_dark_fields_evenly(n):
    data = board(fields=n, reach=0.5, count=8_000)
    x = data.read(torch.arange(8_000)).flatten(1)
    square = ((x + 0.5) * n).floor().long()
    assert (square.sum(dim=1) % 2 == 0).all() and x.abs().max() <= 0.5
    K = (n * n + 1) // 2
    counts = data.labels(torch.arange(8_000)).bincount(minlength=K)
    assert data.classes == K == len(counts)
    assert ((counts - 8_000 / K).abs() < 5 * (8_000 / K) ** 0.5).all()
    mean, covariance = data.distribution.moments()
    assert (x.mean(dim=0) - mean).abs().max() < 0.03
    assert (torch.cov(x.T, correction=0) - covariance).abs().max() < 0.01


def test_the_variance_of_a_board_of_even_side_is_that_of_the_square():
    """Every row and column has as much dark as any other, so a coordinate is uniform: variance (2 reach)^2 / 12."""
    _, covariance = board(fields=4, reach=0.8).distribution.moments()
    torch.testing.assert_close(covariance.diag(), torch.full((2,), 1.6**2 / 12).double())


def test_the_teacher_answers_as_the_law_and_knows_itself():
    teacher = source(Conditioning(classes=8)).load(Progress(None))
    x_t, t = points(6, 1.0), torch.full((6, 1, 1, 1), 0.4).double()
    alpha, sigma = VPCosine().alpha(t).double(), VPCosine().sigma(t).double()
    expected = board().distribution.denoise(x_t, alpha, sigma)
    torch.testing.assert_close(teacher.denoiser(x_t, t), expected, rtol=0, atol=1e-6)
    assert teacher.teacher_rows.rows == 6
    settings = [{}, {"seed": 1}, {"schedule": "ve"}, {"width": 32}]
    assert len({source(**words).load(Progress(None)).sha256 for words in settings}) == 4
    assert teacher.sha256 != source().load(Progress(None)).sha256
    state = torch.get_rng_state()
    weights = [source().load(Progress(None)).student().state_dict() for _ in range(2)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert torch.equal(state, torch.get_rng_state())


def test_what_cannot_be_is_refused():
    class Other(Checkerboard):
        name, distribution = "other", None

        def __init__(self) -> None: ...

    with pytest.raises(UserError, match="needs dataset=checkerboard, got other"):
        source(dataset=Other()).plan()
    with pytest.raises(UserError, match="schedule must be one of"):
        source(schedule="cosine")
    with pytest.raises(UserError, match="reach must lie between"):
        board(reach=1.5)
