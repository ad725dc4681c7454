"""Datasets: real images by index, as 8-bit values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from distillbench.options import option


@dataclass
class DatasetConfig:
    """Settings that every dataset has. A dataset's own Config derives from this one."""

    kind: str = option("", "the registered dataset (set by the choice of dataset=...)")


class Dataset(ABC):
    """A set of real images of one shape."""

    name: ClassVar[str]
    Config: ClassVar[type[DatasetConfig]]
    licence: ClassVar[str]
    shape: tuple[int, int, int]  # C,H,W
    sha256: str  # of the pixels: identifies the data, wherever they were read from

    @abstractmethod
    def __init__(self, config: Any) -> None:
        """Find the images; raise UserError if they are missing or damaged."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def read(self, indices: Tensor) -> Tensor:
        """The images at `indices`, (B,C,H,W) uint8."""


def from_uint8(images: Tensor) -> Tensor:
    """uint8 to [-1, 1] in the default dtype."""
    return images.to(torch.get_default_dtype()) / 127.5 - 1


def to_uint8(x_0: Tensor) -> Tensor:
    """[-1, 1] to uint8, clipped and rounded to the nearest level."""
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
