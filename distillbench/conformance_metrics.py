"""The checks of metrics: each holds one promise of :mod:`distillbench.metrics` against a score of made-up images.

Real images and the teacher's answers are draws of the same law; samples are the teacher's answers, a little disturbed.
Good samples are these answers themselves, bad ones are white noise and a constant grey.

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

from distillbench.checking import (
    Check,
    Fault,
    NotApplicable,
    check_declared,
    differ,
    seed_global_generators,
    undisturbed,
    where,
)
from distillbench.datasets import Dataset, to_uint8
from distillbench.errors import Unavailable, UserError
from distillbench.features import FeatureNetwork, ImageSet, Networks, look
from distillbench.frechet import GaussianStatistics
from distillbench.metrics import Metric, Need, Samples, check_needs
from distillbench.pretrained import weights_folder

IMAGES, CLASSES, SIDE = 128, 4, 16
DISTURBANCE = 0.03  # standard deviation of what is added to the teacher's answers
SEEN = 12  # images that a network is tried on
ORDER_ERROR = 0.05  # of what a score is, or of what it differs between good and bad samples: seeded subsets may move it
SAME_FEATURES = 1e-4  # relative to the largest
VERSION = re.compile(r"\w/\d+")
SHAPES = {"colour": (3, SIDE, SIDE), "grey, with classes": (1, SIDE, SIDE)}


# --- images ----------------------------------------------------------------------------------------------------------


@functools.cache
def images(name: str, shape: tuple[int, int, int], side: int = SIDE) -> Tensor:
    """Images in [-1, 1], (N,C,side,side): "real" or "teacher", smooth patterns around one for each class; "near",
    "noise" or "constant"."""
    generator = torch.Generator().manual_seed({"real": 1, "teacher": 2, "near": 3}.get(name, 4))
    if name == "noise":
        return 2 * torch.rand(IMAGES, *shape, generator=generator) - 1
    if name == "constant":
        return torch.zeros(IMAGES, *shape)
    if name == "near":
        x_0 = images("teacher", shape)
        return (x_0 + DISTURBANCE * torch.randn(x_0.shape, generator=generator)).clamp(-1, 1)
    patterns = torch.randn(CLASSES, shape[0], 4, 4, generator=torch.Generator().manual_seed(0))
    own = torch.randn(IMAGES, shape[0], 4, 4, generator=generator)
    coarse = 0.4 * patterns[torch.arange(IMAGES) % CLASSES] + 0.25 * own
    return interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True).clamp(-1, 1)


@dataclass(frozen=True)
class Pictures:
    """8-bit images (N,C,H,W), known by their digest."""

    sha256: str
    images: Tensor = field(compare=False)

    @classmethod
    def of(cls, x_0: Tensor) -> Pictures:
        x_0 = to_uint8(x_0).contiguous()
        return cls(hashlib.sha256(f"{tuple(x_0.shape)}".encode() + x_0.numpy().tobytes()).hexdigest(), x_0)


@functools.cache
def eyes(folder: Any) -> Networks:
    """Networks with the weights in `folder`, loaded once for all metrics."""
    return Networks(folder, "cpu")


@functools.lru_cache(maxsize=64)
def looked(network: type[FeatureNetwork], pictures: Pictures, folder: Any) -> tuple[Tensor, GaussianStatistics]:
    """Features and statistics, once for all metrics of a network."""
    x_0 = pictures.images
    shape = (x_0.shape[1], x_0.shape[2], x_0.shape[3])
    plain = ImageSet(lambda: [x_0], len(x_0), shape, eyes(folder))
    return plain.features(network), plain.statistics(network)


class WatchedSet(ImageSet):
    """Images that note what is asked of them: "read", "statistics" or "features"."""

    def __init__(self, x_0: Tensor) -> None:
        self.pictures, self.asked = Pictures.of(x_0), set[str]()
        shape = (x_0.shape[1], x_0.shape[2], x_0.shape[3])
        super().__init__(self._read, len(x_0), shape, eyes(weights_folder()))

    def _read(self) -> Iterator[Tensor]:
        self.asked.add("read")
        yield from self.pictures.images.clone().split(100)

    def statistics(self, network: type[FeatureNetwork]) -> GaussianStatistics:
        found = super().statistics(network)
        self.asked.add("statistics")
        return found

    def features(self, network: type[FeatureNetwork]) -> Tensor:
        found = super().features(network)
        self.asked.add("features")
        return found

    def _see(self, network: type[FeatureNetwork], keep: bool) -> None:
        features, self._statistics[network] = looked(network, self.pictures, self.networks.folder)
        self._features[network] = features.clone()

    def changed(self) -> bool:
        """Whether features that were handed out are not what they were."""
        folder = self.networks.folder
        return any(differ(f, looked(network, self.pictures, folder)[0]) for network, f in self._features.items())


@dataclass(frozen=True)
class Bench:
    """A kind of images. What it returns is made anew each time."""

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
        count: int = IMAGES, real_side: int = SIDE,
    ) -> Samples:  # fmt: skip
        """The images `name` as samples, in this order; the teacher's answers in the same one unless it is given."""
        every = torch.arange(IMAGES)
        order = every if order is None else order
        rows, theirs = order[:count], (order if teacher_order is None else teacher_order)[:count]
        x_0, teacher_x_0 = images(name, self.shape)[rows], images("teacher", self.shape)[theirs]
        labels = rows % CLASSES if self.conditional else None
        prompts = None if labels is None else [f"a pattern of kind {label}" for label in labels.tolist()]
        real = WatchedSet(images("real", self.shape, real_side))
        return Samples(x_0, teacher_x_0, WatchedSet(x_0), WatchedSet(teacher_x_0), real, True, labels, prompts)

    def score(self, samples: Samples) -> float:
        """As the harness scores; raises NotApplicable where there is no score, for a reason."""
        try:
            check_needs(self.cls, samples)
            value = self.cls().score(samples)
        except Unavailable as reason:
            if not str(reason).strip():
                raise Fault("Unavailable is raised without a reason, which stands in the table for the score") from None
            raise NotApplicable(f"no score: {reason}") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Fault(f"score must return a float, got {type(value).__name__}")
        if not math.isfinite(value):
            raise Fault(f"score is {value}: raise Unavailable(reason) where it has no meaning")
        return float(value)

    def try_score(self, samples: Samples) -> float | None:
        """The same; None where there is none."""
        try:
            return self.score(samples)
        except NotApplicable:
            return None


