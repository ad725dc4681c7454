"""The real images of a training: random batches in one order for all methods, read ahead of a GPU."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.datasets import Dataset, to_float
from distillbench.host_copies import fits_on, to_device
from distillbench.progress import Progress
from distillbench.share import WHOLE, Share

HELD = 2**26  # bytes of images as float32, on any device
HELD_ON_GPU = 2**32  # bytes of images as they were read (8-bit, where they were rounded)
READ = 1024  # images that are copied to a GPU at a time, where all are held there


@dataclass(frozen=True)
class _Ahead:
    """A batch that is being read."""

    size: int
    before: Tensor  # the generator's state before the batch was drawn
    images: Future[tuple[Tensor, Tensor | None]]


class DataStream:
    """Random batches of a dataset, drawn with replacement by a generator of their own: the same order for all.

    A dataset of up to HELD bytes as float32 is read once, to the device; a larger one to a GPU after :meth:`preload`.
    Of others `ahead` batches are read by a thread while the device works, into pinned memory. `share` are the rows of
    each batch that this process trains on. The stream's state, for :class:`distillbench.resume.Resume`, is where the
    next batch begins, whatever has been read ahead.
    """

    def __init__(
        self, dataset: Dataset, seed: int, device: str, ahead: int = 0, share: Share = WHOLE
    ) -> None:  # fmt: skip
        self.dataset, self.device, self.ahead, self.share = dataset, device, ahead, share
        self.generator = torch.Generator().manual_seed(seed)
        small = 4 * len(dataset) * math.prod(dataset.shape) <= HELD
        self._held: Tensor | None = None
        self._holds = small
        self._queue: deque[_Ahead] = deque()
        self._reader = ThreadPoolExecutor(1, "reading") if ahead and not small else None

    def preload(self, progress: Progress) -> None:
        """Copy the whole dataset to a GPU, as it is read: up to HELD_ON_GPU bytes, and an eighth of its free memory.

        Batches are the same to the bit. On the CPU nothing is done: reading from memory costs no more there.
        """
        if self._holds:
            return
        one = self.dataset.read(torch.arange(1))
        size = len(self.dataset) * one.nbytes
        if size > HELD_ON_GPU or not fits_on(self.device, size):
            return
        held = torch.empty((len(self.dataset), *one.shape[1:]), dtype=one.dtype, device=self.device)
        with progress.step("copying the dataset to the GPU") as step:
            for indices in torch.arange(len(self.dataset)).split(READ):
                first, last = int(indices[0]), int(indices[-1]) + 1
                held[first:last].copy_(to_device(self.dataset.read(indices), self.device))
                step.advance(last / len(held))
        self._held, self._holds = held, True

    def read(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Of the next `size` images this process's share, in [-1, 1] on the device, and their classes if they have any.

        Classes are (B,) int64, in the memory of the CPU.
        """
        if self._holds:
            return self._look_up(self._draw(size))
        if self._reader is not None:
            images, labels = self._read_ahead(size)
            return to_float(images.to(self.device, non_blocking=True)), labels
        images, labels = self._images(self._draw(size))
        return to_float(to_device(images, self.device)), labels

    def close(self) -> None:
        """Read nothing ahead any more."""
        self._forget()
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def get_state(self) -> Tensor:
        """The generator's state before the next batch."""
        return self._queue[0].before if self._queue else self.generator.get_state()

    def set_state(self, state: Tensor) -> None:
        """Go on from there."""
        self._queue.clear()
        self.generator.set_state(state)

    def _draw(self, size: int) -> Tensor:
        return self.share.of(torch.randint(len(self.dataset), (size,), generator=self.generator))

    def _look_up(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._held is None:
            self._held = to_float(to_device(self.dataset.read(torch.arange(len(self.dataset))), self.device))
        labels = self.dataset.labels(indices) if self.dataset.classes else None
        return to_float(self._held.index_select(0, to_device(indices, self.device))), labels

    def _images(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = self.dataset.labels(indices) if self.dataset.classes else None
        return self.dataset.read(indices), labels

    def _read_ahead(self, size: int) -> tuple[Tensor, Tensor | None]:
        if self._queue and self._queue[0].size != size:  # the last batch is smaller: it was drawn for nothing
            self._forget()
        while len(self._queue) <= self.ahead:
            self._begin(size)
        return self._queue.popleft().images.result()

    def _begin(self, size: int) -> None:
        assert self._reader is not None
        before = self.generator.get_state()
        self._queue.append(_Ahead(size, before, self._reader.submit(self._pinned, self._draw(size))))

    def _pinned(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        images, labels = self._images(indices)
        return (images.pin_memory() if self.device != "cpu" else images), labels

    def _forget(self) -> None:
        """Draw what was read ahead once more."""
        if self._queue:
            for batch in self._queue:
                batch.images.cancel()
            self.set_state(self._queue[0].before)
