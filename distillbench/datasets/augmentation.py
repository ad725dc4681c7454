"""Random augmentation of training images: horizontal flips, and EDM's transformations, which have labels.

Karras et al. 2022 (arXiv:2206.00364, appendix F.2) transform each image at random and give the network 9 labels that
say how. With labels of zero it then generates images like those that were not transformed. Position q of the new image
shows position p of the old one, both in pixels from the centre, x to the right and y downwards:

    p = A (q - b),   A = R(theta) R(-r) diag(1/a, a) R(r) / s,   after flips

| symbol    | meaning                                                      | drawn                                    |
|-----------|--------------------------------------------------------------|------------------------------------------|
| x, y flip | left to right, upside down                                   | each 1/2                                 |
| s         | 2^(u/5), scale                                               | u ~ N(0, 1)                              |
| theta     | angle of the rotation                                        | uniform in [-pi, pi)                     |
| a, r      | 2^(v/5), stretching along an axis, and the angle of the axis | v ~ N(0, 1); r uniform, or 0 (each 1/2)  |
| b         | (m W, n H) / 8, translation                                  | m, n ~ N(0, 1)                           |

Each is applied with the given probability (A_prob), independently; only the x flip is always drawn. The new image is
computed as by Karras et al. 2020 (arXiv:2006.06676, appendix B.1): the old one, continued by one reflection to each
side and by 0 beyond, is upsampled by 2 with a low-pass filter, read at p by bilinear interpolation, and downsampled
with the same filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, conv_transpose2d, grid_sample, pad

from distillbench.errors import UserError, unknown
from distillbench.options import option, require_between
from distillbench.system.precision import tf32
from distillbench.system.transfers import to_device

TRANSFORMS = ("xflip", "yflip", "scale", "rotate", "aniso", "translate")
SCALE_STD = ANISO_STD = 0.2  # of the logarithms to base 2
TRANSLATE_STD = 0.125  # of the width and the height
# The low-pass filter of the wavelet sym6 (Daubechies 1992). It is orthonormal to its own shifts by 2, so that up- and
# downsampling with it are the identity.
FILTER = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
REACH = 3  # pixels around the new image that its downsampling reads
VALUES_AT_ONCE = 2**26  # of upsampled images, 256 MiB in float32


@dataclass
class AugmentConfig:
    """Random augmentation of the real images of training, for every method alike. Scores use images as they are."""

    flip: bool = option(False, "flip half of the real images of training left to right")
    probability: float = option(
        0.0, "of each of EDM's transformations of real images, for networks with labels for them; 0: none"
    )
    transforms: list[str] = option(list(TRANSFORMS), f"which of EDM's transformations: {', '.join(TRANSFORMS)}")

    def __post_init__(self) -> None:
        require_between(self, 0, 1, "probability")
        for name in self.transforms:
            if name not in TRANSFORMS:
                raise unknown("transformation", name, TRANSFORMS)
        if self.probability and not self.transforms:
            raise UserError(
                f"transforms must name some of {', '.join(TRANSFORMS)} with probability={self.probability:g}, got []; "
                "without transformations set probability=0"
            )

    def plain(self) -> dict[str, Any]:
        """The settings that change images, as plain values; {} if none does."""
        chosen = [name for name in TRANSFORMS if name in self.transforms]
        plain: dict[str, Any] = {"flip": True} if self.flip else {}
        if self.probability:
            plain["probability"] = self.probability
            plain |= {"transforms": chosen} if chosen != list(TRANSFORMS) else {}
        return plain

    @property
    def transforms_images(self) -> bool:
        """Whether EDM's transformations are used."""
        return "probability" in self.plain()


