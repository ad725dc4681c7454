"""Schedules against the formulas of the papers, in numpy, in 50-digit arithmetic or by quadrature, and diffusers."""

from __future__ import annotations

import copy
import functools
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit

from analytic import close, schedules, time
from distillbench.diffusion.schedules import (
    SCHEDULES,
    VE,
    DiscreteBetas,
    FlowMatching,
    NoiseSchedule,
    VPCosine,
    VPLinear,
)
from distillbench.errors import UserError

pytestmark = pytest.mark.usefixtures("float64")
DISCRETE = {"ddpm_linear": "linear", "ddpm_scaled_linear": "scaled_linear", "ddpm_cosine": "squaredcos_cap_v2"}


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


@pytest.mark.parametrize("name", ["vp_cosine", "vp_linear", *DISCRETE])
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
    low, high = schedule.lam(t[0]).item(), schedule.lam(t[-1]).item()
    lam = time(torch.linspace(max(low, -5), min(high, 4), 19, dtype=torch.float64))
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


@functools.cache
def exact_abar(betas: str) -> list[mpmath.mpf]:
    """abar_0, ..., abar_999 in 50-digit arithmetic, from the definitions of the betas."""
    with mpmath.workdps(50):
        f = lambda i: (
            mpmath.cos((mpmath.mpf(i) / 1000 + mpmath.mpf("0.008")) / mpmath.mpf("1.008") * mpmath.pi / 2) ** 2
        )
        ends = {"linear": ("0.0001", "0.02", 1), "scaled_linear": ("0.00085", "0.012", 2)}
        if betas in ends:
            *ends, power = ends[betas]
            low, high = (mpmath.mpf(end) ** (mpmath.mpf(1) / power) for end in ends)
            beta = [(low + (high - low) * i / 999) ** power for i in range(1000)]
        else:
            beta = [min(1 - f(i + 1) / f(i), mpmath.mpf("0.999")) for i in range(1000)]
        abar = [1 - beta[0]]
        for b in beta[1:]:
            abar.append(abar[-1] * (1 - b))
        return abar


def exact_lam(name: str, t: mpmath.mpf) -> mpmath.mpf:
    if name == "vp_cosine":
        b, end = mpmath.atan(mpmath.exp(-10)), mpmath.atan(mpmath.exp(10))
        return mpmath.log(mpmath.tan(b + (end - b) * t))
    if name in DISCRETE:
        log_abar, u = [mpmath.mpf(0), *map(mpmath.log, exact_abar(DISCRETE[name]))], 1000 * t
        k = min(int(u), 999)
        return mpmath.log(mpmath.expm1(-log_abar[k] - (u - k) * (log_abar[k + 1] - log_abar[k]))) / 2
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


# --- diffusers' discrete schedules -----------------------------------------------------------------------------------


def abar(schedule: NoiseSchedule, index: torch.Tensor) -> torch.Tensor:
    return schedule.alpha((index.double() + 1) / 1000) ** 2


