"""Samples that stay with a run: a small PNG for each row, its images side by side, in the run's folder.

A run can then be copied or committed without the records beside it, and its report still shows the samples.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from distillbench.storage.files import write_atomically

SAMPLES = "samples"  # folder in that of the run
MOST_IMAGES = 16  # of a strip
MOST_PIXELS = 2**17  # of a strip; larger images are fewer
MOST_STRIPS = 200  # of a run
FEWEST_IMAGES = 4
NAME = re.compile(r"([\w-]{1,64})-(\d{1,9})\.png")  # key of the evaluation, number of network evaluations

Strips = Iterable[tuple[str, int, np.ndarray]]  # key of the evaluation, nfe, images (N,C,H,W) uint8


def write_strips(folder: Path, strips: Strips) -> None:
    """Write the first MOST_STRIPS strips to SAMPLES in `folder`, those that are not there yet; remove all others."""
    wanted = {f"{key}-{nfe}.png": images for key, nfe, images in list(strips)[:MOST_STRIPS] if len(images)}
    place = folder / SAMPLES
    for file in place.glob("*.png"):
        if NAME.fullmatch(file.name) and file.name not in wanted:
            file.unlink(missing_ok=True)
    for name, images in wanted.items():
        if not (place / name).is_file():
            place.mkdir(parents=True, exist_ok=True)
            _write(place / name, strip(images))


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(content))


def strip(images: np.ndarray) -> bytes:
    """A PNG of the first of `images` (N,C,H,W) uint8; the text chunk "images" has their number."""
    count, _, height, width = images.shape
    count = min(count, MOST_IMAGES, max(FEWEST_IMAGES, MOST_PIXELS // (height * width)))
    shown = np.asarray(images[:count])
    if shown.shape[1] != 1:  # two channels are red and green, of more than three the first are shown
        shown = np.concatenate([shown, np.zeros_like(shown[:, :1])], axis=1)[:, :3]
    pixels = np.concatenate(list(shown.transpose(0, 2, 3, 1)), axis=1)
    about, buffer = PngInfo(), io.BytesIO()
    about.add_text("images", str(count))
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
        buffer, "PNG", optimize=True, pnginfo=about
    )
    return buffer.getvalue()


def read_strips(folder: Path, key: str) -> dict[int, np.ndarray]:
    """Images (N,C,H,W) uint8 of the evaluation `key` by nfe; damaged files are left out."""
    found = {}
    for file in sorted((folder / SAMPLES).glob("*.png")):
        match = NAME.fullmatch(file.name)
        if match is None or match[1] != key:
            continue
        try:
            with Image.open(file) as picture:
                count = int(picture.info.get("images", 0))
                pixels = np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
            continue
        height, width = pixels.shape[:2]
        if count < 1 or width % count:
            continue
        images = pixels.reshape(height, count, width // count, -1)  # -1: channels
        found[int(match[2])] = images.transpose(1, 3, 0, 2)
    return found
