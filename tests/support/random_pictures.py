"""A dataset of random images."""

from __future__ import annotations

import torch

from distillbench.datasets.dataset import Dataset


class Pictures(Dataset):
    """Random 8-bit images of which image i is of class i mod `classes`."""

    name, licence, sha256 = "pictures", "none", "0" * 64

    def __init__(self, count: int = 40, shape: tuple[int, int, int] = (1, 8, 8), classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.shape, self.classes = shape, classes
        self.images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: torch.Tensor) -> torch.Tensor:
        return self.images[indices]

    def labels(self, indices: torch.Tensor) -> torch.Tensor:
        return indices % self.classes
