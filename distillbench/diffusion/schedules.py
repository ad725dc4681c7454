"""Noise schedules: alpha, sigma and lambda are defined here only.

    x_t = alpha_t x_0 + sigma_t eps,     t in [t_min, t_max], larger t = noisier

| symbol  | meaning                              | shape and type                                        |
|---------|--------------------------------------|-------------------------------------------------------|
| t, s    | times, s < t                         | (B,1,1,1) float64                                     |
| alpha_t | signal coefficient                   | (B,1,1,1), computed in float64, in the default dtype  |
| sigma_t | noise coefficient                    | (B,1,1,1), computed in float64, in the default dtype  |
| lam_t   | log(sigma_t / alpha_t), grows with t | (B,1,1,1) float64                                     |

There are three conventions for the sign and the factor of lambda. Here it is BOOT's, with the sign of EDM's level:
``lam = log(sigma/alpha)``, so ``exp(lam)`` is EDM's sigma, log SNR is ``-2 lam``, and DPM-Solver's lambda is ``-lam``.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import softplus

from distillbench.errors import UserError, unknown

__all__ = ["SCHEDULES", "VE", "DiscreteBetas", "FlowMatching", "NoiseSchedule", "VPCosine", "VPLinear"]


FARTHEST_LAM = 20.0  # of ln tau, 10 standard deviations of 2 from -1 to 1 away


class NoiseSchedule(ABC):
    """A schedule is defined by ``lam(t)``, its inverse ``t_of_lam``, and log alpha as a function of lambda.

    Values at times are not cached: in training steps of a U-Net of 34 M parameters that saved no measurable time.
    """

    t_min: float
    t_max: float

    @abstractmethod
    def lam(self, t: Tensor) -> Tensor:
        """log(sigma_t / alpha_t), float64, shape of t."""

    @abstractmethod
    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The time at which lam(t) equals `lam`, float64, clamped to [t_min, t_max]."""

    @abstractmethod
    def _log_alpha(self, lam: Tensor) -> Tensor:
        """log alpha as a function of lambda, float64."""

    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient, shape of t, default dtype."""
        return self._log_alpha(self.lam(t)).exp().to(torch.get_default_dtype())

    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient, shape of t, default dtype."""
        lam = self.lam(t)
        return (lam + self._log_alpha(lam)).exp().to(torch.get_default_dtype())

    def noised(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps, (B,C,H,W): a sample of q(x_t | x_0) for standard normal eps."""
        return self.alpha(t) * x_0 + self.sigma(t) * eps

    def noise_level(self, t: Tensor) -> Tensor:
        """sigma_t / alpha_t (EDM's sigma), float64."""
        return self.lam(t).exp()

    @property
    def lam_range(self) -> tuple[float, float]:
        """lam(t_min) and lam(t_max)."""
        low, high = self.lam(torch.tensor([self.t_min, self.t_max], dtype=torch.float64)).tolist()
        return low, high

    def __deepcopy__(self, memo: dict) -> Self:
        """The schedule itself: it never changes, and copies of a network share it."""
        return self

    def signal_ratio(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(r, 1 - r) with r = (alpha_t sigma_s) / (alpha_s sigma_t) = exp(lam_s - lam_t), in the default dtype."""
        difference = self.lam(s) - self.lam(t)
        dtype = torch.get_default_dtype()
        return difference.exp().to(dtype), (-torch.expm1(difference)).to(dtype)

    def time_of_level(self, tau: float, setting: str) -> float:
        """The time whose noise level is `tau`. Raises UserError, which names the setting, for one that there is not."""
        low, high = torch.tensor(self.lam_range, dtype=torch.float64).exp().tolist()
        if not low <= tau <= high:
            raise UserError(f"{setting} must be a noise level of the schedule, {low:g} to {high:g}, got {tau}")
        return self.t_of_lam(torch.tensor(tau, dtype=torch.float64).log()).item()

    def restricted(self, lam_low: float, lam_high: float) -> Self:
        """A copy whose [t_min, t_max] is narrowed, never widened, to where lam lies in [lam_low, lam_high]."""
        low, high = self.lam_range
        if not (lam_low < lam_high and lam_low < high and low < lam_high):
            raise UserError(
                f"no time of {type(self).__name__} has lambda between {lam_low:g} and {lam_high:g}: its "
                f"log(sigma/alpha) runs from {low:g} to {high:g}"
            )
        narrow = copy.copy(self)
        if lam_low > low:
            narrow.t_min = self.t_of_lam(torch.tensor(lam_low, dtype=torch.float64)).item()
        if lam_high < high:
            narrow.t_max = self.t_of_lam(torch.tensor(lam_high, dtype=torch.float64)).item()
        return narrow


class _VariancePreserving(NoiseSchedule):
    """alpha^2 + sigma^2 = 1, hence log alpha = -softplus(2 lam) / 2."""

    def _log_alpha(self, lam: Tensor) -> Tensor:
        return -0.5 * softplus(2 * lam)


class VPCosine(_VariancePreserving):
    """alpha = cos(theta), sigma = sin(theta), theta affine in t (Salimans & Ho 2022, appendix; used by TRACT).

    log SNR runs from `logsnr_max` at t = 0 to `logsnr_min` at t = 1.
    """

    def __init__(self, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> None:
        self.t_min, self.t_max = 0.0, 1.0
        self.theta_0 = math.atan(math.exp(-0.5 * logsnr_max))
        self.theta_1 = math.atan(math.exp(-0.5 * logsnr_min))

    def lam(self, t: Tensor) -> Tensor:
        theta = self.theta_0 + (self.theta_1 - self.theta_0) * t.double()
        return torch.log(torch.tan(theta))

    def t_of_lam(self, lam: Tensor) -> Tensor:
        theta = torch.atan(torch.exp(lam.double()))
        return ((theta - self.theta_0) / (self.theta_1 - self.theta_0)).clamp(self.t_min, self.t_max)


class VPLinear(_VariancePreserving):
    """log alpha = -t^2 (b1 - b0) / 4 - t b0 / 2 (Song et al. 2021, eq. 33 with beta linear in t)."""

    def __init__(self, beta_0: float = 0.1, beta_1: float = 20.0, t_min: float = 1e-5) -> None:
        self.t_min, self.t_max = t_min, 1.0
        self.beta_0, self.beta_1 = beta_0, beta_1

    def lam(self, t: Tensor) -> Tensor:
        t = t.double()
        log_alpha = -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return 0.5 * torch.log(-torch.expm1(2 * log_alpha)) - log_alpha

    def t_of_lam(self, lam: Tensor) -> Tensor:
        c = softplus(2 * lam.double())  # -2 log alpha = t^2 (b1 - b0) / 2 + t b0
        slope = self.beta_1 - self.beta_0
        t = 2 * c / (self.beta_0 + torch.sqrt(self.beta_0**2 + 2 * slope * c))
        return t.clamp(self.t_min, self.t_max)


class VE(NoiseSchedule):
    """alpha = 1, sigma = t (EDM: t is the noise level; Karras et al. 2022)."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        self.t_min, self.t_max = sigma_min, sigma_max

    def lam(self, t: Tensor) -> Tensor:
        return torch.log(t.double())

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.exp(lam.double()).clamp(self.t_min, self.t_max)

    def _log_alpha(self, lam: Tensor) -> Tensor:
        return torch.zeros_like(lam)

    def unbounded(self) -> VE:
        """The same with every noise level that a draw can reach."""
        return VE(math.exp(-FARTHEST_LAM), math.exp(FARTHEST_LAM))


class FlowMatching(NoiseSchedule):
    """alpha = 1 - t, sigma = t (rectified flow), without the two ends, where lambda is infinite."""

    def __init__(self, t_min: float = 1e-4, t_max: float = 1 - 1e-4) -> None:
        self.t_min, self.t_max = t_min, t_max

    def lam(self, t: Tensor) -> Tensor:
        return torch.logit(t.double())

    def t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(lam.double()).clamp(self.t_min, self.t_max)

    def _log_alpha(self, lam: Tensor) -> Tensor:
        return -softplus(lam)


def _squared_cosine(steps: int) -> Tensor:
    """beta_i = min(1 - f((i+1)/T) / f(i/T), .999), f(u) = cos^2((u + .008)/1.008 pi/2) (Nichol & Dhariwal 2021)."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


# beta_0, ..., beta_{T-1} for T steps, (T,) float64, under diffusers' names.
BETAS: dict[str, Callable[[int], Tensor]] = {
    "linear": lambda steps: torch.linspace(1e-4, 0.02, steps, dtype=torch.float64),
    "scaled_linear": lambda steps: torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2,
    "squaredcos_cap_v2": _squared_cosine,
}


def _named_betas(name: str, steps: int) -> Tensor:
    if name not in BETAS:
        raise unknown("beta schedule", name, BETAS)
    return BETAS[name](steps)


class DiscreteBetas(_VariancePreserving):
    """diffusers' discrete schedules in continuous time (Ho et al. 2020: alpha_i^2 = abar_i = prod_{j<=i} (1 - beta_j)).

    Index i is t = (i + 1) / steps; between these points, and down to abar = 1 at t = 0, log abar is linear in t.
    `betas` is "linear" (DDPM), "scaled_linear" (Stable Diffusion) or "squaredcos_cap_v2" (DeepFloyd IF), all with the
    ends that these models have; or beta_0, ..., beta_{steps-1} themselves, (steps,), each between 0 and 1.
    """

    def __init__(self, betas: str | Tensor, steps: int = 1000) -> None:
        table = _named_betas(betas, steps) if isinstance(betas, str) else betas.double().cpu()
        if table.ndim != 1 or not len(table) or not bool(((table > 0) & (table < 1)).all()):
            raise UserError("betas must be a list of values above 0 and below 1")
        steps = len(table)
        self.t_min, self.t_max = 1 / steps, 1.0
        self.steps = steps
        self._decays: dict[torch.device, Tensor] = {}  # on each device, as every copy to a GPU waits for it
        # -log abar at t = k / steps, k = 0, ..., steps: 0 and growing
        self.decay = torch.cat([torch.zeros(1).double(), -torch.log1p(-table).cumsum(0)])

    def _decay(self, device: torch.device) -> Tensor:
        if device not in self._decays:
            self._decays[device] = self.decay.to(device)
        return self._decays[device]

    def lam(self, t: Tensor) -> Tensor:
        decay, u = self._decay(t.device), t.double() * self.steps
        k = u.detach().long().clamp(0, self.steps - 1)
        return 0.5 * torch.log(torch.expm1(decay[k] + (u - k) * (decay[k + 1] - decay[k])))

    def t_of_lam(self, lam: Tensor) -> Tensor:
        decay, c = self._decay(lam.device), softplus(2 * lam.double())  # -log abar
        k = (torch.searchsorted(decay, c.detach(), right=True) - 1).clamp(0, self.steps - 1)
        u = k + (c - decay[k]) / (decay[k + 1] - decay[k])
        return (u / self.steps).clamp(self.t_min, self.t_max)


SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "vp_cosine": VPCosine,
    "vp_linear": VPLinear,
    "ve": VE,
    "flow_matching": FlowMatching,
    "ddpm_linear": partial(DiscreteBetas, "linear"),
    "ddpm_scaled_linear": partial(DiscreteBetas, "scaled_linear"),
    "ddpm_cosine": partial(DiscreteBetas, "squaredcos_cap_v2"),
}
