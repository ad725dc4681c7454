"""Rows of a report: those of the summary over seeds, each with the rows of the runs' tables behind it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from distillbench.records.statistics import KEYS, TEACHER
from distillbench.reports import words
from distillbench.reports.labels import Labels
from distillbench.reports.runs import RunData
from distillbench.reports.words import is_known

Row = dict[str, Any]  # None where a value is empty


@dataclass
class Entry:
    """A row of the summary. `label` names its method, with settings, device and run where these differ."""

    values: Row
    label: str
    runs: frozenset[str]
    behind: list[Row] = field(default_factory=list)  # rows of tables that it is a mean of

    @property
    def is_teacher(self) -> bool:
        return str(self.values["method"]).startswith(TEACHER)

    def failures(self) -> str:
        """Why rows behind it are not ok, with their seeds."""
        seeds: dict[str, list[str]] = {}
        for row in self.behind:
            if row["status"] != "ok":
                seed = "" if row["training_seed"] is None else f"seed {row['training_seed']}"
                why = words.other_reasons(row["reason"]) or str(row["reason"] or "no reason given")
                seeds.setdefault(f"{row['status'] or 'no status'}: {why}", []).append(seed)
        named = {why: ", ".join(dict.fromkeys(filter(None, several))) for why, several in seeds.items()}
        return "; ".join(f"{several} {why}".strip() for why, several in named.items())

    def why_empty(self, column: str) -> str:
        """Why a column is empty, by the rows behind it."""
        return "; ".join(filter(None, _reasons_of(column, [self])))

    def interval(self, score: str) -> tuple[float | None, float | None, str]:
        """The ends of the interval over training seeds, else over sampling seeds, and over which."""
        for source in ("training", "sampling"):
            low, high = self.values.get(f"{score}_{source}_low"), self.values.get(f"{score}_{source}_high")
            if low is not None and high is not None:
                return float(low), float(high), source
        return None, None, ""


@dataclass(frozen=True)
class TableRow:
    """A row of a run's table, with the label of its entry."""

    run: RunData
    label: str
    values: Row


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """The rows of a frame as plain values, None for empty ones."""
    columns = {name: [_plain(v) for v in frame[name].astype(object).tolist()] for name in frame}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> Any:
    if not is_known(value):
        return None
    return value.item() if hasattr(value, "item") else value


def key_of(row: Mapping[str, Any]) -> tuple:
    """The values of KEYS that identify a row of the summary; an empty text is as good as none."""
    return tuple(row.get(name) or None for name in KEYS)


def key_without_images(row: Mapping[str, Any]) -> tuple:
    """What a row of the summary and its rows of the table have in common; a failed row may not know its images."""
    return tuple(_plain(row.get(name)) for name in KEYS if name != "images")


def entries_of(summary: pd.DataFrame, several_runs: bool, names: Labels) -> list[Entry]:
    """An entry for each row of a summary, whose column `run` names one run, or several joined by commas."""
    rows = rows_of(summary)
    runs = [str(row["run"]).split(", ") if several_runs else [row["run"]] for row in rows]
    return [Entry(row, label, frozenset(of)) for row, label, of in zip(rows, _labels(rows, names), runs, strict=True)]


def _labels(rows: Sequence[Row], names: Labels) -> list[str]:
    methods = [str(row["method"]) for row in rows]
    of = {method: names.method_label(method).short for method in methods}
    twice = {label for label in of.values() if list(of.values()).count(label) > 1}
    labels = [method if of[method] in twice else of[method] for method in methods]
    for column in ("settings", "device", "run"):
        values: dict[str, set] = {}
        for label, row in zip(labels, rows, strict=True):
            values.setdefault(label, set()).add(row.get(column))
        labels = [
            f"{label} [{row[column]}]" if len(values[label]) > 1 and row.get(column) else label
            for label, row in zip(labels, rows, strict=True)
        ]
    return labels


def attach(entries: Sequence[Entry], tables: Iterable[tuple[RunData, Row]]) -> list[TableRow]:
    """Give each entry the rows of `tables` behind it; returns these rows, in the order of the tables."""
    index: dict[tuple, list[Entry]] = {}
    for entry in entries:
        index.setdefault(key_without_images(entry.values), []).append(entry)
    found = []
    for run, row in tables:
        for entry in index.get(key_without_images(row), []):
            images = entry.values["images"]
            if row["run"] in entry.runs and (row["images"] is None or images is None or row["images"] == images):
                entry.behind.append(row)
                found.append(TableRow(run, entry.label, row))
                break
    return found


def common_reasons(rows: Sequence[Row]) -> list[tuple[bool, str]]:
    """Parts of reasons that all rows of the teacher (True), or all of students (False), have; of two rows at least."""
    found = []
    for teacher in (True, False):
        parts = [
            str(row["reason"]).split("; ") if row["reason"] else []
            for row in rows
            if str(row["method"]).startswith(TEACHER) is teacher
        ]
        if len(parts) > 1:
            found += [(teacher, part) for part in dict.fromkeys(parts[0]) if all(part in own for own in parts)]
    return found


def without_common(row: Row, common: Iterable[tuple[bool, str]]) -> str:
    """The row's reasons without those in `common`."""
    teacher = str(row["method"]).startswith(TEACHER)
    shared = {part for of, part in common if of is teacher}
    return "; ".join(part for part in str(row["reason"] or "").split("; ") if part and part not in shared)


def why_empty(column: str, entries: Sequence[Entry]) -> str:
    """Why a column is empty in all entries."""
    reasons = _reasons_of(column, entries)
    if column.startswith("train_"):  # a teacher is not trained
        reasons = [reason for reason in reasons if "the teacher is the baseline" not in reason] or reasons
    return "; ".join(filter(None, reasons)) or "no reason recorded"


def _reasons_of(column: str, entries: Sequence[Entry]) -> list[str]:
    """The different reasons, "" for rows without one."""
    return list(dict.fromkeys(words.why_empty(column, row["reason"]) for entry in entries for row in entry.behind))
