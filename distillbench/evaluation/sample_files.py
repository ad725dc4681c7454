"""Files of samples in the layout of guided-diffusion (Dhariwal & Nichol 2021, arXiv:2105.05233), .npz.

| array   | meaning                                            | shape             |
|---------|----------------------------------------------------|-------------------|
| `arr_0` | images, red, green and blue                        | (N,H,W,3) uint8   |
| `arr_1` | their classes; may be missing                      | (N,) int64        |

Its evaluations/evaluator.py reads them, and its reference batches have `mu`, `sigma`, `mu_s`, `sigma_s` besides.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from distillbench.datasets.annotations import READ_WITHOUT
from distillbench.datasets.array_readers import ArrayReader, open_npz
from distillbench.datasets.dataset import to_uint8
from distillbench.errors import UserError
from distillbench.evaluation.stored_images import images_at_once
from distillbench.storage.npz import NotNpz

CHANNELS = 3  # that guided-diffusion reads: grey images are repeated


@dataclass(frozen=True)
class SampleFile:
    """The images of a file, memory-mapped where they are not compressed."""

    path: Path
    reader: ArrayReader

    @property
    def count(self) -> int:
        return len(self.reader)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C,H,W)."""
        height, width, channels = self.reader.parts[0].images.shape[1:]
        return channels, height, width

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64."""
        return None if self.reader.labels is None else torch.from_numpy(self.reader.labels)

    def batches(self) -> Iterator[Tensor]:
        """All images in order, (B,C,H,W) uint8."""
        size = images_at_once(self.shape)
        for part in self.reader.parts:
            for first in range(0, len(part.images), size):
                images = torch.from_numpy(np.array(part.images[first : first + size]))
                yield images.permute(0, 3, 1, 2).contiguous()


def read_samples(path: Path, sides: tuple[int, int]) -> SampleFile:
    """The images of an .npz file, which must have these `sides` (H,W). Raises UserError if it has none of them."""
    check_exists(path)
    try:
        found = SampleFile(path, open_npz([path], "all", labelled=True))
    except UserError as error:  # written for dataset.path
        why = str(error).removeprefix("dataset.path: ").removesuffix(READ_WITHOUT).rstrip()
        if isinstance(error.__cause__, NotNpz):
            why = f"{error.__cause__}. Write it as .npz: numpy.savez('samples.npz', arr_0=images)"
        raise UserError(f"{path.name}: {why}") from error
    for part in found.reader.parts:
        height, width, channels = part.images.shape[1:]
        if (height, width) != sides or channels not in (1, CHANNELS) or channels != found.shape[0]:
            raise UserError(
                f"{part.name} must hold images of {sides[0]}x{sides[1]} with 1 or 3 channels, as the dataset does, got "
                f"{part.images.shape}"
            )
    return found


def check_exists(path: Path) -> None:
    """Raise UserError if there is no file at `path`."""
    if not path.is_file():
        raise UserError(f"no file of samples {str(path)!r}")


@contextmanager
def writing(path: str, count: int, sides: tuple[int, int], labels: Tensor | None) -> Iterator[Callable[[Tensor], None]]:
    """Write an .npz of `count` images: the block calls ``add(x_0)`` with batches (B,C,H,W) in [-1, 1], in order."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *sides, CHANNELS)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, header)

            def add(x_0: Tensor) -> None:
                images = to_uint8(x_0).expand(-1, CHANNELS, -1, -1).permute(0, 2, 3, 1)
                file.write(images.contiguous().numpy().data)

            yield add
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                npy.write_array(file, labels.numpy(), allow_pickle=False)
