"""Samplers against closed-form gains, the exact flow of a Gaussian and of a mixture, and diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from analytic import (
    MEAN,
    VARIANCE,
    close,
    column,
    ddim_chain,
    gaussian_map,
    gaussian_teacher,
    mixture_map,
    mixture_teacher,
    schedules,
    slope,
    time,
)
from distillbench.denoiser import implied_eps
from distillbench.evaluate import teacher_sampler
from distillbench.noise import FixedNoise
from distillbench.samplers import ddim, ddim_step, heun_step, karras_times, time_like, uniform_times
from distillbench.schedules import SCHEDULES, VE, VPCosine, VPLinear
from distillbench.teachers import Teacher

pytestmark = pytest.mark.usefixtures("float64")


def noise(n: int = 6, pixels: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, pixels, 1, 1, generator=torch.Generator().manual_seed(seed))


def down(step, teacher: Teacher, x: Tensor, times: Tensor) -> Tensor:
    """`step` from the last of `times` to the first."""
    for k in range(len(times) - 1, 0, -1):
        x = step(teacher, x, time_like(x, times[k]), time_like(x, times[k - 1]))
    return x


def one_ddim_step(teacher: Teacher, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return ddim_step(teacher.schedule, x, teacher.denoise(x, t), t, s)


def one_heun_step(teacher: Teacher, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return heun_step(teacher.schedule, teacher.denoise, x, t, s)


# --- DDIM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules())
def test_ddim_step_is_equation_12_of_song_et_al(name):
    """(sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) f for arbitrary x_t and f."""
    schedule = SCHEDULES[name]()
    t, s = schedule.t_of_lam(time([1.0, 2.0, -2.0])), schedule.t_of_lam(time([0.5, -4.0, -2.5]))
    x_t, f = noise(3), noise(3, seed=1)
    ratio = schedule.sigma(s) / schedule.sigma(t)
    expected = ratio * x_t + (schedule.alpha(s) - schedule.alpha(t) * ratio) * f
    close(ddim_step(schedule, x_t, f, t, s), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 7, 32])
@pytest.mark.parametrize("name", schedules())
def test_ddim_on_a_gaussian_is_a_product_of_gains(name, steps):
    """Closed form: each step multiplies x - alpha m by (alpha_s alpha_t v + sigma_s sigma_t) / V_t."""
    teacher = gaussian_teacher(SCHEDULES[name]())
    times = uniform_times(teacher.schedule, steps)
    x_T = teacher.schedule.sigma(time(times[-1])) * noise()
    x_0 = ddim(teacher.denoise, teacher.schedule, x_T, times)
    close(x_0, ddim_chain(teacher.schedule, x_T, times), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [4, 16, 64])
def test_ddim_with_equal_angles_shrinks_a_unit_gaussian_by_a_power_of_a_cosine(steps):
    """cos(pi / 2N)^N on the cosine schedule: .7286, .9259, .9809."""
    teacher = gaussian_teacher(VPCosine(logsnr_min=-60, logsnr_max=60), (0.0,), (1.0,))
    x_0 = ddim(teacher.denoise, teacher.schedule, noise(pixels=1), uniform_times(teacher.schedule, steps))
    close(x_0, math.cos(math.pi / (2 * steps)) ** steps * noise(pixels=1), rtol=1e-9)


def test_ddim_makes_one_evaluation_a_step_and_ends_on_the_data_prediction():
    teacher = gaussian_teacher()
    asked = []

    def f(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t[0].item())
        return teacher.denoise(x, t) + 1  # recognisable

    times = uniform_times(teacher.schedule, 5)
    x_0 = ddim(f, teacher.schedule, noise(), times)
    assert asked == times.flip(0)[:-1].tolist()
    assert teacher.teacher_rows.rows == 5 * 6
    assert torch.equal(ddim(f, teacher.schedule, noise(), times[-2:]), f(noise(), time_like(noise(), 1.0)))
    assert x_0.shape == noise().shape


@pytest.mark.parametrize("name", schedules())
def test_ddim_depends_on_a_schedule_only_through_the_noise_levels(name):
    """At equal noise levels every schedule gives the x_0 that Euler's method gives in EDM's coordinates."""
    schedule = SCHEDULES[name]()
    levels = torch.tensor([0.01, 0.05, 0.3, 1.0, 4.0, 20.0], dtype=torch.float64)
    teacher = mixture_teacher(schedule)
    times = schedule.t_of_lam(levels.log())
    x_hat = 20 * noise(pixels=1)
    x_0 = ddim(teacher.denoise, schedule, schedule.alpha(time(times[-1])) * x_hat, times)
    edm = mixture_teacher(VE())
    for k in range(5, 1, -1):
        slope_ = (x_hat - edm.denoise(x_hat, time_like(x_hat, levels[k]))) / levels[k]
        x_hat = x_hat + (levels[k - 1] - levels[k]) * slope_
    close(x_0, edm.denoise(x_hat, time_like(x_hat, levels[1])), rtol=1e-9, atol=1e-10)


def test_ddim_agrees_with_diffusers():
    """diffusers' DDIMScheduler on the discrete betas whose cumulative product is VPLinear's alpha^2, five steps."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    schedule, teacher = VPLinear(), mixture_teacher(VPLinear())
    t = torch.arange(1, 101, dtype=torch.float64) / 100
    theirs = DDIMScheduler(100, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    theirs.alphas_cumprod = schedule.alpha(t) ** 2
    theirs.set_timesteps(5)
    x = noise(pixels=1)
    for i in theirs.timesteps:
        t_i = time_like(x, t[i])
        eps = implied_eps(x, teacher.denoise(x, t_i), schedule.alpha(t_i), schedule.sigma(t_i))
        x = theirs.step(eps, i, x).prev_sample
    times = torch.cat([torch.tensor([schedule.t_min]), t[theirs.timesteps.flip(0)]])
    close(ddim(teacher.denoise, schedule, noise(pixels=1), times), x, rtol=1e-9, atol=1e-9)


# --- Heun ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules())
def test_heun_step_on_a_gaussian_is_the_trapezium_rule(name):
    """dx^/dtau = tau (x^ - m) / (v + tau^2): Heun's factor written out, in EDM's coordinates."""
    schedule = SCHEDULES[name]()
    teacher = gaussian_teacher(schedule)
    tau_t, tau_s = time([0.5, 3.0, 20.0]), time([0.2, 1.5, 12.0])
    t, s = schedule.t_of_lam(tau_t.log()), schedule.t_of_lam(tau_s.log())
    v, m, h = column(VARIANCE), column(MEAN), tau_s - tau_t
    rate = lambda tau: tau / (v + tau**2)
    gain = 1 + h / 2 * (rate(tau_t) + rate(tau_s) * (1 + h * rate(tau_t)))
    x_hat = tau_t * noise(3)
    x_s = heun_step(schedule, teacher.denoise, schedule.alpha(t) * x_hat, t, s)
    close(x_s / schedule.alpha(s), m + gain * (x_hat - m), rtol=1e-10, atol=1e-10)
    assert teacher.teacher_rows.rows == 2 * 3


@pytest.mark.parametrize(("step", "order", "within"), [(one_ddim_step, 1, 0.1), (one_heun_step, 2, 0.15)])
@pytest.mark.parametrize("name", ["ve", "vp_cosine", "flow_matching"])
def test_order_of_convergence_on_a_karras_grid(name, step, order, within):
    """Error against the exact map (closed form; equal quantiles) falls as N^-1 (DDIM) and N^-2 (Heun)."""
    schedule = SCHEDULES[name]()
    gaussian, mixture = gaussian_teacher(schedule), mixture_teacher(schedule)
    low, high = schedule.t_of_lam(time([0.002, 80.0]).log())
    x_T = schedule.alpha(high) * 80 * noise(32).clamp(-2, 2)
    exact = gaussian_map(schedule, x_T, high, low)
    x_M = schedule.alpha(high) * 80 * noise(32, pixels=1).clamp(-2, 2)
    exact_mixture = mixture_map(schedule, x_M, high.item(), low.item())
    errors, errors_mixture = [], []
    for steps in (64, 128, 256):
        times = karras_times(schedule, steps + 1, 0.002, 80.0)
        errors.append((down(step, gaussian, x_T, times) - exact).square().mean().sqrt().item())
        errors_mixture.append((down(step, mixture, x_M, times) - exact_mixture).square().mean().sqrt().item())
    assert slope(errors) == pytest.approx(order, abs=within)
    assert slope(errors_mixture) == pytest.approx(order, abs=2 * within)
    assert errors[-1] < {1: 0.02, 2: 1e-3}[order]


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [3.0, 7.0])
def test_karras_times_are_equation_5(rho):
    """(max^(1/rho) + i/(N-1) (min^(1/rho) - max^(1/rho)))^rho, i = 0, ..., N-1, in numpy; here in ascending order."""
    i = np.arange(18)
    levels = (80.0 ** (1 / rho) + i / 17 * (0.002 ** (1 / rho) - 80.0 ** (1 / rho))) ** rho
    for name in SCHEDULES:
        schedule = SCHEDULES[name]()
        times = karras_times(schedule, 18, 0.002, 80.0, rho)
        assert times.shape == (18,) and times.dtype is torch.float64
        np.testing.assert_allclose(schedule.noise_level(times), levels[::-1], rtol=1e-9)


