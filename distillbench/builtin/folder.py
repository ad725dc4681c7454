"""A folder of images: every PNG, JPEG, WebP or BMP file below it, cut to the centred square and resized."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from distillbench import Dataset, DatasetConfig, UserError, hookimpl, option
from distillbench.options import require_one_of, require_positive

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Folder(Dataset):
    """Images below a folder, in the order of their paths, held in memory as uint8."""

    name = "folder"
    licence = "that of the images"
    resizer = "centre crop, Pillow bicubic, 8 bits"

    @dataclass
    class Config(DatasetConfig):
        path: str = option("", "the folder (required)")
        resolution: int = option(32, "side in pixels: centre-cropped to a square, then resized (Pillow, bicubic)")
        channels: int = option(3, "3: colour; 1: grey")

        def __post_init__(self) -> None:
            require_positive(self, "resolution")
            require_one_of(self, "channels", (1, 3))

    def __init__(self, config: Config) -> None:
        if not config.path:
            raise UserError("dataset=folder needs dataset.path=FOLDER, a folder of images")
        folder = Path(config.path)
        if not folder.is_dir():
            raise UserError(f"dataset.path: no folder {config.path!r}")
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"dataset.path: no image ({', '.join(sorted(SUFFIXES))}) below {config.path!r}")
        self.shape = (config.channels, config.resolution, config.resolution)
        self.images = torch.stack([self._open(file, config) for file in files])
        self.sha256 = hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    @staticmethod
    def _open(file: Path, config: Config) -> Tensor:
        try:
            with Image.open(file) as image:
                image = image.convert("RGB" if config.channels == 3 else "L")
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise UserError(f"dataset.path: cannot read {file.name!r} as an image: {error}") from error
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        size = (config.resolution, config.resolution)
        image = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        pixels = np.asarray(image, dtype=np.uint8).reshape(config.resolution, config.resolution, config.channels)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]


@hookimpl
def register_datasets(register) -> None:
    register(Folder)
