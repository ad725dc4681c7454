"""The conformance suite for datasets: each check tests one promise of :mod:`distillbench.datasets.dataset`.

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

from distillbench.datasets.dataset import Dataset, DatasetConfig, to_float
from distillbench.errors import UserError
from distillbench.testing.checks import (
    Check,
    Fault,
    NotApplicable,
    check_declared,
    differ,
    seed_global_generators,
    settings_with_help,
    undisturbed,
)

READ, LABELLED = 64, 4096  # images that are read, labels that are read
DISTRIBUTION_READ = 2048  # images that are compared with the distribution
OUTSIDE = 0.01  # share of floating-point values that may leave [-1, 1]: tails of a distribution
SURPRISE = 6.0  # standard errors
ROUNDING = 1 / 127.5  # of 8-bit values in [-1, 1]
LARGEST_STD_ERROR = 0.25  # relative
DIGEST = re.compile(r"[0-9a-f]{16,128}")


@dataclass(frozen=True)
class DatasetBench:
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
        """One object for all checks."""
        return self.build()

    def indices(self, most: int = READ) -> Tensor:
        """Different indices, evenly spaced from the first to the last; raises NotApplicable if there are no images."""
        count = len(self.dataset)
        if not count:
            raise NotApplicable("it has no images")
        return torch.linspace(0, count - 1, min(most, count), dtype=torch.float64).round().long().unique()


def declared(bench: DatasetBench) -> str:
    """The registry accepts the class, it names its licence, and every setting has a help text."""
    check_declared("datasets", bench.cls)
    if not bench.cls.licence.strip():
        raise Fault("licence is empty: say under which terms the images may be used")
    count = settings_with_help(bench.cls.Config)
    bench.config()
    return f"licence: {bench.cls.licence}; {count} settings with help"


def builds(bench: DatasetBench) -> str:
    """It can be built from its settings. A UserError says what is missing."""
    try:
        with undisturbed("__init__", "use a torch.Generator with a seed of the settings"):
            dataset = bench.build()
            count = len(dataset)
    except UserError as error:
        raise NotApplicable(f"it cannot be built with these settings: {error}") from error
    return f"{count:,} images"


def described(bench: DatasetBench) -> str:
    """Its attributes have the right types and are consistent."""
    dataset = bench.dataset
    shape, sha256 = dataset.shape, dataset.sha256
    sized = isinstance(shape, tuple) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    if not sized:
        raise Fault(f"shape must be a tuple (C, H, W) of positive integers, got {shape!r}")
    if not isinstance(sha256, str) or not DIGEST.fullmatch(sha256):
        raise Fault(f"sha256 must be the digest of the pixels, 16 or more of 0-9a-f, got {sha256!r}")
    for name in ("split", "resizer"):
        if not isinstance(getattr(dataset, name), str) or not getattr(dataset, name):
            raise Fault(f"{name} must be a non-empty string, got {getattr(dataset, name)!r}")
    if type(dataset.classes) is not int or dataset.classes < 0:
        raise Fault(f"classes must be the number of classes, 0 for none, got {dataset.classes!r}")
    _check_prompts(dataset)
    evaluated = dataset.evaluated
    if evaluated is not None and not (evaluated.step == 1 and 0 < evaluated.start < evaluated.stop == dataset.classes):
        raise Fault(
            f"evaluated must be a range from the first class that is not trained on to {dataset.classes}, the number "
            f"of classes, got {evaluated!r}"
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


def images(bench: DatasetBench) -> str:
    """Images have the declared shape, and are uint8 or floating point in [-1, 1]."""
    dataset, i = bench.dataset, bench.indices()
    with undisturbed("read", "an image must depend on its index alone"):
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
        raise Fault(f"all values of {len(i)} images are equal")
    if len(i) > 1 and (x_0 == x_0[:1]).all():
        raise Fault(f"{len(i)} images at different indices are all equal")
    text = f"{x_0.dtype}".removeprefix("torch.") + f", values in [-1, 1] from {low:.2f} to {high:.2f}"
    if x_0.dtype == torch.uint8 and x_0.max() <= 1:
        return f"{text}; no 8-bit value is above 1: should they be 0 to 255?"
    if x_0.dtype != torch.uint8 and low >= 0:
        return f"{text}; none is negative: should images in [0, 1] be scaled to [-1, 1]?"
    return text


def by_index(bench: DatasetBench) -> str:
    """An index always gives the same image, whatever the order and the batch."""
    dataset, i = bench.dataset, bench.indices()
    given, x_0 = i.clone(), dataset.read(i)
    if differ(given, i):
        raise Fault("read changes the given indices in place: copy them first")
    kept = x_0.clone()
    x_0.fill_(0)
    if differ(dataset.read(i), kept):
        raise Fault("read gives other images the second time: does it return a view of its own storage? Return a copy")
    order = torch.randperm(len(i), generator=torch.Generator().manual_seed(0))
    if differ(dataset.read(i[order]), kept[order]):
        raise Fault("in another order read gives other images: image k of the result must be the one at indices[k]")
    twice = torch.cat([order[:3], order[:3]])
    if differ(dataset.read(i[twice]), kept[twice]):
        raise Fault("an index that occurs twice in a batch must give the same image twice")
    alone = torch.cat([dataset.read(i[k : k + 1]) for k in range(min(4, len(i)))])
    if differ(alone, kept[: len(alone)]):
        raise Fault("read one by one, images differ from those of a batch: compute nothing over the batch")
    return "the same index gives the same image"


def repeatable(bench: DatasetBench) -> str:
    """The same settings give the same images and sha256, whatever the state of the global generators."""
    first, i = bench.dataset, bench.indices()
    seed_global_generators(1)
    second = bench.build()
    if len(first) != len(second):
        raise Fault(f"built twice from the same settings it has {len(first):,} images, then {len(second):,}")
    if differ(first.read(i), second.read(i)):
        raise Fault(
            "built twice from the same settings it gives other images: draw from a torch.Generator with a seed of the "
            "settings, and sort lists of files"
        )
    if first.sha256 != second.sha256:
        raise Fault("built twice from the same settings its sha256 differs: take the hash of the pixels alone")
    return "built again, it gives the same images and the same sha256"


def labels(bench: DatasetBench) -> str:
    """Labels are classes, by index like the images; a dataset without classes has none."""
    dataset, i = bench.dataset, bench.indices(LABELLED)
    if not dataset.classes:
        different = _undeclared_labels(dataset, i)
        if different < len(i):
            raise Fault(f"labels() gives {different} classes and classes is 0: set classes to their number")
        return "no classes, no labels"
    with undisturbed("labels", "a label must depend on its index alone"):
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
        raise Fault("labels do not match their indices: in another order, or built again, they differ")
    return f"{len(found.unique())} of {dataset.classes} classes in {len(i):,} labels"


def _undeclared_labels(dataset: Dataset, i: Tensor) -> int:
    """The number of different labels of a dataset without classes; the number of images if it gives none."""
    try:
        return len(dataset.labels(i).unique())
    except (Exception, SystemExit):  # any refusal
        return len(i)


def distribution(bench: DatasetBench) -> str:
    """Images have the mean and the standard deviation of the distribution that is declared as `distribution`."""
    dataset = bench.dataset
    if dataset.distribution is None:
        raise NotApplicable("no distribution is declared")
    if tuple(dataset.distribution.shape) != tuple(dataset.shape):
        raise Fault(
            f"the declared distribution has the shape {tuple(dataset.distribution.shape)}, "
            f"the dataset's images have {tuple(dataset.shape)}"
        )
    raw = dataset.read(bench.indices(DISTRIBUTION_READ))
    x_0 = to_float(raw).double().flatten(1)
    mean, covariance = dataset.distribution.moments()
    s = covariance.diagonal().sqrt()
    slack = ROUNDING if raw.dtype == torch.uint8 else 0.0
    away = (x_0.mean(dim=0) - mean).abs().max().item()
    if ((x_0.mean(dim=0) - mean).abs() > SURPRISE * s / len(x_0) ** 0.5 + slack).any():
        raise Fault(
            f"images do not have the mean of the declared distribution: over {len(x_0):,} images off by {away:.3g}"
        )
    ratio = (x_0.var(dim=0).sum() / s.square().sum()).sqrt().item()
    if abs(ratio - 1) > LARGEST_STD_ERROR + SURPRISE / (2 * len(x_0)) ** 0.5:
        raise Fault(f"images have {ratio:.2f} times the standard deviation of the declared distribution")
    return (
        f"mean off by up to {away:.2g}, standard deviation {ratio:.2f} of the distribution's, over {len(x_0):,} images"
    )


# --- the suite -------------------------------------------------------------------------------------------------------


@contextmanager
def benches(
    cls: type[Dataset], config: DatasetConfig | None, distribution_images: int, dataset: Dataset | None
) -> Iterator[list[DatasetBench]]:
    """One bench, with the given settings."""
    if dataset is not None:
        raise UserError("a dataset is checked by itself: dataset= is for teachers")
    yield [DatasetBench(cls, config)]


CHECKS = [
    Check(declared),
    Check(builds, ("declared",), must_apply=True),
    Check(described, ("builds",)),
    Check(images, ("described",)),
    Check(by_index, ("images",)),
    Check(repeatable, ("by_index",)),
    Check(labels, ("described",)),
    Check(distribution, ("images",)),
]
