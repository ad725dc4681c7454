"""Noise that belongs to an image index: the same for every method, batch size and machine.

Evaluation, and noise-image pairs, name their noise by (stream, index). A counter-based generator (Philox) turns the
name into the tensor, so nothing has to be stored and no batch size or order can change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

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
        return self.on_device(self.drawn(k))

    def drawn(self, k: int) -> Tensor:
        """The k-th draw, float32 in the memory of the CPU, which is pinned where a GPU is to have it."""
        rows = np.empty((len(self.indices), *self.shape), dtype=np.float32)
        for row, index in zip(rows, self.indices, strict=True):
            name, draw = np.array([self.stream, index], np.uint64), np.array([0, 0, 0, k], np.uint64)
            generator = np.random.Generator(np.random.Philox(key=name, counter=draw))
            generator.standard_normal(out=row, dtype=np.float32)
        drawn = torch.from_numpy(rows)
        return drawn if self.device == "cpu" else drawn.pin_memory()

    def on_device(self, rows: Tensor) -> Tensor:
        """A draw where it is used, in the default dtype; nothing waits for the copy to a GPU."""
        return rows.to(self.device, non_blocking=True).to(torch.get_default_dtype())


class DrawnAhead:
    """The same noise, drawn by a thread before it is asked for: the CPU draws while the GPU computes.

    Draw 0 is begun at once and kept, because some samplers ask for it twice. `expected` is the last draw that the
    sampler will probably ask for; each is begun when the one before it is asked for.
    """

    def __init__(self, noise: Noise, drawing: Executor, expected: int = 0) -> None:
        self.noise, self.indices, self.expected = noise, noise.indices, expected
        self.last = 0  # the largest k that was asked for
        self._drawing = drawing
        self._begun = {0: drawing.submit(noise.drawn, 0)}

    def __call__(self, k: int) -> Tensor:
        begun = self._begun.get(k) if k == 0 else self._begun.pop(k, None)
        self.last = max(self.last, k)
        if k < self.expected and k + 1 not in self._begun:
            self._begun[k + 1] = self._drawing.submit(self.noise.drawn, k + 1)
        return self.noise.on_device(self.noise.drawn(k) if begun is None else begun.result())


def drawn_ahead(noises: Iterable[Noise], device: str) -> Iterator[Noise | DrawnAhead]:
    """The noise of one batch after another. For a GPU, that of the next batch is drawn while a batch is sampled."""
    if device == "cpu":
        yield from noises
        return
    with ThreadPoolExecutor(1, "drawing noise") as drawing:
        waiting: DrawnAhead | None = None
        last = 0
        for noise in noises:
            following = DrawnAhead(noise, drawing, last)
            if waiting is not None:
                waiting.expected = last
                yield waiting
                last = max(last, waiting.last)
            waiting = following
        if waiting is not None:
            waiting.expected = last
            yield waiting


class FixedNoise:
    """Noise that is already there: what timing calls use, so that drawing it is not timed."""

    def __init__(self, draws: list[Tensor]) -> None:
        self.draws = draws

    def __call__(self, k: int) -> Tensor:
        return self.draws[k]
