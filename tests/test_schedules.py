"""Schedules against the formulas of the papers, in numpy, in 50-digit arithmetic or by quadrature."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit

from analytic import close, schedules, time
from distillbench.schedules import SCHEDULES, VE, FlowMatching, NoiseSchedule, VPCosine, VPLinear

pytestmark = pytest.mark.usefixtures("float64")


def some_times(schedule: NoiseSchedule, n: int = 41) -> torch.Tensor:
    return time(torch.linspace(schedule.t_min, schedule.t_max, n, dtype=torch.float64))


def check(schedule: NoiseSchedule, t: torch.Tensor, alpha: np.ndarray, sigma: np.ndarray, rtol: float) -> None:
    np.testing.assert_allclose(schedule.alpha(t).flatten(), alpha, rtol=rtol)
    np.testing.assert_allclose(schedule.sigma(t).flatten(), sigma, rtol=rtol)


def test_vp_cosine_is_the_cosine_log_snr_of_salimans_and_ho():
    """logsnr = -2 log tan(a t + b), alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr), in numpy."""
    schedule, t = VPCosine(), some_times(VPCosine())
    b = np.arctan(np.exp(-0.5 * 20.0))
    a = np.arctan(np.exp(-0.5 * -20.0)) - b
    logsnr = -2 * np.log(np.tan(a * t.flatten().numpy() + b))
    assert logsnr[0] == pytest.approx(20, abs=1e-9) and logsnr[-1] == pytest.approx(-20, abs=1e-9)
    np.testing.assert_allclose(-2 * schedule.lam(t).flatten(), logsnr, atol=1e-10)
    check(schedule, t, np.sqrt(expit(logsnr)), np.sqrt(expit(-logsnr)), rtol=3e-9)
    check(schedule, t[1:-1], np.sqrt(expit(logsnr))[1:-1], np.sqrt(expit(-logsnr))[1:-1], rtol=1e-11)


def test_vp_cosine_is_a_cosine_and_a_sine_where_its_ends_are_far_away():
    schedule, t = VPCosine(logsnr_min=-60, logsnr_max=60), time(torch.linspace(0.01, 0.99, 33, dtype=torch.float64))
    angle = math.pi / 2 * t.flatten().numpy()
    check(schedule, t, np.cos(angle), np.sin(angle), rtol=1e-10)


def test_vp_linear_is_the_integral_of_its_noise_rate():
    """alpha_t = exp(-1/2 int_0^t beta), sigma^2 = 1 - alpha^2, with the integral by quadrature (Song et al. 2021)."""
    schedule, t = VPLinear(), some_times(VPLinear(), 17)
    integral = [quad(lambda u: 0.1 + u * (20.0 - 0.1), 0, float(v), epsabs=1e-14)[0] for v in t.flatten()]
    check(schedule, t, np.exp(-0.5 * np.array(integral)), np.sqrt(-np.expm1(-np.array(integral))), rtol=1e-9)


def test_ve_has_the_noise_level_as_its_time():
    t = some_times(VE())
    check(VE(), t, np.ones(len(t)), t.flatten().numpy(), rtol=1e-14)


def test_flow_matching_is_the_straight_line():
    t = some_times(FlowMatching())
    check(FlowMatching(), t, 1 - t.flatten().numpy(), t.flatten().numpy(), rtol=1e-11)


@pytest.mark.parametrize("name", ["vp_cosine", "vp_linear"])
def test_variance_is_preserved(name):
    schedule = SCHEDULES[name]()
    t = some_times(schedule)
    total = schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2
    close(total, torch.ones_like(total), atol=3e-9)


@pytest.mark.parametrize("name", schedules())
def test_lambda_is_the_log_of_sigma_over_alpha_and_grows_with_t(name):
    schedule = SCHEDULES[name]()
    t = some_times(schedule, 201)
    lam = schedule.lam(t)
    close(lam, torch.log(schedule.sigma(t) / schedule.alpha(t)), atol=1e-11)
    close(lam.exp(), schedule.noise_level(t), rtol=1e-14)
    assert (lam.flatten().diff() > 0).all()


@pytest.mark.parametrize("name", schedules())
def test_t_of_lam_is_the_inverse_and_stays_in_the_range(name):
    schedule = SCHEDULES[name]()
    t = some_times(schedule, 101)
    close(schedule.t_of_lam(schedule.lam(t)), t, rtol=1e-10, atol=1e-13)
    lam = torch.linspace(-5, 4, 19, dtype=torch.float64).view(-1, 1, 1, 1)
    close(schedule.lam(schedule.t_of_lam(lam)), lam, atol=1e-10)
    beyond = schedule.t_of_lam(torch.tensor([-80.0, 80.0], dtype=torch.float64))
    assert beyond.tolist() == [schedule.t_min, schedule.t_max]


@pytest.mark.parametrize("name", schedules())
def test_coefficients_are_computed_in_float64_whatever_they_are_returned_in(name):
    schedule = SCHEDULES[name]()
    t = some_times(schedule)
    exact = schedule.alpha(t), schedule.sigma(t), *schedule.signal_ratio(t[1:], t[:-1])
    torch.set_default_dtype(torch.float32)  # the fixture puts the default back
    rounded = schedule.alpha(t), schedule.sigma(t), *schedule.signal_ratio(t[1:], t[:-1])
    for wide, narrow in zip(exact, rounded, strict=True):
        assert narrow.dtype is torch.float32 and narrow.shape == wide.shape
        assert torch.equal(narrow, wide.float())
    assert schedule.lam(t).dtype is schedule.noise_level(t).dtype is schedule.t_of_lam(t).dtype is torch.float64


def exact_lam(name: str, t: mpmath.mpf) -> mpmath.mpf:
    if name == "vp_cosine":
        b, end = mpmath.atan(mpmath.exp(-10)), mpmath.atan(mpmath.exp(10))
        return mpmath.log(mpmath.tan(b + (end - b) * t))
    if name == "vp_linear":
        log_alpha = -t * t * (mpmath.mpf(20.0) - mpmath.mpf(0.1)) / 4 - t * mpmath.mpf(0.1) / 2
        return mpmath.log(mpmath.sqrt(1 - mpmath.exp(2 * log_alpha))) - log_alpha
    return mpmath.log(t) if name == "ve" else mpmath.log(t / (1 - t))


@pytest.mark.parametrize("gap", [1e-2, 1e-5])
@pytest.mark.parametrize("name", schedules())
def test_signal_ratio_keeps_its_digits_where_r_is_close_to_one_and_at_both_ends(name, gap):
    """(r, 1 - r) in float32 against 50-digit arithmetic; 1 - r formed in float32 would lose up to all of them."""
    schedule = SCHEDULES[name]()
    width = schedule.t_max - schedule.t_min
    t = torch.tensor([schedule.t_min + gap * width, (schedule.t_min + schedule.t_max) / 2, schedule.t_max]).double()
    s = t - gap * width
    s[0] = schedule.t_min
    torch.set_default_dtype(torch.float32)
    r, one_minus_r = schedule.signal_ratio(time(t), time(s))
    with mpmath.workdps(50):
        for k in range(3):
            difference = exact_lam(name, mpmath.mpf(s[k].item())) - exact_lam(name, mpmath.mpf(t[k].item()))
            assert r[k].item() == pytest.approx(float(mpmath.exp(difference)), rel=2e-7)
            assert one_minus_r[k].item() == pytest.approx(float(-mpmath.expm1(difference)), rel=2e-7)


@pytest.mark.parametrize("name", schedules())
def test_signal_ratio_is_the_ratio_of_the_coefficients(name):
    """r = alpha_t sigma_s / (alpha_s sigma_t), with s < t: in (0, 1)."""
    schedule = SCHEDULES[name]()
    t = some_times(schedule)
    s, t = t[:-1], t[1:]
    r, one_minus_r = schedule.signal_ratio(t, s)
    expected = schedule.alpha(t) * schedule.sigma(s) / (schedule.alpha(s) * schedule.sigma(t))
    close(r, expected, rtol=1e-10)
    close(r + one_minus_r, torch.ones_like(r), atol=1e-15)
    assert ((r > 0) & (r < 1)).all()
