"""Comparison of two runs: what differs between them, and which scores and costs changed significantly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from distillbench.records.costs import COUNTED
from distillbench.records.statistics import TEACHER
from distillbench.records.table import LAST, LOADS, TUNING, UPDATES
from distillbench.reports.differences import (
    MATCH,
    Row,
    RowNamer,
    environment_differences,
    heading,
    settings_differences,
    value_text,
)
from distillbench.reports.labels import NAMES, Labels
from distillbench.reports.merge import SAME, records
from distillbench.reports.runs import RunData
from distillbench.reports.show import run_names

HIGHER = ("sample_images_per_second",)  # costs for which higher is better
NO_COST = ("sample_best_batch", "student_lora_rank", *UPDATES, *LOADS, *TUNING)  # numbers that are not costs
COSTS = [name for name, kind in LAST.items() if kind != "string" and name not in NO_COST]
LEVEL = 0.95
NOTHING_WORSE, SOMETHING_WORSE, BAD_INPUT = 0, 1, 2  # exit codes

SAME_VALUE, WITHIN, ONE_SEED, CHANGED = "same", "within noise", "one seed: not known", "changed"
BETTER, WORSE, GONE, NEW = "better", "worse", "no value any more", "new"

Rows = list[dict[str, Any]]  # rows of the table, None for empty values


@dataclass(frozen=True)
class Change:
    """One score or cost of one row in both runs."""

    row: Row
    name: str
    before: float
    after: float
    verdict: str
    low: float | None = None  # interval of after - before
    high: float | None = None
    p: float | None = None  # of the test behind the interval
    seeds: tuple[int, int] = (1, 1)
    device: str = ""  # of a cost that depends on it

    @property
    def relative(self) -> float | None:
        """The change relative to the value before; None if that is zero or not finite."""
        if not (math.isfinite(self.before) and math.isfinite(self.after)) or self.before == 0:
            return None
        return (self.after - self.before) / abs(self.before)


@dataclass(frozen=True)
class Comparison:
    """How two runs differ. Texts can be printed after control characters are escaped."""

    runs: tuple[str, str]
    tolerance: float
    settings: list[str]
    environment: list[str]
    rows: list[str]  # rows that are new, missing, failed, or cannot be compared
    lost: list[str]  # rows that were ok and no longer are
    scores: list[Change]
    costs: list[Change]
    directions: dict[str, str]
    matched: int  # number of rows that are in both
    protocols: bool  # whether the protocols of some row differ
    labels: Labels = field(default_factory=Labels)
    notes: list[str] = field(default_factory=list)

    @property
    def comparable(self) -> bool:
        """Whether anything can be concluded: there is a row in both, or a lost one."""
        return bool(self.matched or self.lost)

    @property
    def code(self) -> int:
        """The exit code: 0 nothing is worse, 1 something is, 2 nothing can be compared."""
        if not self.comparable:
            return BAD_INPUT
        return SOMETHING_WORSE if self.worse or self.lost else NOTHING_WORSE

    @property
    def worse(self) -> list[Change]:
        """Scores that are significantly worse or lost their value, and costs that are worse beyond the tolerance."""
        return [one for one in self.scores if one.verdict in (WORSE, GONE)] + [
            one for one in self.costs if one.verdict == WORSE
        ]


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(a: RunData, b: RunData, tolerance: float = 0.1) -> Comparison:
    """How run `b` differs from run `a`. Rows that are equal in MATCH are compared; their devices may differ.

    A score has one value per training seed, the mean over its sampling seeds (for the teacher, one per sampling seed).
    They are compared by Welch's t-test and its 95 % interval of the difference of the two means; a change is beyond
    noise if that interval does not contain zero. With fewer than two seeds on a side it is only known whether values
    are equal. Costs have no interval: they are flagged if their mean changed by more than `tolerance`, relatively.
    Costs that depend on the device are compared on equal devices only.
    """
    left, right = _groups(a.table), _groups(b.table)
    shared = [row for row in left if row in right]
    name = RowNamer([*left, *right], Labels.of([a.labels, b.labels]))
    rows, lost, protocols = _unmatched(left, right, name)
    notes: list[str] = []
    directions = _same_scores(a, b, notes)
    scores, costs = [], []
    for row in shared:
        old, new = left[row], right[row]
        told, is_lost = _statuses(old, new)
        rows += [f"{name(row)}: {line}" for line in told]
        lost += [f"{name(row)}: {line}" for line in is_lost]
        old, new = _ok(old), _ok(new)
        if len(old) and len(new):
            found = [_score(row, old, new, score, direction) for score, direction in directions.items()]
            scores += [one for one in found if one is not None]
            costs += _costs(row, old, new, tolerance)
            if not _on_devices(old) & _on_devices(new):
                notes.append(f"{_devices(old)} in A, {_devices(new)} in B: speed and memory are not compared")
    notes = list(dict.fromkeys(notes))
    names = run_names([a, b])
    return Comparison(
        runs=(heading("A", names[0], a), heading("B", names[1], b)),
        tolerance=tolerance,
        settings=settings_differences(a, b),
        environment=environment_differences(a, b),
        rows=rows,
        lost=lost,
        scores=scores,
        costs=costs,
        directions=directions,
        matched=len(shared),
        protocols=protocols,
        labels=Labels.of([a.labels, b.labels]),
        notes=notes,
    )


def welch(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """95 % interval of the mean of `after` minus that of `before`, at least two values each, and its p (Welch 1947)."""
    from scipy import stats  # here: it takes half a second, and few commands compare

    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return float(b[0] - a[0]), float(b[0] - a[0]), float(a[0] == b[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nearly equal values
        found = stats.ttest_ind(b, a, equal_var=False)
        interval = found.confidence_interval(LEVEL)
    return float(interval.low), float(interval.high), float(found.pvalue)


def _groups(table: pd.DataFrame) -> dict[Row, Rows]:
    """The rows of a table by MATCH, in the order of the table."""
    found: dict[Row, Rows] = {}
    for row in records(table):
        found.setdefault(tuple(None if row[name] == "" else row[name] for name in MATCH), []).append(row)
    return found


def _ok(rows: Rows) -> Rows:
    return [row for row in rows if row["status"] == "ok"]


def _on_devices(rows: Rows) -> set[str]:
    return {row["device"] for row in rows if row["device"]}


def _per_seed(rows: Rows, name: str) -> dict[Any, float]:
    """The mean of a column for each training seed, for the teacher for each sampling seed; empty values are ignored."""
    by = "sampling_seed" if str(rows[0]["method"]).startswith(TEACHER) else "training_seed"
    values: dict[Any, list[float]] = {}
    for row in rows:
        if row.get(name) is not None:
            values.setdefault(row[by], []).append(float(row[name]))
    return {seed: sum(several) / len(several) for seed, several in values.items()}


def _close(a: float, b: float) -> bool:
    return bool(np.isclose(a, b, rtol=SAME, atol=0, equal_nan=True))


def _score(row: Row, old: Rows, new: Rows, name: str, direction: str) -> Change | None:
    """How a score changed; None if neither run has it."""
    a, b = _per_seed(old, name), _per_seed(new, name)
    if not a and not b:
        return None
    x, y = list(a.values()), list(b.values())
    with np.errstate(invalid="ignore"):
        before, after = (float(np.mean(values)) if values else math.nan for values in (x, y))
    seeds = len(x), len(y)
    if not a or not b:
        return Change(row, name, before, after, NEW if not a else GONE, seeds=seeds)
    equal = a.keys() == b.keys() and all(_close(a[seed], b[seed]) for seed in a)
    if equal or (seeds == (1, 1) and _close(before, after)):
        return Change(row, name, before, after, SAME_VALUE, seeds=seeds)
    if min(seeds) < 2:
        return Change(row, name, before, after, ONE_SEED, seeds=seeds)
    if not np.isfinite([*x, *y]).all():
        return Change(row, name, before, after, "not finite: not known", seeds=seeds)
    low, high, p = welch(x, y)
    verdict = WITHIN
    if low > 0 or high < 0:
        verdict = CHANGED if direction == "none" else BETTER if (high < 0) == (direction == "lower") else WORSE
    return Change(row, name, before, after, verdict, low, high, p, seeds)


def _costs(row: Row, old: Rows, new: Rows, tolerance: float) -> list[Change]:
    """How costs changed: counted ones over all devices, measured ones for each device that both runs have."""
    places: list[tuple[str, Rows, Rows, Sequence[str]]] = [("", old, new, COUNTED)]
    measured = [name for name in COSTS if name not in COUNTED]
    for device in sorted(_on_devices(old) & _on_devices(new)):
        a, b = ([row for row in rows if row["device"] == device] for rows in (old, new))
        places.append((device, a, b, measured))
    found = []
    for device, a, b, names in places:
        for name in names:
            x, y = (list(_per_seed(rows, name).values()) for rows in (a, b))
            if not x and not y:
                continue
            before, after = (float(np.mean(values)) if values else math.nan for values in (x, y))
            verdict = GONE if not y else NEW if not x else _judged(name, before, after, tolerance)
            found.append(Change(row, name, before, after, verdict, seeds=(len(x), len(y)), device=device))
    return found


def _judged(name: str, before: float, after: float, tolerance: float) -> str:
    if _close(before, after):
        return SAME_VALUE
    if not abs(after - before) > tolerance * abs(before):
        return "within tolerance"
    return BETTER if (after > before) == (name in HIGHER) else WORSE


def _statuses(old: Rows, new: Rows) -> tuple[list[str], list[str]]:
    """Texts on what failed and recovered, and texts on what was ok before and failed."""
    a, b = _seeds(old), _seeds(new)
    reasons: dict[str, list[str]] = {}
    lost: dict[str, list[str]] = {}
    for seeds, (status, reason) in b.items():
        before = a.get(seeds, ("ok" if len(_ok(old)) else "", ""))[0]
        if status != "ok":
            target = lost if before == "ok" else reasons
            target.setdefault(f"{status}: {reason or 'no reason is recorded'}", []).append(_seeds_in_words(seeds))
    told = [f"{why} ({', '.join(seeds)}), as before" for why, seeds in reasons.items()]
    recovered = [seeds for seeds, (status, _) in a.items() if status != "ok" and b.get(seeds, ("", ""))[0] == "ok"]
    again = [_seeds_in_words(seeds) for seeds in recovered]
    told += [f"ok now ({', '.join(again)})"] if again else []
    return told, [f"was ok, {why} ({', '.join(seeds)})" for why, seeds in lost.items()]


def _seeds(rows: Rows) -> dict[tuple[Any, Any], tuple[str, str]]:
    """Status and reason by (training seed, sampling seed); of several devices, those of one that is not ok."""
    found: dict[tuple[Any, Any], tuple[str, str]] = {}
    for row in rows:
        seeds = row["training_seed"], row["sampling_seed"]
        if found.get(seeds, ("ok", ""))[0] == "ok":
            found[seeds] = str(row["status"] or "unknown status"), row["reason"] or ""
    return found


def _seeds_in_words(seeds: tuple[Any, Any]) -> str:
    training, sampling = seeds
    return (f"seed {training}, " if training is not None else "") + f"noise {sampling}"


def _unmatched(
    left: Mapping[Row, Rows], right: Mapping[Row, Rows], name: RowNamer
) -> tuple[list[str], list[str], bool]:
    """Texts on rows that only one run has; texts on those of A that were ok; whether protocols differ.

    A row of A is paired with the row of B of the same dataset, method and number of evaluations that differs in the
    fewest columns of MATCH. If the protocol differs, the row is not missing: it cannot be compared.
    """
    rest = [row for row in right if row not in left]
    told: list[str] = []
    lost: list[str] = []
    fixed = [MATCH.index(column) for column in ("dataset", "method", "nfe")]
    protocols: dict[str, list[str]] = {}
    for row in (row for row in left if row not in right):
        others = [other for other in rest if all(other[k] == row[k] for k in fixed)]
        other = min(others, key=lambda other: sum(x != y for x, y in zip(row, other, strict=True)), default=None)
        how = _how(row, other) if other is not None else {}
        if other is not None:
            rest.remove(other)
        if "protocol" in how:
            texts = "; ".join(f"{column} {change}" for column, change in how.items())
            protocols.setdefault(texts, []).append(name(row, without=how))
            continue
        hint = "; ".join(f"{column} {change}" for column, change in how.items())
        hint = f" (B has it with {hint})" if hint else ""
        if len(_ok(left[row])):
            lost.append(f"{name(row)}: was ok, vanished{hint}")
        else:
            told.append(f"{name(row)}: was not ok, vanished{hint}")
        if other is not None:
            told.append(f"{name(other)}: appeared")
    told += [f"{name(row)}: appeared" for row in rest]
    told += [f"{', '.join(names)}: cannot be compared, {texts}" for texts, names in protocols.items()]
    return told, lost, bool(protocols)


def _how(row: Row, other: Row) -> dict[str, str]:
    pairs = zip(MATCH, row, other, strict=True)
    return {column: f"{value_text(x)} → {value_text(y)}" for column, x, y in pairs if x != y}


def _devices(rows: Rows) -> str:
    return ", ".join(dict.fromkeys(row["device"] or "an unknown device" for row in rows))


def _same_scores(a: RunData, b: RunData, notes: list[str]) -> dict[str, str]:
    """Direction by score, if both runs declare it the same way; otherwise a note says so."""
    found = {}
    for name in dict.fromkeys([*a.columns, *b.columns]):
        x, y = a.columns.get(name), b.columns.get(name)
        facts = [fact for fact in dict.fromkeys([*(x or {}), *(y or {})]) if fact not in NAMES]
        differs = [fact for fact in facts if x and y and x.get(fact) != y.get(fact)]
        if differs:
            notes.append(f"{name} is not compared: the runs declare another {', '.join(differs)}")
        else:
            found[name] = (x or y or {})["direction"]
    return found
