"""Images in a file, of which only a batch at a time is in memory: 50,000 of 3x256x256 are 37 GiB in float32."""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

MOST_AT_ONCE = 1024  # images read at a time,
BYTES_AT_ONCE = 2**26  # and bytes in float32


def images_at_once(shape: tuple[int, ...]) -> int:
    """The number of images of `shape` (C,H,W) that are read at a time."""
    return max(1, min(MOST_AT_ONCE, BYTES_AT_ONCE // (4 * math.prod(shape))))


class StoredImages:
    """Images (N,C,H,W) in [-1, 1] in a file, float32 or float64.

    A new one is an unnamed temporary file in `folder` (None: the system's), to which :meth:`add` appends batches. It
    is deleted when it is closed, and also when the process is killed.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._open(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115
        self._offset, self.count, self.shape, self._dtype = 0, 0, (0, 0, 0), np.dtype(np.float32)

    def _open(self, file: IO[bytes]) -> None:
        self._file = file
        self._close = weakref.finalize(self, file.close)

    @classmethod
    def in_npy(cls, path: Path) -> StoredImages:
        """The images in an .npy file, which stays. They can be read even if it is deleted or replaced meanwhile."""
        array = np.load(path, mmap_mode="r")
        images = cls.__new__(cls)
        images._open(open(path, "rb"))  # noqa: SIM115
        images._offset, images._dtype = array.offset, array.dtype
        images.count, images.shape = len(array), array.shape[1:]
        return images

    def add(self, batch: Tensor) -> None:
        """Append a batch (B,C,H,W) on the CPU; all have one shape and dtype."""
        values = batch.to(torch.promote_types(batch.dtype, torch.float32)).contiguous().numpy()
        if not self.count:
            self.shape, self._dtype = values.shape[1:], values.dtype
        if (values.shape[1:], values.dtype) != (self.shape, self._dtype):
            raise ValueError(f"images are {self._dtype} {self.shape}, got {values.dtype} {values.shape[1:]}")
        self._file.write(values.data)
        self.count += len(values)

    def batches(self) -> Iterator[Tensor]:
        """All images in order, at most :func:`images_at_once` at a time, in the default dtype."""
        size = images_at_once(self.shape)
        for first in range(0, self.count, size):
            yield self._mapped(first, min(size, self.count - first))

    def first(self, count: int) -> Tensor:
        """The first `count` images, or all if there are fewer."""
        return self._mapped(0, min(count, self.count))

    @property
    def tensor(self) -> Tensor:
        """All images (N,C,H,W), memory-mapped: read from the file where they are used. Changes stay in memory."""
        return self._mapped(0, self.count)

    def _mapped(self, first: int, count: int) -> Tensor:
        self._file.flush()
        offset = self._offset + first * math.prod(self.shape) * self._dtype.itemsize
        array = np.memmap(self._file, self._dtype, "c", offset, (count, *self.shape))  # a map of these images only
        return torch.from_numpy(array).to(torch.get_default_dtype())

    def close(self) -> None:
        """Close the file; that of a new one is deleted."""
        self._close()
