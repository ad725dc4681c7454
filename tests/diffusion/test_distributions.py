"""Distributions in closed form against quadrature, autograd of the log-density, an ODE solver, mpmath and draws."""

from __future__ import annotations

import json

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from analytic import CENTRES, SPREADS, WEIGHTS, close, some_schedules, time
from distillbench.diffusion.distributions import Distribution, Gaussian, GaussianMixture, mixture
from distillbench.diffusion.schedules import SCHEDULES, VE, NoiseSchedule, VPCosine
from distillbench.errors import UserError

pytestmark = pytest.mark.usefixtures("float64")


def one_pixel() -> GaussianMixture:
    return mixture(WEIGHTS, [[m] for m in CENTRES], [[s] for s in SPREADS])


def plane() -> GaussianMixture:
    return mixture([0.2, 0.5, 0.3], [[-1.0, 0.5], [0.8, 0.9], [0.1, -1.2]], [[0.3, 0.1], [0.2, 0.4], [0.25, 0.25]])


def image() -> GaussianMixture:
    means = [[-0.9, 0.1, 0.4, 0.6], [0.5, -0.3, 0.7, -0.8]]
    return mixture([0.4, 0.6], means, [[0.2, 0.3, 0.1, 0.4], [0.5, 0.2, 0.3, 0.15]], [1, 2, 2])


def gaussian(shape=(1, 2, 2), seed: int = 0) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    D = int(np.prod(shape))
    root = torch.randn(D, D, generator=generator) * torch.linspace(0.1, 1.5, D)
    return Gaussian(torch.randn(shape, generator=generator), root @ root.T)


DISTRIBUTIONS = {"one_pixel": one_pixel, "plane": plane, "image": image, "gaussian": gaussian}


def noisy(distribution: Distribution, alpha: Tensor, sigma: Tensor, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_0, _ = distribution.draw(len(alpha), generator)
    return alpha * x_0 + sigma * torch.randn(x_0.shape, generator=generator)


def log_density(
    distribution: Distribution, x_t: Tensor, alpha: Tensor, sigma: Tensor, component: int | None = None
) -> Tensor:
    """log p(x_t), (B,), from torch.distributions; alpha and sigma without sizes."""
    x = x_t.flatten(1)
    if isinstance(distribution, Gaussian):
        S = alpha**2 * distribution.covariance + sigma**2 * torch.eye(x.shape[1])
        return MultivariateNormal(alpha * distribution.mean.flatten(), S).log_prob(x)
    assert isinstance(distribution, GaussianMixture)
    centre, spread = (
        alpha * distribution.means.flatten(1),
        (alpha**2 * distribution.stds.flatten(1) ** 2 + sigma**2).sqrt(),
    )
    if component is not None:
        return Normal(centre[component], spread[component]).log_prob(x).sum(dim=1)
    return MixtureSameFamily(Categorical(distribution.weights), Independent(Normal(centre, spread), 1)).log_prob(x)


def by_score(
    distribution: Distribution, x_t: Tensor, alpha: Tensor, sigma: Tensor, component: int | None = None
) -> Tensor:
    """(x + sigma^2 grad log p) / alpha, Tweedie's formula."""
    x = x_t.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_density(distribution, x, alpha, sigma, component).sum(), x)
    return (x_t + sigma**2 * score) / alpha


