"""The conformance suite for metrics, on generated images.

Each check tests one promise of :mod:`distillbench.evaluation.metric`.

Real images and the teacher's samples are draws of the same distribution; samples are the teacher's plus a little noise.
Good samples are the teacher's themselves; bad ones are white noise and a constant grey.

| symbol | meaning                                          | shape                |
|--------|--------------------------------------------------|----------------------|
| x_0    | samples, images                                  | (N,C,H,W) in [-1, 1] |
| order  | another order of the N                           | (N,) int64           |
| D      | features of a network                            | int                  |
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from distillbench.datasets.dataset import Dataset, to_uint8
from distillbench.errors import Unavailable, UserError
from distillbench.evaluation.features import FeatureNetwork, ImageSet, Networks, extract
from distillbench.evaluation.frechet import GaussianStatistics
from distillbench.evaluation.metric import Metric, Need, Samples, check_needs
from distillbench.evaluation.pretrained_weights import weights_folder
from distillbench.testing.checks import (
    Check,
    Fault,
    NotApplicable,
    check_declared,
    differ,
    seed_global_generators,
    undisturbed,
    where,
)

IMAGES, CLASSES, SIDE = 128, 4, 16
NEAR_STD = 0.03  # standard deviation of the noise that "near" samples add to the teacher's
NETWORK_IMAGES = 12  # images that a network is checked on
ORDER_ERROR = 0.05  # relative to the score, or to its range from good to bad samples: seeded subsets may change it
SAME_FEATURES = 1e-4  # relative to the largest
VERSION = re.compile(r"\w/\d+")
SHAPES = {"colour": (3, SIDE, SIDE), "grey, with classes": (1, SIDE, SIDE)}


# --- images ----------------------------------------------------------------------------------------------------------


@functools.cache
def images(name: str, shape: tuple[int, int, int], side: int = SIDE) -> Tensor:
    """Images in [-1, 1], (N,C,side,side).

    "real" and "teacher" are smooth patterns around one for each class; others are "near", "noise" and "constant".
    """
    generator = torch.Generator().manual_seed({"real": 1, "teacher": 2, "near": 3}.get(name, 4))
    if name == "noise":
        return 2 * torch.rand(IMAGES, *shape, generator=generator) - 1
    if name == "constant":
        return torch.zeros(IMAGES, *shape)
    if name == "near":
        x_0 = images("teacher", shape)
        return (x_0 + NEAR_STD * torch.randn(x_0.shape, generator=generator)).clamp(-1, 1)
    patterns = torch.randn(CLASSES, shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
    own = torch.randn(IMAGES, shape[0], 4, 4, generator=generator)
    coarse = 0.4 * patterns[torch.arange(IMAGES) % CLASSES] + 0.25 * own
    return interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True).clamp(-1, 1)


@dataclass(frozen=True)
class HashedImages:
    """8-bit images (N,C,H,W), compared by their hash."""

    sha256: str
    images: Tensor = field(compare=False)

    @classmethod
    def of(cls, x_0: Tensor) -> HashedImages:
        x_0 = to_uint8(x_0).contiguous()
        return cls(hashlib.sha256(f"{tuple(x_0.shape)}".encode() + x_0.numpy().tobytes()).hexdigest(), x_0)


@functools.cache
def networks_in(folder: Any) -> Networks:
    """Networks with the weights in `folder`, loaded once for all metrics."""
    return Networks(folder, "cpu")


@functools.lru_cache(maxsize=64)
def extracted(network: type[FeatureNetwork], hashed: HashedImages, folder: Any) -> tuple[Tensor, GaussianStatistics]:
    """Features and statistics, computed once for all metrics of a network."""
    x_0 = hashed.images
    shape = (x_0.shape[1], x_0.shape[2], x_0.shape[3])
    plain = ImageSet(lambda: [x_0], len(x_0), shape, networks_in(folder))
    return plain.features(network), plain.statistics(network)


class WatchedSet(ImageSet):
    """Images that record what is read of them: "read", "statistics" or "features"."""

    def __init__(self, x_0: Tensor) -> None:
        self.hashed, self.used = HashedImages.of(x_0), set[str]()
        shape = (x_0.shape[1], x_0.shape[2], x_0.shape[3])
        super().__init__(self._read, len(x_0), shape, networks_in(weights_folder()))

    def _read(self) -> Iterator[Tensor]:
        self.used.add("read")
        yield from self.hashed.images.clone().split(100)

    def statistics(self, network: type[FeatureNetwork]) -> GaussianStatistics:
        found = super().statistics(network)
        self.used.add("statistics")
        return found

    def features(self, network: type[FeatureNetwork]) -> Tensor:
        found = super().features(network)
        self.used.add("features")
        return found

    def _extract(self, network: type[FeatureNetwork], keep: bool) -> None:
        features, self._statistics[network] = extracted(network, self.hashed, self.networks.folder)
        self._features[network] = features.clone()

    def changed(self) -> bool:
        """Whether returned features were changed in place."""
        folder = self.networks.folder
        return any(differ(f, extracted(network, self.hashed, folder)[0]) for network, f in self._features.items())


@dataclass(frozen=True)
class MetricBench:
    """A kind of images. Methods return new objects."""

    label: str
    cls: type[Metric]

    @property
    def conditional(self) -> bool:
        return "classes" in self.label

    @property
    def shape(self) -> tuple[int, int, int]:
        return SHAPES[self.label]

    def samples(
        self, name: str = "near", order: Tensor | None = None, teacher_order: Tensor | None = None,
        count: int | None = None, real_side: int = SIDE,
    ) -> Samples:  # fmt: skip
        """The images `name` as samples in the order `order`, and the teacher's in `teacher_order` (None: the same)."""
        order = torch.arange(IMAGES) if order is None else order
        rows, teachers = order[:count], (order if teacher_order is None else teacher_order)[:count]
        x_0, teacher_x_0 = images(name, self.shape)[rows], images("teacher", self.shape)[teachers]
        labels = rows % CLASSES if self.conditional else None
        prompts = None if labels is None else [f"a pattern of kind {label}" for label in labels.tolist()]
        real = WatchedSet(images("real", self.shape, real_side))
        return Samples(x_0, teacher_x_0, WatchedSet(x_0), WatchedSet(teacher_x_0), real, True, labels, prompts)

    def score(self, samples: Samples) -> float:
        """The score as the harness computes it; raises NotApplicable if the metric raises Unavailable."""
        try:
            check_needs(self.cls, samples)
            value = self.cls().score(samples)
        except Unavailable as reason:
            if not str(reason).strip():
                raise Fault("Unavailable is raised without a reason; tables show it instead of the score") from None
            raise NotApplicable(f"no score: {reason}") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Fault(f"score must return a float, got {type(value).__name__}")
        if not math.isfinite(value):
            raise Fault(f"score is {value}: raise Unavailable(reason) if it is undefined")
        return float(value)

    def try_score(self, samples: Samples) -> float | None:
        """The same; None if there is no score."""
        try:
            return self.score(samples)
        except NotApplicable:
            return None