@dataclass(frozen=True)
class Transformations:
    """Random transformations, one for each image of a batch.

    `rows` (B,8): x flip and y flip (0 or 1), u, theta, v, r, m, n, of which those that are not applied are 0.
    """

    rows: Tensor

    @property
    def labels(self) -> Tensor:
        """What the network is told, (B,9): x flip, y flip, u, cos theta - 1, sin theta, v cos r, v sin r, m, n."""
        x_flip, y_flip, u, theta, v, r, m, n = self.rows.unbind(dim=1)
        return torch.stack([x_flip, y_flip, u, theta.cos() - 1, theta.sin(), v * r.cos(), v * r.sin(), m, n], dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        """The transformed images of x, (B,C,H,W). In full float32: positions must not be rounded to TF32's 10 bits."""
        x = flipped(x, self.rows[:, 0] > 0)
        x = torch.where((self.rows[:, 1] > 0).view(-1, 1, 1, 1), x.flip(2), x)
        at_once = max(1, VALUES_AT_ONCE // (36 * x[0].numel()))
        with tf32(False, str(x.device)):
            A, b = self._positions(x)
            parts = zip(x.split(at_once), A.split(at_once), b.split(at_once), strict=True)
            return torch.cat([_resampled(*part) for part in parts])

    def _positions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A (B,2,2) and b (B,2)."""
        _, _, u, theta, v, r, m, n = self.rows.to(x.dtype).unbind(dim=1)
        a = (ANISO_STD * v).exp2()
        stretching = torch.diag_embed(torch.stack([1 / a, a], dim=1))
        A = _rotation(theta) @ _rotation(-r) @ stretching @ _rotation(r) / (SCALE_STD * u).exp2().view(-1, 1, 1)
        return A, TRANSLATE_STD * torch.stack([m * x.shape[3], n * x.shape[2]], dim=1)


def draw_transformations(
    size: int, generator: torch.Generator, probability: float, transforms: Sequence[str] = TRANSFORMS
) -> Tensor:
    """`rows` of :class:`Transformations` for `size` images, on the generator's device, in the default dtype."""
    about: dict[str, Any] = {"generator": generator, "device": generator.device, "dtype": torch.get_default_dtype()}
    limits = [probability * (name in transforms) for name in TRANSFORMS]
    limits[0] = float("xflip" in transforms)
    luck = torch.rand(size, 6, **about).unbind(dim=1)
    x_flip, y_flip, scale, rotate, aniso, translate = (each < limit for each, limit in zip(luck, limits, strict=True))
    coins = torch.rand(size, 3, **about) < 0.5
    u, v, m, n = torch.randn(size, 4, **about).unbind(dim=1)
    theta, r = ((2 * torch.rand(size, 2, **about) - 1) * math.pi).unbind(dim=1)
    values = torch.stack([*coins[:, :2].to(u).unbind(dim=1), u, theta, v, r, m, n], dim=1)
    used = [x_flip, y_flip, scale, rotate, aniso, aniso & coins[:, 2], translate, translate]
    return values * torch.stack(used, dim=1)


def flipped(x: Tensor, which: Tensor) -> Tensor:
    """x (B,C,H,W) with the images that `which` (B,) names flipped left to right."""
    return torch.where(which.view(-1, 1, 1, 1), x.flip(3), x)


def _rotation(angle: Tensor) -> Tensor:
    """R, (B,2,2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def _resampled(x: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """The images x (B,C,H,W) at p = A (q - b) of every pixel q.

    The upsampled image has its pixels at p = (p' + 1/2) / 2 for p' in its own pixels from its own centre; q likewise.
    """
    batch, channels, height, width = x.shape
    x = _upsampled(pad(x, [width - 1, width - 1, height - 1, height - 1], mode="reflect"))
    shift = A @ (0.5 - 2 * b).unsqueeze(2) - 0.5
    half_new = width + 2 * REACH, height + 2 * REACH  # of upsampled widths and heights, in which theta is
    columns = [A[:, :, 0] * half_new[0], A[:, :, 1] * half_new[1], shift[:, :, 0]]
    halves = 3 * width - 2, 3 * height - 2
    theta = torch.stack([torch.stack([c[:, k] / halves[k] for c in columns], dim=1) for k in range(2)], dim=1)
    shape = [batch, channels, 2 * (height + 2 * REACH), 2 * (width + 2 * REACH)]
    x = grid_sample(x, affine_grid(theta, shape, align_corners=False), align_corners=False)
    return _downsampled(x)[:, :, REACH:-REACH, REACH:-REACH]


def _upsampled(x: Tensor) -> Tensor:
    """(B,C,H,W) to (B,C,2H,2W): row i is the sum over k of filter[i + 5 - 2k] row k of x."""
    taps = to_device(torch.tensor(FILTER, dtype=x.dtype), x.device)
    rows = conv_transpose2d(x.flatten(0, 1).unsqueeze(1), taps.view(1, 1, -1, 1), stride=(2, 1), padding=(5, 0))
    both = conv_transpose2d(rows, taps.view(1, 1, 1, -1), stride=(1, 2), padding=(0, 5))
    return both.view(*x.shape[:2], *both.shape[2:])


def _downsampled(x: Tensor) -> Tensor:
    """(B,C,2H,2W) to (B,C,H,W): row k is the sum over i of filter[i + 5 - 2k] row i of x."""
    taps = to_device(torch.tensor(FILTER, dtype=x.dtype), x.device)
    rows = conv2d(x.flatten(0, 1).unsqueeze(1), taps.view(1, 1, -1, 1), stride=(2, 1), padding=(5, 0))
    both = conv2d(rows, taps.view(1, 1, 1, -1), stride=(1, 2), padding=(0, 5))
    return both.view(*x.shape[:2], *both.shape[2:])
