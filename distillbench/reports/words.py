"""Texts of a report: names of columns, numbers with as many digits as are significant, leaders, why cells are empty."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from distillbench.errors import counted
from distillbench.records.statistics import TEACHER, leaders, verdict
from distillbench.reports.labels import COLUMNS

ABOUT = {  # columns other than scores: heading (with its unit), explanation
    name: (f"{label.short}, {label.unit}" if label.unit else label.short, label.long) for name, label in COLUMNS.items()
}


MOST_DECIMALS = 12


def heading(column: str) -> str:
    return ABOUT[column][0] if column in ABOUT else column


def is_known(value: object) -> bool:
    """Whether a cell of a frame is not empty."""
    return value is not None and not pd.isna(value) and value != ""  # type: ignore[call-overload]


def number(value: object, low: object = None, high: object = None) -> str:
    """A number, rounded to two digits of its interval's half-width; without an interval to four digits.

    Whole numbers without an interval, such as counts, are written in full. "" for an empty value.
    """
    if not is_known(value):
        return ""
    x = float(value)  # type: ignore[arg-type]
    if not math.isfinite(x):
        return "∞" if x > 0 else "−∞"
    width = float(high) - float(low) if is_known(low) and is_known(high) else 0.0  # type: ignore[arg-type]
    if math.isfinite(width) and width > 0:
        decimals = 1 - _exponent(width / 2)
    elif x == int(x) and abs(x) < 1e15:
        decimals = 0
    else:
        decimals = 3 - _exponent(x)
    decimals = min(decimals, 3 - _exponent(x) + 4) if x else min(decimals, 6)
    if x and (abs(x) < 1e-4 or abs(x) >= 1e15):
        return f"{x:.{max(0, min(decimals + _exponent(x), 8))}e}".replace("-", "−")
    return f"{round(x, decimals):,.{max(decimals, 0)}f}".replace("-", "−")


def decimals(value: float, half_width: float | None = None) -> int:
    """The number of decimals of a value: as many as its half width is rounded to.

    The half width is rounded as by the Particle Data Group: to two digits if its first three are below 355, else to one
    (so 1.234 has two decimals at 0.04 and at 0.12). Without one: four significant digits. Never below 0.
    """
    if half_width is not None and math.isfinite(half_width) and half_width > 0:
        lead = math.floor(math.log10(half_width))
        first = round(half_width / 10 ** (lead - 2))
        return max(0, min(MOST_DECIMALS, (1 if first < 355 else 0) - lead))
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, min(MOST_DECIMALS, 3 - math.floor(math.log10(abs(value)))))


def plus_minus(mean: object, low: object = None, high: object = None) -> str:
    """A mean with its interval: "174 ± 12", or "174 [170 to 190]" where the interval is not symmetric."""
    if not (is_known(mean) and is_known(low) and is_known(high)):
        return number(mean)
    x, ends = float(mean), (float(low), float(high))  # type: ignore[arg-type]
    half = (ends[1] - ends[0]) / 2
    if not (math.isfinite(x) and math.isfinite(half) and half > 0):
        return number(mean)
    digits = decimals(x, half)
    texts = [f"{value:,.{digits}f}".replace("-", "−") for value in (x, *ends, half)]
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


def leading(summary: pd.DataFrame, labels: Sequence[str], directions: Mapping[str, str]) -> list[dict[str, object]]:
    """For each score and nfe of rows that may be compared: the best method, and whether it leads significantly.

    `labels` names the rows of `summary`. Keys of each: score, nfe, name (several if tied), value, leads, alone (no
    other method has the score), has_intervals (all methods have one), why.
    """
    found: list[dict[str, object]] = []
    names = pd.Series(list(labels), index=summary.index, dtype=object)
    students = summary[~summary["method"].fillna("").str.startswith(TEACHER)]
    for score, direction in directions.items():
        if direction == "none" or f"{score}_training_low" not in summary:
            continue
        marks = leaders(students, score, direction)
        for nfe, group in students.groupby("nfe", dropna=True):
            scored = group[group[score].notna()]
            if not len(scored):
                continue
            values = scored[score].astype(float)
            best = values.min() if direction == "lower" else values.max()
            first = values.index[values == best]
            row = scored.loc[first[0]]
            ends = scored[[f"{score}_training_low", f"{score}_training_high"]]
            found.append({
                "score": score, "nfe": int(nfe), "name": " = ".join(names[first].tolist()[:3]),
                "value": number(best, row[f"{score}_training_low"], row[f"{score}_training_high"]),
                "leads": bool(marks[group.index].any()), "alone": len(scored) == 1,
                "has_intervals": bool(ends.notna().all(axis=None)),
                "why": verdict(group.reset_index(drop=True), score, direction),
            })  # fmt: skip
    return found


def conclusion(found: Sequence[Mapping[str, object]]) -> list[str]:
    """The findings of :func:`leading` in sentences, significant leads first."""
    sure = [one for one in found if one["leads"]]
    unsettled = [one for one in found if not one["leads"] and not one["alone"]]
    lines = [
        f"{one['name']} leads significantly on {one['score']} at {counted(_int(one['nfe']), 'evaluation')} "
        f"({one['value']})."
        for one in sure
    ]
    if unsettled:
        one_seed = not any(one["has_intervals"] for one in unsettled)
        because = (
            "an interval needs at least two training seeds of each method"
            if one_seed
            else "95 % intervals over training seeds overlap or are missing, or rows are incomplete"
        )
        where = "Elsewhere" if sure else "On every score"
        lines.append(f"{where} no method leads significantly: {because}.")
    if found and not sure and not unsettled:
        lines.append("No method leads: no score has two methods at the same number of evaluations to compare.")
    return lines


def _int(value: object) -> int:
    return int(value)  # type: ignore[call-overload]
