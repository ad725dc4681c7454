"""Noise that belongs to an image index: the same for every method, batch size and machine.

Evaluation and noise-image pairs identify their noise by (stream, index), the key of a counter-based generator (Philox).
So nothing has to be stored, and neither batch size nor order changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def stream_key(purpose: str, seed: int) -> int:
    """The 64-bit key of a stream. Purposes have different streams: pairs never have the evaluation's noise."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}".encode()).digest()[:8], "little")


def uniform(stream: int, indices: Sequence[int]) -> np.ndarray:
    """A number in [0, 1) for each of the images `indices` of a stream, (N,) float64, independent of their noise."""
    keys = (np.array([stream, index], np.uint64) for index in indices)
    counter = np.array([0, 0, 1, 0], np.uint64)
    return np.array([np.random.Generator(np.random.Philox(key=key, counter=counter)).random() for key in keys])


class Noise:
    """Standard normal noise for the images `indices` of a stream; calling it with k gives the k-th draw, (B,C,H,W).

    ``noise(0)`` is the initial noise eps from which every method and the teacher sample. Samplers that add fresh noise
    at step k ask for ``noise(k)``.
    """

    def __init__(self, stream: int, indices: Sequence[int], shape: tuple[int, int, int], device: str = "cpu") -> None:
        self.stream, self.indices, self.shape, self.device = stream, indices, shape, device

    def __call__(self, k: int) -> Tensor:
        return self.on_device(self.drawn(k))

    def drawn(self, k: int) -> Tensor:
        """The k-th draw, float32 in CPU memory, pinned where it will be copied to a GPU."""
        rows = np.empty((len(self.indices), *self.shape), dtype=np.float32)
        for row, index in zip(rows, self.indices, strict=True):
            key, draw = np.array([self.stream, index], np.uint64), np.array([0, 0, 0, k], np.uint64)
            generator = np.random.Generator(np.random.Philox(key=key, counter=draw))
            generator.standard_normal(out=row, dtype=np.float32)
        drawn = torch.from_numpy(rows)
        return drawn if self.device == "cpu" else drawn.pin_memory()

    def on_device(self, rows: Tensor) -> Tensor:
        """A draw on the device, in the default dtype; the copy to a GPU is asynchronous."""
        return rows.to(self.device, non_blocking=True).to(torch.get_default_dtype())


class PrefetchedNoise:
    """The same noise, drawn ahead by a thread: the CPU draws while the GPU computes.

    Draw 0 is begun at once and stored, because some samplers ask for it twice. `expected` is the last draw that the
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


def prefetched(noises: Iterable[Noise], device: str) -> Iterator[Noise | PrefetchedNoise]:
    """The noise of one batch after another. For a GPU, that of the next batch is drawn while a batch is sampled."""
    if device == "cpu":
        yield from noises
        return
    with ThreadPoolExecutor(1, "drawing noise") as drawing:
        ready: PrefetchedNoise | None = None
        last = 0
        for noise in noises:
            upcoming = PrefetchedNoise(noise, drawing, last)
            if ready is not None:
                ready.expected = last
                yield ready
                last = max(last, ready.last)
            ready = upcoming
        if ready is not None:
            ready.expected = last
            yield ready


class FixedNoise:
    """Noise that was drawn before, so that timing does not include drawing it."""

    def __init__(self, draws: list[Tensor]) -> None:
        self.draws = draws

    def __call__(self, k: int) -> Tensor:
        return self.draws[k]
