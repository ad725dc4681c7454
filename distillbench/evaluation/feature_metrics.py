"""Metrics of features, for any feature network: a plugin names the network and the column.

    class FdMyNetwork(FrechetDistance):
        name, network = "fd_my_network", MyNetwork

Distances and kernels are computed in float64, on the device of the feature networks if the features fit there. A
squared distance is a difference of squared norms; float32 loses it if the features' mean is large beside their spread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from distillbench.errors import Unavailable
from distillbench.evaluation.features import FeatureNetwork, ImageSet
from distillbench.evaluation.frechet import GaussianStatistics, frechet_distance, frechet_influence
from distillbench.evaluation.metric import Metric, Need, Samples
from distillbench.system.transfers import fits_on, to_device

__all__ = [
    "Coverage", "Density", "FeatureDistanceToTeacher", "FeatureMetric", "FeatureSpread", "FrechetDistance",
    "FrechetDistanceExtrapolated", "FrechetDistanceToTeacher", "KernelDistance", "NearestReal", "Precision",
    "Recall", "density_and_coverage", "nearest", "precision_and_recall", "spread_ratio",
]  # fmt: skip

ROWS = 1000  # at most, of a distance matrix at a time
MOST_DISTANCES = 2**26  # at most, at a time: 512 MiB
SEED = 2020  # of random subsets; torch-fidelity's default


class FeatureMetric(Metric):
    """A metric of the features of `network`."""

    network: ClassVar[type[FeatureNetwork]]


class FrechetDistance(FeatureMetric):
    """Squared Fréchet distance between Gaussians fitted to the features of all real images and of the samples.

    Biased upwards for few samples: compare it only at equal numbers of images.
    """

    label = "FD ({network})"
    title = "Fréchet distance of {network} features"
    unit = "squared feature distance"
    direction = "lower"
    protocol = "frechet/2: covariances over n - 1, float64, all real images"
    needs = frozenset({Need.real})
    influence_needs = frozenset({Need.features})

    def score(self, samples: Samples) -> float:
        return frechet_distance(samples.real.statistics(self.network), samples.images.statistics(self.network))

    def influence(self, samples: Samples) -> Tensor:
        return frechet_influence(samples.images.features(self.network), samples.real.statistics(self.network))


class FrechetDistanceToTeacher(FeatureMetric):
    """Squared Fréchet distance to the teacher's many-step samples for the same noise: 0 for a perfect student."""

    label = "FD to teacher ({network})"
    title = "Fréchet distance of {network} features to the teacher's samples"
    unit = "squared feature distance"
    direction = "lower"
    protocol = "frechet_to_teacher/1: covariances over n - 1, float64, the same noise on both sides"
    influence_needs = frozenset({Need.features})

    def score(self, samples: Samples) -> float:
        return frechet_distance(samples.teacher.statistics(self.network), samples.images.statistics(self.network))

    def influence(self, samples: Samples) -> Tensor:
        """Of the noise: other noise changes both sides."""
        sides = (samples.images, samples.teacher), (samples.teacher, samples.images)
        of = [frechet_influence(a.features(self.network), b.statistics(self.network)) for a, b in sides]
        return of[0] + of[1]


class FrechetDistanceExtrapolated(FeatureMetric):
    """The Fréchet distance extrapolated to infinitely many samples (Chong & Forsyth 2020, arXiv:1911.07023).

    The bias falls like 1/n, so a line in 1/n is fitted to the distances of subsets and evaluated at 0. That holds if n
    is a few times the number D of features: with subsets of 2 D, a tenth of the bias remains; of D, a third. The bias
    that comes from the finite number of real images remains.
    """

    label = "FD∞ ({network})"
    title = "Fréchet distance of {network} features, extrapolated to infinitely many samples"
    unit = "squared feature distance"
    direction = "lower"
    protocol = f"frechet_extrapolated/1: 8 subsets of n/2 to n >= 4 D samples, evenly spaced in n, seed {SEED}"
    needs = frozenset({Need.real, Need.features})
    subsets, smallest, fewest = 8, 0.5, 2  # the smallest subset, relative to n; its least size, relative to D

    def score(self, samples: Samples) -> float:
        features, real = samples.images.features(self.network), samples.real.statistics(self.network)
        n, width = features.shape
        if self.smallest * n < self.fewest * width:
            raise Unavailable(f"the extrapolation needs {self.fewest * width / self.smallest:.0f} samples, got {n}")
        generator, features = torch.Generator().manual_seed(SEED), features.to(real.mean.device)
        sizes = torch.linspace(self.smallest * n, n, self.subsets).round().long().tolist()
        distances = []
        for size in sizes:
            chosen = torch.randperm(n, generator=generator)[:size].to(features.device)
            distances.append(frechet_distance(real, GaussianStatistics.of(features[chosen])))
        x, y = 1 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64)
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        return (y.mean() - slope * x.mean()).item()


