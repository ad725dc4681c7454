"""Samplers as pure functions of a denoiser ``f(x_t, t) -> x_0``, and their time grids.

| symbol   | meaning                                             | shape     |
|----------|-----------------------------------------------------|-----------|
| x_t      | noisy image                                         | (B,C,H,W) |
| t > s    | times, float64                                      | (B,1,1,1) |
| times    | a grid for N steps, t_0 <= t_1 < ... < t_N, float64 | (N+1,)    |
| f        | denoiser, E[x_0 given x_t]                          | (B,C,H,W) |
| noise(k) | fresh standard normal noise, k = 1, 2, ...          | (B,C,H,W) |

Every sampler starts at times[-1] and returns its last data prediction, the one at times[1]: so does every step to
sigma = 0 (EDM's Heun, DPM-Solver++ with first order at the end, the DDPM posterior mean). times[0] is where that last
step would end; nothing is evaluated there, and it may equal times[1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from distillbench.diffusion.schedules import DiscreteBetas, NoiseSchedule
from distillbench.errors import UserError, unknown
from distillbench.system.transfers import to_device

__all__ = [
    "ONE_STEP", "SAMPLERS", "TIME_GRIDS", "Sampler", "Solver", "ancestral", "ancestral_step", "check_heun", "ddim",
    "ddim_ode_step", "ddim_step", "dpmpp_2m", "heun", "heun_step", "karras_times", "renoise", "time_like",
    "uniform_lambda_times", "uniform_times", "whole_grid", "x_at_t_max", "x_at_top",
]  # fmt: skip

LARGEST_HEUN_WEIGHT = 10  # a uniform grid in t from log SNR -20 has 1085 and an RMSE of 4; Karras's 18 steps have 1.2
DenoiseFunction = Callable[[Tensor, Tensor], Tensor]
NoiseFunction = Callable[[int], Tensor]


def time_like(x: Tensor, value: float | Tensor) -> Tensor:
    """The time `value` for every image of x: (B,1,1,1) float64 on x's device."""
    if isinstance(value, Tensor):
        return to_device(value, x.device).to(torch.float64).expand(len(x), 1, 1, 1)
    return torch.full((), value, dtype=torch.float64, device=x.device).expand(len(x), 1, 1, 1)


def x_at_t_max(schedule: NoiseSchedule, eps: Tensor) -> Tensor:
    """Where sampling starts: x_T = sigma_T eps, which is eps itself where sigma_T = 1 (VP) and 80 eps for EDM's VE."""
    return schedule.sigma(time_like(eps, schedule.t_max)) * eps


def x_at_top(schedule: NoiseSchedule, eps: Tensor, times: Tensor) -> Tensor:
    """Where sampling on an ascending grid starts: sigma_t eps at t = times[-1], which may lie below t_max."""
    return schedule.sigma(time_like(eps, times[-1])) * eps


# --- time grids: (schedule, N) -> t_0 <= t_1 < ... < t_N, (N+1,) float64 ---------------------------------------------


def uniform_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """t_0 < ... < t_N, uniform in t from t_min to t_max, shape (N+1,) float64 (the grid t = i/N of Salimans & Ho)."""
    return torch.linspace(schedule.t_min, schedule.t_max, steps + 1, dtype=torch.float64)


