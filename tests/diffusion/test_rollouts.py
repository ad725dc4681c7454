"""Rollouts of a few-step student against the moments of its chain on a Gaussian, where they follow a recursion."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from analytic import MEAN, VARIANCE, column, some_schedules, time
from distillbench.diffusion.distributions import Gaussian
from distillbench.diffusion.exact_denoiser import ExactDenoiser
from distillbench.diffusion.rollouts import chain_times, rollout
from distillbench.diffusion.samplers import uniform_lambda_times
from distillbench.diffusion.schedules import SCHEDULES, VE, VPCosine
from distillbench.errors import UserError

COUNT, STEPS = 100_000, 3
SHAPE = (2, 1, 1)


def chain(schedule):
    """An exact denoiser of N(m, v), and the times of a student that takes STEPS steps."""
    denoiser = ExactDenoiser(Gaussian(column(MEAN), torch.diag(torch.tensor(VARIANCE))), schedule)
    return denoiser, uniform_lambda_times(schedule, STEPS)[1:]


def drawn(seed=0, count=COUNT):
    """A function that draws new noise at each call, and the list of its draws."""
    generator, draws = torch.Generator().manual_seed(seed), []

    def noise():
        draws.append(torch.randn(count, *SHAPE, generator=generator))
        return draws[-1]

    return noise, draws


def moments(schedule, times, k):
    """Mean and variance of x_t after k steps: with x_0 = m + g (x_t - alpha_t m), they follow from those before."""
    m, v = column(MEAN), column(VARIANCE)
    levels = [(schedule.alpha(time(t)).double(), schedule.sigma(time(t)).double()) for t in times.flip(0)]
    mean, variance = 0 * m, levels[0][1].square().expand(1, *SHAPE)
    for (alpha_t, sigma_t), (alpha_s, sigma_s) in pairwise(levels[: k + 1]):
        g = alpha_t * v / (alpha_t**2 * v + sigma_t**2)
        mean, variance = alpha_s * (m + g * (mean - alpha_t * m)), (alpha_s * g) ** 2 * variance + sigma_s**2
    return mean, variance


def assert_moments(x, mean, variance):
    """Within 5 standard errors."""
    assert ((x.double().mean(dim=0) - mean).abs() < 5 * (variance / len(x)).sqrt()).all()
    assert ((x.double().var(dim=0) / variance - 1).abs() < 5 * (2 / len(x)) ** 0.5).all()


@pytest.mark.parametrize("name", some_schedules())
@pytest.mark.parametrize("k", range(STEPS))
def test_a_rollout_of_all_images_has_the_moments_of_the_chain(name, k):
    schedule = SCHEDULES[name]()
    denoiser, times = chain(schedule)
    noise, draws = drawn()
    x_t, t = rollout(denoiser, schedule, times, noise, k)
    assert_moments(x_t, *moments(schedule, times, k))
    assert (t == times[STEPS - 1 - k]).all() and t.shape == (COUNT, 1, 1, 1) and t.dtype == torch.float64
    assert len(draws) == k + 1


def test_each_image_can_have_its_own_step():
    schedule = VPCosine()
    denoiser, times = chain(schedule)
    k = torch.arange(COUNT).view(-1, 1, 1, 1) % STEPS
    x_t, t = rollout(denoiser, schedule, times, drawn()[0], k)
    for step in range(STEPS):
        rows = (k == step).flatten()
        assert_moments(x_t[rows], *moments(schedule, times, step))
        assert (t[rows] == times[STEPS - 1 - step]).all()
        alone, _ = rollout(denoiser, schedule, times, drawn()[0], step)
        assert torch.equal(x_t[rows], alone[rows])  # the same draws


def test_a_rollout_has_no_gradient_and_costs_what_it_says():
    schedule, calls = VPCosine(), []
    _, times = chain(schedule)
    weight = torch.ones((), requires_grad=True)

    def f(x_t, t):
        calls.append(len(x_t))
        return weight * x_t

    for k, cost in ((0, 0), (2, 2), (torch.zeros(4, 1, 1, 1, dtype=torch.int64), STEPS - 1)):
        calls.clear()
        x_t, _ = rollout(f, schedule, times, drawn(count=4)[0], k)
        assert not x_t.requires_grad and calls == [4] * cost


def test_a_step_outside_of_the_chain_is_refused():
    with pytest.raises(UserError, match="has the steps 0 to 2, got 3"):
        rollout(lambda x_t, t: x_t, VPCosine(), chain(VPCosine())[1], drawn(count=1)[0], 3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_of_a_chain_have_its_noise_levels(name):
    """The first is at most that of pure noise on this schedule."""
    schedule = SCHEDULES[name]()
    times = chain_times(schedule, [80.0, 3.0, 0.5])
    highest = min(80.0, schedule.noise_level(torch.tensor(schedule.t_max)).item())
    assert times.dtype == torch.float64
    assert schedule.noise_level(times).tolist() == pytest.approx([0.5, 3.0, highest], rel=1e-5)


@pytest.mark.parametrize("levels", [[], [1.0, 2.0], [1.0, 1.0], [1.0, 0.0], [1.0, -1.0], [30.0, 20.0], [10.0, 0.01]])
def test_levels_that_make_no_chain_are_refused(levels):
    with pytest.raises(UserError, match=r"levels must fall, within those of the schedule, 0.1 to 10, got \["):
        chain_times(VE(sigma_min=0.1, sigma_max=10.0), levels)


def test_the_ends_of_a_schedule_are_levels():
    assert chain_times(VE(), [80.0, 0.002]).tolist() == pytest.approx([0.002, 80.0])
