"""The distributions of training times against scipy's, and the denoising loss against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

from distillbench.diffusion import SCHEDULES, VE, Gaussian, denoising_loss, karras_time, lognormal_time
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.exact_denoiser import ExactDenoiser

UNIFORM = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:-1].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_normal_times(name):
    schedule = SCHEDULES[name]()
    lam = schedule.lam(lognormal_time(schedule, UNIFORM, -0.4, 1.0)).flatten()
    exact = stats.norm(-0.4, 1.0).ppf(UNIFORM.flatten().clamp(1e-12)).clip(*schedule.lam_range)
    assert lam.numpy() == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_karras_times_have_a_uniform_root(name):
    schedule, low, high = SCHEDULES[name](), 0.05, 10.0
    root = schedule.noise_level(karras_time(schedule, UNIFORM, low, high, rho=3)).flatten() ** (1 / 3)
    exact = stats.uniform(low ** (1 / 3), high ** (1 / 3) - low ** (1 / 3)).ppf(UNIFORM.flatten())
    assert root.numpy() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("low, high", [(1e-3, 100.0), (0.5, 100.0), (1e-3, 5.0)])
def test_karras_times_do_not_pile_up_at_the_ends_of_a_schedule(low, high):
    schedule = VE(sigma_min=0.1, sigma_max=10.0)
    bottom, top = max(low, 0.1) ** (1 / 7), min(high, 10.0) ** (1 / 7)
    root = schedule.noise_level(karras_time(schedule, UNIFORM, low, high)).flatten() ** (1 / 7)
    assert root.numpy() == pytest.approx(stats.uniform(bottom, top - bottom).ppf(UNIFORM.flatten()), rel=1e-6)


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("name", SCHEDULES)
def test_extreme_draws_stay_within_the_schedule(name, draw):
    schedule, u = SCHEDULES[name](), torch.full((1, 1, 1, 1), draw, dtype=torch.float64)
    for t in (lognormal_time(schedule, u, 0, 100), karras_time(schedule, u, 1e-9, 1e9)):
        assert schedule.t_min <= t.item() <= schedule.t_max


@pytest.mark.parametrize("name", SCHEDULES)
def test_noised_images_have_the_schedule_s_mean_and_variance(name):
    schedule = SCHEDULES[name]()
    t = schedule.t_of_lam(torch.full((100_000, 1, 1, 1), math.log(0.7), dtype=torch.float64))
    eps = torch.randn(100_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x_t = schedule.noised(torch.full_like(eps, 0.3), t, eps)
    alpha, sigma = schedule.alpha(t)[0].item(), schedule.sigma(t)[0].item()
    assert sigma / alpha == pytest.approx(0.7, rel=1e-6)
    assert x_t.mean().item() == pytest.approx(0.3 * alpha, abs=5 * sigma / 100_000**0.5)
    assert x_t.std().item() == pytest.approx(sigma, rel=0.01)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_denoising_loss_of_the_best_denoiser(name):
    """For x_0 ~ N(0, v) the error of E[x_0 | x_t] is v tau^2 / (v + tau^2)."""
    schedule, v, tau = SCHEDULES[name](), 0.25, 0.4
    exact = ExactDenoiser(Gaussian(torch.zeros(2, 1, 1), v * torch.eye(2)), schedule)
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(50_000, 2, 1, 1, generator=generator) for _ in range(2))
    t = schedule.t_of_lam(torch.full((50_000, 1, 1, 1), math.log(tau), dtype=torch.float64))
    loss = denoising_loss(exact, v**0.5 * x_0, t, eps, sd=0.6).item()
    assert loss == pytest.approx((tau**-2 + 0.6**-2) * v * tau**2 / (v + tau**2), rel=0.02)


def test_the_denoising_loss_s_gradient_reaches_the_network():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.tensor(0.1))

        def forward(self, x, lam, embedding=None, class_index=None):
            return x + self.by

    schedule = SCHEDULES["ve"]()
    D = Denoiser(Shift(), schedule, "x0")
    x_0, eps = torch.zeros(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    t = schedule.t_of_lam(torch.zeros(4, 1, 1, 1, dtype=torch.float64))
    denoising_loss(D, x_0, t, eps, sd=1.0).backward()
    assert D.network.by.grad.item() == pytest.approx(2 * 0.1 * (1 + 1), rel=1e-5)