# --- what it is ------------------------------------------------------------------------------------------------------


def declared(bench: Bench) -> str:
    """The class is one that the registry takes; unit and protocol are said, the protocol with a version."""
    cls = bench.cls
    check_declared("metrics", cls)
    if not cls.unit.strip():
        raise Fault("unit is empty: say what the number counts, or in what it is measured")
    if not VERSION.search(cls.protocol):
        raise Fault(
            f"protocol must have a version, such as {cls.name}/1: ..., to be raised whenever values change, got "
            f"{cls.protocol!r}"
        )
    facts = cls.describe()
    return f"{facts['unit']}, {facts['direction']} is better" if cls.direction != "none" else f"{facts['unit']}"


def network(bench: Bench) -> str:
    """The features of its network are a function of each image alone."""
    cls = bench.cls.network
    if cls is None:
        raise NotApplicable("it looks through no network")
    if not VERSION.search(cls.protocol):
        raise Fault(
            f"the protocol of {cls.__name__} must have a version, such as {cls.name}/1: ..., got {cls.protocol!r}"
        )
    try:
        made = eyes(weights_folder()).get(cls)
    except Unavailable as reason:
        raise NotApplicable(str(reason)) from None
    pictures = to_uint8(images("near", bench.shape)[:SEEN])

    def seen(rows: Tensor) -> Tensor:
        return torch.cat(list(look(made, [rows], "cpu")))

    with undisturbed(f"network {cls.name}", "features are a function of the image"):
        f = seen(pictures)
    if f.shape != (SEEN, cls.width):
        raise Fault(f"{cls.__name__} must give features (B, width) = {(SEEN, cls.width)}, got {tuple(f.shape)}")
    if not f.isfinite().all():
        raise Fault(f"{cls.__name__} gives features that are not finite")
    if (f == f[:1]).all():
        raise Fault(f"{cls.__name__} gives all images the same features")
    if (f - seen(pictures.flip(0)).flip(0)).abs().max() > SAME_FEATURES * f.abs().max():
        raise Fault(f"features of {cls.__name__} depend on the images beside: is it in eval()?")
    return f"{cls.name}, {cls.width} features"


