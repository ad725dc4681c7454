"""Encoders of images and of texts that record their calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distillbench import Denoiser, Teacher
from distillbench.diffusion.schedules import VPCosine
from distillbench.networks.architectures import ResidualMLP

PROMPTS = ["a cat", "two dogs", "seven seas"]


def latent_teacher(calls: list[int]) -> Teacher:
    """A teacher of (1,4,4) latents of (1,8,8) images; the number of images of each encoding goes into `calls`."""

    def to_latents(x):
        calls.append(len(x))
        return torch.nn.functional.avg_pool2d(x, 2)

    denoiser = Denoiser(ResidualMLP((1, 4, 4), 8, 1), VPCosine(), "v")
    decode = lambda z: torch.nn.functional.interpolate(z, scale_factor=2)
    return Teacher("toy", denoiser, (1, 4, 4), "1" * 64, to_latents=to_latents, decode=decode, decoded=(1, 8, 8))


def encode(calls: list[list[str]]) -> Callable[[list[str]], Tensor]:
    """An encoder of texts to (B,2,3): their lengths, and twice that. The texts of each call go into `calls`."""

    def of(texts):
        calls.append(list(texts))
        return torch.tensor([[[len(t)] * 3, [2 * len(t)] * 3] for t in texts]).float()

    return of
