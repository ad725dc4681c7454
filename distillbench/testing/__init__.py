"""Conformance checks of methods, teachers, datasets and metrics.

It may import `runs` and below.

The names in ``__all__`` are public: the plugin contract covers them. They load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distillbench._lazy import load

if TYPE_CHECKING:
    from distillbench.testing.checks import Finding as Finding
    from distillbench.testing.conformance import DISTRIBUTION_IMAGES as DISTRIBUTION_IMAGES
    from distillbench.testing.conformance import assert_conforms as assert_conforms
    from distillbench.testing.conformance import check_class as check_class
    from distillbench.testing.conformance import check_method as check_method
    from distillbench.testing.conformance import findings as findings
    from distillbench.testing.conformance import findings_of as findings_of

__all__ = [
    "DISTRIBUTION_IMAGES",
    "Finding",
    "assert_conforms",
    "check_class",
    "check_method",
    "findings",
    "findings_of",
]

_HOMES = {
    "DISTRIBUTION_IMAGES": "distillbench.testing.conformance",
    "Finding": "distillbench.testing.checks",
    "assert_conforms": "distillbench.testing.conformance",
    "check_class": "distillbench.testing.conformance",
    "check_method": "distillbench.testing.conformance",
    "findings": "distillbench.testing.conformance",
    "findings_of": "distillbench.testing.conformance",
}


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)
