"""Losses that methods share."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import mse_loss

__all__ = ["mean_square"]


def mean_square(a: Tensor, b: Tensor, w: Tensor | float = 1.0) -> Tensor:
    """The mean of w (a - b)^2 over images and pixels: a and b (B,C,H,W); w at least 0, (B,1,1,1) or a number.

    The weight's root goes into a and b, so that the rest is one operation forward and one backward.
    """
    if isinstance(w, Tensor):
        root = w.sqrt()
        return mse_loss(root * a, root * b)
    return mse_loss(a, b) if w == 1 else w * mse_loss(a, b)