class KernelDistance(FeatureMetric):
    """Squared maximum mean discrepancy, kernel (f.g / D + 1)^3, unbiased (Bińkowski et al. 2018, arXiv:1801.01401)."""

    label = "KD ({network})"
    title = "kernel distance of {network} features"
    unit = "squared kernel distance"
    direction = "lower"
    protocol = f"kernel/2: float64, mean over 100 subsets of 1000, torch-fidelity's, seed {SEED}"
    needs = frozenset({Need.real_images, Need.features})
    subsets, subset = 100, 1000
    fewest_real = subset

    def score(self, samples: Samples) -> float:
        ours, real = _float64_features(samples, self.network)  # first: missing weights are the more helpful reason
        few = min(len(ours), len(real))
        if few < self.subset:
            raise Unavailable(f"a kernel distance needs {self.subset} images for a subset, got {few}")
        random, distances = np.random.RandomState(SEED), []
        for _ in range(self.subsets):
            x, y = (features[_drawn(random, len(features), self.subset, features.device)] for features in (ours, real))
            distances.append(_squared_mmd(x, y))
        return torch.stack(distances).mean().item()

    def influence(self, samples: Samples) -> Tensor:
        """Of the discrepancy of all images: its mean over subsets has nearly the same."""
        ours, real = _float64_features(samples, self.network)
        n, itself = len(ours), (ours.square().mean(dim=1) + 1) ** 3
        among = torch.cat([_mean_kernel(part, ours) for part in ours.split(ROWS)]) * n - itself
        across = torch.cat([_mean_kernel(part, real) for part in ours.split(ROWS)])
        result = 2 * (among / (n - 1) - across)
        return result - result.mean()


class Precision(FeatureMetric):
    """Share of samples within the ball of a real image up to its third neighbour (Kynkäänniemi et al. 2019).

    arXiv:1904.06991 uses VGG-16; values with another network are not comparable.
    """

    label = "precision ({network})"
    title = "precision by {network} features"
    unit = "share"
    direction = "higher"
    protocol = "precision_recall/2: float64, k = 3, balls closed"
    needs = frozenset({Need.real_images, Need.features})
    fewest_real = 4  # a third neighbour

    def score(self, samples: Samples) -> float:
        return precision_and_recall(samples, self.network)[0]

    def influence(self, samples: Samples) -> Tensor:
        ours, real = _float64_features(samples, self.network)
        inside = _inside(ours, real, _real_radii(samples, self.network, real, 3)).double()
        return inside - inside.mean()


class Recall(FeatureMetric):
    """Share of real images within the ball of a sample up to its third neighbour (Kynkäänniemi et al. 2019)."""

    label = "recall ({network})"
    title = "recall by {network} features"
    unit = "share"
    direction = "higher"
    protocol = Precision.protocol
    needs = Precision.needs
    fewest_real = Precision.fewest_real

    def score(self, samples: Samples) -> float:
        return precision_and_recall(samples, self.network)[1]


class Density(FeatureMetric):
    """Mean number of balls of real images (up to neighbour 5) that hold a sample, over 5 (Naeem et al. 2020)."""

    label = "density ({network})"
    title = "density by {network} features"
    unit = "balls over k"
    direction = "higher"
    protocol = "density_coverage/2: arXiv:2002.09797, float64, k = 5, balls open"
    needs = frozenset({Need.real_images, Need.features})
    fewest_real = 6  # a fifth neighbour

    def score(self, samples: Samples) -> float:
        return density_and_coverage(samples, self.network)[0]

    def influence(self, samples: Samples) -> Tensor:
        k = 5
        ours, real = _float64_features(samples, self.network)
        radii = _real_radii(samples, self.network, real, k)
        balls = torch.cat([(distances < radii).sum(dim=1) for _, distances in _distances(ours, real)]) / k
        return balls.double() - balls.double().mean()