# --- declarations ---------------------------------------------------------------------------------------------------


def declared(bench: MetricBench) -> str:
    """The registry accepts the class; it declares a unit, and a protocol with a version."""
    cls = bench.cls
    check_declared("metrics", cls)
    if not cls.unit.strip():
        raise Fault("unit is empty: say what the number counts or measures")
    if not VERSION.search(cls.protocol):
        raise Fault(
            f"protocol must have a version, such as {cls.name}/1: ..., to be increased whenever values change, got "
            f"{cls.protocol!r}"
        )
    facts = cls.describe()
    return f"{facts['unit']}, {facts['direction']} is better" if cls.direction != "none" else f"{facts['unit']}"


def network(bench: MetricBench) -> str:
    """The features of its network depend on each image alone."""
    cls = bench.cls.network
    if cls is None:
        raise NotApplicable("it uses no feature network")
    if not VERSION.search(cls.protocol):
        raise Fault(
            f"the protocol of {cls.__name__} must have a version, such as {cls.name}/1: ..., got {cls.protocol!r}"
        )
    try:
        loaded = networks_in(weights_folder()).get(cls)
    except Unavailable as reason:
        raise NotApplicable(str(reason)) from None
    inputs = to_uint8(images("near", bench.shape)[:NETWORK_IMAGES])

    def features(x: Tensor) -> Tensor:
        return torch.cat(list(extract(loaded, [x], "cpu")))

    with undisturbed(f"network {cls.name}", "features must depend on the image alone"):
        f = features(inputs)
    if f.shape != (NETWORK_IMAGES, cls.width):
        raise Fault(
            f"{cls.__name__} must give features (B, width) = {(NETWORK_IMAGES, cls.width)}, got {tuple(f.shape)}"
        )
    if not f.isfinite().all():
        raise Fault(f"{cls.__name__} gives features that are not finite")
    if (f == f[:1]).all():
        raise Fault(f"{cls.__name__} gives the same features for all images")
    if (f - features(inputs.flip(0)).flip(0)).abs().max() > SAME_FEATURES * f.abs().max():
        raise Fault(f"features of {cls.__name__} depend on the other images of the batch: is it in eval()?")
    return f"{cls.name}, {cls.width} features"


