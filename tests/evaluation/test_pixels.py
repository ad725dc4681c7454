"""Metrics that compare pixels: distances to the teacher's images and to real ones, and spread."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from distillbench.builtin.pixels import NearestRealRmse, Spread, TeacherRmse
from distillbench.datasets.dataset import Dataset, to_float
from distillbench.errors import Unavailable
from distillbench.evaluation.features import Networks
from distillbench.evaluation.metric import Samples, check_needs
from distillbench.evaluation.reference_statistics import RealImages

pytestmark = pytest.mark.usefixtures("float64")


def samples(x, y, keeps_noise=True, labels=None):
    return Samples(x, y, None, None, None, keeps_noise, labels)


def test_teacher_rmse_is_a_root_mean_square_and_undefined_for_samples_with_fresh_noise():
    x = torch.zeros(3, 2, 1, 1)
    y = x.clone()
    y[0, 0], y[2, 1] = 0.3, -0.4
    assert TeacherRmse().score(samples(x, y)) == pytest.approx(math.sqrt((0.09 + 0.16) / 6), rel=1e-12)
    with pytest.raises(Unavailable):
        check_needs(TeacherRmse, samples(x, y, False))


def test_spread_is_relative_to_the_teacher_and_within_classes():
    """Half the distance to the mean: 0.5. Two different classes, each collapsed to a point: 0."""
    y = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    assert Spread().score(samples(y / 2, y)) == pytest.approx(0.5, rel=1e-12)
    labels = torch.arange(64) % 2
    collapsed = labels.double().view(-1, 1, 1, 1).expand_as(y)
    assert Spread().score(samples(collapsed, y, labels=labels)) == pytest.approx(0, abs=1e-12)
    assert Spread().score(samples(collapsed, y)) > 0.1
    with pytest.raises(Unavailable):
        Spread().score(samples(y, torch.zeros_like(y)))


class Three(Dataset):
    """Three grey images of one level each."""

    name, licence, sha256, shape = "three", "none", "0" * 64, (1, 2, 2)
    levels = torch.tensor([0, 128, 255], dtype=torch.uint8)

    def __init__(self, config=None):
        pass

    def __len__(self):
        return 3

    def read(self, indices):
        return self.levels[indices].view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_nearest_real_rmse_finds_copies():
    real = RealImages(Three(), Networks(Path("nowhere"), "cpu"), Path("nowhere"))
    copies = to_float(Three().read(torch.tensor([0, 1, 2, 1])))
    near = Samples(copies, copies, None, None, real, True)
    assert NearestRealRmse().score(near) == pytest.approx(0, abs=1e-6)
    off = Samples(copies - 0.25, copies, None, None, real, True)
    assert NearestRealRmse().score(off) == pytest.approx(0.25, rel=1e-5)


def test_the_influence_on_teacher_rmse_is_the_derivative_by_the_weight_of_an_image():
    """If image i counts 1 + e times, the mean square is that of the weighted images."""
    x = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = x.square().mean(dim=(1, 2, 3))
    influence = TeacherRmse().influence(samples(x, torch.zeros_like(x)))
    for i in range(6):
        weights = torch.ones(6, dtype=torch.float64)
        weights[i] += 1e-6
        change = (weights @ squares / weights.sum()).sqrt() - squares.mean().sqrt()
        assert influence[i].item() == pytest.approx(6 * change.item() / 1e-6, rel=1e-4)
    assert not TeacherRmse().influence(samples(x, x)).any()
