"""Exponential moving averages of a network's weights."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn

from distillbench.system.dtensors import local_shards

__all__ = ["MovingAverage", "move_towards"]


def power_exponent(sigma_rel: float) -> float:
    """gamma >= 0 of the average whose weights grow as t^gamma, from its relative width (Karras et al. 2024, EDM2).

    sigma_rel is the standard deviation of these weights in t in [0, 1], at most 12^(-1/2) (gamma = 0): sigma_rel^2 =
    (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), arXiv:2312.02696, eq. 123 to 126 and algorithm 2. The update at time t,
    dt after the one before, keeps (1 - dt / t)^(gamma + 1) of the average (eq. 127).
    """
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


@torch.no_grad()
def move_towards(average: nn.Module, network: nn.Module, share: float) -> None:
    """Move the weights of `average` by `share` of the way to those of `network`; buffers are copied."""
    MovingAverage(average, network).move(share)


class MovingAverage:
    """Moves the weights of `average` towards those of `network`; buffers are copied.

    The tensors are collected once, at the first move: collecting them takes as long as a move of a small network.
    """

    def __init__(self, average: nn.Module, network: nn.Module) -> None:
        self.average, self.network = average, network

    @functools.cached_property
    def weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """The weights of `average` and of `network`."""
        return local_shards(self.average.parameters()), local_shards(self.network.parameters())

    @functools.cached_property
    def buffers(self) -> tuple[list[Tensor], list[Tensor]]:
        """The buffers of `average` and of `network`."""
        return list(self.average.buffers()), list(self.network.buffers())

    @torch.no_grad()
    def move(self, share: float) -> None:
        """Move by `share` of the way."""
        mine_all, theirs_all = self.weights
        torch._foreach_lerp_(mine_all, theirs_all, share)
        if self.buffers[0]:
            torch._foreach_copy_(*self.buffers)