# --- what it looks at ------------------------------------------------------------------------------------------------


def needs(bench: Bench) -> str:
    """It looks at nothing that it does not declare to need."""
    samples, declared_needs = bench.samples(), bench.cls.needs
    try:
        bench.score(samples)
    except NotApplicable:
        if not _asked(samples.real) | _asked(samples.images):
            raise
    except (Exception, SystemExit):  # whatever it was, another check tells
        pass
    real = _asked(samples.real)
    if real and not declared_needs & {Need.real, Need.real_images}:
        raise Fault("it looks at real images, which not every run has: declare needs = frozenset({Need.real, ...})")
    if real & {"read", "features"} and Need.real_images not in declared_needs:
        raise Fault("it looks at the real images themselves, not at their statistics alone: declare Need.real_images")
    ours = _asked(samples.images) | _asked(samples.teacher)
    if "features" in ours and Need.features not in declared_needs:
        raise Fault("it looks at the features of every sample, not at statistics alone: declare Need.features")
    if bench.cls.network is None and (real | ours) & {"features", "statistics"}:
        raise Fault("it looks through a network and declares none: set `network`")
    if Need.same_noise not in declared_needs:
        _check_unpaired(bench)
    unused = {Need.real, Need.real_images} & declared_needs and not real
    hint = "; real images are declared, and not looked at here" if unused else ""
    return (
        f"as declared: {', '.join(sorted(declared_needs))}" if declared_needs else "nothing beside the samples"
    ) + hint


def _asked(images_seen: ImageSet) -> set[str]:
    assert isinstance(images_seen, WatchedSet)
    return images_seen.asked


def _check_unpaired(bench: Bench) -> None:
    """The teacher's answers in another order, each still of the class of its sample, must not matter."""
    try:
        plain = bench.try_score(bench.samples())
        other = bench.try_score(bench.samples(teacher_order=torch.arange(IMAGES).roll(5 * CLASSES)))
    except (Exception, SystemExit):  # another check tells
        return
    if plain is not None and other is not None and abs(plain - other) > _tolerance(bench, plain):
        raise Fault(
            f"with the teacher's answers in another order it is {other:.4g} instead of {plain:.4g}, so each sample is "
            "compared with the answer to the same noise: declare Need.same_noise"
        )


def _tolerance(bench: Bench, value: float) -> float:
    good, bad = (bench.try_score(bench.samples(name)) for name in ("teacher", "noise"))
    away = abs(good - bad) if good is not None and bad is not None else 0.0
    return ORDER_ERROR * max(abs(value), away)


# --- what it says ----------------------------------------------------------------------------------------------------


def scores(bench: Bench) -> str:
    """A score is a finite number, or Unavailable with a reason."""
    return f"{bench.score(bench.samples()):.4g} of {IMAGES} images"


def deterministic(bench: Bench) -> str:
    """The same samples have the same score, whatever the global generators are."""
    seed_global_generators(0)
    with undisturbed("score", "use a torch.Generator with a seed of the protocol"):
        first = bench.score(bench.samples())
    seed_global_generators(1)
    second = bench.score(bench.samples())
    if first != second:
        raise Fault(f"the same samples have scores {first:.6g} and {second:.6g}: seed what is random in the protocol")
    return "the same samples, the same score"


