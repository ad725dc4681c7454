"""Distances between images, by the names that they have in settings.

A method calls ``self.distances[NAME](a, b, w)``: the mean over images of w d(a, b), a number.

| symbol | meaning                  | shape                  |
|--------|--------------------------|------------------------|
| a, b   | images that are compared | (B,C,H,W)              |
| w      | weight of each image     | (B,1,1,1), or a number |
| d      | distance of two images   | (B,)                   |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from distillbench.diffusion.losses import mean_square

__all__ = ["DISTANCES", "DISTANCE_NAMES", "pseudo_huber"]

Distance = Callable[..., Tensor]  # (a, b) or (a, b, w) -> the mean of w d(a, b)


def mean_absolute(a: Tensor, b: Tensor, w: Tensor | float = 1.0) -> Tensor:
    """The mean of w |a - b| over images and pixels."""
    return (w * (a - b).abs()).mean() if isinstance(w, Tensor) else w * l1_loss(a, b)


def pseudo_huber(a: Tensor, b: Tensor, w: Tensor | float = 1.0, c: float | None = None) -> Tensor:
    """The mean of w (sqrt(|a - b|^2 + c^2) - c), by default with c = .00054 sqrt(pixels).

    Song & Dhariwal 2023, arXiv:2310.14189. With c = 0 it is the mean of w |a - b|.
    """
    if c == 0:  # of this the gradient at a = b is 0; of the root of a sum it is infinite
        return (w * torch.linalg.vector_norm(a - b, dim=(1, 2, 3), keepdim=True)).mean()
    c = 0.00054 * a[0].numel() ** 0.5 if c is None else c
    return (w * (((a - b).square().sum(dim=(1, 2, 3), keepdim=True) + c**2).sqrt() - c)).mean()


# Distances of pixel values.
DISTANCES: dict[str, Distance] = {
    "l2": mean_square,
    "l1": mean_absolute,
    "pseudo_huber": pseudo_huber,
}


@dataclass(frozen=True)
class LpipsForm:
    """How LPIPS (Zhang et al. 2018, arXiv:1801.03924) is computed: papers differ in it."""

    average_pooling: bool = False  # in place of VGG16's max-pooling
    side: int = 224  # pixels that images of a width below 256 are resized to; 0: they are not resized

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what its network gets."""
        return (self.side, self.side) if self.side and width < 256 else (height, width)


# Distances of features of a network, which only the harness has: in ``Method.distances``.
LPIPS: dict[str, LpipsForm] = {
    "lpips": LpipsForm(),  # openai/consistency_models_cifar10
    "lpips_avgpool": LpipsForm(average_pooling=True),  # piq's, in openai/consistency_models and Kim-Dongjun/ctm-cifar10
    "lpips_unresized": LpipsForm(side=0),  # gnobitab/RectifiedFlow
}

DISTANCE_NAMES = (*DISTANCES, *LPIPS)  # all that a method may ask for
