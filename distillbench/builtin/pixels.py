"""Scores on pixels, without a network: distance to the teacher's samples, spread, distance to real images."""

from __future__ import annotations

import torch

from distillbench import Metric, Samples, Unavailable, hookimpl
from distillbench.datasets.dataset import to_float
from distillbench.evaluation.feature_metrics import device_for, nearest, spread_ratio
from distillbench.evaluation.metric import Need
from distillbench.system.transfers import to_device

CHUNK = 1024  # images at a time


class TeacherRmse(Metric):
    """Root mean square difference to the teacher's many-step samples from the same noise, clipped to [-1, 1]."""

    name = "teacher_rmse"
    unit = "pixel values in [-1, 1]"
    direction = "lower"
    protocol = "teacher_rmse/1: root mean square over images and pixels, both clipped to [-1, 1], not quantised"
    needs = frozenset({Need.same_noise})

    def score(self, samples: Samples) -> float:
        pairs = zip(samples.x_0.split(CHUNK), samples.teacher_x_0.split(CHUNK), strict=True)
        total = sum((x_0 - teacher).double().square().sum().item() for x_0, teacher in pairs)
        return (total / samples.x_0.numel()) ** 0.5


class Spread(Metric):
    """Standard deviation of the samples' pixels relative to the teacher's samples: 1 means equally diverse.

    In a conditional run it is computed within each class.
    """

    name = "spread"
    unit = "ratio to the teacher's"
    direction = "none"
    protocol = "spread/1: root of the summed pixel variances within each class, over that of the teacher's answers"

    def score(self, samples: Samples) -> float:
        return spread_ratio(samples.x_0.flatten(1), samples.teacher_x_0.flatten(1), samples.labels)


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
        device = device_for(samples.real, samples.x_0.numel())
        ours = to_device(samples.x_0, device).flatten(1).double()
        best = torch.full((len(ours),), torch.inf, dtype=torch.float64, device=device)
        for batch in samples.real.read():
            real = to_float(to_device(batch, device)).flatten(1).double()
            best = torch.minimum(best, nearest(ours, real))
        return (best.median() / ours.shape[1] ** 0.5).item()


@hookimpl(api=2)
def register_metrics(register) -> None:
    register(TeacherRmse)
    register(Spread)
    register(NearestRealRmse)
