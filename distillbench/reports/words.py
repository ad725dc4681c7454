"""Texts of a report: numbers with as many digits as are significant, lists of names, why cells are empty."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import pandas as pd

from distillbench.records.numbers import rounded


def is_known(value: object) -> bool:
    """Whether a cell of a frame is not empty."""
    return value is not None and not pd.isna(value) and value != ""  # type: ignore[call-overload]


def number(value: object, low: object = None, high: object = None) -> str:
    """A number, rounded as :func:`rounded` does by its interval, with a typographic minus; "" for an empty value."""
    if not is_known(value):
        return ""
    x = float(value)  # type: ignore[arg-type]
    if not math.isfinite(x):
        return "∞" if x > 0 else "−∞"
    half = (float(high) - float(low)) / 2 if is_known(low) and is_known(high) else None  # type: ignore[arg-type]
    return rounded(x, half).replace("-", "−")


def plus_minus(mean: object, low: object = None, high: object = None) -> str:
    """A mean with its interval: "174 ± 12", or "174 [170 to 190]" where the interval is not symmetric."""
    if not (is_known(mean) and is_known(low) and is_known(high)):
        return number(mean)
    x, ends = float(mean), (float(low), float(high))  # type: ignore[arg-type]
    half = (ends[1] - ends[0]) / 2
    if not (math.isfinite(x) and math.isfinite(half) and half > 0):
        return number(mean)
    texts = [rounded(value, half).replace("-", "−") for value in (x, *ends, half)]
    symmetric = abs(x - sum(ends) / 2) < 0.05 * half
    return f"{texts[0]} ± {texts[3]}" if symmetric else f"{texts[0]} [{texts[1]} to {texts[2]}]"


def brief(value: float) -> str:
    """A number in a sentence: three digits."""
    if not math.isfinite(value) or not value:
        return number(value)
    return f"{round(value, 2 - _exponent(value)):,.{max(0, 2 - _exponent(value))}f}".replace("-", "−")


def _exponent(x: float) -> int:
    return math.floor(math.log10(abs(x))) if x else 0


def interval(low: object, high: object) -> str:
    """Both ends, rounded as :func:`number` rounds; "" without an interval."""
    if not (is_known(low) and is_known(high)):
        return ""
    return f"{number(low, low, high)} to {number(high, low, high)}"


def listed(names: Iterable[object], most: int = 12) -> str:
    """Names as "a, b and c"; beyond `most` of them their number."""
    texts = [str(name) for name in names]
    if len(texts) > most:
        texts = [*texts[:most], f"{len(texts) - most:,} more"]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1] if texts else "none"


@functools.lru_cache(maxsize=100_000)
def why_empty(column: str, reason: object) -> str:
    """Why `column` is empty, from a row's reasons: parts `name, name empty: why`, separated by semicolons."""
    if not is_known(reason):
        return ""
    for part in str(reason).split("; "):
        names, separator, why = part.partition(" empty: ")
        if separator and any(column == n or (n.endswith("*") and column.startswith(n[:-1])) for n in names.split(", ")):
            return why
    return ""


def other_reasons(reason: object) -> str:
    """A row's reasons without those of empty columns: why it failed."""
    parts = [part for part in str(reason).split("; ") if " empty: " not in part] if is_known(reason) else []
    return "; ".join(parts)


def better(direction: str) -> str:
    return {"lower": "lower is better", "higher": "higher is better"}.get(direction, "no direction")
