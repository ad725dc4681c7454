"""The two tables of a section of the HTML report: the comparison of means, and every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distillbench.records.statistics import arrow
from distillbench.records.table import LAST
from distillbench.reports import words
from distillbench.reports.entries import Entry, TableRow, why_empty
from distillbench.reports.words import heading, number

COSTS = [name for name in LAST if name.startswith(("train_", "sample_"))]
SHOWN = ("sample_latency_p50_ms", "train_seconds", "train_teacher_nfe")  # costs that are visible at first
TEXTS = ("run", "dataset", "teacher", "method", "settings", "inputs", "status", "reason", "device", "key")
NO_REASON = "empty, no reason recorded"


@dataclass
class Cell:
    text: str
    value: float | str | None = None  # to sort by; None comes last
    below: str = ""
    kind: str = ""  # best, failed, none
    title: str = ""


@dataclass
class Column:
    name: str
    heading: str
    title: str
    shown: bool
    is_text: bool
    first: str = "ascending"  # the order after the first click
    empty: str = ""  # why all cells are empty, if they are


@dataclass
class Table:
    id: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]

    @property
    def hidden(self) -> list[int]:
        """The places, from 1, of the columns that are hidden at first."""
        return [place for place, column in enumerate(self.columns, 1) if not column.shown]


@dataclass(frozen=True)
class Comparison:
    """Entries that may be compared. `leads` holds for each score whether an entry leads."""

    entries: Sequence[Entry]
    scores: dict[str, str]  # direction by score
    leads: dict[str, list[bool]]
    several_runs: bool

    def differs(self, column: str) -> bool:
        return len({entry.values.get(column) for entry in self.entries}) > 1

    def has(self, column: str) -> bool:
        return any(entry.values.get(column) is not None for entry in self.entries)


def comparison_table(id_: str, data: Comparison) -> Table:
    """Means over seeds. Every cost is a column, of which a few are visible at first."""
    columns = [*_describing(data), *_scores(data), *_costs(data), *_identifying(data)]
    rows = [[_cell(data, at, column) for column in columns] for at in range(len(data.entries))]
    return Table(id_, "Means over seeds, with 95 % intervals", columns, rows)


def every_row_table(id_: str, rows: Sequence[TableRow], scores: dict[str, str], several_runs: bool) -> Table:
    """Every row of the runs' tables, seeds apart, with the key of its record."""
    inputs = ["inputs"] * any(row.values.get("inputs") for row in rows)
    names = ["method", "settings", *inputs, *["run"] * several_runs, "training_seed", "sampling_seed", "nfe", "status"]
    names += [*scores, "key", "reason"]
    any_settings = any(row.values["settings"] for row in rows)
    columns = [
        Column(name, f"{name} {arrow(scores[name])}".strip(), name, True, False)
        if name in scores
        else _column(name, any_settings or name != "settings")
        for name in names
    ]
    return Table(
        id_, "Every row, seeds apart", columns, [[_plain_cell(row.values, name) for name in names] for row in rows]
    )


def _plain_cell(row: dict[str, Any], name: str) -> Cell:
    if name in TEXTS:
        failed = name == "status" and row[name] != "ok"
        return Cell(str(row.get(name) or ""), row.get(name), kind="failed" if failed else "")
    return Cell(number(row.get(name)), row.get(name))


# --- columns of the comparison ---------------------------------------------------------------------------------------


def _column(name: str, shown: bool, has_values: bool = True) -> Column:
    title, text = words.ABOUT[name]
    return Column(name, title, text, shown, name in TEXTS, empty="" if has_values else "all have their defaults")


def _describing(data: Comparison) -> list[Column]:
    """Columns that say what a row is."""
    rows = [entry.values for entry in data.entries]
    columns = [Column("method", "method", words.ABOUT["method"][1], True, True)]
    columns += [_column("settings", data.differs("settings"), any(row["settings"] for row in rows))]
    columns += [_column("run", data.differs("run"))] * data.several_runs
    columns += [_column("nfe", True)]
    columns += [
        _column(seeds, any((row[seeds] or 0) > 1 for row in rows)) for seeds in ("training_seeds", "sampling_seeds")
    ]
    return [*columns, _column("status", any(row["status"] != "ok" for row in rows))]


def _scores(data: Comparison) -> list[Column]:
    columns = []
    for score, direction in data.scores.items():
        first = "descending" if direction == "higher" else "ascending"
        title = f"{score}: {words.better(direction)}"
        why = "" if data.has(score) else why_empty(score, data.entries)
        columns.append(Column(score, f"{score} {arrow(direction)}".strip(), title, True, False, first, why))
    return columns


def _costs(data: Comparison) -> list[Column]:
    columns = []
    for cost in COSTS:
        first = "descending" if "per_second" in cost else "ascending"
        shown, why = data.has(cost) and cost in SHOWN, "" if data.has(cost) else why_empty(cost, data.entries)
        columns.append(Column(cost, heading(cost), words.ABOUT[cost][1], shown, False, first, why))
    return columns


def _identifying(data: Comparison) -> list[Column]:
    devices = {entry.values["device"] for entry in data.entries if entry.values["device"]}
    return [_column("device", len(devices) > 1), _column("key", False)]


# --- cells of the comparison -----------------------------------------------------------------------------------------


def _cell(data: Comparison, at: int, column: Column) -> Cell:
    entry, name = data.entries[at], column.name
    value = entry.values.get(name)
    if name in data.scores:
        return _score_cell(entry, name, data.leads[name][at])
    if name in COSTS:
        return _cost_cell(entry, name)
    if name == "status":
        reasons = entry.failures()
        below = reasons if len(reasons) <= 160 else reasons[:159] + "…"
        return Cell(str(value), value, below, "failed" if value != "ok" else "", reasons)
    if name == "key":
        keys = list(dict.fromkeys(str(row["key"]) for row in entry.behind if row.get("key")))
        return Cell(" ".join(keys), keys[0] if keys else None)
    if name == "training_seeds" and entry.is_teacher:
        return Cell("", None)
    return Cell(str(value or "") if column.is_text else number(value), value)


def _score_cell(entry: Entry, score: str, leads: bool) -> Cell:
    row, value = entry.values, entry.values[score]
    if value is None and str(row["status"]).startswith("0 of "):
        status = str(entry.behind[0]["status"]) if entry.behind else "failed"
        return Cell(status, None, "", "failed", entry.failures() or "no reason given")
    if value is None:
        return Cell("–", None, "", "none", entry.why_empty(score) or NO_REASON)
    low, high, source = entry.interval(score)
    below, title = words.interval(low, high), ""
    if below:
        how = {"t": "Student's t", "bootstrap": "bootstrap"}.get(str(row.get(f"{score}_{source}_interval")), "")
        title = f"95 % interval of the mean over {source} seeds{', ' + how if how else ''}"
        below += " (sampling)" if source == "sampling" else ""
    if row.get(f"{score}_missing"):
        title = f"{title}; {row[f'{score}_missing']} of its rows have no score".lstrip("; ")
    if leads:
        title = f"leads: its interval overlaps with no other. {title}"
    return Cell(number(value, low, high), float(value), below, "best" if leads else "", title)


def _cost_cell(entry: Entry, cost: str) -> Cell:
    value = entry.values.get(cost)
    if value is None:
        return Cell("–", None, "", "none", entry.why_empty(cost) or NO_REASON)
    return Cell(number(value), float(value))
