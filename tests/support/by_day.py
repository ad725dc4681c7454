"""Which cases of a parametrised test run by day; the others are left to ``pytest -m nightly``."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def by_day(cases: Iterable[str], chosen: Collection[str]) -> list[Any]:
    """`cases` as parameters of a test; those that are not `chosen` have the mark nightly."""
    return [case if case in chosen else pytest.param(case, marks=pytest.mark.nightly) for case in cases]
