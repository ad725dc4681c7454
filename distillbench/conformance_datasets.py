"""The checks of datasets: each holds one promise of :mod:`distillbench.datasets` against a dataset.

| symbol | meaning                          | shape                                        |
|--------|----------------------------------|----------------------------------------------|
| i      | indices                          | (B,) int64                                   |
| x_0    | images as they are read          | (B,C,H,W) uint8, or floating point in [-1, 1] |
| m, s   | mean, standard deviation of x_0  | (C H W,) float64, over images                |
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.checking import (
    Check,
    Fault,
    NotApplicable,
    check_declared,
    differ,
    seed_global_generators,
    settings_with_help,
    undisturbed,
)
from distillbench.datasets import Dataset, DatasetConfig, to_float
from distillbench.errors import UserError

READ, LABELLED = 64, 4096  # images that are read, labels that are looked at
LAW_READ = 2048  # images that are compared with the law
OUTSIDE = 0.01  # share of floating-point values that may leave [-1, 1]: a law's tails
SURPRISE = 6.0  # standard errors
ROUNDING = 1 / 127.5  # of 8-bit values in [-1, 1]
LARGEST_STD_ERROR = 0.25  # relative
DIGEST = re.compile(r"[0-9a-f]{16,128}")


@dataclass(frozen=True)
class Bench:
    """A dataset and its settings."""

    cls: type[Dataset]
    given: DatasetConfig | None
    label: str = "dataset"
    conditional: bool = False

    def config(self) -> DatasetConfig:
        return self.cls.Config() if self.given is None else copy.deepcopy(self.given)

    def build(self) -> Dataset:
        return self.cls(self.config())

    @functools.cached_property
    def dataset(self) -> Dataset:
        """One for all checks."""
        return self.build()

    def indices(self, most: int = READ) -> Tensor:
        """Different indices from the first to the last. Raises NotApplicable where there is none."""
        count = len(self.dataset)
        if not count:
            raise NotApplicable("it has no images")
        return torch.linspace(0, count - 1, min(most, count), dtype=torch.float64).round().long().unique()


def declared(bench: Bench) -> str:
    """The class is one that the registry takes, its licence is named, and every setting says what it is."""
    check_declared("datasets", bench.cls)
    if not bench.cls.licence.strip():
        raise Fault("licence is empty: say under what terms the images may be used")
    count = settings_with_help(bench.cls.Config)
    bench.config()
    return f"licence: {bench.cls.licence}; {count} settings with help"


def builds(bench: Bench) -> str:
    """It is built from its settings. A UserError says what is missing."""
    try:
        with undisturbed("__init__", "use a torch.Generator with a seed of the settings"):
            dataset = bench.build()
            count = len(dataset)
    except UserError as error:
        raise NotApplicable(f"it is not built with these settings: {error}") from error
    return f"{count:,} images"


def described(bench: Bench) -> str:
    """What it says of itself is of the right types, and goes together."""
    dataset = bench.dataset
    shape, sha256 = dataset.shape, dataset.sha256
    sized = isinstance(shape, tuple) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    if not sized:
        raise Fault(f"shape must be a tuple (C, H, W) of positive whole numbers, got {shape!r}")
    if not isinstance(sha256, str) or not DIGEST.fullmatch(sha256):
        raise Fault(f"sha256 must be the digest of the pixels, 16 or more of 0-9a-f, got {sha256!r}")
    for name in ("split", "resizer"):
        if not isinstance(getattr(dataset, name), str) or not getattr(dataset, name):
            raise Fault(f"{name} must be a word, got {getattr(dataset, name)!r}")
    if type(dataset.classes) is not int or dataset.classes < 0:
        raise Fault(f"classes must be the number of classes, 0 for none, got {dataset.classes!r}")
    _check_prompts(dataset)
    asked = dataset.evaluated
    if asked is not None and not (asked.step == 1 and 0 < asked.start < asked.stop == dataset.classes):
        raise Fault(
            f"evaluated must be a range from the first class that training leaves out to {dataset.classes}, the number "
            f"of classes, got {asked!r}"
        )
    kind = f"{dataset.classes} classes" if dataset.classes else "no classes"
    return f"images of {'x'.join(map(str, shape))}, {kind}, sha256 {sha256[:8]}"


def _check_prompts(dataset: Dataset) -> None:
    prompts = dataset.prompts
    if prompts is None:
        return
    if len(prompts) != dataset.classes:
        raise Fault(f"prompts must have one text for each class: {len(prompts)} texts, classes = {dataset.classes}")
    if not isinstance(prompts[0], str):
        raise Fault(f"prompts must be texts, got {type(prompts[0]).__name__}")


# --- images ----------------------------------------------------------------------------------------------------------


def images(bench: Bench) -> str:
    """Images are of the declared shape, and of one of the two types and ranges."""
    dataset, i = bench.dataset, bench.indices()
    with undisturbed("read", "an image is a function of its index"):
        x_0 = dataset.read(i)
    if not isinstance(x_0, Tensor):
        raise Fault(f"read must return a tensor, got {type(x_0).__name__}")
    if x_0.shape != (len(i), *dataset.shape):
        raise Fault(f"read must return (B,C,H,W) = {(len(i), *dataset.shape)} for B indices, got {tuple(x_0.shape)}")
    if x_0.dtype != torch.uint8 and not x_0.is_floating_point():
        raise Fault(f"read must return uint8, or floating point in [-1, 1], got {x_0.dtype}")
    values = to_float(x_0)
    if not values.isfinite().all():
        raise Fault("images are not finite")
    low, high, outside = values.min().item(), values.max().item(), (values.abs() > 1).double().mean().item()
    if outside > OUTSIDE:
        raise Fault(f"floating-point images must lie in [-1, 1], got values from {low:.3g} to {high:.3g}")
    if low == high:
        raise Fault(f"all values of {len(i)} images are the same")
    if len(i) > 1 and (x_0 == x_0[:1]).all():
        raise Fault(f"{len(i)} images at different indices are all the same")
    text = f"{x_0.dtype}".removeprefix("torch.") + f", values in [-1, 1] from {low:.2f} to {high:.2f}"
    if x_0.dtype == torch.uint8 and x_0.max() <= 1:
        return f"{text}; no 8-bit value is above 1: were they meant to be 0 to 255?"
    if x_0.dtype != torch.uint8 and low >= 0:
        return f"{text}; none is negative: were images in [0, 1] meant to be spread over [-1, 1]?"
    return text


def by_index(bench: Bench) -> str:
    """An index names an image, in whatever order and company it is asked for, and as often as it is."""
    dataset, i = bench.dataset, bench.indices()
    given, x_0 = i.clone(), dataset.read(i)
    if differ(given, i):
        raise Fault("read changes the indices that it is given: copy them first")
    kept = x_0.clone()
    x_0.fill_(0)
    if differ(dataset.read(i), kept):
        raise Fault("read gives other images the second time: is what it returned a view of what it keeps? Copy it")
    order = torch.randperm(len(i), generator=torch.Generator().manual_seed(0))
    if differ(dataset.read(i[order]), kept[order]):
        raise Fault("in another order read gives other images: image k of the answer must be the one at indices[k]")
    twice = torch.cat([order[:3], order[:3]])
    if differ(dataset.read(i[twice]), kept[twice]):
        raise Fault("indices that are asked for twice in a batch must give the same image twice")
    alone = torch.cat([dataset.read(i[k : k + 1]) for k in range(min(4, len(i)))])
    if differ(alone, kept[: len(alone)]):
        raise Fault("read one by one, images differ from those of a batch: let nothing be computed over the batch")
    return "the same index, the same image"


def repeatable(bench: Bench) -> str:
    """The same settings give the same images and the same digest, whatever the global generators are."""
    first, i = bench.dataset, bench.indices()
    seed_global_generators(1)
    second = bench.build()
    if len(first) != len(second):
        raise Fault(f"built twice from the same settings it has {len(first):,} images, then {len(second):,}")
    if differ(first.read(i), second.read(i)):
        raise Fault(
            "built twice from the same settings it gives other images: draw from a torch.Generator with a seed of the "
            "settings, and sort the files that are listed"
        )
    if first.sha256 != second.sha256:
        raise Fault("built twice from the same settings its sha256 differs: take the digest of the pixels alone")
    return "built again, the same images and the same sha256"


def labels(bench: Bench) -> str:
    """Labels are classes, by index like the images; without classes there are none."""
    dataset, i = bench.dataset, bench.indices(LABELLED)
    if not dataset.classes:
        different = _labels_unasked(dataset, i)
        if different < len(i):
            raise Fault(f"labels() gives {different} classes and classes is 0: set classes to their number")
        return "no classes, no labels"
    with undisturbed("labels", "a label is a function of its index"):
        found = dataset.labels(i)
    if not isinstance(found, Tensor) or found.shape != i.shape or found.dtype != torch.int64:
        got = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise Fault(f"labels must return (B,) int64, here {tuple(i.shape)}, got {got}")
    if found.min() < 0 or found.max() >= dataset.classes:
        raise Fault(
            f"labels must be 0 to {dataset.classes - 1} (classes = {dataset.classes}), got {found.min().item()} to "
            f"{found.max().item()}"
        )
    order = torch.randperm(len(i), generator=torch.Generator().manual_seed(0))
    if differ(dataset.labels(i[order]), found[order]) or differ(bench.build().labels(i), found):
        raise Fault("labels do not go with their indices: asked in another order, or built again, they are others")
    return f"{len(found.unique())} of {dataset.classes} classes in {len(i):,} labels"


def _labels_unasked(dataset: Dataset, i: Tensor) -> int:
    """How many different labels a dataset without classes gives; as many as there are images where it gives none."""
    try:
        return len(dataset.labels(i).unique())
    except (Exception, SystemExit):  # a refusal in any form
        return len(i)


def law(bench: Bench) -> str:
    """Images have the mean and the standard deviation of the law that they are said to be drawn from."""
    dataset = bench.dataset
    if dataset.law is None:
        raise NotApplicable("no law is given")
    if tuple(dataset.law.shape) != tuple(dataset.shape):
        raise Fault(f"the law is of images of {tuple(dataset.law.shape)}, the dataset's are {dataset.shape}")
    raw = dataset.read(bench.indices(LAW_READ))
    x_0 = to_float(raw).double().flatten(1)
    mean, covariance = dataset.law.moments()
    s = covariance.diagonal().sqrt()
    slack = ROUNDING if raw.dtype == torch.uint8 else 0.0
    away = (x_0.mean(dim=0) - mean).abs().max().item()
    if ((x_0.mean(dim=0) - mean).abs() > SURPRISE * s / len(x_0) ** 0.5 + slack).any():
        raise Fault(f"images do not have the mean of the law: over {len(x_0):,} of them it is off by up to {away:.3g}")
    ratio = (x_0.var(dim=0).sum() / s.square().sum()).sqrt().item()
    if abs(ratio - 1) > LARGEST_STD_ERROR + SURPRISE / (2 * len(x_0)) ** 0.5:
        raise Fault(f"images do not have the standard deviation of the law but {ratio:.2f} of it")
    return f"mean off by up to {away:.2g}, standard deviation {ratio:.2f} of the law's, over {len(x_0):,} images"


# --- the suite -------------------------------------------------------------------------------------------------------


@contextmanager
def benches(
    cls: type[Dataset], config: DatasetConfig | None, law_images: int, dataset: Dataset | None
) -> Iterator[list[Bench]]:
    """One, with the settings that are given."""
    if dataset is not None:
        raise UserError("a dataset is checked by itself: dataset= is for teachers")
    yield [Bench(cls, config)]


CHECKS = [
    Check(declared),
    Check(builds, ("declared",), must_apply=True),
    Check(described, ("builds",)),
    Check(images, ("described",)),
    Check(by_index, ("images",)),
    Check(repeatable, ("by_index",)),
    Check(labels, ("described",)),
    Check(law, ("images",)),
]
