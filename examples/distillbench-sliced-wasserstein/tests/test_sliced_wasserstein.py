"""The sliced Wasserstein distance meets the contract, and agrees with closed forms and with an assignment solver."""

from pathlib import Path

import pytest
import torch
from distillbench import Samples, Unavailable
from distillbench.evaluation import ImageSet
from distillbench.evaluation.features import Networks
from distillbench.testing import assert_conforms
from scipy.optimize import linear_sum_assignment
from scipy.stats import norm, wasserstein_distance
from torch import Tensor

from distillbench_sliced_wasserstein import L, SlicedWasserstein, directions, project, sliced_wasserstein


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(x_0: Tensor, real: Tensor) -> Samples:
    """What a run passes to a metric, with real images in batches of 7."""
    ours, theirs = (
        ImageSet(lambda images=images: images.split(7), len(images), tuple(images.shape[1:]), Networks(Path(), "cpu"))
        for images in (x_0, real)
    )
    return Samples(x_0, x_0, ours, ours, theirs, keeps_noise=True)


def brute_force(x: Tensor, y: Tensor) -> float:
    """The same number by optimal assignment, each point of the smaller set as often as it takes: (L,N) and (L,M)."""
    x, y = x.repeat_interleave(y.shape[1], dim=1), y.repeat_interleave(x.shape[1], dim=1)
    squares = []
    for a, b in zip(x, y, strict=True):
        cost = (a[:, None] - b) ** 2
        rows, columns = linear_sum_assignment(cost.numpy())
        squares.append(cost[rows, columns].mean())
    return torch.stack(squares).mean().sqrt().item()


def test_it_conforms():
    assert_conforms(SlicedWasserstein)


@pytest.mark.parametrize(("N", "M"), [(6, 6), (6, 4), (5, 7), (1, 9), (12, 3)])
def test_it_is_the_cheapest_assignment(N, M):
    x, y = torch.randn(3, N, generator=generator()).double(), 2 * torch.randn(3, M, generator=generator(1)).double()
    x, y = x.sort(dim=1).values, y.sort(dim=1).values
    assert sliced_wasserstein(x, y) == pytest.approx(brute_force(x, y), rel=1e-12)
    assert sliced_wasserstein(y, x) == pytest.approx(sliced_wasserstein(x, y), rel=1e-12)


def test_order_two_is_at_least_order_one():
    """scipy has order 1; W_1 <= W_2 by Jensen, with equality where all distances are equal."""
    x, y = (torch.rand(1, n, generator=generator(n)).double().sort(dim=1).values for n in (30, 40))
    assert sliced_wasserstein(x, y) >= wasserstein_distance(x[0].numpy(), y[0].numpy()) > 0
    assert sliced_wasserstein(x, x + 0.3) == pytest.approx(wasserstein_distance(x[0].numpy(), (x + 0.3)[0].numpy()))


def test_of_gaussians():
    """W_2^2 between N(m, s^2) and N(n, r^2) is (m - n)^2 + (s - r)^2; quantiles stand for the distributions."""
    u = (torch.arange(20_000).double() + 0.5) / 20_000
    z = torch.from_numpy(norm.ppf(u.numpy()))
    x, y = 0.2 + 0.5 * z, -0.1 + 0.1 * z
    assert sliced_wasserstein(x[None], y[None]) == pytest.approx((0.3**2 + 0.4**2) ** 0.5, rel=1e-3)


def test_a_shift_costs_its_length_along_each_direction():
    """SW^2 = mean of (theta . d)^2, and over the sphere that is |d|^2 / D."""
    x = torch.rand(50, 3, 2, 2, generator=generator()) - 0.5
    d = torch.linspace(-0.3, 0.4, 12).view(3, 2, 2)
    score = SlicedWasserstein().score(samples(x + d, x))
    along = directions(12) @ d.double().flatten()
    assert score == pytest.approx(along.square().mean().sqrt().item(), rel=1e-6)
    assert score == pytest.approx((d.square().mean() ** 0.5).item(), rel=3 / L**0.5)


def test_a_scaling_costs_its_share_of_the_spread():
    """x against a x: every quantile moves by (1 - a) theta . x, so SW^2 = (1 - a)^2 mean of (theta . x)^2."""
    x = 2 * torch.rand(40, 1, 4, 4, generator=generator()) - 1
    expected = 0.3 * (directions(16) @ x.double().flatten(1).T).square().mean().sqrt().item()
    assert SlicedWasserstein().score(samples(0.7 * x, x)) == pytest.approx(expected, rel=1e-6)


def test_it_is_zero_at_home_whatever_the_order_and_the_number_of_copies():
    x = 2 * torch.rand(30, 2, 3, 3, generator=generator()) - 1
    assert SlicedWasserstein().score(samples(x.flip(0), x)) == pytest.approx(0, abs=1e-12)
    assert SlicedWasserstein().score(samples(x.repeat(3, 1, 1, 1), x)) == pytest.approx(0, abs=1e-12)


def test_eight_bit_images_are_read_as_what_they_mean():
    levels = torch.randint(0, 256, (20, 1, 4, 4), generator=generator(), dtype=torch.uint8)
    assert SlicedWasserstein().score(samples(levels / 127.5 - 1, levels)) == pytest.approx(0, abs=1e-6)


def test_directions_are_fixed_and_of_length_one():
    theta = directions(5)
    assert theta.shape == (L, 5) and torch.equal(theta, directions(5))
    torch.testing.assert_close(theta.norm(dim=1), torch.ones(L).double())
    assert project([torch.zeros(4, 5, 1, 1)], theta).shape == (L, 4)


def test_other_shapes_have_no_score():
    with pytest.raises(Unavailable, match="different shapes"):
        SlicedWasserstein().score(samples(torch.rand(5, 2, 1, 1), torch.rand(5, 1, 1, 1)))
