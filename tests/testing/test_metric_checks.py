"""The conformance suite for metrics: each fault is found by its check and by no other."""

from __future__ import annotations

import random

import pytest
import torch

from distillbench import FeatureNetwork, Metric, Need, Unavailable, UserError
from distillbench.evaluation import feature_metrics
from distillbench.evaluation.pretrained_weights import WeightsFile
from distillbench.registry import load_registry
from distillbench.testing.conformance import SUITES, assert_conforms, check_class
from distillbench.testing.metrics import IMAGES
from faults import failed, found_in, gatherer

METRICS = load_registry().metrics
CHECKS = [check.name for check in SUITES["metrics"].checks]


def test_missing_weights_are_no_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = check_class(METRICS["fid"].cls)
    assert {finding.ok for finding in found[1:]} == {None}
    assert "the weights of inception are not there" in found[1].message


class Tiny(FeatureNetwork):
    """Four random projections of an image's corners."""

    name, protocol, width = "tiny", "tiny/1: corners", 4
    weights = WeightsFile("none", "none", "", "none", 0)

    @classmethod
    def locate(cls, folder):
        return folder

    def __init__(self, file, device) -> None:
        self.matrix = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) / 100

    def __call__(self, images):
        return images[:, :, :9:8, :9:8].float().flatten(1) @ self.matrix


class Good(Metric):
    """Mean distance of pixels to the teacher's samples."""

    name, unit, direction, protocol = "good", "pixel values", "lower", "good/1: mean absolute difference"
    needs = frozenset({Need.same_noise})

    def score(self, samples):
        return self.distances(samples).mean().item()

    def influence(self, samples):
        return self.distances(samples) - self.distances(samples).mean()

    def distances(self, samples):
        return (samples.x_0 - samples.teacher_x_0).abs().double().flatten(1).mean(dim=1)


class GoodFeatures(feature_metrics.FrechetDistance):
    name, network = "good_features", Tiny


@pytest.mark.parametrize("cls", [Good, GoodFeatures])
def test_a_correct_metric_passes(cls):
    found = {finding.check: finding.ok for finding in check_class(cls)}
    assert found == dict.fromkeys(CHECKS, True) | ({} if cls.network else {"network": None})


FAULTS, fault = gatherer()  # (metric with one fault, the check that finds it, part of the message)


def through(cls: type[FeatureNetwork]) -> type[Metric]:
    """The Fréchet distance through this network."""
    return type(f"Through{cls.__name__}", (GoodFeatures,), {"network": cls})


@fault("declared", "direction must be one of lower, higher, none, got 'up'")
class Upwards(Good):
    direction = "up"


@fault("declared", "unit is empty")
class NoUnit(Good):
    unit = ""


@fault("declared", "protocol must have a version, such as good/1")
class NoVersion(Good):
    protocol = "mean absolute difference"


class WrongWidth(Tiny):
    name, width = "wrong_width", 5


class IgnoresTheImage(Tiny):
    name = "ignores_the_image"

    def __call__(self, images):
        return torch.ones(len(images), 4)


class Normalises(Tiny):
    name = "normalises"

    def __call__(self, images):
        f = super().__call__(images)
        return f - f.mean(dim=0) + 100 * f.std(dim=0) * torch.arange(len(f))[:, None]


FAULTS += [
    (through(WrongWidth), "network", "must give features (B, width) = (12, 5), got (12, 4)"),
    (through(IgnoresTheImage), "network", "gives the same features for all images"),
    (through(Normalises), "network", "depend on the other images of the batch"),
]


@fault("needs", "uses real images, which not every run has")
class NeedsReal(GoodFeatures):
    needs = frozenset()


@fault("needs", "not only their statistics: declare Need.real_images")
class NeedsImages(Good):
    needs = frozenset({Need.same_noise, Need.real})

    def score(self, samples):
        return super().score(samples) + 0 * sum(len(batch) for batch in samples.real.read())


@fault("needs", "declare Need.features")
class NeedsFeatures(feature_metrics.FeatureSpread):
    name, network, needs = "needs_features", Tiny, frozenset()