class Coverage(FeatureMetric):
    """Share of real images whose ball (up to neighbour 5) holds a sample (Naeem et al. 2020, arXiv:2002.09797)."""

    label = "coverage ({network})"
    title = "coverage by {network} features"
    unit = "share"
    direction = "higher"
    protocol = Density.protocol
    needs = Density.needs
    fewest_real = Density.fewest_real

    def score(self, samples: Samples) -> float:
        return density_and_coverage(samples, self.network)[1]


class FeatureDistanceToTeacher(FeatureMetric):
    """Mean distance between the features of a sample and of the teacher's for the same noise."""

    label = "distance to teacher ({network})"
    title = "mean distance of {network} features to the teacher's"
    unit = "feature distance"
    direction = "lower"
    protocol = "feature_distance_to_teacher/1: mean Euclidean distance"
    needs = frozenset({Need.same_noise, Need.features})

    def score(self, samples: Samples) -> float:
        return self._distances(samples).mean().item()

    def influence(self, samples: Samples) -> Tensor:
        distances = self._distances(samples)
        return distances - distances.mean()

    def _distances(self, samples: Samples) -> Tensor:
        ours, theirs = samples.images.features(self.network), samples.teacher.features(self.network)
        return torch.linalg.vector_norm(ours.double() - theirs.double(), dim=1)


class FeatureSpread(FeatureMetric):
    """Standard deviation of the samples' features over noise, relative to the teacher's: 1 is as diverse.

    In a conditional run it is the standard deviation within each class.
    """

    label = "spread ({network})"
    title = "spread of {network} features relative to the teacher's"
    unit = "ratio to the teacher's"
    direction = "none"
    protocol = "spread/1: root of the summed variances within each class, over that of the teacher's answers"
    needs = frozenset({Need.features})

    def score(self, samples: Samples) -> float:
        ours, theirs = samples.images.features(self.network), samples.teacher.features(self.network)
        return spread_ratio(ours, theirs, samples.labels)


class NearestReal(FeatureMetric):
    """Median distance of a sample to the nearest real image, over that of a real image to the nearest other one.

    A diagnostic of copying: well below 1, samples are closer to training images than these are to each other.
    """

    label = "nearest real ({network})"
    title = "distance of {network} features to the nearest real image"
    unit = "ratio to that of real images"
    direction = "none"
    protocol = "nearest_real/2: float64, medians of Euclidean distances; a real image is not its own neighbour"
    needs = frozenset({Need.real_images, Need.features})

    def score(self, samples: Samples) -> float:
        ours, real = _float64_features(samples, self.network)
        among_real = samples.real.once(f"nearest {self.network.name}", lambda: nearest(real, real, skip=1).median())
        if among_real == 0:
            raise Unavailable("more than half of the real images are duplicates")
        return (nearest(ours, real).median() / among_real).item()


def device_for(images: ImageSet, numbers: int) -> str:
    """The device of the feature networks of `images` if so many float64 `numbers` fit there; otherwise the CPU."""
    device = images.networks.device
    return device if device == "cpu" or fits_on(device, 8 * numbers) else "cpu"


def _float64_features(samples: Samples, network: type[FeatureNetwork]) -> tuple[Tensor, Tensor]:
    """Features of the samples and of the real images, float64, on the networks' device if both fit there."""
    ours, real = samples.images.features(network), samples.real.features(network)
    device = device_for(samples.images, ours.numel() + real.numel())
    return ours.to(device).double(), real.to(device).double()


def _drawn(random: np.random.RandomState, count: int, size: int, device: torch.device) -> Tensor:
    """`size` different indices out of 0, ..., count - 1."""
    return to_device(torch.from_numpy(random.choice(count, size, replace=False)), device)