def unchanged(bench: Bench) -> str:
    """What it is given stays as it is, for the scores after it."""
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
    return "samples stay as they are"


def order(bench: Bench) -> str:
    """The order of the samples, with the teacher's answers and the classes beside them, does not matter."""
    shuffled = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))
    first, second = bench.score(bench.samples()), bench.score(bench.samples(order=shuffled))
    if abs(first - second) > _tolerance(bench, first):
        raise Fault(f"in another order the same samples have score {second:.4g} instead of {first:.4g}")
    away = abs(first - second)
    return "the same in another order" if away <= 1e-6 * abs(first) else f"in another order it moves by {away:.2g}"


def direction(bench: Bench) -> str:
    """The teacher's own answers are not worse than noise and a constant, by the declared direction."""
    good = bench.score(bench.samples("teacher"))
    noise, constant = (bench.try_score(bench.samples(name)) for name in ("noise", "constant"))
    bad = [value for value in (noise, constant) if value is not None]
    if not bad:
        raise NotApplicable("neither noise nor a constant has a score")
    told = [f"{name} {value:.4g}" for name, value in (("noise", noise), ("constant", constant)) if value is not None]
    seen = f"the teacher's answers {good:.4g}, {', '.join(told)}"
    if len(bad) == 2 and good == bad[0] == bad[1]:
        raise Fault(f"{seen}: it is the same whatever the samples are")
    if bench.cls.direction == "none":
        return f"{seen}; neither is better, as declared"
    if Need.prompts in bench.cls.needs:
        return f"{seen}; what they show says nothing of the bench's prompts"
    worse: Callable[[float], bool] = {"lower": lambda b: good > b, "higher": lambda b: good < b}[bench.cls.direction]
    if all(worse(value) for value in bad):
        raise Fault(f"{seen}: by direction = {bench.cls.direction!r} the teacher's answers are the worst of them")
    return seen


def sizes(bench: Bench) -> str:
    """Real images of another size, and a few samples only, have a score or a reason."""
    told, reasons = [], []
    for what, samples in (
        (f"real images of {2 * SIDE}x{2 * SIDE}", bench.samples(real_side=2 * SIDE)),
        ("two samples", bench.samples(count=2)),
    ):
        try:
            told.append(f"{what}: {bench.score(samples):.4g}")
        except NotApplicable as reason:
            reasons.append(str(reason))
            told.append(f"{what}: {reason}")
        except UserError as error:
            told.append(f"{what}: refused ({error})")
        except Fault as fault:
            raise Fault(f"{what}: {fault}") from fault
        except (Exception, SystemExit) as error:
            raise Fault(
                f"{what} end in {where(error, bench.cls)}: raise Unavailable(reason) where there is no score"
            ) from error
    if len(set(reasons)) == 1 and len(reasons) == len(told):
        raise NotApplicable(reasons[0])
    return "; ".join(told)


# --- the suite -------------------------------------------------------------------------------------------------------


@contextmanager
def benches(cls: type[Metric], config: None, law_images: int, dataset: Dataset | None) -> Iterator[list[Bench]]:
    """Colour images, and grey ones with classes and prompts."""
    if config is not None or dataset is not None:
        raise UserError("a metric has no settings and is checked on images of its bench")
    yield [Bench(label, cls) for label in SHAPES]


CHECKS = [
    Check(declared, benches="first"),
    Check(network, ("declared",), "first"),
    Check(needs, ("network",)),
    Check(scores, ("needs",)),
    Check(deterministic, ("scores",)),
    Check(unchanged, ("scores",)),
    Check(order, ("deterministic",)),
    Check(direction, ("scores",)),
    Check(sizes, ("scores",)),
]