@fault("needs", "declares none: set `network`")
class HidesItsNetwork(Good):
    def score(self, samples):
        return super().score(samples) + 0 * samples.images.statistics(Tiny).mean.sum().item()


@fault("needs", "compared with the teacher's for the same noise: declare Need.same_noise")
class Paired(Good):
    needs = frozenset()


@fault("scores", "score must return a float, got Tensor")
class GivesATensor(Good):
    def score(self, samples):
        return (samples.x_0 - samples.teacher_x_0).abs().mean()


@fault("scores", "score is nan")
class GivesNan(Good):
    def score(self, samples):
        return float("nan")


@fault("scores", "without a reason")
class GivesNoReason(Good):
    def score(self, samples):
        raise Unavailable


@fault("scores", "KeyError: 'x' (line")
class ScoreCrashes(Good):
    def score(self, samples):
        return {}["x"]


@fault("deterministic", "draws from the global generator of torch")
class DrawsGlobally(Good):
    def score(self, samples):
        return super().score(samples) + torch.rand(()).item() * 1e-6


@fault("deterministic", "have scores")
class HidesRandomness(Good):
    def score(self, samples):
        return super().score(samples) * (1 + random.SystemRandom().random() / 1e4)


@fault("unchanged", "score changes samples.x_0 in place")
class Overwrites(Good):
    def score(self, samples):
        return samples.x_0.sub_(samples.teacher_x_0).abs_().double().mean().item()


@fault("unchanged", "changes the features of samples.images in place")
class OverwritesFeatures(feature_metrics.FeatureDistanceToTeacher):
    name, network = "overwrites_features", Tiny

    def score(self, samples):
        value = super().score(samples)
        samples.images.features(Tiny).zero_()
        return value


@fault("order", "in another order the same samples have score")
class FirstOnly(Good):
    def score(self, samples):
        return (samples.x_0[0] - 1).abs().max().item() + super().score(samples)


@fault("influence", "influences must have mean 0, got")
class InfluenceIsNotCentred(Good):
    def influence(self, samples):
        return self.distances(samples)


@fault("influence", "a finite number for each image, (N,) =")
class InfluenceOfAllTogether(Good):
    def influence(self, samples):
        return self.distances(samples).mean()


@fault("influence", "do not follow the images")
class SortsInfluences(Good):
    def influence(self, samples):
        return super().influence(samples).sort().values


@fault("direction", "'higher' the teacher's samples are the worst")
class WrongDirection(Good):
    direction = "higher"


@fault("direction", "it does not depend on the samples")
class IsAlwaysOne(Good):
    def score(self, samples):
        return 1.0


@fault("sizes", "real images of 32x32: RuntimeError")
class NeedsEqualSizes(Good):
    needs = frozenset({Need.same_noise, Need.real_images})

    def score(self, samples):
        real = torch.cat(list(samples.real.read())).float().mean(dim=0)
        return super().score(samples) + 0 * (samples.x_0 - real).mean().item()


@fault("sizes", "two samples: score is nan")
class NeedsMany(Good):
    def score(self, samples):
        return super().score(samples) + 0 * samples.x_0[2:].mean().item()


@pytest.mark.parametrize(("cls", "check", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_is_found_by_its_own_check(cls, check, message):
    found = failed(found_in("metrics", cls, check))
    assert list(found) == [check]
    assert message in found[check] and "\n" not in found[check]


def test_there_is_a_fault_for_every_check():
    assert {check for _, check, _ in FAULTS} == set(CHECKS)


class NeedsAMillion(Good):
    """Needs more images than the bench has."""

    def score(self, samples):
        raise Unavailable(f"takes a million images, here are {len(samples.x_0)}")


def test_a_missing_score_is_reported_with_its_reason():
    found = {finding.check: finding for finding in check_class(NeedsAMillion)}
    assert (
        found["scores"].ok is None and found["scores"].message == f"no score: takes a million images, here are {IMAGES}"
    )
    assert_conforms(NeedsAMillion)


def test_a_metric_has_no_settings():
    with pytest.raises(UserError, match="a metric has no settings"):
        check_class(Good, config=3)
