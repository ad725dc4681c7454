"""Crop and resize stored images to the shape of a dataset.

| setting  | meaning                                                                         |
|----------|---------------------------------------------------------------------------------|
| `crop`   | center: the largest centred square; none: images must be square                 |
| `resize` | pillow_bicubic, pillow_lanczos, pillow_box: one antialiased resize of Pillow    |
|          | adm: as Dhariwal and Nichol; none: images must have the right size already      |

Transparent images are composited over white first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from distillbench.datasets.image_readers import DAMAGE, LARGEST_IMAGE, dataset_error, over_white, unreadable
from distillbench.errors import quoted

CROPS = {"center": "centre crop", "none": "no crop"}
ADM = "adm"
FILTERS = {
    "pillow_bicubic": Image.Resampling.BICUBIC,
    "pillow_lanczos": Image.Resampling.LANCZOS,
    "pillow_box": Image.Resampling.BOX,
}
RESIZES = {
    "pillow_bicubic": "Pillow bicubic",
    "pillow_lanczos": "Pillow Lanczos",
    "pillow_box": "Pillow box",
    ADM: "halved by box and resized by Pillow bicubic as Dhariwal and Nichol do",
    "none": "not resized",
}


@dataclass(frozen=True)
class Fit:
    """Converts images to uint8 of C,H,W = `channels`, `side`, `side`. Images of the right size are not resized."""

    channels: int
    side: int
    crop: str
    resize: str

    @property
    def words(self) -> str:
        """The value of `Dataset.resizer`, whether or not any image is resized."""
        if (self.crop, self.resize) == ("none", "none"):
            return "none"
        return f"{CROPS[self.crop]}, {RESIZES[self.resize]}, 8 bits"

    def __call__(self, image: Image.Image | np.ndarray, name: str) -> np.ndarray:
        """`image` as (C,H,W) uint8. Raises UserError if the settings do not allow it; `name` is for messages."""
        shape = self.side, self.side, self.channels
        if isinstance(image, np.ndarray):
            if image.shape == shape:
                return image.transpose(2, 0, 1)
            image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else np.ascontiguousarray(image))
        if image.mode.startswith(("I", "F")):
            raise dataset_error(
                f"{name!r} has more than 8 bits per channel (Pillow's mode {image.mode}): convert it to 8 bits"
            )
        try:
            image = over_white(image).convert("RGB" if self.channels == 3 else "L")
        except DAMAGE as error:  # unsupported colour spaces such as CIELAB
            raise unreadable(name, error) from error
        if image.size != (self.side, self.side):
            image = self._resized(image, name)
        return np.asarray(image, dtype=np.uint8).reshape(shape).transpose(2, 0, 1)

    def _resized(self, image: Image.Image, name: str) -> Image.Image:
        width, height = image.size
        if width != height and self.crop == "none":
            raise dataset_error(f"{name!r} is not square ({width}x{height}): set dataset.crop=center, or crop it")
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        if self.resize == "none" and side != self.side:
            choices = "|".join(name for name in RESIZES if name != "none")
            raise dataset_error(
                f"{name!r} is {width}x{height}, but dataset.resolution={self.side}: choose how to resize it "
                f"(dataset.resize={choices}) or set the resolution"
            )
        if self.resize == ADM:
            return self._resized_as_adm(image, name)
        if width != height:  # crop first: Pillow's resize(box=...) would use pixels outside the box
            image = image.crop((left, top, left + side, top + side))
        return image if self.resize == "none" else image.resize((self.side, self.side), FILTERS[self.resize])

    def _resized_as_adm(self, image: Image.Image, name: str) -> Image.Image:
        """Halve by averaging while the result stays large enough, resize the shorter side, crop the centre."""
        while min(image.size) >= 2 * self.side:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = self.side / min(image.size)
        if image.width * image.height * scale**2 > LARGEST_IMAGE:
            raise dataset_error(f"{quoted(name)} is {image.width}x{image.height}: too elongated to be resized by {ADM}")
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - self.side) // 2, (image.height - self.side) // 2
        return image.crop((left, top, left + self.side, top + self.side))