# --- the denoiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_schedules())
def test_denoiser_is_the_posterior_mean_by_quadrature(name: str) -> None:
    distribution, schedule = one_pixel(), SCHEDULES[name]()
    t = schedule.t_of_lam(time([-4.0, -2.0, -0.5, 0.0, 0.7, 2.0, 4.0]))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = noisy(distribution, alpha, sigma)
    x_0 = np.linspace(-6, 6, 200_001)  # the trapezoid rule on a bell-shaped integrand: exact but for rounding
    log_prior = np.logaddexp.reduce(
        [np.log(w / s) - 0.5 * ((x_0 - m) / s) ** 2 for w, m, s in zip(WEIGHTS, CENTRES, SPREADS, strict=True)]
    )
    expected = []
    for x, a, s in zip(x_t.flatten().numpy(), alpha.flatten().numpy(), sigma.flatten().numpy(), strict=True):
        log_p = log_prior - 0.5 * ((x - a * x_0) / s) ** 2
        p = np.exp(log_p - log_p.max())
        expected.append((p * x_0).sum() / p.sum())
    close(distribution.denoise(x_t, alpha, sigma), torch.tensor(expected).view(-1, 1, 1, 1), atol=1e-12)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("alpha, sigma", [(1.0, 0.05), (0.8, 0.6), (0.3, 0.9), (1.0, 5.0)])
def test_denoiser_follows_from_the_score(kind: str, alpha: float, sigma: float) -> None:
    distribution = DISTRIBUTIONS[kind]()
    a, s = torch.full((16, 1, 1, 1), alpha), torch.full((16, 1, 1, 1), sigma)
    x_t = noisy(distribution, a, s)
    close(
        distribution.denoise(x_t, a, s),
        by_score(distribution, x_t, torch.tensor(alpha), torch.tensor(sigma)),
        atol=2e-12,
    )


@pytest.mark.parametrize("kind", ["one_pixel", "plane", "image"])
def test_conditioned_denoiser_is_that_of_the_component(kind: str) -> None:
    distribution = DISTRIBUTIONS[kind]()
    K, D = distribution.components, distribution.means[0].numel()
    component = torch.arange(3 * (K + 1)) % (K + 1)
    a, s = torch.full((len(component), 1, 1, 1), 0.8), torch.full((len(component), 1, 1, 1), 0.6)
    x_t = noisy(distribution, a, s)
    f = distribution.denoise(x_t, a, s, component)
    for k in range(K):
        rows = component == k
        alone = Gaussian(distribution.means[k], torch.eye(D) * distribution.stds[k].flatten() ** 2)
        close(f[rows], by_score(distribution, x_t[rows], torch.tensor(0.8), torch.tensor(0.6), k), atol=1e-12)
        close(f[rows], alone.denoise(x_t[rows], a[rows], s[rows]), atol=1e-14)
    assert torch.equal(f[component == K], distribution.denoise(x_t, a, s)[component == K])  # not conditioned
    for wrong in (-1, K + 1):
        with pytest.raises(IndexError):
            distribution.denoise(x_t[:1], a[:1], s[:1], torch.tensor([wrong]))


def test_gaussian_has_one_component_and_the_null_label() -> None:
    distribution, a, s = gaussian(), time([0.8, 0.6]), time([0.6, 0.8])
    x_t = noisy(distribution, a, s)
    assert distribution.components == 1
    assert torch.equal(distribution.denoise(x_t, a, s, torch.tensor([0, 1])), distribution.denoise(x_t, a, s))


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_denoiser_depends_on_the_noise_level_alone(kind: str) -> None:
    distribution = DISTRIBUTIONS[kind]()
    for make in SCHEDULES.values():
        t = make().t_of_lam(time([-3.0, -1.0, 0.0, 1.5, 4.0]))  # 4.0, or the most that the schedule has
        alpha, sigma, tau = make().alpha(t), make().sigma(t), make().lam(t).exp()
        x_hat = noisy(distribution, torch.ones_like(tau), tau)
        f = distribution.denoise(alpha * x_hat, alpha, sigma)
        close(f, distribution.denoise(x_hat, torch.ones_like(tau), tau), atol=1e-12)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_denoiser_at_the_ends(kind: str) -> None:
    """No noise: x_t / alpha. No signal: the mean. Far from everything: one component's answer, finite."""
    distribution = DISTRIBUTIONS[kind]()
    one, zero = torch.ones(8, 1, 1, 1), torch.zeros(8, 1, 1, 1)
    x_0, _ = distribution.draw(8, torch.Generator().manual_seed(0))
    mean = distribution.moments()[0].view(distribution.shape).expand(x_0.shape)
    close(distribution.denoise(0.7 * x_0, 0.7 * one, zero), x_0, atol=1e-13)
    close(distribution.denoise(0.7 * x_0, 0.7 * one, 1e-7 * one), x_0, atol=1e-11)
    close(distribution.denoise(x_0, zero, one), mean, atol=1e-14)
    close(distribution.denoise(x_0, 1e-9 * one, one), mean, atol=1e-7)
    for alpha, sigma, far in [(1, 80, 400.0), (1, 80, 1e8), (1, 1e-3, 1e8), (1e-5, 1, 1e8), (1, 1e-3, 1e38)]:
        for sign in (-1, 1):
            x_t = torch.full_like(x_0, sign * far)
            f = distribution.denoise(x_t, alpha * one, sigma * one)
            assert f.isfinite().all()
    f = one_pixel().denoise(torch.full((8, 1, 1, 1), 1e6), one, 80 * one)  # the widest component has all of it
    close(f, 0.4 + 0.35**2 / (0.35**2 + 6400) * (1e6 * one - 0.4), rtol=1e-13)


