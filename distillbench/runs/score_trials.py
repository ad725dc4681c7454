"""Trials of scoring: seconds of a feature network by images, and of a metric on features of random numbers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distillbench.datasets.dataset import to_uint8
from distillbench.errors import Unavailable
from distillbench.evaluation.features import FeatureNetwork, ImageSet, Networks, full_precision
from distillbench.evaluation.frechet import GaussianStatistics
from distillbench.evaluation.metric import Metric, Samples, check_needs
from distillbench.evaluation.timing import OUT_OF_MEMORY, Timer
from distillbench.runs.trials import Line, fit

FEWEST, MOST = 64, 8192  # images of a trial of a metric
STEEPEST = 2.0  # exponent of growth: a metric compares all pairs of images at most


@dataclass(frozen=True)
class NetworkTimes:
    """Seconds to load a feature network, and to run it once on so many images; `batch` are always run together."""

    loading: float
    run: Line
    batch: int

    def __call__(self, images: int) -> float:
        """Seconds of the features of `images`: the last batch is filled up."""
        return math.ceil(images / self.batch) * self.run(self.batch)


def times_of_network(
    network: type[FeatureNetwork], networks: Networks, shape: tuple[int, int, int], timer: Timer, seconds: float
) -> NetworkTimes:
    """The times of a feature network on images of `shape`."""
    begin = time.perf_counter()
    loaded = networks.get(network)
    loading = time.perf_counter() - begin
    images = torch.randint(256, (loaded.batch, 3, *shape[1:]), dtype=torch.uint8).to(networks.device)
    with torch.inference_mode(), full_precision():
        run = fit(lambda n: loaded(images[:n]), 1, loaded.batch, timer, seconds)
    return NetworkTimes(loading, run, loaded.batch)


def seconds_of_metric(
    metric: type[Metric], networks: Networks, shape: tuple[int, int, int], counts: tuple[int, int], timer: Timer,
    seconds: float,
) -> float:  # fmt: skip
    """Seconds of a score of `counts` samples and real images whose features are there.

    The number of images is doubled while the time allows; beyond it the growth of the last doubling goes on. Raises
    Unavailable if that many images are not enough for a score.
    """
    full, size = max(counts), min(FEWEST, max(counts))
    found: list[tuple[int, float]] = []
    reason = Unavailable("memory ran out")
    while True:
        try:
            samples = _random_samples(metric, networks, shape, min(size, counts[0]), min(size, counts[1]))
            check_needs(metric, samples)
            found.append((size, timer.seconds(partial(metric().score, samples))))
        except OUT_OF_MEMORY:
            break
        except Unavailable as why:  # there may have to be more images
            reason = why
        expected = sum(taken for _, taken in found) + 2**STEEPEST * found[-1][1] if found else 0.0
        if size >= min(full, MOST) or expected > seconds:
            break
        size = min(2 * size, full)
    if not found:
        raise reason
    return _extended(found, full)


def _extended(found: list[tuple[int, float]], full: int) -> float:
    """The seconds at `full` images, from trials (images, seconds) of growing size."""
    size, seconds = found[-1]
    if size >= full:
        return seconds
    slope = 1.0
    if len(found) > 1:
        before, less = found[-2]
        slope = math.log(max(seconds, 1e-9) / max(less, 1e-9)) / math.log(size / before)
    return seconds * (full / size) ** min(max(slope, 0.0), STEEPEST)


def _random_samples(
    metric: type[Metric], networks: Networks, shape: tuple[int, int, int], count: int, real: int
) -> Samples:
    """Random samples, `real` random images to compare them with, and features of random numbers of both."""
    x_0, teacher_x_0, others = (torch.rand(n, *shape) * 2 - 1 for n in (count, count, real))
    ours, teachers, compared = (_RandomImages(images, metric, networks) for images in (x_0, teacher_x_0, others))
    if metric.network is not None:
        compared.know_statistics(metric.network)
    labels = torch.zeros(count, dtype=torch.int64)
    return Samples(x_0, teacher_x_0, ours, teachers, compared, keeps_noise=True, labels=labels)


class _RandomImages(ImageSet):
    """Images whose features are there, and whose statistics are computed from them, as from those of samples."""

    def __init__(self, images: Tensor, metric: type[Metric], networks: Networks) -> None:
        shape = (images.shape[1], images.shape[2], images.shape[3])
        super().__init__(lambda: [to_uint8(images)], len(images), shape, networks)
        if metric.network is not None:
            self._features[metric.network] = torch.randn(len(images), metric.network.width)

    def statistics(self, network: type[FeatureNetwork]) -> GaussianStatistics:
        if network not in self._statistics:
            self._statistics[network] = GaussianStatistics.of(self._features[network].to(self.networks.device))
        return self._statistics[network]

    def know_statistics(self, network: type[FeatureNetwork]) -> None:
        """Take them as read from a file: a covariance of full rank."""
        mean = torch.zeros(network.width, dtype=torch.float64, device=self.networks.device)
        self._statistics[network] = GaussianStatistics(self.count, mean, given=torch.eye(len(mean)).to(mean))
