"""Scores on pixels, without a network: distance to the teacher's samples, spread, distance to real images.

All read the samples in batches: 50,000 of 256x256 do not fit into memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distillbench import Metric, Samples, Unavailable, hookimpl
from distillbench.datasets.dataset import to_float
from distillbench.evaluation.feature_metrics import device_for, nearest
from distillbench.evaluation.features import in_blocks
from distillbench.evaluation.metric import Need
from distillbench.system.transfers import to_device

MOST_VALUES = 2**27  # float64 values in memory at a time, of class means or of samples: 1 GiB


class TeacherRmse(Metric):
    """Root mean square difference to the teacher's many-step samples from the same noise, clipped to [-1, 1]."""

    name = "teacher_rmse"
    unit = "pixel values in [-1, 1]"
    direction = "lower"
    protocol = "teacher_rmse/1: root mean square over images and pixels, both clipped to [-1, 1], not quantised"
    needs = frozenset({Need.same_noise})

    def score(self, samples: Samples) -> float:
        total = sum((x_0 - teacher).double().square().sum().item() for x_0, teacher in samples.batches())
        return (total / samples.x_0.numel()) ** 0.5

    def influence(self, samples: Samples) -> Tensor:
        squares = torch.cat([(x_0 - of).double().square().flatten(1).mean(dim=1) for x_0, of in samples.batches()])
        mean = squares.mean()
        return (squares - mean) / (2 * mean.sqrt()) if mean else squares


class Spread(Metric):
    """Standard deviation of the samples' pixels relative to the teacher's samples: 1 means equally diverse.

    In a conditional run it is computed within each class.
    """

    name = "spread"
    unit = "ratio to the teacher's"
    direction = "none"
    protocol = "spread/1: root of the summed pixel variances within each class, over that of the teacher's answers"

    def score(self, samples: Samples) -> float:
        if not len(samples.teacher_x_0):
            raise Unavailable("there are no samples of a teacher")
        size = samples.x_0[0].numel()
        labels = torch.zeros(len(samples.x_0)) if samples.labels is None else samples.labels
        _, of_image, members = labels.unique(return_inverse=True, return_counts=True)
        several = (members > 1).nonzero().flatten()  # the variance within a class of one image is 0
        ours = teachers = 0.0
        for classes in several.split(max(1, MOST_VALUES // (2 * size))):
            row = torch.full((len(members),), len(classes)).scatter(0, classes, torch.arange(len(classes)))
            within = _within(samples, row[of_image], members[classes])
            ours, teachers = ours + within[0], teachers + within[1]
        if teachers == 0:
            raise Unavailable("the teacher's samples are all equal")
        return (ours / teachers) ** 0.5


def _within(samples: Samples, row: Tensor, members: Tensor) -> tuple[float, float]:
    """Sums of squared distances to the mean of the class, float64: of the samples and of the teacher's.

    Image i is of class row[i]; the classes 0, ..., K - 1 are counted, which have `members` (K,) images.
    """
    K, size = len(members), samples.x_0[0].numel()

    def sides() -> Iterator[tuple[int, Tensor, Tensor]]:
        """Which side, classes (b,), and the values (b,D) of counted images."""
        first = 0
        for pair in samples.batches():
            part = row[first : first + len(pair[0])]
            for side, images in enumerate(pair):
                yield side, part[part < K], images[part < K].flatten(1).double()
            first += len(part)

    means = torch.zeros(2, K, size, dtype=torch.float64)
    for side, classes, x in sides():
        means[side].index_add_(0, classes, x)
    means /= members[:, None]
    sums = [0.0, 0.0]
    for side, classes, x in sides():
        sums[side] += x.sub_(means[side][classes]).square().sum().item()
    return sums[0], sums[1]


class NearestRealRmse(Metric):
    """Median root mean square difference between a sample and its nearest real image. Near 0, samples are copies."""

    name = "nearest_real_rmse"
    unit = "pixel values in [-1, 1]"
    direction = "none"
    protocol = "nearest_real_rmse/2: float64, median over samples, all real images, both clipped to [-1, 1]"
    needs = frozenset({Need.real_images})

    def score(self, samples: Samples) -> float:
        if tuple(samples.x_0.shape[1:]) != samples.real.shape:
            raise Unavailable("samples and real images have different shapes")
        size = samples.x_0[0].numel()
        device = device_for(samples.real, min(samples.x_0.numel(), MOST_VALUES))
        nearest_of_all = []
        for block in in_blocks((x_0 for x_0, _ in samples.batches()), max(1, MOST_VALUES // size)):
            ours = to_device(block, device).flatten(1).double()
            best = torch.full((len(ours),), torch.inf, dtype=torch.float64, device=device)
            for batch in samples.real.read():  # again for each block
                real = to_float(to_device(batch, device)).flatten(1).double()
                best = torch.minimum(best, nearest(ours, real))
            nearest_of_all.append(best)
        return (torch.cat(nearest_of_all).median() / size**0.5).item()


@hookimpl(api=2)
def register_metrics(register) -> None:
    register(TeacherRmse)
    register(Spread)
    register(NearestRealRmse)
