"""Conformance suites for methods, datasets, teachers and metrics, built-in or third-party.

    from distillbench.testing.conformance import assert_conforms

    def test_my_method():
        assert_conforms(MyMethod)

    def test_my_teacher():
        assert_conforms(MyTeacher, MyTeacher.Config(path="weights.pt"), dataset=MyDataset(MyDataset.Config()))

On the command line: ``distillbench check NAME``. Checks are independent: an error in one is its finding, and the others
still run. The checks of each kind are listed at the end of its module: :mod:`distillbench.testing.methods` (methods),
:mod:`distillbench.testing.datasets`, :mod:`distillbench.testing.teachers`,
:mod:`distillbench.testing.metrics`. Global state is restored, and files are written to a temporary folder only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from distillbench import registry
from distillbench.datasets.dataset import Dataset
from distillbench.errors import UserError
from distillbench.testing import datasets, methods, metrics, teachers
from distillbench.testing.bench_networks import USUALLY_COMPUTED, Computed
from distillbench.testing.checks import Bench, Check, Finding, examine
from distillbench.training.method import Method, MethodConfig

__all__ = [
    "DISTRIBUTION_IMAGES",
    "Finding",
    "assert_conforms",
    "check_class",
    "check_method",
    "findings",
    "findings_of",
]

DISTRIBUTION_IMAGES = 200_000  # of the training on an exact teacher; enough for every built-in method to pass


@dataclass(frozen=True)
class Suite:
    """How a kind is checked; `benches(cls, config, distribution_images, dataset)` is a context of its benches."""

    checks: Sequence[Check]
    benches: Callable[[Any, Any, int, Dataset | None], AbstractContextManager[Sequence[Bench]]]


SUITES = {
    "methods": Suite(methods.CHECKS, methods.benches),
    "teachers": Suite(teachers.CHECKS, teachers.benches),
    "datasets": Suite(datasets.CHECKS, datasets.benches),
    "metrics": Suite(metrics.CHECKS, metrics.benches),
}


def assert_conforms(
    cls: type,
    config: Any = None,
    distribution_images: int = DISTRIBUTION_IMAGES,
    dataset: Dataset | None = None,
    *,
    network: str = "mlp",
    precision: str = "fp32",
    recompute: bool = False,
) -> None:
    """Raise AssertionError with the messages of all failed checks, if there are any. Arguments: :func:`check_class`."""
    asked = config, distribution_images, dataset
    found = check_class(cls, *asked, network=network, precision=precision, recompute=recompute)
    lines = [f"{finding.check}: {finding.message}" for finding in found if finding.ok is False]
    if lines:
        kind = kind_of(cls).removesuffix("s")
        raise AssertionError("\n".join([f"{cls.__name__} breaks the contract of a {kind}", *lines]))


def check_class(
    cls: type,
    config: Any = None,
    distribution_images: int = DISTRIBUTION_IMAGES,
    dataset: Dataset | None = None,
    *,
    network: str = "mlp",
    precision: str = "fp32",
    recompute: bool = False,
) -> list[Finding]:
    """The findings of all checks of `cls`, a subclass of Method, TeacherSource, Dataset or Metric.

    `config` holds its settings (None: the defaults). `distribution_images` is the number of images for which the last
    check of a method, ``matches``, trains on an exact teacher; 0 leaves that check out. `dataset` is the one that a
    teacher is built on (None: a small mixture of Gaussians, 1x8x8 with three classes, whose distribution is known).

    A method is checked on a small `network` ("mlp", "unet", "dit" or "edm"; all but the first have attention), trained
    as with ``compute.precision`` ("fp32" or "bf16") and ``compute.recompute``.

    Raises UserError if `cls` is of none of these kinds or takes no such argument.
    """
    computed = Computed(network, precision, recompute)
    return list(findings_of(kind_of(cls), cls, config, distribution_images, dataset, computed))


def check_method(
    cls: type[Method], config: MethodConfig | None = None, distribution_images: int = DISTRIBUTION_IMAGES
) -> list[Finding]:
    """:func:`check_class` for a class that is meant to be a method."""
    return list(findings_of("methods", cls, config, distribution_images))


def findings(
    cls: type, config: Any = None, distribution_images: int = DISTRIBUTION_IMAGES, dataset: Dataset | None = None
) -> Iterator[Finding]:
    """The findings of :func:`check_class`, yielded one by one."""
    return findings_of(kind_of(cls), cls, config, distribution_images, dataset)


def findings_of(
    kind: str,
    cls: type,
    config: Any = None,
    distribution_images: int = DISTRIBUTION_IMAGES,
    dataset: Dataset | None = None,
    computed: Computed = USUALLY_COMPUTED,
) -> Iterator[Finding]:
    """:func:`findings` of a class that is meant to be of `kind`: "methods", "teachers", "datasets" or "metrics".

    `computed` is on what network a method is checked, and how it is computed.
    """
    suite = SUITES[kind]
    new_benches = suite.benches
    if kind == "methods":
        new_benches = functools.partial(methods.benches, computed=computed)
    elif computed != USUALLY_COMPUTED:
        raise UserError(f"network, precision and recompute are for methods, and {cls.__name__} is of the {kind}")
    with new_benches(cls, config, distribution_images, dataset) as benches:
        yield from examine(suite.checks, benches)


def kind_of(cls: Any) -> str:
    """The kind of a class; raises UserError if it is of none."""
    for kind, rules in registry.KINDS.items():
        if isinstance(cls, type) and issubclass(cls, rules.base):
            return kind
    bases = ", ".join(rules.base.__name__ for rules in registry.KINDS.values())
    raise UserError(f"a class to check must be a subclass of one of {bases}, got {cls!r}")