def test_gaussian_without_spread_in_a_direction() -> None:
    distribution = Gaussian(torch.tensor([1.0, -1.0]).view(2, 1, 1), torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    x_t, one = torch.tensor([[2.0, 5.0]]).view(1, 2, 1, 1), torch.ones(1, 1, 1, 1)
    close(distribution.denoise(x_t, one, one), torch.tensor([1.8, -1.0]).view(1, 2, 1, 1), atol=1e-15)
    close(distribution.denoise(x_t, one, 0 * one), torch.tensor([2.0, -1.0]).view(1, 2, 1, 1), atol=1e-15)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_denoiser_has_the_gradient_of_the_formula(kind: str) -> None:
    distribution, a, s = DISTRIBUTIONS[kind](), time([0.8, 0.6]), time([0.6, 0.8])
    x_t = noisy(distribution, a, s).requires_grad_()
    components = torch.tensor([0, distribution.components])
    assert torch.autograd.gradcheck(
        lambda x, a, s: distribution.denoise(x, a, s, components), (x_t, a, s.requires_grad_())
    )


# --- draws -----------------------------------------------------------------------------------------------------------


def agrees_with_draws(rows: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Within five standard errors, by the draws' own spread."""
    away = rows - mean
    products = away[:, :, None] * away[:, None, :]
    assert ((rows.mean(0) - mean).abs() <= 5 * rows.std(0) / len(rows) ** 0.5).all()
    assert ((products.mean(0) - covariance).abs() <= 5 * products.std(0) / len(rows) ** 0.5).all()


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_moments_are_those_of_draws(kind: str) -> None:
    distribution, count = DISTRIBUTIONS[kind](), 100_000
    x_0, component = distribution.draw(count, torch.Generator().manual_seed(3))
    assert x_0.shape == (count, *distribution.shape) and x_0.dtype == torch.float64
    assert component.shape == (count,) and component.dtype == torch.int64
    agrees_with_draws(x_0.flatten(1), *distribution.moments())
    if isinstance(distribution, GaussianMixture):
        share = torch.bincount(component, minlength=distribution.components) / count
        assert (
            (share - distribution.weights).abs()
            < 5 * (distribution.weights * (1 - distribution.weights) / count).sqrt()
        ).all()
        for k in range(distribution.components):
            agrees_with_draws(
                x_0[component == k].flatten(1),
                distribution.means[k].flatten(),
                (distribution.stds[k].flatten() ** 2).diag(),
            )


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_draws_repeat_with_the_generator(kind: str) -> None:
    distribution = DISTRIBUTIONS[kind]()
    first, again = (distribution.draw(5, torch.Generator().manual_seed(9)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert distribution.draw(0, torch.Generator())[0].shape == (0, *distribution.shape)


# --- the probability-flow map ----------------------------------------------------------------------------------------


def solved(distribution: Distribution, schedule: NoiseSchedule, x_t: Tensor, t: float, s: float) -> Tensor:
    """x_s by an adaptive Runge-Kutta method of order 8 on dx^/d(lam) = x^ - f, with x^ = x / alpha, lam = log tau."""

    def slope(lam: float, x_hat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(x_hat).view(x_t.shape)
        one = torch.ones(len(x), 1, 1, 1)
        return (x - distribution.denoise(x, one, one * np.exp(lam))).numpy().ravel()

    ends = [schedule.lam(time(v)).item() for v in (t, s)]
    start = (x_t / schedule.alpha(time(t))).numpy().ravel()
    solution = solve_ivp(slope, ends, start, method="DOP853", rtol=1e-12, atol=1e-12)
    return schedule.alpha(time(s)) * torch.from_numpy(solution.y[:, -1]).view(x_t.shape)


@pytest.mark.parametrize("name", some_schedules())
@pytest.mark.parametrize("make", [one_pixel, gaussian, lambda: mixture([1.0], [[0.3, -1.0]], [[0.2, 1.5]])])
def test_transport_solves_the_probability_flow(make, name: str) -> None:
    distribution, schedule = make(), SCHEDULES[name]()
    low, high = (schedule.t_of_lam(time(lam)) for lam in (-2.5, 2.5))
    assert distribution.has_map
    for t, s in [(high, low), (low, high)]:
        x_t = noisy(distribution, schedule.alpha(t).expand(5, 1, 1, 1), schedule.sigma(t).expand(5, 1, 1, 1))
        expected = solved(distribution, schedule, x_t, t.item(), s.item())
        close(distribution.transport(schedule, x_t, t.expand(5, 1, 1, 1), s), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", some_schedules())
@pytest.mark.parametrize("make", [one_pixel, gaussian])
def test_transport_back_and_forth(make, name: str) -> None:
    distribution, schedule = make(), SCHEDULES[name]()
    t, s = (schedule.t_of_lam(time(lam)).expand(64, 1, 1, 1) for lam in (-3.0, 4.0))
    x_t = noisy(distribution, schedule.alpha(t), schedule.sigma(t))
    x_s = distribution.transport(schedule, x_t, t, s)
    close(distribution.transport(schedule, x_s, s, t), x_t, rtol=1e-10, atol=1e-10)
    close(distribution.transport(schedule, x_t, t, t), x_t, rtol=1e-14, atol=1e-14)
    between = schedule.t_of_lam(time(0.5)).expand(64, 1, 1, 1)
    through = distribution.transport(schedule, distribution.transport(schedule, x_t, t, between), between, s)
    close(through, x_s, rtol=1e-10, atol=1e-10)


def test_mixture_of_equal_components_moves_as_a_gaussian() -> None:
    distribution, alone = (
        mixture([0.3, 0.7], [[0.4], [0.4]], [[0.2], [0.2]]),
        Gaussian(torch.full((1, 1, 1), 0.4), torch.full((1, 1), 0.04)),
    )
    x_t, t, s = torch.linspace(-30, 30, 101).view(-1, 1, 1, 1), time(0.9), time(0.2)
    close(distribution.transport(VPCosine(), x_t, t, s), alone.transport(VPCosine(), x_t, t, s), rtol=1e-13, atol=1e-14)


def quantile_map(distribution: GaussianMixture, x_t: float, sigma_t: float, sigma_s: float) -> float:
    """x_s with F_s(x_s) = F_t(x_t) where alpha = 1, in 40 decimal digits, by halving; 1 - F in the upper half."""
    columns = (distribution.weights, distribution.means.flatten(), distribution.stds.flatten())
    rows = [tuple(map(mpmath.mpf, row)) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def tail(x, sigma, sign):
        scores = (sign * (x - m) / mpmath.sqrt(s**2 + mpmath.mpf(sigma) ** 2) for _, m, s in rows)
        return mpmath.fsum(w * mpmath.ncdf(z) for (w, _, _), z in zip(rows, scores, strict=True))

    with mpmath.workdps(40):
        sign = 1 if tail(mpmath.mpf(x_t), sigma_t, 1) < 0.5 else -1
        wanted = tail(mpmath.mpf(x_t), sigma_t, sign)
        low, high = mpmath.mpf(-10_000), mpmath.mpf(10_000)
        for _ in range(70):
            middle = (low + high) / 2
            below = (tail(middle, sigma_s, sign) - wanted) * sign < 0
            low, high = (middle, high) if below else (low, middle)
        return float(low)


@pytest.mark.parametrize("sigma_t, sigma_s", [(80.0, 0.002), (0.002, 80.0), (1.0, 0.1), (0.1, 1.0)])
def test_transport_in_the_tails(sigma_t: float, sigma_s: float) -> None:
    """Out to 8 standard deviations on both sides, and to 15 of them, relative to 1e-12; measured 1e-15."""
    distribution = one_pixel()
    mean, covariance = (value.item() for value in distribution.moments())
    scores = [-15.0, -8.0, -5.0, -1.0, 0.0, 1.0, 5.0, 8.0, 15.0]
    x_t = [mean + z * (covariance + sigma_t**2) ** 0.5 for z in scores]
    expected = [quantile_map(distribution, x, sigma_t, sigma_s) for x in x_t]
    close(distribution.transport(VE(), time(x_t), time(sigma_t), time(sigma_s)), time(expected), rtol=1e-12)


def test_transport_in_a_gap_between_components() -> None:
    """Where F is flat to 16 digits, and 1 - F as well: x_t is up to 45 standard deviations from the components."""
    distribution = mixture([0.3, 0.3, 0.4], [[-1.0], [0.0], [1.0]], [[0.01], [0.02], [0.015]])
    x_t = [-1.3, -0.9, -0.7, -0.5, -0.35, -0.1, 0.1, 0.3, 0.5, 0.52, 0.6, 0.9, 1.4]
    expected = [quantile_map(distribution, x, 0.005, 0.05) for x in x_t]
    x_s = distribution.transport(VE(), time(x_t), time(0.005), time(0.05))
    close(x_s, time(expected), rtol=1e-12)


def test_transported_noise_is_data() -> None:
    distribution, schedule, count = one_pixel(), VE(), 20_000
    t, s = time(schedule.t_max), time(schedule.t_min)
    x_t = noisy(distribution, torch.ones(count, 1, 1, 1), t.expand(count, 1, 1, 1))
    mean, covariance = distribution.moments()
    agrees_with_draws(distribution.transport(schedule, x_t, t, s).flatten(1), mean, covariance + schedule.t_min**2)


def test_float32_default_costs_the_map_no_digits() -> None:
    distribution, schedule, x_t = one_pixel(), VPCosine(), torch.linspace(-2, 2, 9).view(-1, 1, 1, 1)
    expected = distribution.transport(schedule, x_t, time(0.8), time(0.1))
    torch.set_default_dtype(torch.float32)  # the fixture puts it back
    assert torch.equal(distribution.transport(schedule, x_t, time(0.8), time(0.1)), expected)
    assert torch.equal(mixture([0.1, 0.9], [[0.1], [0.2]], [[0.3], [0.4]]).means.flatten()[:1], time(0.1).flatten())


# --- types, identity, refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_have_the_type_of_x(kind: str, dtype: torch.dtype) -> None:
    distribution, a, s = DISTRIBUTIONS[kind](), time([0.8, 0.6]), time([0.6, 0.8])
    x_t = noisy(distribution, a, s).to(dtype)
    f = distribution.denoise(x_t, a.float(), s.float())
    assert f.dtype == dtype and f.shape == x_t.shape
    close(f.double(), distribution.denoise(x_t.double(), a, s), rtol=torch.finfo(dtype).eps, atol=1e-6)
    if distribution.has_map:
        x_s = distribution.transport(VPCosine(), x_t, time([0.8, 0.8]), time([0.1, 0.2]))
        assert x_s.dtype == dtype and x_s.shape == x_t.shape


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_tables_go_to_the_device_of_x(kind: str) -> None:
    """On the "meta" device: shapes alone, but it refuses tensors of another device as a GPU does."""
    distribution, a, s = DISTRIBUTIONS[kind](), time([0.8, 0.6]).to("meta"), time([0.6, 0.8]).to("meta")
    x_t = torch.zeros(2, *distribution.shape, device="meta")
    for component in (None, torch.zeros(2, dtype=torch.int64, device="meta")):
        f = distribution.denoise(x_t, a, s, component)
        assert f.device.type == "meta" and f.shape == x_t.shape
    if isinstance(distribution, Gaussian):
        assert distribution.transport(VPCosine(), x_t, time(0.8), time(0.1)).device.type == "meta"
    assert distribution == DISTRIBUTIONS[kind]()


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_a_distribution_is_a_value(kind: str) -> None:
    distribution, twin = DISTRIBUTIONS[kind](), DISTRIBUTIONS[kind]()
    assert distribution == twin and hash(distribution) == hash(twin) and distribution is not twin
    assert json.loads(json.dumps(distribution.plain())) == twin.plain()
    assert distribution != "a law" and distribution != one_pixel().means
    with pytest.raises(AttributeError):
        distribution.shape = (1, 1, 1)  # type: ignore[misc]


def test_distributions_with_other_numbers_differ() -> None:
    near, far = mixture([1.0], [[0.0]], [[1.0]]), mixture([1.0], [[0.0]], [[1.1]])
    assert near != far and near.plain() != far.plain()
    assert near != Gaussian(torch.zeros(1, 1, 1), torch.ones(1, 1))
    flat, square = (mixture([1.0], [[0.0] * 4], [[1.0]], shape) for shape in (None, (1, 2, 2)))
    assert flat != square and flat.plain() != square.plain() and flat.shape == (4, 1, 1)


def test_a_distribution_keeps_its_own_numbers() -> None:
    mean, covariance = torch.zeros(2, 1, 1), torch.eye(2)
    distribution = Gaussian(mean, covariance)
    mean += 1
    distribution.moments()[0].add_(1)
    assert (distribution.mean == 0).all() and (distribution.moments()[0] == 0).all()


def test_weights_are_made_to_sum_to_one() -> None:
    assert mixture([1 / 3 + 1e-7] * 3, [[0.0]] * 3, [[1.0]] * 3).weights.sum().item() == pytest.approx(1, abs=1e-15)


def test_one_std_for_a_row_or_for_all() -> None:
    rows = mixture([0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], [[0.2, 0.2], [0.3, 0.3]])
    assert rows == mixture([0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], [[0.2], [0.3]])
    means, weights = torch.zeros(2, 3, 1, 1), torch.tensor([0.5, 0.5])
    assert GaussianMixture(weights, means, torch.tensor(0.2)).stds.shape == means.shape


def test_no_map_in_closed_form_for_a_mixture_in_a_plane() -> None:
    distribution = plane()
    assert not distribution.has_map
    with pytest.raises(UserError, match="3 components in 2 dimensions"):
        distribution.transport(VPCosine(), torch.zeros(1, 2, 1, 1), time(0.9), time(0.1))


GOOD = {"weights": [0.5, 0.5], "means": [[0.0, 1.0], [1.0, 0.0]], "stds": [[0.1], [0.2]]}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"weights": [0.5, 0.6]}, "weights: positive numbers that sum to 1"),
        ({"weights": [1.0, 0.0]}, "weights: positive"),
        ({"weights": [1.0]}, "weights: 2 numbers"),
        ({"weights": 0.5}, "weights: a list of numbers"),
        ({"weights": []}, "weights: a list of numbers"),
        ({"weights": [float("nan"), 0.5]}, "weights: finite"),
        ({"weights": [True, 0.5]}, "weights: a list of numbers"),
        ({"means": [[0.0, 1.0], [1.0]]}, "means, row 2: 2 numbers"),
        ({"means": [0.0, 1.0]}, "means, row 1: a list of numbers"),
        ({"means": "wide"}, "means: a list of rows"),
        ({"means": []}, "means: a list of rows"),
        ({"means": [["a", 1.0], [1.0, 0.0]]}, "means, row 1: a list of numbers"),
        ({"means": [[float("inf"), 1.0], [1.0, 0.0]]}, "means, row 1: finite"),
        ({"stds": [[0.1], [0.0]]}, "stds: positive"),
        ({"stds": [[0.1], [-0.2]]}, "stds: positive"),
        ({"stds": [[0.1]]}, "stds: 2 rows of 1 or 2 numbers"),
        ({"stds": [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]]}, "stds: 2 rows of 1 or 2 numbers"),
        ({"stds": 0.1}, "stds: a list of rows"),
        ({"shape": [1, 2, 2]}, "shape: C, H and W with a product of 2"),
        ({"shape": [2, 1]}, "shape: C, H and W"),
        ({"shape": [-2, -1, 1]}, "shape: C, H and W"),
        ({"shape": [0.5, 4, 1]}, "shape: C, H and W"),
        ({"shape": "2,1,1"}, "shape: a list of numbers"),
    ],
)
def test_mixture_names_the_setting_at_fault(wrong: dict, words: str) -> None:
    mixture(**GOOD)
    with pytest.raises(UserError, match=words):
        mixture(**{**GOOD, **wrong})


@pytest.mark.parametrize(
    "mean, covariance, words",
    [
        (torch.zeros(2), torch.eye(2), "mean: a shape"),
        (torch.zeros(2, 0, 1), torch.eye(2), "mean: a shape"),
        (torch.zeros(2, 1, 1), torch.eye(3), "covariance: 2 x 2"),
        (torch.zeros(2, 1, 1), torch.ones(2), "covariance: 2 x 2"),
        (torch.zeros(2, 1, 1), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "differ by up to 0.5"),
        (torch.zeros(2, 1, 1), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "at least 0 are needed, got -1"),
        (torch.full((2, 1, 1), float("nan")), torch.eye(2), "mean: finite"),
        (torch.zeros(2, 1, 1), [[1.0, 0.0], [1.0]], "covariance: numbers"),
        (torch.zeros(2, 1, 1), None, "covariance: numbers"),
    ],
)
def test_gaussian_refuses(mean, covariance, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Gaussian(mean, covariance)


@pytest.mark.parametrize(
    "weights, means, stds, words",
    [
        ((2,), (2, 3), (), "means: a shape"),
        ((3,), (2, 1, 1, 1), (), "weights: 2 numbers"),
        ((2, 1), (2, 1, 1, 1), (), "weights: 2 numbers"),
        ((2,), (2, 3, 1, 1), (2,), "stds: a shape"),
        ((2,), (2, 3, 1, 1), (2, 2, 1, 1), "stds: a shape"),
        ((2,), (2, 3, 1, 1), (2, 3, 2, 1), "stds: a shape"),
    ],
)
def test_mixture_refuses_shapes(weights, means, stds, words: str) -> None:
    with pytest.raises(UserError, match=words):
        GaussianMixture(torch.full(weights, 0.5), torch.zeros(means), torch.ones(stds))


def test_covariance_of_float32_and_low_rank_is_accepted() -> None:
    root = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    distribution = Gaussian(torch.zeros(6, 1, 1), root @ root.T)
    assert (distribution._v >= 0).all() and distribution.covariance.dtype == torch.float64
