"""Scores made of features, for any network: a plugin names the network and the column.

    class FdMyNetwork(FrechetDistance):
        name, network = "fd_my_network", MyNetwork

Kernel distance, precision and recall are torch-fidelity's, called with features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from distillbench.errors import Unavailable
from distillbench.features import FeatureNetwork
from distillbench.frechet import GaussianStatistics, frechet_distance
from distillbench.metrics import Metric, Need, Samples

__all__ = [
    "Coverage", "Density", "FeatureDistanceToTeacher", "FeatureMetric", "FeatureSpread", "FrechetDistance",
    "FrechetDistanceExtrapolated", "FrechetDistanceToTeacher", "KernelDistance", "NearestReal", "Precision",
    "Recall", "density_and_coverage", "nearest", "precision_and_recall", "spread_ratio",
]  # fmt: skip

ROWS = 1000  # of a distance matrix at a time
SEED = 2020  # of subsets: torch-fidelity's default


class FeatureMetric(Metric):
    """A score that looks through `network`."""

    network: ClassVar[type[FeatureNetwork]]


class FrechetDistance(FeatureMetric):
    """Squared Fréchet distance between Gaussians fitted to the features of all real images and of the samples.

    Biased upwards for few samples: compare at equal numbers of images only.
    """

    unit = "squared feature distance"
    direction = "lower"
    protocol = "frechet/2: covariances over n - 1, float64, all real images"
    needs = frozenset({Need.real})

    def score(self, samples: Samples) -> float:
        return frechet_distance(samples.real.statistics(self.network), samples.images.statistics(self.network))


class FrechetDistanceToTeacher(FeatureMetric):
    """Squared Fréchet distance to the teacher's many-step answers to the same noise: 0 for a perfect student."""

    unit = "squared feature distance"
    direction = "lower"
    protocol = "frechet_to_teacher/1: covariances over n - 1, float64, the same noise on both sides"

    def score(self, samples: Samples) -> float:
        return frechet_distance(samples.teacher.statistics(self.network), samples.images.statistics(self.network))


class FrechetDistanceExtrapolated(FeatureMetric):
    """The Fréchet distance extrapolated to infinitely many samples (Chong & Forsyth 2020, arXiv:1911.07023).

    The bias falls like 1/n, so a line in 1/n through the distances of subsets is read off at 0. That holds where n is a
    few times the number D of features: with subsets of 2 D, a tenth of the bias is left; of D, a third. The number of
    real images is what it is: their part of the bias stays.
    """

    unit = "squared feature distance"
    direction = "lower"
    protocol = f"frechet_extrapolated/1: 8 subsets of n/2 to n >= 4 D samples, evenly spaced in n, seed {SEED}"
    needs = frozenset({Need.real, Need.features})
    subsets, smallest, fewest = 8, 0.5, 2  # the smallest subset, of n; and the fewest samples in it, of D

    def score(self, samples: Samples) -> float:
        features, real = samples.images.features(self.network), samples.real.statistics(self.network)
        n, width = features.shape
        if self.smallest * n < self.fewest * width:
            raise Unavailable(f"a line in 1/n takes {self.fewest * width / self.smallest:.0f} samples, here are {n}")
        generator = torch.Generator().manual_seed(SEED)
        sizes = torch.linspace(self.smallest * n, n, self.subsets).round().long().tolist()
        distances = []
        for size in sizes:
            chosen = features[torch.randperm(n, generator=generator)[:size]]
            distances.append(frechet_distance(real, GaussianStatistics.of(chosen.to(real.mean.device))))
        x, y = 1 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64)
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        return (y.mean() - slope * x.mean()).item()


class KernelDistance(FeatureMetric):
    """Squared maximum mean discrepancy, kernel (f.g / D + 1)^3, unbiased (Bińkowski et al. 2018, arXiv:1801.01401)."""

    unit = "squared kernel distance"
    direction = "lower"
    protocol = f"kernel/1: torch-fidelity, mean over 100 subsets of 1000, seed {SEED}"
    needs = frozenset({Need.real_images, Need.features})
    subset = 1000

    def score(self, samples: Samples) -> float:
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

        ours, real = _both(samples, self.network)
        few = min(len(ours), len(real))
        if few < self.subset:
            raise Unavailable(f"a kernel distance takes subsets of {self.subset} images, here are {few}")
        found = kid_features_to_metric(
            ours, real, kid_subsets=100, kid_subset_size=self.subset, kid_kernel="poly", kid_kernel_poly_degree=3,
            kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0, rng_seed=SEED, verbose=False,
        )  # fmt: skip
        return found[KEY_METRIC_KID_MEAN]


class Precision(FeatureMetric):
    """Share of samples within a real image's ball, which reaches to its third neighbour (Kynkäänniemi et al. 2019).

    arXiv:1904.06991, whose network is VGG-16: values on another network are others.
    """

    unit = "share"
    direction = "higher"
    protocol = "precision_recall/1: torch-fidelity, k = 3"
    needs = frozenset({Need.real_images, Need.features})

    def score(self, samples: Samples) -> float:
        return precision_and_recall(samples, self.network)[0]


class Recall(FeatureMetric):
    """Share of real images within a sample's ball, which reaches to its third neighbour (Kynkäänniemi et al. 2019)."""

    unit = "share"
    direction = "higher"
    protocol = Precision.protocol
    needs = Precision.needs

    def score(self, samples: Samples) -> float:
        return precision_and_recall(samples, self.network)[1]