# --- what it uses ----------------------------------------------------------------------------------------------------


def needs(bench: MetricBench) -> str:
    """It uses nothing that it does not declare to need."""
    samples, declared_needs = bench.samples(), bench.cls.needs
    try:
        bench.score(samples)
    except NotApplicable:
        if not _used(samples.real) | _used(samples.images):
            raise
    except (Exception, SystemExit):  # the check `scores` reports it
        pass
    real = _used(samples.real)
    if real and not declared_needs & {Need.real, Need.real_images}:
        raise Fault("it uses real images, which not every run has: declare needs = frozenset({Need.real, ...})")
    if real & {"read", "features"} and Need.real_images not in declared_needs:
        raise Fault("it uses the real images themselves, not only their statistics: declare Need.real_images")
    generated = _used(samples.images) | _used(samples.teacher)
    if "features" in generated and Need.features not in declared_needs:
        raise Fault("it uses the features of every sample, not only their statistics: declare Need.features")
    if bench.cls.network is None and (real | generated) & {"features", "statistics"}:
        raise Fault("it uses a feature network and declares none: set `network`")
    if Need.same_noise not in declared_needs:
        _check_unpaired(bench)
    unused = {Need.real, Need.real_images} & declared_needs and not real
    hint = "; real images are declared, but not used here" if unused else ""
    return (f"as declared: {', '.join(sorted(declared_needs))}" if declared_needs else "nothing but the samples") + hint


def _used(watched: ImageSet) -> set[str]:
    assert isinstance(watched, WatchedSet)
    return watched.used


def _check_unpaired(bench: MetricBench) -> None:
    """Another order of the teacher's samples, each still of the class of its sample, must not change the score."""
    try:
        plain = bench.try_score(bench.samples())
        other = bench.try_score(bench.samples(teacher_order=torch.arange(IMAGES).roll(5 * CLASSES)))
    except (Exception, SystemExit):  # the check `scores` reports it
        return
    if plain is not None and other is not None and abs(plain - other) > _tolerance(bench, plain):
        raise Fault(
            f"with the teacher's samples in another order it is {other:.4g} instead of {plain:.4g}, so each sample is "
            "compared with the teacher's for the same noise: declare Need.same_noise"
        )


def _tolerance(bench: MetricBench, value: float) -> float:
    good, bad = (bench.try_score(bench.samples(name)) for name in ("teacher", "noise"))
    span = abs(good - bad) if good is not None and bad is not None else 0.0
    return ORDER_ERROR * max(abs(value), span)


# --- scores ----------------------------------------------------------------------------------------------------------


def scores(bench: MetricBench) -> str:
    """A score is a finite number, or Unavailable with a reason."""
    return f"{bench.score(bench.samples()):.4g} of {IMAGES} images"


def deterministic(bench: MetricBench) -> str:
    """The same samples have the same score, whatever the state of the global generators."""
    seed_global_generators(0)
    with undisturbed("score", "use a torch.Generator with a seed of the protocol"):
        first = bench.score(bench.samples())
    seed_global_generators(1)
    second = bench.score(bench.samples())
    if first != second:
        raise Fault(
            f"the same samples have scores {first:.6g} and {second:.6g}: draw from a generator with a fixed seed"
        )
    return "the same samples have the same score"


def unchanged(bench: MetricBench) -> str:
    """Samples and features are not changed in place: later metrics use them too."""
    samples, fresh = bench.samples(), bench.samples()
    bench.score(samples)
    for name in ("x_0", "teacher_x_0", "labels"):
        before, after = getattr(fresh, name), getattr(samples, name)
        if before is not None and differ(before, after):
            raise Fault(f"score changes samples.{name} in place: copy it first")
    for name in ("images", "teacher", "real"):
        seen = getattr(samples, name)
        assert isinstance(seen, WatchedSet)
        if seen.changed():
            raise Fault(f"score changes the features of samples.{name} in place: copy them first")
    return "samples are not changed"


