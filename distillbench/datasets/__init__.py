"""The contract of a dataset, and readers of images, arrays, tables and annotations.

It may import `diffusion` and below.

The names in ``__all__`` are public: the plugin contract covers them. They load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distillbench._lazy import load

if TYPE_CHECKING:
    from distillbench.datasets.dataset import to_float as to_float
    from distillbench.datasets.dataset import to_uint8 as to_uint8
    from distillbench.datasets.image_dataset import FileConfig as FileConfig
    from distillbench.datasets.image_dataset import FileDataset as FileDataset

__all__ = [
    "FileConfig",
    "FileDataset",
    "to_float",
    "to_uint8",
]

_HOMES = {
    "FileConfig": "distillbench.datasets.image_dataset",
    "FileDataset": "distillbench.datasets.image_dataset",
    "to_float": "distillbench.datasets.dataset",
    "to_uint8": "distillbench.datasets.dataset",
}


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)
