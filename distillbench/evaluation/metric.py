"""The contract of a metric: what it is given, what it declares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from distillbench.errors import Unavailable
from distillbench.evaluation.features import FeatureNetwork, ImageSet
from distillbench.evaluation.stored_images import images_at_once

__all__ = ["DIRECTIONS", "Metric", "Need", "Samples"]

DIRECTIONS = ("lower", "higher", "none")  # none: a diagnostic; neither is better


class Need(StrEnum):
    """What a metric requires. Without it the score is empty, with the reason."""

    real = "real"  # statistics of real images: the dataset's, or a reference file's
    real_images = "real_images"  # the real images themselves
    features = "features"  # the features of every sample, not only their mean and covariance
    same_noise = "same_noise"  # samples computed from the same noise as the teacher's
    prompts = "prompts"  # the texts that the samples are conditioned on


@dataclass(frozen=True)
class Samples:
    """Generated images and what they are compared with.

    `x_0` and `teacher_x_0`, the teacher's many-step samples for the same noise, are (N,C,H,W) in [-1, 1], clipped.
    In a run they are memory-mapped files, which may be larger than the memory: :meth:`batches` reads a part at a time.
    `images` and `teacher` are the same two as sets of 8-bit images, rounded once; `real` are the real images.
    `teacher_x_0` and `teacher` may be given as functions without arguments, which are called when they are first read:
    a teacher need not be sampled for metrics that do not compare with it.
    `keeps_noise` is False if the samples are not meant to match the teacher's for the same noise.
    """

    x_0: Tensor
    teacher_x_0: Tensor
    images: ImageSet
    teacher: ImageSet
    real: ImageSet
    keeps_noise: bool
    labels: Tensor | None = None  # (N,), the classes that the samples are conditioned on
    prompts: list[str] | None = None
    read: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None  # reads `batches` without the whole tensors

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(x_0, teacher_x_0) in order, a limited number at a time, whatever the number and size of the images."""
        size = images_at_once(tuple(self.x_0.shape[1:]))
        yield from self.read() if self.read else zip(self.x_0.split(size), self.teacher_x_0.split(size), strict=True)


class _Made:
    """A field that may be given as a function, which is called when the field is first read."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, samples: Any, owner: type) -> Any:
        if samples is None:
            return self
        value = vars(samples)[self.name]
        if callable(value):
            value = vars(samples)[self.name] = value()
        return value

    def __set__(self, samples: Any, value: Any) -> None:
        vars(samples)[self.name] = value


for _name in ("teacher_x_0", "teacher"):  # not in the class: there they would be defaults of its fields
    setattr(Samples, _name, _Made(_name))


class Metric(ABC):
    """A score of generated images: one column of the table, called `name`."""

    name: ClassVar[str]  # the column; contains the network's name unless the metric is defined with one network
    label: ClassVar[str] = ""  # the name in tables, such as "FD ({network})"; empty: the name without underscores
    title: ClassVar[str] = ""  # the same in full, such as "Fréchet distance of {network} features"; empty: the label
    unit: ClassVar[str]
    direction: ClassVar[str]  # one of DIRECTIONS: which is better
    protocol: ClassVar[str]  # everything but the network that determines the score, with a version
    network: ClassVar[type[FeatureNetwork] | None] = None
    needs: ClassVar[frozenset[Need]] = frozenset()
    influence_needs: ClassVar[frozenset[Need]] = frozenset()  # of `influence`, besides `needs`
    fewest_real: ClassVar[int] = 2  # of the real images whose features it needs

    @abstractmethod
    def score(self, samples: Samples) -> float:
        """The score; raises Unavailable(reason) if it is undefined."""

    def influence(self, samples: Samples) -> Tensor | None:
        """(N,) how much each image moves the score, with mean 0; None if that is not known.

        The derivative of the score by the weight of the image, times N: of a mean over images, the image's value minus
        the mean. Its variance over N is the variance of the score over noise. Used to tell whether methods differ.
        """
        return None

    @classmethod
    def identity(cls, weights_folder: Path) -> dict[str, Any]:
        """All that determines its scores, as plain values: part of every record's key."""
        network = {} if cls.network is None else cls.network.identity(weights_folder)
        return {"protocol": cls.protocol, "seen": network}

    @classmethod
    def describe(cls) -> dict[str, str]:
        """Its declarations, for tables and reports."""
        short, full = ("", "") if cls.network is None else cls.network.names()
        label = cls.label.replace("{network}", short) or cls.name.replace("_", " ")
        return {
            "label": label,
            "title": cls.title.replace("{network}", full) or label,
            "unit": cls.unit,
            "direction": cls.direction,
            "network": cls.network.name if cls.network else "",
            "needs": ", ".join(sorted(cls.needs)),
            "protocol": cls.protocol if cls.network is None else f"{cls.protocol}; {cls.network.protocol}",
        }


def check_needs(metric: type[Metric], samples: Samples) -> None:
    """Raise Unavailable if `samples` lack anything that `metric` needs."""
    if Need.same_noise in metric.needs and not samples.keeps_noise:
        raise Unavailable("sampling adds fresh noise, so these samples do not match the teacher's for the same noise")
    if Need.prompts in metric.needs and samples.prompts is None:
        raise Unavailable("the samples have no prompts")
    if Need.real_images in metric.needs and not samples.real.count:
        raise Unavailable("there are no real images to compare with")