def test_karras_levels_beyond_the_schedule_are_moved_to_its_ends():
    times = karras_times(VE(sigma_min=0.1, sigma_max=10.0), 18, 0.002, 80.0)
    assert times[0] == 0.1 and times[-1] == 10.0 and ((times >= 0.1) & (times <= 10.0)).all()


@pytest.mark.parametrize("name", schedules())
def test_uniform_times_are_i_over_n_stretched_over_the_range(name):
    schedule = SCHEDULES[name]()
    times = uniform_times(schedule, 8)
    expected = [schedule.t_min + i / 8 * (schedule.t_max - schedule.t_min) for i in range(9)]
    np.testing.assert_allclose(times, expected, rtol=1e-14)
    assert times.dtype is torch.float64


def test_time_like_gives_one_time_to_every_image():
    t = time_like(noise(5).float(), 0.25)
    assert t.shape == (5, 1, 1, 1) and t.dtype is torch.float64 and (t == 0.25).all()


# --- the teacher's own row -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules())
def test_teacher_sampler_answers_the_noise_scaled_to_the_schedule(name):
    """eps stands for x_T = sigma_T eps, also where sigma_T is 80 (VE): the closed-form DDIM, with the law's spread."""
    schedule = SCHEDULES[name]()
    teacher = gaussian_teacher(schedule)
    times = uniform_times(schedule, 256)
    x_T = schedule.sigma(time(schedule.t_max)) * noise()
    exact = gaussian_map(schedule, x_T, time(schedule.t_max), time(schedule.t_min))
    x_0 = teacher_sampler(teacher)(FixedNoise([noise()]), 256)
    close(x_0, ddim_chain(schedule, x_T, times), atol=1e-3)
    assert (x_0.std(dim=0) > 0.5 * exact.std(dim=0)).all()
