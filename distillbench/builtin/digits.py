"""Handwritten digits, 8x8: 1,797 real images that are part of scikit-learn, so that no download is needed.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench import Dataset, DatasetConfig, hookimpl


class Digits(Dataset):
    """Handwritten digits 0 to 9, one channel, 8x8. The 17 grey levels 0, ..., 16 are scaled to 0, ..., 255."""

    name = "digits"
    licence = "CC BY 4.0 (UCI Machine Learning Repository)"
    shape = (1, 8, 8)
    classes = 10

    @dataclass
    class Config(DatasetConfig):
        pass

    def __init__(self, config: Config) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        levels = torch.from_numpy(digits.images)
        self.targets = torch.from_numpy(digits.target).long()
        self.images = (levels * (255 / 16)).round().to(torch.uint8)[:, None]
        self.sha256 = hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def labels(self, indices: Tensor) -> Tensor:
        return self.targets[indices]


@hookimpl(api=2)
def register_datasets(register) -> None:
    register(Digits)
