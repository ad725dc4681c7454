"""Noise that belongs to an image index: the same for every method, batch size and machine.

Evaluation, and noise-image pairs, name their noise by (stream, index). A counter-based generator (Philox) turns the
name into the tensor, so nothing has to be stored and no batch size or order can change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream_key(purpose: str, seed: int) -> int:
    """The 64-bit name of a stream. Streams of different purposes never meet: pairs are not the evaluation's noise."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}".encode()).digest()[:8], "little")


def uniform(stream: int, indices: Sequence[int]) -> np.ndarray:
    """A number in [0, 1) for each of the images `indices` of a stream, (N,) float64, independent of their noise."""
    names = (np.array([stream, index], np.uint64) for index in indices)
    counter = np.array([0, 0, 1, 0], np.uint64)
    return np.array([np.random.Generator(np.random.Philox(key=name, counter=counter)).random() for name in names])


class Noise:
    """Standard normal noise for the images `indices` of a stream; calling it with k gives the k-th draw, (B,C,H,W).

    ``noise(0)`` is the initial noise eps that every method and the teacher answer. Samplers that add fresh noise at
    step k ask for ``noise(k)``.
    """

    def __init__(self, stream: int, indices: Sequence[int], shape: tuple[int, int, int], device: str = "cpu") -> None:
        self.stream, self.indices, self.shape, self.device = stream, indices, shape, device

    def __call__(self, k: int) -> Tensor:
        rows = np.empty((len(self.indices), *self.shape), dtype=np.float32)
        for row, index in zip(rows, self.indices, strict=True):
            name, draw = np.array([self.stream, index], np.uint64), np.array([0, 0, 0, k], np.uint64)
            generator = np.random.Generator(np.random.Philox(key=name, counter=draw))
            generator.standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(rows).to(self.device, torch.get_default_dtype())


class FixedNoise:
    """Noise that is already there: what timing calls use, so that drawing it is not timed."""

    def __init__(self, draws: list[Tensor]) -> None:
        self.draws = draws

    def __call__(self, k: int) -> Tensor:
        return self.draws[k]
