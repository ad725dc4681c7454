"""The interface of datasets: real images by index, usually as 8-bit values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from distillbench.options import option

if TYPE_CHECKING:
    from distillbench.diffusion.distributions import Distribution

__all__ = ["Dataset", "DatasetConfig", "to_float", "to_uint8"]


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
    sha256: str  # of the pixels: identifies the data, wherever it was read from
    split: str = "all"  # which of the authors' splits
    resizer: str = "none"  # how images were cropped and resized, which changes every score
    classes: int = 0  # number of classes; 0: the images have no labels
    prompts: Sequence[str] | None = None  # texts, one per class: the caption of image i is prompt i
    evaluated: range | None = None  # the classes used by evaluation only, after those of training; None: all
    notes: Sequence[str] = ()  # for the user: what was left out when reading, and why
    distribution: Distribution | None = None  # the distribution of the images, if it is known in closed form

    @abstractmethod
    def __init__(self, config: Any) -> None:
        """Find the images; raise UserError if they are missing or damaged."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images; 0 for a dataset without images, which only data-free methods can use."""

    @abstractmethod
    def read(self, indices: Tensor) -> Tensor:
        """The images at `indices`, (B,C,H,W): uint8, or floating point in [-1, 1] if they were never quantised."""

    def labels(self, indices: Tensor) -> Tensor:
        """The classes of the images at `indices`, (B,) int64. Datasets with ``classes`` override it."""
        raise NotImplementedError(f"{self.name} declares {self.classes} classes but no labels")


def to_float(images: Tensor) -> Tensor:
    """Images as read (uint8, or floating point in [-1, 1]) to [-1, 1] in the default dtype."""
    x_0 = images.to(torch.get_default_dtype())
    return x_0 / 127.5 - 1 if images.dtype == torch.uint8 else x_0


def to_uint8(x_0: Tensor) -> Tensor:
    """[-1, 1] to uint8, clipped and rounded to the nearest level; uint8 is returned unchanged."""
    if x_0.dtype == torch.uint8:
        return x_0
    return ((x_0.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
