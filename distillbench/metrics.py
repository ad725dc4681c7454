"""The contract of a score: what it is given, what it declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from distillbench.errors import Unavailable
from distillbench.features import FeatureNetwork, ImageSet

__all__ = ["DIRECTIONS", "Metric", "Need", "Samples"]

DIRECTIONS = ("lower", "higher", "none")  # none: a diagnostic, of which neither is better


class Need(StrEnum):
    """What a score cannot do without. Where it is missing the score is empty, with the reason."""

    real = "real"  # statistics of the real images: the dataset's, or of a reference file
    real_images = "real_images"  # the real images themselves
    features = "features"  # every sample's features, not their mean and covariance alone
    same_noise = "same_noise"  # samples that are answers to the noise that the teacher answered
    prompts = "prompts"  # texts that the samples were asked to show


@dataclass(frozen=True)
class Samples:
    """Generated images and what they can be compared with.

    `x_0` and `teacher_x_0`, the teacher's many-step answers to the same noise, are (N,C,H,W) in [-1, 1], clipped.
    `images` and `teacher` are the same two as 8-bit images, rounded once, seen through networks; `real` are the real
    ones. `keeps_noise` is False for samples that are not meant as answers to that noise.
    """

    x_0: Tensor
    teacher_x_0: Tensor
    images: ImageSet
    teacher: ImageSet
    real: ImageSet
    keeps_noise: bool
    labels: Tensor | None = None  # (N,), the classes asked for
    prompts: list[str] | None = None


class Metric(ABC):
    """A score of generated images: one column of the table, named by `name`."""

    name: ClassVar[str]  # the column; says the network, unless the score is defined on one
    unit: ClassVar[str]
    direction: ClassVar[str]  # of DIRECTIONS: which is better
    protocol: ClassVar[str]  # everything that decides the number beside the network, with a version
    network: ClassVar[type[FeatureNetwork] | None] = None
    needs: ClassVar[frozenset[Need]] = frozenset()

    @abstractmethod
    def score(self, samples: Samples) -> float:
        """The score; raise Unavailable(reason) where it has no meaning."""

    @classmethod
    def identity(cls, weights_folder: Path) -> dict[str, Any]:
        """What decides its numbers, as plain values: part of every record's key."""
        seen = {} if cls.network is None else cls.network.identity(weights_folder)
        return {"protocol": cls.protocol, "seen": seen}

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Its declarations, for tables and reports."""
        return {
            "unit": cls.unit,
            "direction": cls.direction,
            "network": cls.network.name if cls.network else "",
            "needs": ", ".join(sorted(cls.needs)),
            "protocol": cls.protocol if cls.network is None else f"{cls.protocol}; {cls.network.protocol}",
        }


def check_needs(metric: type[Metric], samples: Samples) -> None:
    """Raise Unavailable if `samples` lack what `metric` declares to need."""
    if Need.same_noise in metric.needs and not samples.keeps_noise:
        raise Unavailable("these samples add fresh noise, so they are not answers to the teacher's noise")
    if Need.prompts in metric.needs and samples.prompts is None:
        raise Unavailable("the samples were asked for without prompts")
    if Need.real_images in metric.needs and not samples.real.count:
        raise Unavailable("there are no real images to compare with")