@pytest.mark.parametrize("name", DISCRETE)
def test_abar_is_that_of_diffusers_at_every_index(name):
    """diffusers multiplies a thousand float32 factors; the last of "squaredcos_cap_v2" is 1 - .999 in float32."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    ends = {"ddpm_linear": (1e-4, 0.02), "ddpm_scaled_linear": (0.00085, 0.012), "ddpm_cosine": (1e-4, 0.02)}[name]
    ours = abar(SCHEDULES[name](), torch.arange(1000))
    for kind in (DDPMScheduler, DDIMScheduler):
        theirs = kind(1000, *ends, beta_schedule=DISCRETE[name]).alphas_cumprod
        close(ours[:-1], theirs[:-1].double(), rtol=3e-6)
        close(ours[-1:], theirs[-1:].double(), rtol=1e-4)


@pytest.mark.parametrize("name", DISCRETE)
def test_abar_is_the_product_in_50_digits(name):
    exact = torch.tensor([float(a) for a in exact_abar(DISCRETE[name])])
    close(abar(SCHEDULES[name](), torch.arange(1000)), exact, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "first", "at_980", "last"),
    [
        ("ddpm_linear", 0.999900, 5.90e-5, 4.04e-5),
        ("ddpm_scaled_linear", 0.999150, 5.84e-3, 4.66e-3),
        ("ddpm_cosine", 0.999959, 8.77e-4, 2.4e-9),
    ],
)
def test_abar_is_that_of_the_table(name, first, at_980, last):
    """specs/methods.md, section 1.2."""
    found = abar(SCHEDULES[name](), torch.tensor([0, 980, 999]))
    np.testing.assert_allclose(found, [first, at_980, last], rtol=0.02)
    np.testing.assert_allclose(found[:2], [first, at_980], rtol=2e-3)


@pytest.mark.parametrize("name", DISCRETE)
def test_log_abar_is_linear_between_the_indices(name):
    schedule = SCHEDULES[name]()
    k = torch.arange(1, 1000).double()
    log_abar = lambda u: 2 * torch.log(schedule.alpha(u / 1000))
    close(log_abar(k + 0.25), 0.75 * log_abar(k) + 0.25 * log_abar(k + 1), rtol=1e-8)
    assert (schedule.t_min, schedule.t_max) == (0.001, 1.0)
    t = (k + 0.5) / 1000
    close(schedule.t_of_lam(schedule.lam(t)), t, rtol=1e-10)


def test_a_discrete_schedule_can_be_copied_and_have_another_number_of_steps():
    short = copy.deepcopy(DiscreteBetas("linear", steps=10))
    beta = torch.linspace(1e-4, 0.02, 10)
    close(short.alpha(torch.arange(1, 11).double() / 10) ** 2, torch.cumprod(1 - beta, 0), rtol=1e-12)
    assert short.t_min == 0.1


def test_unknown_betas_are_refused():
    with pytest.raises(UserError, match=r"'linaer'\. Did you mean 'linear'"):
        DiscreteBetas("linaer")


def test_tables_follow_the_time_to_its_device():
    t = torch.full((2, 1, 1, 1), 0.5, dtype=torch.float64, device="meta")
    schedule = SCHEDULES["ddpm_linear"]()
    assert schedule.alpha(t).device == schedule.t_of_lam(schedule.lam(t)).device == t.device


# --- restricted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules())
def test_restricted_narrows_the_times_and_nothing_else(name):
    schedule = SCHEDULES[name]()
    narrow = schedule.restricted(-2.0, 1.5)
    assert type(narrow) is type(schedule)
    close(narrow.lam(torch.tensor([narrow.t_min, narrow.t_max])), torch.tensor([-2.0, 1.5]), atol=1e-10)
    t = some_times(narrow)
    assert torch.equal(narrow.lam(t), schedule.lam(t)) and torch.equal(narrow.alpha(t), schedule.alpha(t))
    assert narrow.t_of_lam(torch.tensor([-9.0, 9.0])).tolist() == [narrow.t_min, narrow.t_max]
    assert (schedule.t_min, schedule.t_max) == (SCHEDULES[name]().t_min, SCHEDULES[name]().t_max)


@pytest.mark.parametrize("name", schedules())
def test_restricted_never_widens(name):
    schedule = SCHEDULES[name]().restricted(-2.0, 1.5)
    for low, high in ((-math.inf, math.inf), (-90.0, 90.0), (-2.5, 2.5)):
        same = schedule.restricted(low, high)
        assert (same.t_min, same.t_max) == (schedule.t_min, schedule.t_max)
    half = schedule.restricted(0.0, math.inf)
    assert half.t_max == schedule.t_max and half.lam(torch.tensor(half.t_min)).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (0.5, 0.5), (30.0, 40.0), (-40.0, -30.0), (math.nan, 1.0)])
@pytest.mark.parametrize("name", schedules())
def test_a_range_that_leaves_nothing_is_refused(name, low, high):
    with pytest.raises(UserError, match="no time of"):
        SCHEDULES[name]().restricted(low, high)


# --- dtypes and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules())
def test_alpha_and_sigma_have_the_default_dtype_and_the_gradient_of_their_times(name):
    schedule = SCHEDULES[name]()
    t = some_times(schedule, 9)[1:-1].requires_grad_()
    (schedule.alpha(t) + schedule.sigma(t)).sum().backward()
    h = 1e-7 * t.detach()
    around = [schedule.alpha(u) + schedule.sigma(u) for u in (t.detach() - h, t.detach() + h)]
    close(t.grad, (around[1] - around[0]) / (2 * h), rtol=1e-4, atol=1e-6)
    torch.set_default_dtype(torch.float32)  # the fixture sets it back
    assert schedule.alpha(t).dtype == schedule.sigma(t).dtype == torch.float32
