"""Losses that methods share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import mse_loss

from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.diffusion.denoiser import SIGMA_DATA, Denoiser
from distillbench.diffusion.schedules import NoiseSchedule

__all__ = ["SNR_WEIGHTS", "denoising_loss", "denoising_weight", "mean_square"]

# Weights of squared errors of x_0, from SNR = alpha_t^2 / sigma_t^2, (B,1,1,1).
SNR_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated_snr": lambda snr: snr.clamp(min=1),  # max(SNR, 1) (Salimans & Ho 2022, arXiv:2202.00512, eq. 9)
    "snr_plus_one": lambda snr: snr + 1,  # (eq. 10)
    "edm": lambda snr: snr + SIGMA_DATA**-2,  # SNR + 1 / sigma_data^2 (Karras et al. 2022, arXiv:2206.00364, table 1)
}


def mean_square(a: Tensor, b: Tensor, w: Tensor | float = 1.0) -> Tensor:
    """The mean of w (a - b)^2 over images and pixels: a and b (B,C,H,W); w at least 0, (B,1,1,1) or a number.

    The weight's root goes into a and b, so that the rest is one operation forward and one backward.
    """
    if isinstance(w, Tensor):
        root = w.sqrt()
        return mse_loss(root * a, root * b)
    return mse_loss(a, b) if w == 1 else w * mse_loss(a, b)


def denoising_weight(schedule: NoiseSchedule, t: Tensor, sd: float = SIGMA_DATA) -> Tensor:
    """1/tau^2 + 1/sd^2 of squared errors of x_0, (B,1,1,1) float64 (Karras et al. 2022, table 1: 1 / c_out^2)."""
    return schedule.noise_level(t) ** -2 + sd**-2


def denoising_loss(
    D: Denoiser,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    c: Condition = UNCONDITIONAL,
    sd: float = SIGMA_DATA,
    embedding: Tensor | None = None,
) -> Tensor:
    """E (1/tau^2 + 1/sd^2) |D(x_t, t, c) - x_0|^2 with x_t = alpha_t x_0 + sigma_t eps, a mean over images and pixels.

    Karras et al. 2022, arXiv:2206.00364, table 1, with tau = sigma_t / alpha_t. Its optimum is D = E[x_0 | x_t, c]. It
    also trains the fake score of distribution matching, whose x_0 are generated images. `embedding` is passed to D.
    """
    x_t, weight = D.schedule.noised(x_0, t, eps), denoising_weight(D.schedule, t, sd)
    return (weight.to(x_0.dtype) * (D(x_t, t, c, embedding) - x_0).square()).mean()
