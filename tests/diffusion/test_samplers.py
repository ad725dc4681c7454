"""Samplers against closed-form gains, the exact flow of a Gaussian and of a mixture, and diffusers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from analytic import (
    CENTRES,
    MEAN,
    SPREADS,
    VARIANCE,
    GaussianNetwork,
    MixtureNetwork,
    close,
    column,
    ddim_chain,
    gaussian_map,
    mixture_map,
    schedules,
    slope,
    some_schedules,
    time,
)
from distillbench.diffusion.consistency import multistep
from distillbench.diffusion.denoiser import implied_eps
from distillbench.diffusion.samplers import (
    ONE_STEP,
    SAMPLERS,
    TIME_GRIDS,
    DenoiseFunction,
    Solver,
    ancestral,
    ancestral_step,
    ddim,
    ddim_step,
    dpmpp_2m,
    heun,
    heun_step,
    karras_times,
    time_like,
    uniform_times,
)
from distillbench.diffusion.schedules import SCHEDULES, VE, NoiseSchedule, VPCosine, VPLinear
from distillbench.errors import UserError

pytestmark = pytest.mark.usefixtures("float64")


def noise(n: int = 6, pixels: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, pixels, 1, 1, generator=torch.Generator().manual_seed(seed))


def gaussian(schedule: NoiseSchedule, mean=MEAN, variance=VARIANCE) -> DenoiseFunction:
    """f(x_t, t) of N(mean, diag(variance))."""
    network = GaussianNetwork(schedule, mean, variance)
    return lambda x_t, t: network(x_t, t.flatten())


def mixture(schedule: NoiseSchedule) -> DenoiseFunction:
    """f(x_t, t) of the one-pixel mixture."""
    network = MixtureNetwork(schedule)
    return lambda x_t, t: network(x_t, t.flatten())


class Recorded:
    """A denoiser that remembers where it was asked."""

    def __init__(self, f: DenoiseFunction) -> None:
        self.f, self.x, self.t = f, [], []

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        self.x.append(x_t)
        self.t.append(t[0].item())
        return self.f(x_t, t)


def arrive(sampler, f: DenoiseFunction, schedule: NoiseSchedule, x_T: Tensor, times: Tensor, *noises) -> Tensor:
    """x_s where `sampler` arrives after steps down all of `times`, of which s is the first: its last evaluation."""
    recorded = Recorded(f)
    sampler(recorded, schedule, x_T, torch.cat([times[:1], times]), *noises)
    assert recorded.t[-1] == times[0]
    return recorded.x[-1]


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


# --- DDIM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_schedules())
def test_ddim_step_is_equation_12_of_song_et_al(name):
    """(sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) f for arbitrary x_t and f."""
    schedule = SCHEDULES[name]()
    t, s = schedule.t_of_lam(time([1.0, 2.0, -2.0])), schedule.t_of_lam(time([0.5, -4.0, -2.5]))
    x_t, f = noise(3), noise(3, seed=1)
    ratio = schedule.sigma(s) / schedule.sigma(t)
    expected = ratio * x_t + (schedule.alpha(s) - schedule.alpha(t) * ratio) * f
    close(ddim_step(schedule, x_t, f, t, s), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 7, 32])
@pytest.mark.parametrize("name", some_schedules())
def test_ddim_on_a_gaussian_is_a_product_of_gains(name, steps):
    """Closed form: each step multiplies x - alpha m by (alpha_s alpha_t v + sigma_s sigma_t) / V_t."""
    schedule = SCHEDULES[name]()
    for grid in TIME_GRIDS:
        solver = Solver("ddim", grid)
        x_T = schedule.sigma(time(solver.times(schedule, steps)[-1])) * noise()
        x_0 = solver.solve(gaussian(schedule), schedule, noise(), steps)
        close(x_0, ddim_chain(schedule, x_T, solver.times(schedule, steps)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [4, 16, 64])
def test_ddim_with_equal_angles_shrinks_a_unit_gaussian_by_a_power_of_a_cosine(steps):
    """cos(pi / 2N)^N on the cosine schedule: .7286, .9259, .9809."""
    schedule = VPCosine(logsnr_min=-60, logsnr_max=60)
    x_0 = ddim(gaussian(schedule, (0.0,), (1.0,)), schedule, noise(pixels=1), uniform_times(schedule, steps))
    close(x_0, math.cos(math.pi / (2 * steps)) ** steps * noise(pixels=1), rtol=1e-9)


@pytest.mark.parametrize("name", some_schedules())
def test_ddim_depends_on_a_schedule_only_through_the_noise_levels(name):
    """At equal noise levels every schedule gives the x_0 that Euler's method gives in EDM's coordinates."""
    schedule = SCHEDULES[name]()
    levels = torch.tensor([0.01, 0.05, 0.3, 1.0, 4.0, 20.0], dtype=torch.float64)
    levels = levels.clamp(*schedule.noise_level(torch.tensor([schedule.t_min, schedule.t_max])).tolist())
    times = schedule.t_of_lam(levels.log())
    x_hat = levels[-1] * noise(pixels=1)
    x_0 = ddim(mixture(schedule), schedule, schedule.alpha(time(times[-1])) * x_hat, times)
    edm = mixture(VE())
    for k in range(5, 1, -1):
        slope_ = (x_hat - edm(x_hat, time_like(x_hat, levels[k]))) / levels[k]
        x_hat = x_hat + (levels[k - 1] - levels[k]) * slope_
    close(x_0, edm(x_hat, time_like(x_hat, levels[1])), rtol=1e-9, atol=1e-10)


def test_ddim_agrees_with_diffusers_on_other_betas():
    """diffusers' DDIMScheduler on the discrete betas whose cumulative product is VPLinear's alpha^2, five steps."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    schedule, f = VPLinear(), mixture(VPLinear())
    t = torch.arange(1, 101, dtype=torch.float64) / 100
    theirs = DDIMScheduler(100, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    theirs.alphas_cumprod = schedule.alpha(t) ** 2
    theirs.set_timesteps(5)
    x = noise(pixels=1)
    for i in theirs.timesteps:
        t_i = time_like(x, t[i])
        eps = implied_eps(x, f(x, t_i), schedule.alpha(t_i), schedule.sigma(t_i))
        x = theirs.step(eps, i, x).prev_sample
    times = torch.cat([torch.tensor([schedule.t_min]), t[theirs.timesteps.flip(0)]])
    close(ddim(f, schedule, noise(pixels=1), times), x, rtol=1e-9, atol=1e-9)


# --- Heun ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_schedules())
def test_heun_step_on_a_gaussian_is_the_trapezium_rule(name):
    """dx^/dtau = tau (x^ - m) / (v + tau^2): Heun's factor written out, in EDM's coordinates."""
    schedule = SCHEDULES[name]()
    f = Recorded(gaussian(schedule))
    tau_t, tau_s = time([0.5, 3.0, 14.0]), time([0.2, 1.5, 9.0])
    t, s = schedule.t_of_lam(tau_t.log()), schedule.t_of_lam(tau_s.log())
    v, m, h = column(VARIANCE), column(MEAN), tau_s - tau_t
    rate = lambda tau: tau / (v + tau**2)
    gain = 1 + h / 2 * (rate(tau_t) + rate(tau_s) * (1 + h * rate(tau_t)))
    x_hat = tau_t * noise(3)
    x_s = heun_step(schedule, f, schedule.alpha(t) * x_hat, t, s)
    close(x_s / schedule.alpha(s), m + gain * (x_hat - m), rtol=1e-10, atol=1e-10)
    assert len(f.x) == 2


@pytest.mark.parametrize("name", some_schedules())
def test_heun_reaches_the_exact_flow(name):
    """18 steps, EDM's own number for CIFAR-10, leave .04 at a spread of 1; four times as many leave a sixteenth."""
    schedule = SCHEDULES[name]()
    solver, f = Solver.parse("heun"), gaussian(schedule)
    low, high = (schedule.noise_level(time(t)) for t in (schedule.t_min, schedule.t_max))
    start, end = schedule.t_of_lam(high.clamp(max=80).log()), low.clamp(min=0.002)
    x_at_end = gaussian_map(schedule, schedule.sigma(start) * noise(), start, schedule.t_of_lam(end.log()))
    exact = f(x_at_end, time_like(x_at_end, schedule.t_of_lam(end.log()).flatten()))
    errors = [rms(solver.solve(f, schedule, noise(), steps) - exact) for steps in (18, 72)]
    assert errors[0] < 0.05 and errors[1] < errors[0] / 14


# --- DPM-Solver++(2M) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_schedules())
def test_dpmpp_2m_extrapolates_to_the_middle_of_a_step(name):
    """x_s = sigma_s/sigma_t x_t + alpha_s (1 - e^-h) D, by hand for two unequal steps, h = 1.5 and h = 1.

    f = c: exact. f = -lam, affine along the way: the second step's D is f in the middle of [lam_s, lam_t].
    """
    schedule = SCHEDULES[name]()
    lam = torch.tensor([-1.5, -0.5, 1.0])
    times = schedule.t_of_lam(lam)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    x_T = noise(4)
    constant = arrive(dpmpp_2m, lambda x, t: torch.full_like(x, 0.7), schedule, x_T, times)
    close(constant, sigma[0] / sigma[2] * (x_T - 0.7 * alpha[2]) + 0.7 * alpha[0], rtol=1e-9, atol=1e-10)
    x_s = arrive(dpmpp_2m, lambda x, t: -schedule.lam(t).expand_as(x), schedule, x_T, times)
    x_1 = sigma[1] / sigma[2] * x_T + alpha[1] * (1 - math.exp(-1.5)) * -1.0
    close(x_s, sigma[0] / sigma[1] * x_1 + alpha[0] * (1 - math.exp(-1)) * 1.0, rtol=1e-9, atol=1e-10)


# --- order of convergence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2)])
@pytest.mark.parametrize(
    ("name", "grid"), [("vp_cosine", "uniform"), ("flow_matching", "uniform"), ("ddpm_linear", "uniform_lambda")]
)
def test_order_of_convergence(name, grid, sampler, order):
    """Error against the exact map (closed form; equal quantiles) on t in [.01, .99] falls as N^-order."""
    whole = SCHEDULES[name]()
    schedule = whole.restricted(*whole.lam(torch.tensor([0.01, 0.99])).tolist())
    low, high = schedule.t_min, schedule.t_max
    x_T, x_M = noise(32).clamp(-2, 2), noise(32, pixels=1).clamp(-2, 2)
    exact, exact_M = gaussian_map(schedule, x_T, time(high), time(low)), mixture_map(schedule, x_M, high, low)
    errors, errors_M = [], []
    for steps in (64, 128, 256):
        times = TIME_GRIDS[grid](schedule, steps)
        errors.append(rms(arrive(sampler, gaussian(schedule), schedule, x_T, times) - exact))
        errors_M.append(rms(arrive(sampler, mixture(schedule), schedule, x_M, times) - exact_M))
    assert slope(errors) == pytest.approx(order, abs=0.15)
    assert slope(errors_M) == pytest.approx(order, abs=0.15)
    assert max(errors[-1], errors_M[-1]) < {1: 0.01, 2: 5e-4}[order]


@pytest.mark.parametrize(("sampler", "order"), [(ddim, 1), (heun, 2), (dpmpp_2m, 2)])
@pytest.mark.parametrize("name", ["ve", "vp_cosine"])
def test_order_of_convergence_on_a_karras_grid(name, sampler, order):
    schedule = SCHEDULES[name]()
    low, high = schedule.t_of_lam(torch.tensor([0.002, 80.0]).log()).tolist()
    x_T = schedule.alpha(time(high)) * 80 * noise(32, pixels=1).clamp(-2, 2)
    exact = mixture_map(schedule, x_T, high, low)
    grids = [karras_times(schedule, steps + 1, 0.002, 80.0) for steps in (64, 128, 256)]
    errors = [rms(arrive(sampler, mixture(schedule), schedule, x_T, times) - exact) for times in grids]
    assert slope(errors) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_of_an_ode_is_what_its_sampler_repeats(name):
    schedule, sampler = VPCosine(), {"ddim": ddim, "heun": heun}[name]
    times = karras_times(schedule, 5, 0.1, 20.0)
    x = x_T = noise(pixels=1)
    for k in range(4, 0, -1):
        x = ONE_STEP[name](schedule, mixture(schedule), x, time_like(x, times[k]), time_like(x, times[k - 1]))
    close(arrive(sampler, mixture(schedule), schedule, x_T, times), x, rtol=1e-12)


# --- ancestral sampling ----------------------------------------------------------------------------------------------


def affine_law(run, n: int) -> tuple[Tensor, Tensor]:
    """Mean and variance, (2,1,1), of a sampler that is affine in its n normal draws: from its answers to unit draws.

    `run(draw)` answers a batch whose row 0 is drawn nothing and whose row j + 1 is drawn a one in draw j, else zero.
    """
    unit = torch.cat([torch.zeros(1, n), torch.eye(n)])
    out = run(lambda j: unit[:, j].view(-1, 1, 1, 1).expand(-1, 2, 1, 1))
    return out[0], (out[1:] - out[0]).square().sum(dim=0)


@pytest.mark.parametrize("grid", TIME_GRIDS)
@pytest.mark.parametrize("name", some_schedules())
def test_ancestral_keeps_the_marginals_when_x_0_is_known(name, grid):
    """With f = x_0 and x_T ~ q(x_T given x_0), it arrives at q(x_s given x_0) = N(alpha_s x_0, sigma_s^2): exactly."""
    schedule = SCHEDULES[name]()
    times, x_0 = Solver("ddpm", grid).times(schedule, 9)[1:], column(MEAN)
    T, s = time(times[-1]), time(times[0])

    def run(draw) -> Tensor:
        x_T = schedule.alpha(T) * x_0 + schedule.sigma(T) * draw(0)
        return arrive(ancestral, lambda x, t: x_0.expand_as(x), schedule, x_T, times, draw)

    mean, variance = affine_law(run, 9)
    close(mean, (schedule.alpha(s) * x_0)[0], rtol=1e-9)
    close(variance, (schedule.sigma(s) ** 2).expand(1, 2, 1, 1)[0], rtol=1e-9)


@pytest.mark.parametrize("name", some_schedules())
def test_ancestral_sampling_converges_to_the_distribution_of_the_data(name):
    """Exact mean and variance of its samples of a Gaussian, no Monte Carlo: errors halve with twice the steps."""
    schedule = SCHEDULES[name]()
    T, m, v = time(schedule.t_max), column(MEAN), column(VARIANCE)
    errors = []
    for steps in (64, 128, 256):

        def run(draw, steps: int = steps) -> Tensor:
            x_T = schedule.alpha(T) * (m + v.sqrt() * draw(0)) + schedule.sigma(T) * draw(steps)
            times = TIME_GRIDS["uniform_lambda"](schedule, steps)
            return ancestral(gaussian(schedule), schedule, x_T, times, draw)

        mean, variance = affine_law(run, steps + 1)
        close(mean, m, atol=1e-9)  # exactly, as every step is affine and right in the mean
        errors.append((variance.sqrt() - v.sqrt()).abs().max().item())
    assert errors[-1] < 0.04 and errors[2] < 0.6 * errors[1] < 0.6**2 * errors[0]


def test_ancestral_samples_of_the_mixture_have_its_moments():
    schedule, generator = VPCosine(), torch.Generator().manual_seed(0)
    draw = lambda k: torch.randn(4000, 1, 1, 1, generator=generator)
    x = Solver.parse("ddpm").solve(mixture(schedule), schedule, draw(0), 100, draw)
    weights, centres, spreads = torch.tensor([0.3, 0.5, 0.2]), torch.tensor(CENTRES), torch.tensor(SPREADS)
    mean = (weights * centres).sum()
    deviation = ((weights * (centres**2 + spreads**2)).sum() - mean**2).sqrt()
    assert x.mean().item() == pytest.approx(mean.item(), abs=4 * deviation.item() / 4000**0.5)
    assert x.std().item() == pytest.approx(deviation.item(), rel=0.03)
    left = (x < -0.6).double().mean().item()  # between the first centre and the others: weight .3
    assert left == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("name", some_schedules())
def test_ancestral_step_is_the_ddpm_posterior(name):
    """Mean and variance as products and quotients of alpha and sigma, for arbitrary x_t and x_0."""
    schedule = SCHEDULES[name]()
    t, s = schedule.t_of_lam(time([1.0, 2.0, -2.0])), schedule.t_of_lam(time([0.5, -3.0, -2.5]))
    alpha_t, alpha_s, sigma_t, sigma_s = schedule.alpha(t), schedule.alpha(s), schedule.sigma(t), schedule.sigma(s)
    x_t, x_0, z = noise(3), noise(3, seed=1), noise(3, seed=2)
    ratio = alpha_t / alpha_s
    between = sigma_t**2 - ratio**2 * sigma_s**2
    mean = ratio * sigma_s**2 / sigma_t**2 * x_t + alpha_s * between / sigma_t**2 * x_0
    expected = mean + (sigma_s**2 / sigma_t**2 * between).sqrt() * z
    close(ancestral_step(schedule, x_t, x_0, z, t, s), expected, rtol=1e-9, atol=1e-10)


# --- diffusers' own schedulers ---------------------------------------------------------------------------------------

BETAS = {
    "ddpm_linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "ddpm_scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "ddpm_cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
# A "leading" run of one step starts at index 0 in diffusers, where there is nothing to remove.
RUNS = [("leading", 5), ("leading", 20), ("trailing", 1), ("trailing", 5), ("trailing", 20)]


def abar(schedule: NoiseSchedule) -> Tensor:
    """(1000,) float64; diffusers' own is float32."""
    return schedule.alpha((torch.arange(1000).double() + 1) / 1000) ** 2


def predicted_eps(schedule: NoiseSchedule, f: DenoiseFunction, x: Tensor, i: Tensor) -> Tensor:
    t = time_like(x, (i + 1) / 1000)
    return implied_eps(x, f(x, t), schedule.alpha(t), schedule.sigma(t))


@pytest.mark.parametrize(("grid", "steps"), RUNS)
@pytest.mark.parametrize("name", BETAS)
def test_ddim_is_that_of_diffusers(name, grid, steps):
    """Whole runs at the same indices. (Its "linspace" steps by 1000 // N whatever its indices are.)"""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    schedule, x = SCHEDULES[name](), noise(pixels=1)
    f, solver = mixture(schedule), Solver("ddim", grid)
    theirs = DDIMScheduler(1000, clip_sample=False, timestep_spacing=grid, **BETAS[name])
    theirs.alphas_cumprod = abar(schedule)
    theirs.set_timesteps(steps)
    for i in theirs.timesteps:
        x = theirs.step(predicted_eps(schedule, f, x, i), i, x).prev_sample
    close(ddim(f, schedule, noise(pixels=1), solver.times(schedule, steps)), x, rtol=1e-7, atol=1e-8)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("grid", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", BETAS)
def test_dpmpp_2m_is_that_of_diffusers(name, grid, steps):
    """DPMSolverMultistepScheduler to sigma = 0 at the same indices; it works in float32."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    schedule, x = SCHEDULES[name](), noise(pixels=1)
    f, times = mixture(schedule), Solver("dpmpp_2m", grid).times(schedule, steps)
    theirs = DPMSolverMultistepScheduler(1000, prediction_type="sample", final_sigmas_type="zero", **BETAS[name])
    theirs.set_timesteps(timesteps=(times[1:].flip(0) * 1000 - 1).round().int().tolist())
    levels = torch.cat([schedule.noise_level(times[1:].flip(0)), torch.zeros(1)])
    np.testing.assert_allclose(theirs.sigmas, levels, rtol=1e-3)
    theirs.sigmas = levels
    for i in theirs.timesteps:
        x = theirs.step(f(x.double(), time_like(x, (i + 1) / 1000)), i, x).prev_sample
    close(dpmpp_2m(f, schedule, noise(pixels=1), times), x, atol=2e-6)


@pytest.mark.parametrize(("grid", "steps"), RUNS)
@pytest.mark.parametrize("name", BETAS)
def test_ancestral_is_the_ddpm_of_diffusers(name, grid, steps):
    """DDPMScheduler with "fixed_small" variance and the same draws."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    schedule, x = SCHEDULES[name](), noise(pixels=1)
    f, times = mixture(schedule), Solver("ddpm", grid).times(schedule, steps)
    theirs = DDPMScheduler(1000, clip_sample=False, timestep_spacing=grid, variance_type="fixed_small", **BETAS[name])
    theirs.alphas_cumprod = abar(schedule)
    theirs.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    for i in theirs.timesteps:
        x = theirs.step(predicted_eps(schedule, f, x, i), i, x, generator=generator).prev_sample
    generator.manual_seed(7)
    draw = lambda k: torch.randn(x.shape, generator=generator)
    close(ancestral(f, schedule, noise(pixels=1), times, draw), x, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("grid", ["leading", "linspace", "trailing"])
def test_spacings_are_those_of_diffusers(grid):
    """Up to the index -1 that rounding adds to its N "trailing" ones, for 61 or 103 steps for example."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    theirs = DDIMScheduler(1000, timestep_spacing=grid)
    for steps in [*range(2, 130), 250, 333, 500, 501, 667, 999, 1000]:
        theirs.set_timesteps(steps)
        expected = (theirs.timesteps[:steps].flip(0).numpy() + 1) / 1000
        times = TIME_GRIDS[grid](SCHEDULES["ddpm_linear"](), steps)
        np.testing.assert_allclose(times, [0.001, *expected], rtol=1e-13)


# --- grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [3.0, 7.0])
def test_karras_times_are_equation_5(rho):
    """(max^(1/rho) + i/(N-1) (min^(1/rho) - max^(1/rho)))^rho, i = 0, ..., N-1, in numpy; here in ascending order."""
    i = np.arange(18)
    for name in SCHEDULES:
        schedule = SCHEDULES[name]()
        low, high = schedule.noise_level(torch.tensor([schedule.t_min, schedule.t_max])).tolist()
        low, high = max(low, 0.002), min(high, 80.0)
        levels = (high ** (1 / rho) + i / 17 * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        times = karras_times(schedule, 18, 0.002, 80.0, rho)
        assert times.shape == (18,) and times.dtype is torch.float64
        np.testing.assert_allclose(schedule.noise_level(times), levels[::-1], rtol=1e-9)


@pytest.mark.parametrize("points", [1, 2, 18, 100])
def test_karras_levels_beyond_the_schedule_leave_distinct_ones_within_it(points):
    for low, high in ((0.002, 80.0), (0.002, 3.0), (0.5, 80.0), (0.5, 3.0)):
        times = karras_times(VE(sigma_min=0.1, sigma_max=10.0), points, low, high)
        assert len(times) == points and (times.diff() > 0).all()
        assert times[-1].item() == pytest.approx(min(high, 10.0), rel=1e-12)
        if points > 1:
            assert times[0].item() == pytest.approx(max(low, 0.1), rel=1e-12)


@pytest.mark.parametrize(("low", "high"), [(20.0, 80.0), (0.001, 0.05), (2.0, 1.0)])
def test_karras_levels_none_of_which_the_schedule_has_are_refused(low, high):
    with pytest.raises(UserError, match=r"0\.1 to 10, got"):
        karras_times(VE(sigma_min=0.1, sigma_max=10.0), 18, low, high)


@pytest.mark.parametrize("grid", TIME_GRIDS)
@pytest.mark.parametrize("name", schedules())
def test_a_grid_ascends_from_t_min_through_distinct_times(name, grid):
    schedule = SCHEDULES[name]()
    for steps in (1, 2, 3, 17, 256):
        times = TIME_GRIDS[grid](schedule, steps)
        assert times.shape == (steps + 1,) and times.dtype is torch.float64
        assert times[0] == schedule.t_min and times[1] >= times[0] and (times[1:].diff() > 0).all()
        assert times[-1] <= schedule.t_max
        if (steps == 1 or grid not in ("leading", "karras", "consistency")) and grid != "ddpm_quadratic":
            largest = 80.0 if grid in ("karras", "consistency") else math.inf
            top = min(schedule.noise_level(torch.tensor(schedule.t_max)).item(), largest)
            assert schedule.noise_level(times[-1]).item() == pytest.approx(top, rel=1e-9)


@pytest.mark.parametrize("name", some_schedules())
def test_uniform_lambda_is_uniform_in_the_logarithm_of_the_noise_level(name):
    schedule = SCHEDULES[name]()
    levels = schedule.noise_level(TIME_GRIDS["uniform_lambda"](schedule, 12)).numpy()
    np.testing.assert_allclose(levels, np.geomspace(levels[0], levels[-1], 13), rtol=1e-8)
    assert levels[-1] == schedule.noise_level(torch.tensor(schedule.t_max)).item()


def test_quadratic_levels_are_those_of_ddim_s_code_up_to_its_rounding():
    """linspace(0, sqrt(1000 * .8), N)^2 and alpha_bar = cumprod(1 - linspace(1e-4, .02, 1000)), log-linear between."""
    log_abar = np.log1p(-np.linspace(1e-4, 0.02, 1000)).cumsum()
    for steps in (2, 10, 100):
        index = np.linspace(0, np.sqrt(800), steps) ** 2
        level = np.sqrt(np.expm1(-np.interp(index, np.arange(1000), log_abar)))  # sigma / alpha
        for name in ("ddpm_linear", "ve", "vp_cosine", "flow_matching"):
            schedule = SCHEDULES[name]()
            times = TIME_GRIDS["ddpm_quadratic"](schedule, steps)
            np.testing.assert_allclose(schedule.noise_level(times[1:]), level, rtol=1e-9)
        np.testing.assert_allclose(TIME_GRIDS["ddpm_quadratic"](VE(), 1)[1], level[-1], rtol=1e-9)
    narrow = VE(sigma_min=0.1, sigma_max=10.0)
    times = TIME_GRIDS["ddpm_quadratic"](narrow, 50)
    assert (times[1:].diff() > 0).all() and times[1:].numpy()[[0, -1]] == pytest.approx([0.1, 10.0])


def test_leading_starts_below_t_max():
    """specs/methods.md 1.2: with 50 steps diffusers starts at 980 (981 with the offset of Stable Diffusion)."""
    times = TIME_GRIDS["leading"](SCHEDULES["ddpm_linear"](), 50)
    assert times[-1].item() == pytest.approx(0.981) and times[1].item() == times[0].item() == 0.001


@pytest.mark.parametrize("grid", ["leading", "linspace", "trailing"])
def test_more_steps_than_diffusers_has_indices_are_refused(grid):
    with pytest.raises(UserError, match="between 1 and 1000 steps, got 1001"):
        TIME_GRIDS[grid](VPCosine(), 1001)


@pytest.mark.parametrize("name", some_schedules())
def test_uniform_times_are_i_over_n_stretched_over_the_range(name):
    schedule = SCHEDULES[name]()
    times = uniform_times(schedule, 8)
    expected = [schedule.t_min + i / 8 * (schedule.t_max - schedule.t_min) for i in range(9)]
    np.testing.assert_allclose(times, expected, rtol=1e-14)
    assert times.dtype is torch.float64


def test_time_like_gives_one_time_to_every_image():
    t = time_like(noise(5).float(), 0.25)
    assert t.shape == (5, 1, 1, 1) and t.dtype is torch.float64 and (t == 0.25).all()


# --- solvers by name -------------------------------------------------------------------------------------------------

EVERY = [f"{sampler}/{grid}" for sampler in SAMPLERS for grid in TIME_GRIDS]


@pytest.mark.parametrize("text", EVERY)
def test_a_solver_makes_the_evaluations_that_it_says_and_ends_on_the_last(text):
    schedule, solver = VE(), Solver.parse(text)
    for steps in (1, 2, 5):
        f = Recorded(lambda x, t: gaussian(schedule)(x, t) + 1)  # recognisable
        asked: list[int] = []

        def draw(k: int, asked: list[int] = asked) -> Tensor:
            asked.append(k)
            return noise(seed=k)

        x_0 = solver.solve(f, schedule, noise(), steps, draw)
        times = solver.times(schedule, steps)
        assert len(f.t) == solver.evaluations(steps) and solver.steps(len(f.t)) == steps
        assert f.t[0] == times[-1] and f.t[-1] == times[1] and set(f.t) <= set(times.tolist())
        close(f.x[0], times[-1] * noise(), rtol=1e-14)  # x_t = sigma_t eps
        assert torch.equal(x_0, f.f(f.x[-1], time_like(noise(), times[1])))
        assert asked == ([] if solver.deterministic else list(range(1, steps)))
        assert torch.isfinite(x_0).all()


def test_evaluations_and_steps():
    one, two = Solver.parse("ddim"), Solver.parse("heun")
    assert [one.evaluations(n) for n in (1, 2, 18)] == [1, 2, 18]
    assert [two.evaluations(n) for n in (1, 2, 18)] == [1, 3, 35]
    assert [one.steps(n) for n in (0, 1, 2, 3)] == [None, 1, 2, 3]
    assert [two.steps(n) for n in (-1, 0, 1, 2, 3, 4, 35)] == [None, None, 1, None, 2, None, 18]


@pytest.mark.parametrize(
    ("text", "name", "grid"),
    [
        ("ddim", "ddim", "uniform"),
        ("ddim/uniform", "ddim", "uniform"),
        ("ddim/karras", "ddim/karras", "karras"),
        ("heun", "heun", "karras"),
        ("heun/uniform", "heun/uniform", "uniform"),
        ("dpmpp_2m/uniform_lambda", "dpmpp_2m/uniform_lambda", "uniform_lambda"),
        ("dpmpp_2m/karras", "dpmpp_2m", "karras"),
        ("ddpm", "ddpm", "uniform"),
        ("renoise", "renoise", "consistency"),
    ],
)
def test_a_solver_has_one_name(text, name, grid):
    solver = Solver.parse(text)
    assert (solver.name, solver.grid) == (name, grid)
    assert Solver.parse(solver.name) == solver
    assert solver.deterministic is (not text.startswith(("ddpm", "renoise")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dim", r"no sampler 'dim'\. Did you mean 'ddim'\? Possible: ddim, ddpm, dpmpp_2m, heun"),
        ("DDIM/karras", "no sampler 'DDIM'. Did you mean 'ddim'"),
        ("", "no sampler ''"),
        (
            "ddim/karas",
            "no time grid 'karas' for sampler ddim. Did you mean 'karras'. Possible: consistency, ddpm_quadratic, ",
        ),
        ("ddim/", "no time grid ''"),
        ("ddim/karras/karras", "no time grid 'karras/karras'"),
    ],
)
def test_names_that_do_not_exist_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        Solver.parse(text)


def test_a_solver_takes_at_least_one_step():
    with pytest.raises(UserError, match="heun makes at least 1 step, got 0"):
        Solver.parse("heun").times(VPCosine(), 0)


def test_a_sampler_that_draws_noise_has_to_be_given_some():
    schedule = VPCosine()
    with pytest.raises(ValueError, match="noise"):
        Solver.parse("ddpm").solve(gaussian(schedule), schedule, noise(), 3)
    assert Solver.parse("ddpm").solve(gaussian(schedule), schedule, noise(), 1).shape == noise().shape


@pytest.mark.parametrize("text", ["ddim", "heun", "dpmpp_2m", "ddpm"])
def test_samplers_keep_the_type_of_the_images(text):
    torch.set_default_dtype(torch.float32)  # the fixture puts the default back
    schedule = VPCosine()
    draw = lambda k: torch.randn(3, 2, 1, 1)
    seen = Recorded(lambda x, t: 0.5 * x)
    x_0 = Solver.parse(text).solve(seen, schedule, draw(0), 4, draw)
    assert {x.dtype for x in [x_0, *seen.x]} == {torch.float32}


@pytest.mark.parametrize("schedule", [VE(), VPCosine()], ids=["ve", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_renoise_is_the_multistep_sampling_of_consistency_models(schedule, steps):
    """Against the other implementation, of distillbench/diffusion/consistency.py, on the same 40 levels and noise."""

    class F:
        e = 0.002

        def __init__(self):
            self.schedule = schedule

        def __call__(self, x, t, c=None):
            return torch.tanh(x / schedule.alpha(t) / (1 + schedule.noise_level(t)))

    draws = [torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(k)) for k in range(8)]
    grid = karras_times(schedule, 40, 0.002, 80.0)
    F.e = schedule.noise_level(torch.tensor([schedule.t_min])).item()
    ours = Solver.parse("renoise").solve(F(), schedule, draws[0], steps, draws.__getitem__)
    close(ours, multistep(F(), grid, draws.__getitem__, steps), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 5, 18])
def test_heun_says_where_a_step_is_unstable(steps):
    """The weight of the second slope, from equation 5 of Karras et al. (2022) by hand: (tau_t - tau_s) / (2 tau_s)."""
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    levels = [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** 7 for i in range(steps)]
    largest = max((t - s) / (2 * s) for t, s in pairwise(levels))
    note = Solver.parse("heun").note(VE(), steps)
    assert steps != 4 or round(largest) == 117
    assert (largest > 10) == bool(note) == (steps < 18)
    assert not note or (note.startswith(f"heun is unstable in {steps} steps") and f" {largest:.0f} " in note)
    assert not Solver.parse("ddim/karras").note(VE(), steps)