def _squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased squared mean discrepancy of x and y, both (m,D), without the kernels of points with themselves."""
    m = len(x)
    return (_sum_of_pairs(x) + _sum_of_pairs(y)) / (m * (m - 1)) - 2 * _kernel(x, y).mean()


def _sum_of_pairs(x: Tensor) -> Tensor:
    """The sum of the kernel over all ordered pairs of different points; between two blocks it is computed once."""
    blocks = x.chunk(4)
    zero = x.new_zeros(())
    across = sum((_kernel(a, b).sum() for a, b in itertools.combinations(blocks, 2)), start=zero)
    within = (_kernel(block, block) for block in blocks)
    return 2 * across + sum((kernel.sum() - kernel.diagonal().sum() for kernel in within), start=zero)


def _kernel(f: Tensor, g: Tensor) -> Tensor:
    return torch.matmul(f, g.T).div_(f.shape[1]).add_(1).pow_(3)


def _mean_kernel(points: Tensor, others: Tensor) -> Tensor:
    """(N,) mean over `others` (M,D) of the kernel with each of `points` (N,D)."""
    sums = [_kernel(points, part).sum(dim=1) for part in others.split(MOST_DISTANCES // len(points))]
    return torch.stack(sums).sum(dim=0) / len(others)


def precision_and_recall(samples: Samples, network: type[FeatureNetwork], k: int = 3) -> tuple[float, float]:
    """Precision and recall, computed together and once for these samples."""
    if min(len(samples.images.features(network)), len(samples.real.features(network))) <= k:
        raise Unavailable(f"neighbour {k} needs more than {k} samples and real images")
    return samples.images.once(f"precision {network.name}", lambda: _precision_and_recall(samples, network, k))


def _precision_and_recall(samples: Samples, network: type[FeatureNetwork], k: int) -> tuple[float, float]:
    ours, real = _float64_features(samples, network)
    real_radii = _real_radii(samples, network, real, k)
    return _share_inside(ours, real, real_radii), _share_inside(real, ours, nearest(ours, ours, skip=k))


def _real_radii(samples: Samples, network: type[FeatureNetwork], real: Tensor, k: int) -> Tensor:
    """Distance of each real image to its k-th neighbour among the others, (M,), computed once for all samples."""
    return samples.real.once(f"radii {network.name} {k}", lambda: nearest(real, real, skip=k)).to(real.device)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of `points` (N,D) in any closed ball around `centres` (M,D) with `radii` (M,)."""
    return _inside(points, centres, radii).sum().item() / len(points)


def _inside(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """(N,) whether each of `points` (N,D) is in any closed ball around `centres` (M,D) with `radii` (M,)."""
    return torch.cat([(distances <= radii).any(dim=1) for _, distances in _distances(points, centres)])


def density_and_coverage(samples: Samples, network: type[FeatureNetwork], k: int = 5) -> tuple[float, float]:
    """Density and coverage, computed together and once for these samples."""
    if len(samples.real.features(network)) <= k:
        raise Unavailable(f"neighbour {k} needs more than {k} real images")

    def compute() -> tuple[float, float]:
        ours, real = _float64_features(samples, network)
        radii = _real_radii(samples, network, real, k)
        inside, covered = torch.zeros((2,), dtype=torch.int64, device=real.device)
        for rows, distances in _distances(real, ours):
            within = distances < radii[rows, None]
            inside += within.sum()
            covered += within.any(dim=1).sum()
        return inside.item() / (k * len(ours)), covered.item() / len(real)

    return samples.images.once(f"density {network.name} {k}", compute)


def _distances(points: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Distances of `points` (N,D) to all `others` (M,D), in blocks: (rows, distances of these rows)."""
    size = max(1, min(ROWS, MOST_DISTANCES // max(1, len(others))))
    centre = others.mean(dim=0)  # far from the origin, distances lose digits even in float64
    others = others - centre
    for first in range(0, len(points), size):
        rows = slice(first, first + size)
        yield rows, torch.cdist(points[rows] - centre, others)


def nearest(points: Tensor, others: Tensor, skip: int = 0) -> Tensor:
    """Distance of each of `points` (N,D) to the nearest of `others` (M,D) after the first `skip`, (N,).

    cdist of many points is inaccurate for short distances: it only finds the neighbour; its distance is computed again.
    """
    result = []
    for rows, distances in _distances(points, others):
        index = distances.kthvalue(skip + 1).indices
        result.append(torch.linalg.vector_norm(points[rows] - others[index], dim=1))
    return torch.cat(result)


def spread_ratio(ours: Tensor, theirs: Tensor, labels: Tensor | None) -> float:
    """Square root of the ratio of variances within each class of `labels` (N,); `ours` and `theirs` are (N,D)."""
    teachers = _variance(theirs, labels)
    if teachers == 0:
        raise Unavailable("the teacher's samples are all equal")
    return (_variance(ours, labels) / teachers) ** 0.5


def _variance(points: Tensor, labels: Tensor | None) -> float:
    """Sum of squared distances to the mean of the class, over all points and classes."""
    groups = [points] if labels is None else [points[labels == label] for label in labels.unique()]
    return sum((g.double() - g.double().mean(dim=0)).square().sum().item() for g in groups)