class Density(FeatureMetric):
    """Mean number of real images' balls (to the fifth neighbour) that a sample lies in, over 5 (Naeem et al. 2020)."""

    unit = "balls over k"
    direction = "higher"
    protocol = "density_coverage/1: arXiv:2002.09797, k = 5"
    needs = frozenset({Need.real_images, Need.features})

    def score(self, samples: Samples) -> float:
        return density_and_coverage(samples, self.network)[0]


class Coverage(FeatureMetric):
    """Share of real images whose ball (to the fifth neighbour) holds a sample (Naeem et al. 2020, arXiv:2002.09797)."""

    unit = "share"
    direction = "higher"
    protocol = Density.protocol
    needs = Density.needs

    def score(self, samples: Samples) -> float:
        return density_and_coverage(samples, self.network)[1]


class FeatureDistanceToTeacher(FeatureMetric):
    """Mean distance between the features of a sample and of the teacher's answer to the same noise."""

    unit = "feature distance"
    direction = "lower"
    protocol = "feature_distance_to_teacher/1: mean Euclidean distance"
    needs = frozenset({Need.same_noise, Need.features})

    def score(self, samples: Samples) -> float:
        ours, theirs = samples.images.features(self.network), samples.teacher.features(self.network)
        return torch.linalg.vector_norm(ours.double() - theirs.double(), dim=1).mean().item()


class FeatureSpread(FeatureMetric):
    """Standard deviation of the samples' features over noise, relative to the teacher's answers: 1 is as diverse.

    Of a conditional run it is that within each class.
    """

    unit = "ratio to the teacher's"
    direction = "none"
    protocol = "spread/1: root of the summed variances within each class, over that of the teacher's answers"
    needs = frozenset({Need.features})

    def score(self, samples: Samples) -> float:
        ours, theirs = samples.images.features(self.network), samples.teacher.features(self.network)
        return spread_ratio(ours, theirs, samples.labels)


class NearestReal(FeatureMetric):
    """Median distance of a sample to the nearest real image, over that of a real image to the nearest other one.

    A diagnostic of copying: well below 1 means that samples lie closer to training images than these to one another.
    """

    unit = "ratio to that of real images"
    direction = "none"
    protocol = "nearest_real/1: medians of Euclidean distances; a real image is not its own neighbour"
    needs = frozenset({Need.real_images, Need.features})

    def score(self, samples: Samples) -> float:
        ours, real = _both(samples, self.network)
        among = samples.real.once(f"nearest {self.network.name}", lambda: nearest(real, real, skip=1).median())
        if among == 0:
            raise Unavailable("more than half of the real images are there twice")
        return (nearest(ours, real).median() / among).item()


def _both(samples: Samples, network: type[FeatureNetwork]) -> tuple[Tensor, Tensor]:
    """Features of the samples and of the real images."""
    return samples.images.features(network), samples.real.features(network)


def precision_and_recall(samples: Samples, network: type[FeatureNetwork]) -> tuple[float, float]:
    """Both at once, and once for these samples."""
    ours, real = _both(samples, network)
    if min(len(ours), len(real)) < 4:
        raise Unavailable("a third neighbour needs four images")
    return samples.images.once(f"precision {network.name}", lambda: _precision_and_recall(ours, real))


def _precision_and_recall(ours: Tensor, real: Tensor) -> tuple[float, float]:
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    options = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(ours, real, **options)
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


def density_and_coverage(samples: Samples, network: type[FeatureNetwork], k: int = 5) -> tuple[float, float]:
    """Both at once, and once for these samples."""
    ours, real = _both(samples, network)
    if len(real) <= k:
        raise Unavailable(f"neighbour {k} needs more than {k} real images")

    def compute() -> tuple[float, float]:
        radii = samples.real.once(f"radii {network.name} {k}", lambda: nearest(real, real, skip=k))
        inside, covered = 0, 0
        for rows, radius in zip(real.split(ROWS), radii.split(ROWS), strict=True):
            within = torch.cdist(rows, ours) < radius[:, None]
            inside += int(within.sum())
            covered += int(within.any(dim=1).sum())
        return inside / (k * len(ours)), covered / len(real)

    return samples.images.once(f"density {network.name} {k}", compute)


def nearest(points: Tensor, others: Tensor, skip: int = 0) -> Tensor:
    """Distance of each of `points` (N,D) to its nearest among `others` (M,D), the first `skip` left out, (N,).

    cdist of many loses the digits of short distances, so it finds the neighbour and the distance is computed anew.
    """
    found = []
    for rows in points.split(ROWS):
        index = torch.cdist(rows, others).kthvalue(skip + 1).indices
        found.append(torch.linalg.vector_norm(rows - others[index], dim=1))
    return torch.cat(found)


def spread_ratio(ours: Tensor, theirs: Tensor, labels: Tensor | None) -> float:
    """Root of the ratio of summed variances, (N,D) both, within each of the classes `labels` (N,)."""
    mine, teachers = _variance(ours, labels), _variance(theirs, labels)
    if teachers == 0:
        raise Unavailable("the teacher's answers do not differ")
    return (mine / teachers) ** 0.5


def _variance(points: Tensor, labels: Tensor | None) -> float:
    """Squared distance to the mean of the class, summed over classes."""
    groups = [points] if labels is None else [points[labels == label] for label in labels.unique()]
    return sum((g.double() - g.double().mean(dim=0)).square().sum().item() for g in groups)
