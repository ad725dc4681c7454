"""Embeddings of times and other numbers, which networks add to their features."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

__all__ = [
    "AugmentedNetwork", "GuidanceEmbedding", "PlacedFeatures", "ScalarEmbedding", "TimeEmbedding", "TimeFeatures",
    "TimedNetwork",
]  # fmt: skip


class TimeFeatures(nn.Module):
    """Sines and cosines of `time` at frequencies from 1 to 1000: (B,) -> (B, channels)."""

    frequencies: Tensor

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(1000), channels // 2, device="cpu"))
        # not computed on "meta" where a network is built there: torch imports its compiler for that, two seconds
        self.register_buffer("frequencies", frequencies.to(torch.get_default_device()))

    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeEmbedding(nn.Sequential):
    """Two linear layers on :class:`TimeFeatures`: (B,) -> (B, channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__(TimeFeatures(), nn.Linear(64, channels), nn.SiLU(), nn.Linear(channels, channels))

    def zero_output(self) -> TimeEmbedding:
        """Makes the embedding zero at every time, until it is trained."""
        output = cast(nn.Linear, self[-1])
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        return self


class ScalarEmbedding(TimeEmbedding):
    """Of a number in [low, high], such as a second time or a step index: (B,1,1,1) -> (B, channels).

    It is zero until it is trained. So a network to whose embedding of time it is added starts as it was.
    """

    def __init__(self, channels: int, low: float, high: float) -> None:
        super().__init__(channels)
        self.low, self.high = low, high
        self.zero_output()

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(((value.flatten() - self.low) / (self.high - self.low)).to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        return cast(nn.Linear, self[-1]).weight.dtype


class GuidanceEmbedding(ScalarEmbedding):
    """Of a guidance weight w in [low, high]: (B,1,1,1) -> (B, channels). Zero until it is trained."""


@dataclass(frozen=True)
class PlacedFeatures:
    """Where a network has its features of time, and what it calls them with."""

    owners: Sequence[nn.Module]  # the modules that have them, each its own copy
    name: str  # of the features in each owner
    argument: Callable[[Tensor], Tensor] = torch.positive  # the time itself; from the network's time, (B,) -> (B,)
    logarithmic: bool = False  # they are features of log(argument)


class AugmentedNetwork:
    """A network that can take the labels of augmented images, ``c.augmentation``."""

    augment_dim: int  # how many; 0: none


class TimedNetwork(nn.Module, ABC):
    """A network whose features of time can be replaced."""

    @abstractmethod
    def time_features(self) -> PlacedFeatures:
        """Where its features of time are. Raises UserError where they cannot be replaced."""
