"""Conversion of time, input and output between networks of diffusers and ours."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distillbench.diffusion.denoiser import SIGMA_DATA

__all__ = ["Call", "ConsistencyCall", "ScoreCall"]


@dataclass(frozen=True)
class Call:
    """Converts our x and time to the inputs of a network of diffusers, and its output to our prediction.

    | symbol | meaning                                                  | shape     |
    |--------|----------------------------------------------------------|-----------|
    | x      | input of our network (EDM's c_in x^ for "edm")           | (B,C,H,W) |
    | time   | time of our network: t, or log(t) / 4 for "edm"          | (B,)      |
    | out    | output of the network of diffusers                       | (B,C,H,W) |
    """

    scale: float
    offset: float = 0.0
    sign: float = 1.0

    def argument(self, time: Tensor) -> Tensor:
        """The time of diffusers' network, scale time + offset, (B,)."""
        return self.scale * time + self.offset

    def input(self, x: Tensor) -> Tensor:
        """The x of diffusers' network, (B,C,H,W)."""
        return x

    def output(self, out: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Our prediction, (B,C,H,W)."""
        return out if self.sign == 1 else self.sign * out


@dataclass(frozen=True)
class ScoreCall(Call):
    """A score network of images in [0, 1] at noise level s (Song et al. 2021, NCSN++), read as eps of ours in [-1, 1].

    y = (x + 1) / 2 has the noise level s = t / 2, and the network returns the score -eps / s. (diffusers starts from
    y = s eps, which is x = 2 s eps - 1, and we start from x = 2 s eps: negligible at s = 1348.)
    """

    def input(self, x: Tensor) -> Tensor:
        return (x + 1) / 2

    def output(self, out: Tensor, x: Tensor, time: Tensor) -> Tensor:
        return -self.argument(time).view(-1, 1, 1, 1).to(out.dtype) * out


@dataclass(frozen=True)
class ConsistencyCall(Call):
    """A consistency function c_skip x^ + c_out F (Song et al. 2023, appendix C), read as an EDM network F'.

    With tau the noise level, e the smallest, sd = SIGMA_DATA and n^2 = tau^2 + sd^2, of EDM's k_skip x^ + k_out F':

        F' = (1 - e/tau) F + sd (2 e - e^2/tau) / ((tau - e)^2 + sd^2) x,     x = x^ / n

    so that the denoiser is the consistency function itself, and one step of DDIM its one-step sample.
    """

    e: float = 0.002

    def output(self, out: Tensor, x: Tensor, time: Tensor) -> Tensor:
        tau = (4 * time.double()).exp().view(-1, 1, 1, 1)
        inner = 1 - self.e / tau
        skip = SIGMA_DATA * (2 * self.e - self.e**2 / tau) / ((tau - self.e) ** 2 + SIGMA_DATA**2)
        return inner.to(out.dtype) * out + skip.to(out.dtype) * x
