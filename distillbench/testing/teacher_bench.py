"""What families of teachers are checked on: a dataset, with or without classes, and images at chosen noise levels.

| symbol       | meaning                          | shape             |
|--------------|----------------------------------|-------------------|
| x_0          | real images, or their latents    | (B,C,H,W)         |
| x_t          | alpha x_0 + sigma eps            | (B,C,H,W)         |
| t            | time                             | (B,1,1,1) float64 |
| tau          | noise level sigma / alpha        | (B,1,1,1) float64 |
| c            | condition: classes               | of a batch        |
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distillbench.datasets.dataset import Dataset, DatasetConfig, to_float
from distillbench.diffusion.conditioning import Condition, Conditioning
from distillbench.diffusion.distributions import GaussianMixture
from distillbench.diffusion.samplers import time_like
from distillbench.diffusion.schedules import NoiseSchedule
from distillbench.storage.files import key_of
from distillbench.system.progress import Progress
from distillbench.teachers.teacher import Teacher, TeacherConfig, TeacherSource
from distillbench.testing.checks import NotApplicable

MEAN_IMAGES = 2048  # images over which the mean image is computed
IMAGES = 128  # that are noised and denoised
FEW = 4  # images in checks that need few


class TinyImages(Dataset):
    """Draws of a known mixture of three Gaussians around three patterns, 1x8x8: the default dataset of the checks."""

    name, licence = "tiny_images", "none needed: drawn from a formula"
    Config = DatasetConfig
    shape, classes = (1, 8, 8), 3

    def __init__(self, config: DatasetConfig) -> None:
        wave = torch.linspace(0, math.pi, 8, dtype=torch.float64).cos() * 0.5
        means = torch.stack([wave.expand(8, 8), wave.expand(8, 8).T, wave.outer(wave) * -2])[:, None]
        weights = torch.tensor([0.3, 0.45, 0.25], dtype=torch.float64)
        self.distribution = GaussianMixture(weights, means, torch.full((3, 1, 1, 1), 0.12, dtype=torch.float64))
        self.images, self.components = self.distribution.draw(MEAN_IMAGES, torch.Generator().manual_seed(0))
        self.sha256 = key_of([self.distribution.plain(), MEAN_IMAGES])

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def labels(self, indices: Tensor) -> Tensor:
        return self.components[indices]


@dataclass(frozen=True)
class TeacherBench:
    """A family of teachers with its settings, a dataset, and whether the teacher is to be conditional."""

    label: str
    cls: type[TeacherSource]
    given: TeacherConfig | None
    dataset: Dataset
    conditioning: Conditioning
    cache: Path

    @property
    def conditional(self) -> bool:
        return self.conditioning.classes > 0

    def config(self) -> TeacherConfig:
        return self.cls.Config() if self.given is None else copy.deepcopy(self.given)

    def source(self) -> TeacherSource:
        return self.cls(self.config(), self.dataset, self.cache, "cpu", self.conditioning)

    def load(self) -> Teacher:
        """The teacher as the harness loads it."""
        return self.source().load(Progress(None)).conditioned(self.conditioning)

    @functools.cached_property
    def teacher(self) -> Teacher:
        """One object for all checks."""
        return self.load()

    @functools.cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """Real images, or their latents, and their classes (0 if the teacher is unconditional)."""
        count = len(self.dataset)
        if not count or not self.source().fits_data:
            raise NotApplicable("there are no real images of the kind that it denoises")
        i = torch.linspace(0, count - 1, min(MEAN_IMAGES, count), dtype=torch.float64).round().long()
        x_0 = to_float(self.dataset.read(i))
        labels = self.dataset.labels(i) if self.conditional else torch.zeros_like(i)
        if self.teacher.to_latents is None:
            return x_0, labels
        with torch.no_grad():
            return self.teacher.to_latents(x_0[:IMAGES]), labels[:IMAGES]

    def noised(self, tau: float | None = None, t: float | None = None, count: int = IMAGES) -> Noised:
        """Real images at noise level `tau`, or at time `t`."""
        schedule, (x_0, labels) = self.teacher.schedule, self.data
        order = torch.randperm(len(x_0), generator=torch.Generator().manual_seed(0))[:count]
        x_0, labels = x_0[order], labels[order]
        return Noised.of(schedule, x_0, time_of(schedule, tau) if t is None else t, self.condition(labels))

    def random_images(self, teacher: Teacher, t: float, count: int = FEW) -> Noised:
        """Uniform random images at time `t`."""
        x_0 = torch.rand(count, *teacher.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
        return Noised.of(teacher.schedule, x_0, t, teacher.conditioning.of_images(range(count), "cpu"))

    def condition(self, labels: Tensor) -> Condition:
        """The condition for the classes `labels` (B,), as texts if the teacher reads texts."""
        return self.teacher.conditioning.draw(len(labels), torch.Generator().manual_seed(4), "cpu", labels)


@dataclass(frozen=True)
class Noised:
    """x_t and what it was computed from."""

    x_0: Tensor
    x_t: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    c: Condition

    @classmethod
    def of(cls, schedule: NoiseSchedule, x_0: Tensor, t: float, c: Condition) -> Noised:
        times = time_like(x_0, t)
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2))
        return cls(x_0, alpha * x_0 + sigma * eps, times, alpha, sigma, c)

    @property
    def tau(self) -> float:
        return (self.sigma / self.alpha).max().item()

    def denoised(self, teacher: Teacher, rows: slice = slice(None), c: Condition | None = None) -> Tensor:
        """f(x_t, t, c) of the images `rows`, without gradient."""
        with torch.no_grad():
            return teacher.denoise(self.x_t[rows], self.t[rows], (c or self.c)[rows])


def time_of(schedule: NoiseSchedule, tau: float | None) -> float:
    """The time at which sigma / alpha is `tau` (None: 1)."""
    return schedule.t_of_lam(torch.tensor(math.log(tau or 1.0), dtype=torch.float64)).item()


def moments(bench: TeacherBench) -> tuple[Tensor, float]:
    """The mean image of the data, and the standard deviation about it."""
    x_0, _ = bench.data
    mean = x_0.mean(dim=0)
    return mean, (x_0 - mean).square().mean().sqrt().item()