def uniform_lambda_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """t_0 < ... < t_N, uniform in lam from t_min to t_max, shape (N+1,) float64 (Lu et al. 2022, DPM-Solver)."""
    low, high = schedule.lam(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    times = schedule.t_of_lam(torch.linspace(low, high, steps + 1, dtype=torch.float64))
    times[0], times[-1] = schedule.t_min, schedule.t_max  # without rounding
    return times


def karras_times(schedule: NoiseSchedule, points: int, low: float, high: float, rho: float = 7.0) -> Tensor:
    """Karras et al. (2022) eq. 5: `points` noise levels from `low` to `high`, ascending, as times of `schedule`.

    Shape (points,) float64. `low` and `high` are first moved into the schedule's own range of noise levels, so that
    the points are distinct. A single point is the highest level.
    """
    ends = schedule.noise_level(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    bottom, top = max(low, ends[0]), min(high, ends[1])
    if not bottom < top:
        raise UserError(
            f"noise levels must rise from a lower to a higher one within the schedule's range, {ends[0]:g} to "
            f"{ends[1]:g}, got {low:g} to {high:g}"
        )
    ramp = torch.linspace(1, 0, points, dtype=torch.float64).flip(0)
    levels = (bottom ** (1 / rho) + ramp * (top ** (1 / rho) - bottom ** (1 / rho))) ** rho
    return schedule.t_of_lam(levels.log())


def karras_grid(schedule: NoiseSchedule, steps: int) -> Tensor:
    """t_min, then N of Karras et al.'s noise levels between .002 and 80 (EDM's defaults); shape (N+1,) float64."""
    return torch.cat([torch.tensor([schedule.t_min], dtype=torch.float64), karras_times(schedule, steps, 0.002, 80.0)])


def consistency_grid(schedule: NoiseSchedule, steps: int) -> Tensor:
    """t_min, then N of 40 Karras levels, evenly spread over their indices from the top; shape (N+1,) float64.

    Where a consistency function is evaluated (Song et al. 2023, algorithm 1; 40 levels are the paper's for ImageNet).
    For N > 39 there are N + 1 levels.
    """
    count = max(LEVELS, steps + 1)
    levels = karras_times(schedule, count, 0.002, 80.0)
    index = torch.linspace(count - 1, 0, steps + 1)[:-1].round().long().flip(0)
    return torch.cat([torch.tensor([schedule.t_min], dtype=torch.float64), levels[index]])


def ddpm_quadratic_grid(schedule: NoiseSchedule, steps: int) -> Tensor:
    """t_min, then DDPM's noise levels at the N indices 800 (k / (N - 1))^2 of 0, ..., 999; shape (N+1,) float64.

    DDIM's "quad" steps (Song et al. 2021, arXiv:2010.02502), with the ends of its code and without its rounding to
    integers, which repeats some indices. The first and the last level are moved into the schedule's range,
    so that all are distinct. A single step starts at index 800.
    """
    ddpm = DiscreteBetas("linear")
    ends = ddpm.t_of_lam(torch.tensor(schedule.lam_range, dtype=torch.float64)) * ddpm.steps - 1
    low, high = ends.clamp(0, LAST_QUADRATIC).sqrt().tolist()
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64).flip(0)
    index = (low + ramp * (high - low)) ** 2
    times = schedule.t_of_lam(ddpm.lam((index + 1) / ddpm.steps))
    return torch.cat([torch.tensor([schedule.t_min], dtype=torch.float64), times])


LAST_QUADRATIC = 800.0  # index of the highest level
LEVELS = 40  # of a consistency model
POINTS = 1000  # diffusers' indices 0, ..., 999


def diffusers_grid(schedule: NoiseSchedule, steps: int, spacing: Callable[[int], Tensor]) -> Tensor:
    """t_min, then the N indices i of `spacing` as t_min + i/999 (t_max - t_min): (i+1)/1000 for diffusers' schedules.

    Shape (N+1,) float64. A single step starts at t_max; in diffusers one of "leading" or "linspace" starts at index 0,
    where there is no noise to remove.
    """
    if steps > POINTS:
        raise UserError(f"diffusers' time grids have {POINTS} points: between 1 and {POINTS} steps, got {steps}")
    index = spacing(steps).double() if steps > 1 else torch.tensor([POINTS - 1], dtype=torch.float64)
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    return torch.cat([ends[:1], torch.lerp(ends[0], ends[1], index / (POINTS - 1))])


def _leading(steps: int) -> Tensor:
    """0, q, 2q, ..., (N-1) q with q = 1000 // N: does not start at t_max (999) but at (N-1) q, 980 for N = 50."""
    return torch.arange(steps) * (POINTS // steps)


def _linspace(steps: int) -> Tensor:
    """0, ..., 999, rounded."""
    return (torch.arange(steps, dtype=torch.float64) * ((POINTS - 1) / (steps - 1))).round()


def _trailing(steps: int) -> Tensor:
    """999, 999 - 1000/N, ... (rounded), ascending. For some N (61, 103, ...) diffusers has one more, of index -1."""
    index = np.arange(POINTS, 0, -POINTS / steps)[:steps].round() - 1  # halves are rounded as numpy rounds them
    return torch.from_numpy(index).flip(0)


TIME_GRIDS: dict[str, Callable[[NoiseSchedule, int], Tensor]] = {
    "uniform": uniform_times,
    "uniform_lambda": uniform_lambda_times,
    "karras": karras_grid,
    "consistency": consistency_grid,
    "ddpm_quadratic": ddpm_quadratic_grid,
    "leading": partial(diffusers_grid, spacing=_leading),
    "linspace": partial(diffusers_grid, spacing=_linspace),
    "trailing": partial(diffusers_grid, spacing=_trailing),
}


def whole_grid(name: str, schedule: NoiseSchedule, steps: int) -> Tensor:
    """The grid `name` where it runs from t_min to t_max in distinct steps; UserError where it does not."""
    times = TIME_GRIDS[name](schedule, steps)
    if times[-1] < schedule.t_max or not (times.diff() > 0).all():
        raise UserError(f"times={name} does not lead from t_max to t_min in {steps} distinct steps. Possible: uniform")
    return times


def check_heun(schedule: NoiseSchedule, times: Tensor) -> None:
    """Raise UserError where Heun's second slope would get a weight (tau_t - tau_s) / (2 tau_s) above 10."""
    weight = _heun_weight(schedule, times)
    if weight > LARGEST_HEUN_WEIGHT:
        raise UserError(
            f"heun needs noise levels close together, and on this grid its second slope has weight {weight:.0f}, above "
            f"{LARGEST_HEUN_WEIGHT}. Possible: times=karras, more steps, or ddim"
        )


def _heun_weight(schedule: NoiseSchedule, times: Tensor) -> float:
    """The largest weight (tau_t - tau_s) / (2 tau_s) of Heun's second slope on ascending `times`; 0 for one alone."""
    levels = schedule.noise_level(times)
    return ((levels[1:] / levels[:-1] - 1) / 2).max().item() if len(times) > 1 else 0.0


# --- single steps ----------------------------------------------------------------------------------------------------


def ddim_step(schedule: NoiseSchedule, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """DDIM from t to s given the data prediction: alpha_s x_0 + sigma_s eps (Song et al. 2021, eq. 12 with eta = 0)."""
    ratio = schedule.sigma(s) / schedule.sigma(t)  # eps = (x_t - alpha_t x_0) / sigma_t
    return torch.addcmul(ratio * x_t, schedule.alpha(s) - ratio * schedule.alpha(t), x_0)


def heun_step(schedule: NoiseSchedule, f: DenoiseFunction, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Heun in EDM's coordinates (Karras et al. 2022, algorithm 1): two evaluations of f.

    The second evaluation has weight (s^_t - s^_s) / (2 s^_s), so consecutive noise levels should be within a factor
    of about three (a Karras grid is; a coarse grid uniform in t is not).
    """
    level_t, level_s = schedule.noise_level(t).to(x_t.dtype), schedule.noise_level(s).to(x_t.dtype)
    alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
    x_hat = x_t / alpha_t
    x_euler = torch.lerp(f(x_t, t), x_hat, level_s / level_t)  # x^ + (s^_s - s^_t) d_t with d_t = (x^ - f_t) / s^_t
    half_step = (level_s - level_t) / (2 * level_s)  # of d_s = (x_euler - f_s) / s^_s; x_euler contains the other half
    ahead = x_euler - f(alpha_s * x_euler, s)
    return alpha_s * torch.addcmul(torch.lerp(x_hat, x_euler, 0.5), half_step, ahead)


def ddim_ode_step(schedule: NoiseSchedule, f: DenoiseFunction, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """:func:`ddim_step` on f's own data prediction: one evaluation of f."""
    return ddim_step(schedule, x_t, f(x_t, t), t, s)


def ancestral_step(schedule: NoiseSchedule, x_t: Tensor, x_0: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_s ~ q(x_s given x_t, x_0) with standard normal z (Ho et al. 2020, eq. 6 and 7, on any schedule).

    With r = alpha_t sigma_s / (alpha_s sigma_t): mean r sigma_s/sigma_t x_t + alpha_s (1 - r^2) x_0, variance
    sigma_s^2 (1 - r^2), which is sigma_s^2/sigma_t^2 (sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2) ("fixed small").
    """
    r, one_minus_r = schedule.signal_ratio(t, s)
    fresh = one_minus_r * (1 + r)
    mean = r * schedule.sigma(s) / schedule.sigma(t) * x_t + schedule.alpha(s) * fresh * x_0
    return mean + schedule.sigma(s) * fresh.sqrt() * z


# One step of the probability-flow ODE: (schedule, f, x_t, t, s) -> x_s.
ONE_STEP: dict[str, Callable[[NoiseSchedule, DenoiseFunction, Tensor, Tensor, Tensor], Tensor]] = {
    "ddim": ddim_ode_step,
    "heun": heun_step,
}


# --- samplers --------------------------------------------------------------------------------------------------------


def _down(times: Tensor, x: Tensor) -> Iterator[Tensor]:
    """times[N], ..., times[1] of N+1 values, each for every image of x: (B,1,1,1) float64 on x's device."""
    times = to_device(times, x.device)  # one copy for all steps
    for k in range(len(times) - 1, 0, -1):
        yield times[k].expand(len(x), 1, 1, 1)


def ddim(f: DenoiseFunction, schedule: NoiseSchedule, x_T: Tensor, times: Tensor) -> Tensor:
    """DDIM down the grid `times` (N+1 ascending values): N evaluations, the last of which is the returned x_0.

    The last step ends on the data prediction itself, as every step to sigma = 0 does.
    """
    x_t, down = x_T, _down(times, x_T)
    t = next(down)
    for s in down:
        x_t, t = ddim_step(schedule, x_t, f(x_t, t), t, s), s
    return f(x_t, t)


def heun(f: DenoiseFunction, schedule: NoiseSchedule, x_T: Tensor, times: Tensor) -> Tensor:
    """Karras et al. (2022) algorithm 1 in x^ = x_t / alpha_t: 2N - 1 evaluations, the last step Euler's to 0."""
    x_t, down = x_T, _down(times, x_T)
    t = next(down)
    for s in down:
        x_t, t = heun_step(schedule, f, x_t, t, s), s
    return f(x_t, t)


def dpmpp_2m(f: DenoiseFunction, schedule: NoiseSchedule, x_T: Tensor, times: Tensor) -> Tensor:
    """DPM-Solver++(2M), Lu et al. (2022, arXiv:2211.01095) algorithm 2: N evaluations, first order at both ends.

    x_s = sigma_s/sigma_t x_t + alpha_s (1 - e^-h) D with h = lam_t - lam_s and D = f_t + h / (2 h_prev) (f_t - f_prev).
    """
    x_t, down = x_T, _down(times, x_T)
    t = next(down)
    previous: tuple[Tensor, Tensor] | None = None
    for s in down:
        h = schedule.lam(t) - schedule.lam(s)
        f_t = D = f(x_t, t)
        if previous is not None:
            f_prev, h_prev = previous
            D = f_t + (h / (2 * h_prev)).to(x_t.dtype) * (f_t - f_prev)
        _, one_minus_r = schedule.signal_ratio(t, s)
        x_t = schedule.sigma(s) / schedule.sigma(t) * x_t + schedule.alpha(s) * one_minus_r * D
        previous, t = (f_t, h), s
    return f(x_t, t)


def ancestral(f: DenoiseFunction, schedule: NoiseSchedule, x_T: Tensor, times: Tensor, noise: NoiseFunction) -> Tensor:
    """Ho et al. (2020) algorithm 2 on a grid: N evaluations and noise(1), ..., noise(N-1), none in the last step."""
    x_t, down = x_T, _down(times, x_T)
    t = next(down)
    for k, s in enumerate(down, 1):
        x_t, t = ancestral_step(schedule, x_t, f(x_t, t), noise(k), t, s), s
    return f(x_t, t)


def renoise(f: DenoiseFunction, schedule: NoiseSchedule, x_T: Tensor, times: Tensor, noise: NoiseFunction) -> Tensor:
    """Song et al. (2023) algorithm 1: jump to the end, noise again to the next lower level, jump again.

    f must be a consistency function, such as a released one-step student. Its output still contains noise of level e,
    that of times[0], so noise of variance tau^2 - e^2 is added. N evaluations and noise(1), ..., noise(N-1).
    """
    x_t, e, down = x_T, schedule.noise_level(times[:1]).item(), _down(times, x_T)
    t = next(down)
    for k, s in enumerate(down, 1):
        tau = schedule.noise_level(s)
        added = (tau**2 - e**2).clamp(min=0).sqrt().to(x_t.dtype)
        x_t, t = schedule.alpha(s) * (f(x_t, t) + added * noise(k)), s
    return f(x_t, t)


# --- a sampler on a grid, by name ------------------------------------------------------------------------------------


SampleFunction = Callable[[DenoiseFunction, NoiseSchedule, Tensor, Tensor, NoiseFunction], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A sampler and its properties: N steps make `per_step` (N - 1) + 1 evaluations of f."""

    run: SampleFunction
    grid: str  # default, a name of TIME_GRIDS
    per_step: int = 1  # evaluations of f in every step but the last, which makes one
    deterministic: bool = True
    label: str = ""  # its name in tables


def _without_noise(sampler: Callable[[DenoiseFunction, NoiseSchedule, Tensor, Tensor], Tensor]) -> SampleFunction:
    return lambda f, schedule, x_T, times, noise: sampler(f, schedule, x_T, times)


def _no_noise(k: int) -> Tensor:
    raise ValueError("this sampler adds noise: solve() needs the argument `noise`")


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(_without_noise(ddim), "uniform", label="DDIM"),
    "heun": Sampler(_without_noise(heun), "karras", per_step=2, label="Heun"),
    "dpmpp_2m": Sampler(_without_noise(dpmpp_2m), "karras", label="DPM-Solver++(2M)"),
    "ddpm": Sampler(ancestral, "uniform", deterministic=False, label="DDPM"),
    "renoise": Sampler(renoise, "consistency", deterministic=False, label="renoising"),
}


@dataclass(frozen=True)
class Solver:
    """A sampler on a time grid: ``ddim``, ``heun/uniform``, ``dpmpp_2m/uniform_lambda``, ``ddpm/leading``, ..."""

    sampler: str
    grid: str

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise unknown("sampler", self.sampler, SAMPLERS)
        if self.grid not in TIME_GRIDS:
            raise unknown("time grid", self.grid, TIME_GRIDS, f" for sampler {self.sampler}")

    @classmethod
    def parse(cls, text: str) -> Solver:
        """The solver named ``sampler`` (on its default grid) or ``sampler/grid``."""
        sampler, slash, grid = text.partition("/")
        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS)
        return cls(sampler, grid if slash else SAMPLERS[sampler].grid)

    @property
    def name(self) -> str:
        """``sampler``, with ``/grid`` where the grid is not its default: two names differ if the solvers do."""
        return self.sampler if self.grid == SAMPLERS[self.sampler].grid else f"{self.sampler}/{self.grid}"

    @property
    def label(self) -> str:
        """The name in tables, such as "DDIM" or "Heun, uniform grid"."""
        grid = "" if self.grid == SAMPLERS[self.sampler].grid else f", {self.grid.replace('_', ' ')} grid"
        return f"{SAMPLERS[self.sampler].label}{grid}"

    @property
    def deterministic(self) -> bool:
        """Whether x_0 is a function of eps alone."""
        return SAMPLERS[self.sampler].deterministic

    def evaluations(self, steps: int) -> int:
        """Evaluations of f that `steps` steps make."""
        return SAMPLERS[self.sampler].per_step * (steps - 1) + 1

    def steps(self, evaluations: int) -> int | None:
        """Steps that make exactly this many evaluations of f; None where no number of steps does."""
        steps, rest = divmod(evaluations - 1, SAMPLERS[self.sampler].per_step)
        return steps + 1 if evaluations >= 1 and not rest else None

    def times(self, schedule: NoiseSchedule, steps: int) -> Tensor:
        """t_0 <= t_1 < ... < t_N, shape (N+1,) float64."""
        if steps < 1:
            raise UserError(f"{self.name} makes at least 1 step, got {steps}")
        return TIME_GRIDS[self.grid](schedule, steps)

    def check(self, schedule: NoiseSchedule, steps: int) -> None:
        """Raise UserError where the grid has no such number of steps, or they are too long for the sampler."""
        times = self.times(schedule, steps)
        if SAMPLERS[self.sampler].per_step == 2:
            check_heun(schedule, times[1:])  # the last step, to times[0], is Euler's

    def note(self, schedule: NoiseSchedule, steps: int) -> str:
        """The warning in a row with this number of steps; empty if there is none."""
        if SAMPLERS[self.sampler].per_step < 2:
            return ""
        weight = _heun_weight(schedule, self.times(schedule, steps)[1:])
        if weight <= LARGEST_HEUN_WEIGHT:
            return ""
        return (
            f"{self.name} is unstable in {steps} steps: in one of them the second slope has weight {weight:.0f} "
            f"(methods refuse above {LARGEST_HEUN_WEIGHT})"
        )

    def solve(
        self, f: DenoiseFunction, schedule: NoiseSchedule, eps: Tensor, steps: int, noise: NoiseFunction | None = None
    ) -> Tensor:
        """x_0 from eps ~ N(0, I), (B,C,H,W).

        Starts from sigma_t eps at t = times[-1], which is below t_max on some grids ("leading"; "karras" where the
        schedule reaches beyond 80). diffusers starts from eps itself there, with more noise than x_t has: by .3 % with
        50 leading steps of Stable Diffusion's schedule, by much more with few. `noise` is for the samplers that are not
        deterministic; the others ignore it.
        """
        times = self.times(schedule, steps)
        return SAMPLERS[self.sampler].run(f, schedule, x_at_top(schedule, eps, times), times, noise or _no_noise)
