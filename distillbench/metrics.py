"""Metrics: what a score is given, what it declares, and the Fréchet distance that several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from distillbench.datasets import Dataset, to_uint8


@dataclass(frozen=True)
class Samples:
    """Generated images and what they can be compared with.

    `x_0` and `teacher_x_0`, the teacher's many-step answers to the same noise, are (N,C,H,W) in [-1, 1], clipped.
    `keeps_noise` is False for samples that are not meant as answers to that noise.
    """

    x_0: Tensor
    teacher_x_0: Tensor
    keeps_noise: bool

    @property
    def uint8(self) -> Tensor:
        """The images as they would be written to disk: rounded to 8 bits once."""
        return to_uint8(self.x_0)


class Metric(ABC):
    """A score of generated images: one column of the table, named by `name`."""

    name: ClassVar[str]  # the column
    unit: ClassVar[str]
    direction: ClassVar[str]  # "lower" or "higher" is better
    protocol: ClassVar[str]  # everything that decides the number, with a version; part of every record's key

    def __init__(self, dataset: Dataset, device: str) -> None:
        self.dataset, self.device = dataset, device

    @abstractmethod
    def score(self, samples: Samples) -> float:
        """The score; raise Unavailable(reason) where it has no meaning or something that it needs is missing."""


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean (D,) and covariance (D,D) of features, float64; `root` is the covariance's symmetric square root."""

    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(features: Tensor) -> GaussianStatistics:
        """Statistics of features (N,D); the covariance is divided by N - 1, as in the original FID code."""
        features = features.double()
        return GaussianStatistics(features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1))

    def root(self) -> Tensor:
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics, root_of_a: Tensor | None = None) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2) (Dowson & Landau 1982; Heusel et al. 2017).

    The trace of the root is the sum of the roots of the eigenvalues of a symmetric matrix, so no complex number enters.
    """
    root = a.root() if root_of_a is None else root_of_a
    product = root @ b.covariance @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    trace = a.covariance.trace() + b.covariance.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return ((a.mean - b.mean).square().sum() + trace).item()
