"""The picture of a run's samples, and their form in safetensors files."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROWS = 200  # of the picture
T = TypeVar("T")


def sample_grid(rows: list[tuple[str, Tensor]], columns: int = 16, cell: int = 48) -> Image.Image:
    """A picture with a line for each (label, images (N,C,H,W) uint8); the columns show the same noise."""
    if not rows:
        return Image.new("RGB", (cell, cell), "white")
    font = ImageFont.load_default(size=15)
    more, rows = max(0, len(rows) - MOST_ROWS), rows[:MOST_ROWS]
    label = max(int(font.getlength(text)) for text, _ in rows) + 20
    count = min(columns, min(len(images) for _, images in rows))
    side = max(cell, rows[0][1].shape[-1])
    height = (len(rows) + (more > 0)) * (side + 4) + 4
    picture = Image.new("RGB", (label + count * (side + 4), height), "white")
    draw = ImageDraw.Draw(picture)
    if more:
        draw.text((10, height - side / 2), f"and {more:,} more", fill="black", font=font, anchor="lm")
    for j, (text, images) in enumerate(rows):
        top = 4 + j * (side + 4)
        draw.text((10, top + side / 2), text, fill="black", font=font, anchor="lm")
        for k in range(count):
            image = Image.fromarray(_rgb(images[k]).permute(1, 2, 0).contiguous().numpy().astype("uint8"))
            image = image.resize((side, side), Image.Resampling.NEAREST)
            picture.paste(image, (label + k * (side + 4), top))
    return picture


def _rgb(image: Tensor) -> Tensor:
    """(C,H,W) to (3,H,W): grey is repeated, two channels are red and green, of more than three the first are used."""
    if len(image) == 1:
        return image.expand(3, -1, -1)
    import torch  # imported here: reports need no torch, which takes seconds to import

    return torch.cat([image, torch.zeros_like(image[:1])])[:3]


def stack_shown(shown: list[Tensor]) -> dict[str, Tensor]:
    """Samples of an evaluation's rows as named tensors, ready for safetensors."""
    return {str(index): images.contiguous() for index, images in enumerate(shown)}


def unstack_shown(tensors: dict[str, T]) -> list[T]:
    """The inverse of :func:`stack_shown`, of tensors or of arrays."""
    return [tensors[str(index)] for index in range(len(tensors))]
