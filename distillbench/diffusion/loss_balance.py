"""Weights of a loss that adapt to another, by their gradients in one layer (VQGAN; CTM).

Gradients are taken of scaled losses, and divided by the scale: float16 would round those of a mean over many values to
zero. Scales are powers of two, which change no digit of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gradient_ratio", "with_gradient_of"]

ADDED, LARGEST = 1e-4, 1e4  # to the norm of the denominator; of the ratio
SCALE = 2.0**10


def gradient_ratio(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """|da/dweight| / (|db/dweight| + 1e-4), at most 1e4: the factor with which b gets the gradient of a in `weight`.

    `a` and `b` are losses, (); so is the ratio, without gradient. Their graphs are kept. Source: Esser et al. 2021,
    "Taming Transformers", arXiv:2012.09841; the constants are those of CTM's code. Each rank, and each part of
    a step (microbatch), has the ratio of its own images.
    """
    of_a, of_b = (torch.autograd.grad(SCALE * loss, weight, retain_graph=True)[0] / SCALE for loss in (a, b))
    return (of_a.norm() / (of_b.norm() + ADDED)).clamp(max=LARGEST)


def with_gradient_of(loss: Tensor, cut: Tensor, x: Tensor) -> Tensor:
    """`loss`, which was computed from ``cut = x.detach().requires_grad_()``, as a loss of x, ().

    The gradient in `cut` is computed once, here. So several gradients of the result in weights before x, such as one
    for :func:`gradient_ratio` and that of a training step, need one backward pass through what follows x. If `cut` is x
    itself, the result is `loss`.
    """
    if cut is x:
        return loss
    scale = 2.0 ** cut.numel().bit_length()
    (gradient,) = torch.autograd.grad(scale * loss, cut)
    return loss.detach() + ((x - cut.detach()) * (gradient / scale)).sum()
