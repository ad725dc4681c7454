"""The conformance suite for datasets: built-in ones pass, and each fault is found by its check and by no other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from distillbench import Dataset, DatasetConfig, Method, UserError, option
from distillbench.diffusion.distributions import mixture
from distillbench.registry import load_registry
from distillbench.testing.conformance import SUITES, assert_conforms, check_class, findings_of
from faults import failed, gatherer

DATASETS = load_registry().datasets
CHECKS = [check.name for check in SUITES["datasets"].checks]


@pytest.mark.parametrize("name", ["digits", "gmm"])
def test_built_in_datasets_conform(name):
    found = check_class(DATASETS[name].cls)
    assert not failed(found) and [finding.check for finding in found] == CHECKS


def test_missing_files_are_reported():
    found = check_class(DATASETS["cifar10"].cls)
    assert "cannot be built with these settings: dataset=cifar10 has no files yet" in failed(found)["builds"]
    assert {finding.ok for finding in found[2:]} == {None}


class Good(Dataset):
    """Draws of a mixture, as floating point."""

    name, licence = "good", "none needed: a test"
    shape, classes = (1, 2, 3), 2

    @dataclass
    class Config(DatasetConfig):
        count: int = option(500, "images")

    def __init__(self, config) -> None:
        self.distribution = mixture([0.5, 0.5], [[-0.4] * 6, [0.3] * 6], [[0.1], [0.15]], [1, 2, 3])
        self.images, self.targets = self.distribution.draw(config.count, torch.Generator().manual_seed(0))
        self.sha256 = "0123456789abcdef"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices):
        return self.images[indices]

    def labels(self, indices):
        return self.targets[indices]


def test_a_correct_dataset_passes():
    found = check_class(Good)
    assert {finding.ok for finding in found} == {True}
    assert {finding.check: finding.message for finding in found}["builds"] == "500 images"


def test_settings_are_used():
    assert check_class(Good, Good.Config(count=7))[1].message == "7 images"


def test_without_images_only_declarations_are_checked():
    found = {finding.check: finding.ok for finding in check_class(Good, Good.Config(count=0))}
    assert found == dict.fromkeys(CHECKS) | dict.fromkeys(("declared", "builds", "described"), True)


FAULTS, fault = gatherer()  # (dataset with one fault, the check that finds it, part of the message)


@fault("declared", "licence is empty")
class NoLicence(Good):
    licence = ""


@fault("declared", "settings without a help text: count")
class SilentSetting(Good):
    @dataclass
    class Config(DatasetConfig):
        count: int = 10


@fault("declared", "does not define read")
class Unfinished(Good):
    read = Dataset.read


@fault("builds", "cannot be built with these settings: no file")
class Missing(Good):
    def __init__(self, config) -> None:
        raise UserError("no file")


@fault("builds", "FileNotFoundError")
class MissingUnsaid(Good):
    def __init__(self, config) -> None:
        Path("/nowhere/at/all").read_bytes()


@fault("builds", "__init__ draws from the global generator of torch: use a torch.Generator")
class DrawsGlobally(Good):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.images = self.images + torch.randn(self.images.shape) / 100


@fault("described", "shape must be a tuple (C, H, W) of positive integers, got [1, 2, 3]")
class ListShape(Good):
    shape = [1, 2, 3]


@fault("described", "sha256 must be the digest of the pixels, 16 or more of 0-9a-f, got 'mine'")
class NoDigest(Good):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.sha256 = "mine"


@fault("described", "one text for each class: 3 texts, classes = 2")
class TooManyPrompts(Good):
    prompts = ("a", "b", "c")


@fault("described", "to 2, the number of classes, got range(0, 1)")
class EvaluatesTraining(Good):
    evaluated = range(0, 1)


@fault("images", "read must return (B,C,H,W) = (64, 1, 2, 3) for B indices, got (64, 6)")
class Flat(Good):
    def read(self, indices):
        return self.images[indices].flatten(1)


@fault("images", "must return uint8, or floating point in [-1, 1], got torch.int64")
class WholeNumbers(Good):
    def read(self, indices):
        return (self.images[indices] * 100).long()


@fault("images", "must lie in [-1, 1], got values from")
class NotScaled(Good):
    def read(self, indices):
        return (self.images[indices] + 1) * 127.5


@fault("images", "images are not finite")
class NotFinite(Good):
    def read(self, indices):
        return self.images[indices] / 0


@fault("images", "images at different indices are all equal")
class OneImage(Good):
    def read(self, indices):
        return self.images[:1].expand(len(indices), -1, -1, -1)


@fault("images", "read draws from the global generator of torch: an image must depend on its index alone")
class Flips(Good):
    def read(self, indices):
        x_0 = self.images[indices]
        return x_0.flip(3) if torch.rand(()) < 0.5 else x_0


@fault("by_index", "gives other images the second time")
class Augments(Good):
    reads = 0

    def read(self, indices):
        self.reads += 1
        return self.images[indices] * (1 - self.reads / 100)


@fault("by_index", "in another order read gives other images")
class Sorts(Good):
    def read(self, indices):
        return self.images[indices.sort().values]


@fault("by_index", "must give the same image twice")
class NoDuplicates(Good):
    def read(self, indices):
        whole = len(indices) == len(indices.unique())
        return self.images[indices if whole else torch.arange(len(indices))]


@fault("by_index", "compute nothing over the batch")
class Centres(Good):
    def read(self, indices):
        x_0 = self.images[indices]
        return x_0 if len(x_0) > 1 else x_0 * 0.9


@fault("by_index", "changes the given indices in place")
class ChangesIndices(Good):
    def read(self, indices):
        x_0 = self.images[indices]
        indices.zero_()
        return x_0


@fault("repeatable", "built twice from the same settings it gives other images")
class TrulyRandom(Good):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.images = self.images * (1 - os.urandom(1)[0] / 2560 - os.urandom(1)[0] / 65536)


@fault("repeatable", "its sha256 differs")
class DigestOfNow(Good):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.sha256 = os.urandom(32).hex()


@fault("labels", "declares 2 classes but no labels")
class NoLabels(Good):
    labels = Dataset.labels


@fault("labels", "must return (B,) int64, here (500,), got (500,) torch.int32")
class ShortLabels(Good):
    def labels(self, indices):
        return self.targets[indices].int()


@fault("labels", "must be 0 to 1 (classes = 2), got 1 to 2")
class CountsFromOne(Good):
    def labels(self, indices):
        return self.targets[indices] + 1


@fault("labels", "labels do not match their indices")
class LabelsByPosition(Good):
    def labels(self, indices):
        return self.targets[: len(indices)]


@fault("labels", "labels() gives 2 classes and classes is 0")
class ForgetsClasses(Good):
    classes = 0


@fault("distribution", "do not have the mean of the declared distribution")
class OtherMean(Good):
    def read(self, indices):
        return self.images[indices] + 0.1


@fault("distribution", "have 0.50 times the standard deviation of the declared distribution")
class TooNarrow(Good):
    def read(self, indices):
        mean, _ = self.distribution.moments()
        mean = mean.view(self.shape)
        return mean + (self.images[indices] - mean) / 2


@pytest.mark.parametrize(("cls", "check", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_is_found_by_its_own_check(cls, check, message):
    found = failed(check_class(cls))
    assert list(found) == [check]
    assert message in found[check] and "\n" not in found[check]


def test_there_is_a_fault_for_every_check():
    assert {check for _, check, _ in FAULTS} == set(CHECKS)


class Unit(Good):
    """Images in [0, 1]: no fault, since a distribution may be positive, but mentioned."""

    distribution = None

    def __init__(self, config) -> None:
        super().__init__(config)
        self.distribution = None
        self.images = (self.images + 1) / 2


class Bits(Unit):
    def read(self, indices):
        return self.images[indices].round().to(torch.uint8)


@pytest.mark.parametrize(
    ("cls", "words"), [(Unit, "should images in [0, 1] be scaled"), (Bits, "no 8-bit value is above 1")]
)
def test_suspicious_ranges_are_mentioned(cls, words):
    found = {finding.check: finding for finding in check_class(cls)}
    assert found["images"].ok and words in found["images"].message


def test_a_class_that_is_no_dataset_is_reported():
    (first, *others) = findings_of("datasets", Method)
    assert not first.ok and "takes subclasses of Dataset" in first.message
    assert {finding.ok for finding in others} == {None}


def test_a_dataset_is_not_checked_on_another():
    with pytest.raises(UserError, match="dataset= is for teachers"):
        check_class(Good, dataset=Good(Good.Config()))
    with pytest.raises(AssertionError, match="breaks the contract of a dataset\nlabels: labels must return"):
        assert_conforms(ShortLabels)
