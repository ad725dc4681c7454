"""A cheap score of a few hundred samples along training: no feature network, nothing to download.

Images are averaged to 8x8 pixels, and the Fréchet distance between these small images is taken. It says whether a
training moves towards its target, not how good the images look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distillbench.datasets.dataset import Dataset, to_float
from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.diffusion.samplers import ddim, uniform_times, x_at_t_max
from distillbench.evaluation.frechet import GaussianStatistics, frechet_distance
from distillbench.teachers.teacher import Teacher
from distillbench.training.compute import Sampling, sampling
from distillbench.training.method import Method

SIDE = 8  # pixels
TEACHER_STEPS = 16  # of DDIM, for samples of the teacher where there are no real images


@dataclass(frozen=True)
class Small:
    """What is kept of a set of images (N,C,H,W): statistics of its 8x8 pixels, and its spread."""

    statistics: GaussianStatistics
    spread: float  # standard deviation over the images, its mean over pixels

    @staticmethod
    def of(batches: Iterable[Tensor]) -> Small:
        """Of images in batches (b,C,H,W), at least two in all."""
        rows, count = list[Tensor](), 0
        sums = squares = torch.zeros((), dtype=torch.float64)  # over the images, of each pixel
        for images in batches:
            x = images.double()
            side = min(SIDE, x.shape[2]), min(SIDE, x.shape[3])
            rows.append(torch.nn.functional.adaptive_avg_pool2d(x, side).flatten(1).cpu())
            sums, squares, count = sums + x.sum(dim=0).cpu(), squares + x.square().sum(dim=0).cpu(), count + len(x)
        variance = (squares - sums**2 / count) / (count - 1)
        return Small(GaussianStatistics.of(torch.cat(rows)), variance.clamp(min=0).sqrt().mean().item())


class PixelScores:
    """Scores `images` samples, made in batches of `batch`, against as many real images.

    `dataset`: the real images, of the shape in which the method samples; None: they are compared with the teacher's
    samples from the same noise, by 16 steps of DDIM. Real images are preferred, as they cost no evaluations. The noise
    is a stream of its own, not that of the evaluation. Samples are computed with `asked` precision, as in evaluation.
    """

    def __init__(self, dataset: Dataset | None, images: int, batch: int, asked: Sampling, device: str) -> None:
        self.dataset, self.images, self.batch, self.asked, self.device = dataset, images, batch, asked, device
        self.reference = "the teacher's samples" if dataset is None else "real images"
        self._target: Small | None = None  # of the reference

    def evaluations(self, nfe: int) -> int:
        """Network evaluations of a call."""
        return self.images * nfe

    def preparation(self, method: Method) -> int:
        """Network evaluations of the reference, made at the first call."""
        return 0 if self.dataset is not None else self.images * TEACHER_STEPS * method.teacher.conditioning.evaluations

    def __call__(self, method: Method, nfe: int) -> tuple[float | None, float | None]:
        """The Fréchet distance of 8x8 pixels, and the spread over that of the reference; None if not finite."""
        teacher = method.teacher
        with torch.no_grad(), sampling(self.asked, teacher, self.device):
            if self._target is None:
                self._target = Small.of(self._real() if self.dataset is not None else self._of_teacher(teacher))
            seen = Small.of(_clipped(teacher, method.sample(noise, nfe, c)) for noise, c in self._inputs(teacher))
        if not math.isfinite(seen.statistics.variance):
            return None, None
        distance, target = frechet_distance(seen.statistics, self._target.statistics), self._target.spread
        return distance, seen.spread / target if target else 1.0

    def _inputs(self, teacher: Teacher) -> Iterator[tuple[Noise, Condition]]:
        """Noise and condition of each batch. Of more classes than images every k-th one is used."""
        asked = teacher.conditioning.evaluated or range(teacher.conditioning.classes)
        apart = max(1, len(asked) // self.images)
        for part in torch.arange(0, self.images * apart, apart).split(self.batch):
            noise = Noise(stream_key("progress", 0), part.tolist(), teacher.shape, self.device)
            yield noise, teacher.conditioning.of_images(part.tolist(), self.device)

    def _of_teacher(self, teacher: Teacher) -> Iterator[Tensor]:
        times = uniform_times(teacher.schedule, TEACHER_STEPS)
        for noise, c in self._inputs(teacher):
            x_T = x_at_t_max(teacher.schedule, noise(0))
            yield _clipped(teacher, ddim(partial(teacher.denoise, c=c), teacher.schedule, x_T, times))

    def _real(self) -> Iterator[Tensor]:
        """Real images, drawn by a generator of its own: many datasets are sorted by class."""
        assert self.dataset is not None
        drawn = torch.randperm(len(self.dataset), generator=torch.Generator().manual_seed(0))[: self.images]
        for indices in drawn.sort().values.split(self.batch):
            yield to_float(self.dataset.read(indices))


def _clipped(teacher: Teacher, x_0: Tensor) -> Tensor:
    """Images clipped to [-1, 1], infinite ones as not a number. Latents as they are: decoding them is expensive."""
    return x_0.clamp(-1, 1).where(x_0.isfinite(), torch.nan) if teacher.decode is None else x_0
