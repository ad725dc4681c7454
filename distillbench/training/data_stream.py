"""The real images of a training: random batches in the same order for all methods, prefetched for a GPU."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.datasets.augmentation import flipped
from distillbench.datasets.dataset import Dataset, to_float
from distillbench.diffusion.noise import stream_key
from distillbench.system.progress import Progress
from distillbench.system.transfers import fits_on, to_device
from distillbench.teachers.latents import Posteriors
from distillbench.training.share import WHOLE, Share

HELD_BYTES = 2**26  # of images as float32, on any device
HELD_BYTES_ON_GPU = 2**32  # of images in the dtype of the dataset, such as uint8
PRELOAD_BATCH = 1024  # images per copy in preload()


@dataclass(frozen=True)
class _Prefetched:
    """A batch that is being read."""

    size: int
    before: Tensor  # the state before the batch was drawn
    varied: Tensor | None  # whether each image is flipped, or noise of its latent
    images: Future[tuple[Tensor, Tensor | None]]


class DataStream:
    """Random batches of a dataset, drawn with replacement by a separate generator: the same order for all methods.

    A dataset of up to HELD_BYTES as float32 is read once, to the device; a larger one to a GPU in :meth:`preload`. Of
    others a thread prefetches `ahead` batches into pinned memory. `share` are the rows of each batch that this rank
    trains on. The saved state is that of the next batch, not of prefetched ones.

    With `flip` half of the images are flipped left to right. Which ones is drawn by a generator of its own, so the
    images are the same ones in the same order as without. Of posteriors of latents one latent is drawn at each use of
    an image, by that generator too: latents cannot be flipped.
    """

    def __init__(
        self, dataset: Dataset, seed: int, device: str, ahead: int = 0, share: Share = WHOLE, flip: bool = False
    ) -> None:
        self.dataset, self.device, self.ahead, self.share = dataset, device, ahead, share
        self.generator = torch.Generator().manual_seed(seed)
        self.posteriors = isinstance(dataset, Posteriors)
        if flip and self.posteriors:
            raise ValueError("latents cannot be flipped")
        purpose = "flips" if flip else "latents" if self.posteriors else ""
        self.variation = torch.Generator().manual_seed(stream_key(purpose, seed)) if purpose else None
        small = 4 * len(dataset) * math.prod(dataset.shape) <= HELD_BYTES
        self._held: Tensor | None = None
        self._holds = small
        self._queue: deque[_Prefetched] = deque()
        self._reader = ThreadPoolExecutor(1, "reading") if ahead and not small else None

    def preload(self, progress: Progress) -> None:
        """Copy a dataset of up to HELD_BYTES_ON_GPU, and of an eighth of the free memory, to the GPU.

        Batches stay bit-identical. On the CPU this does nothing.
        """
        if self._holds:
            return
        one = self.dataset.read(torch.arange(1))
        size = len(self.dataset) * one.nbytes
        if size > HELD_BYTES_ON_GPU or not fits_on(self.device, size):
            return
        held = torch.empty((len(self.dataset), *one.shape[1:]), dtype=one.dtype, device=self.device)
        with progress.step("copying the dataset to the GPU") as step:
            for indices in torch.arange(len(self.dataset)).split(PRELOAD_BATCH):
                first, last = int(indices[0]), int(indices[-1]) + 1
                held[first:last].copy_(to_device(self.dataset.read(indices), self.device))
                step.advance(last / len(held))
        self._held, self._holds = held, True

    def read(self, size: int) -> tuple[Tensor, Tensor | None]:
        """This rank's share of the next `size` images, (B,C,H,W) in [-1, 1] on the device, and their classes or None.

        Classes are (B,) int64, on the CPU.
        """
        if not self._holds and self._reader is not None:
            images, labels, varied = self._next_prefetched(size)
            images = to_float(images.to(self.device, non_blocking=True))
        else:
            indices, varied = self._draw(size)
            images, labels = self._look_up(indices) if self._holds else self._read(indices)
            images = to_float(to_device(images, self.device))
        return self._varied(images, varied), labels

    def close(self) -> None:
        """Stop prefetching."""
        self._drop_prefetched()
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def get_state(self) -> Tensor:
        """The state of the generator before the next batch, followed by that of flips or latents."""
        return self._queue[0].before if self._queue else self._state()

    def set_state(self, state: Tensor) -> None:
        """Continue from `state`."""
        self._queue.clear()
        length = len(self.generator.get_state())
        self.generator.set_state(state[:length].clone())  # torch crashes on a view
        if self.variation is not None:
            self.variation.set_state(state[length:].clone())

    def _state(self) -> Tensor:
        own = self.generator.get_state()
        return own if self.variation is None else torch.cat([own, self.variation.get_state()])

    def _draw(self, size: int) -> tuple[Tensor, Tensor | None]:
        """This rank's share of the next batch: indices, and whether each image is flipped, or noise of its latent."""
        indices = self.share.of(torch.randint(len(self.dataset), (size,), generator=self.generator))
        if self.variation is None:
            return indices, None
        if self.posteriors:
            eps = torch.randn(size, *self.dataset.shape, generator=self.variation, dtype=torch.float32)
            return indices, self.share.of(eps)
        return indices, self.share.of(torch.rand(size, generator=self.variation) < 0.5)

    def _varied(self, images: Tensor, varied: Tensor | None) -> Tensor:
        """`images` with the flips or the noise of their latents that were drawn for them."""
        if varied is None:
            return images
        varied = to_device(varied, self.device)
        return Posteriors.drawn(images, varied.to(images.dtype)) if self.posteriors else flipped(images, varied)

    def _look_up(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._held is None:
            self._held = to_float(to_device(self.dataset.read(torch.arange(len(self.dataset))), self.device))
        labels = self.dataset.labels(indices) if self.dataset.classes else None
        return self._held.index_select(0, to_device(indices, self.device)), labels

    def _read(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = self.dataset.labels(indices) if self.dataset.classes else None
        return self.dataset.read(indices), labels

    def _next_prefetched(self, size: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self._queue and self._queue[0].size != size:  # the last batch is smaller than the prefetched ones
            self._drop_prefetched()
        while len(self._queue) <= self.ahead:
            self._prefetch(size)
        batch = self._queue.popleft()
        return *batch.images.result(), batch.varied

    def _prefetch(self, size: int) -> None:
        assert self._reader is not None
        before = self._state()
        indices, varied = self._draw(size)
        self._queue.append(_Prefetched(size, before, varied, self._reader.submit(self._read_pinned, indices)))

    def _read_pinned(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        images, labels = self._read(indices)
        return (images.pin_memory() if self.device != "cpu" else images), labels

    def _drop_prefetched(self) -> None:
        """Drop prefetched batches; they will be drawn again."""
        if self._queue:
            for batch in self._queue:
                batch.images.cancel()
            self.set_state(self._queue[0].before)
