"""Latents of real images: encoded once by the teacher's encoder, cached on disk, read row by row.

Encoding a dataset is preparation of data, like resizing: it is done before training and outside every budget.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillbench.datasets.dataset import Dataset, to_float
from distillbench.storage.checksummed import read_array, write_checksum
from distillbench.storage.files import key_of, write_atomically
from distillbench.system.precision import tf32
from distillbench.system.progress import Progress
from distillbench.system.transfers import to_device
from distillbench.teachers.teacher import Teacher

BATCH = 32


class Latents(Dataset):
    """The latents `rows` (N,c,h,w) of the images of `dataset`, float32, possibly memory-mapped, with its labels."""

    name = "latents"

    def __init__(self, dataset: Dataset, rows: np.ndarray) -> None:
        self.dataset, self.rows = dataset, rows
        self.licence = dataset.licence  # type: ignore[misc]  # of this dataset, not of the class
        self.sha256 = dataset.sha256
        self.shape = (rows.shape[1], rows.shape[2], rows.shape[3])
        self.classes, self.prompts, self.evaluated = dataset.classes, dataset.prompts, dataset.evaluated

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(self.rows[indices.numpy()])

    def labels(self, indices: Tensor) -> Tensor:
        return self.dataset.labels(indices)


class Posteriors(Latents):
    """The same with `rows` (N,2c,h,w), mean and standard deviation of each latent, from which a training draws."""

    def __init__(self, dataset: Dataset, rows: np.ndarray) -> None:
        super().__init__(dataset, rows)
        self.shape = (rows.shape[1] // 2, rows.shape[2], rows.shape[3])

    @staticmethod
    def drawn(rows: Tensor, eps: Tensor) -> Tensor:
        """mean + std eps, (B,c,h,w), of rows as they are read."""
        mean, std = rows.chunk(2, dim=1)
        return mean + std * eps


def training_data(dataset: Dataset, teacher: Teacher, cache: Path, device: str, progress: Progress) -> Dataset:
    """The training data of students of `teacher`: `dataset` itself, or its latents, computed once and cached.

    A teacher with ``to_posterior`` has :class:`Posteriors` in place of latents, of twice the size. They are computed
    in float32. On a GPU this is part of the cache key, because older versions used TF32.
    """
    if teacher.to_latents is None or not len(dataset):
        return dataset
    recipe: dict[str, Any] = {
        "dataset_sha256": dataset.sha256,
        "teacher_sha256": teacher.sha256,
        "latent": "mean of the posterior" if teacher.to_posterior is None else "mean and deviation of the posterior",
    }
    recipe |= {} if device == "cpu" else {"tf32": False}
    file = cache / f"{dataset.name}-{key_of(recipe)}.npy"
    channels, *sides = teacher.shape
    shape = (len(dataset), channels if teacher.to_posterior is None else 2 * channels, *sides)
    rows = _found(file, shape)
    if rows is None:
        with tf32(False, device):
            write_atomically(file, lambda path: _encode(dataset, teacher, Path(path), shape, device, progress))
        write_checksum(file, recipe)
        rows = np.load(file, mmap_mode="r")
    return Latents(dataset, rows) if teacher.to_posterior is None else Posteriors(dataset, rows)


def placeholder(dataset: Dataset, teacher: Teacher) -> Dataset:
    """The same for a dry run, where only shapes matter: one latent of zeros for every image."""
    if teacher.to_latents is None or not len(dataset):
        return dataset
    return Latents(dataset, np.broadcast_to(np.zeros((), np.float32), (len(dataset), *teacher.shape)))


def _found(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The latents in `file`; None if they are missing, damaged, or of another shape."""
    try:
        rows = read_array(file)
    except ValueError:
        return None
    return rows if rows.shape == shape and rows.dtype == np.float32 else None


def _encode(
    dataset: Dataset, teacher: Teacher, path: Path, shape: tuple[int, ...], device: str, progress: Progress
) -> None:
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    encode = teacher.encoded if teacher.to_posterior is None else teacher.posterior
    about = f"encoding {dataset.name} to latents"
    with torch.no_grad(), teacher.autoencoder_kept_on_device(), progress.step(about) as step:
        for first in range(0, len(dataset), BATCH):
            indices = torch.arange(first, min(first + BATCH, len(dataset)))
            x_0 = to_float(to_device(dataset.read(indices), device))
            rows[indices.numpy()] = encode(x_0).float().cpu().numpy()
            step.advance((first + len(indices)) / len(dataset))
    rows.flush()