def order(bench: MetricBench) -> str:
    """The order of the samples, together with the teacher's and the classes, does not matter."""
    shuffled = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    first, second = bench.score(bench.samples()), bench.score(bench.samples(order=shuffled))
    if abs(first - second) > _tolerance(bench, first):
        raise Fault(f"in another order the same samples have score {second:.4g} instead of {first:.4g}")
    error = abs(first - second)
    return "the same in another order" if error <= 1e-6 * abs(first) else f"in another order it changes by {error:.2g}"


def influence(bench: MetricBench) -> str:
    """The influences of images, if it gives them, are one finite number each, with mean 0, and follow their images."""
    shuffled = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    bench.score(bench.samples())
    found, other = (bench.cls().influence(bench.samples(order=rows)) for rows in (None, shuffled))
    if found is None or other is None:
        raise NotApplicable("it gives no influences: methods are compared over seeds only")
    if found.shape != (IMAGES,) or not found.isfinite().all():
        raise Fault(f"influence must return a finite number for each image, (N,) = ({IMAGES},)")
    size = found.abs().mean().item()
    if abs(found.double().mean().item()) > ORDER_ERROR * size:
        raise Fault(f"influences must have mean 0, got {found.double().mean():.4g}: subtract it")
    if (found[shuffled] - other).abs().mean().item() > ORDER_ERROR * size:
        raise Fault("the influences do not follow the images if these are in another order")
    return f"of {size:.2g} in the mean"


def direction(bench: MetricBench) -> str:
    """By the declared direction, the teacher's own samples are not worse than both noise and a constant."""
    good = bench.score(bench.samples("teacher"))
    noise, constant = (bench.try_score(bench.samples(name)) for name in ("noise", "constant"))
    bad = [value for value in (noise, constant) if value is not None]
    if not bad:
        raise NotApplicable("neither noise nor a constant has a score")
    others = [f"{name} {value:.4g}" for name, value in (("noise", noise), ("constant", constant)) if value is not None]
    seen = f"the teacher's samples {good:.4g}, {', '.join(others)}"
    if len(bad) == 2 and good == bad[0] == bad[1]:
        raise Fault(f"{seen}: it does not depend on the samples")
    if bench.cls.direction == "none":
        return f"{seen}; neither is better, as declared"
    if Need.prompts in bench.cls.needs:
        return f"{seen}; the bench's images do not show its prompts"
    worse: Callable[[float], bool] = {"lower": lambda b: good > b, "higher": lambda b: good < b}[bench.cls.direction]
    if all(worse(value) for value in bad):
        raise Fault(f"{seen}: by direction = {bench.cls.direction!r} the teacher's samples are the worst")
    return seen


def sizes(bench: MetricBench) -> str:
    """With real images of another size, and with two samples, it gives a score or a reason."""
    results, reasons = [], []
    for what, samples in (
        (f"real images of {2 * SIDE}x{2 * SIDE}", bench.samples(real_side=2 * SIDE)),
        ("two samples", bench.samples(count=2)),
    ):
        try:
            results.append(f"{what}: {bench.score(samples):.4g}")
        except NotApplicable as reason:
            reasons.append(str(reason))
            results.append(f"{what}: {reason}")
        except UserError as error:
            results.append(f"{what}: refused ({error})")
        except Fault as fault:
            raise Fault(f"{what}: {fault}") from fault
        except (Exception, SystemExit) as error:
            raise Fault(f"{what}: {where(error, bench.cls)}; raise Unavailable(reason) if there is no score") from error
    if len(set(reasons)) == 1 and len(reasons) == len(results):
        raise NotApplicable(reasons[0])
    return "; ".join(results)


# --- the suite -------------------------------------------------------------------------------------------------------


@contextmanager
def benches(
    cls: type[Metric], config: None, distribution_images: int, dataset: Dataset | None
) -> Iterator[list[MetricBench]]:
    """Colour images, and grey ones with classes and prompts."""
    if config is not None or dataset is not None:
        raise UserError("a metric has no settings and is checked on generated images: give no config and no dataset")
    yield [MetricBench(label, cls) for label in SHAPES]


CHECKS = [
    Check(declared, benches="first"),
    Check(network, ("declared",), "first"),
    Check(needs, ("network",)),
    Check(scores, ("needs",)),
    Check(deterministic, ("scores",)),
    Check(unchanged, ("scores",)),
    Check(order, ("deterministic",)),
    Check(influence, ("deterministic",)),
    Check(direction, ("scores",)),
    Check(sizes, ("scores",)),
]
