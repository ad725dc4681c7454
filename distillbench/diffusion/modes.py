"""Blocks in which a network is evaluated with constant weights, or without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "frozen_weights"]


@contextmanager
def frozen_weights(network: nn.Module) -> Iterator[None]:
    """In the block the weights of `network` are constants: gradients reach its input only, and dropout is off.

    After it, also after an error, the same weights require gradients as before. train_step must not yield within it.
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """In the block `network` is in evaluation mode. After it every module has its earlier mode.

    Networks of a teacher and of students made from it do not need it: see
    :class:`distillbench.diffusion.denoiser.CountedNetwork`.
    """
    training = [module for module in network.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
