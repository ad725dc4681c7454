"""The summary of several runs for papers: one frame, split into sets of rows that may be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from distillbench.errors import UserError, quoted
from distillbench.records.costs import with_intervals
from distillbench.records.stars import INTERVALS, find_stars
from distillbench.records.statistics import KEYS, SEEDS, leaders, summarise
from distillbench.reports.labels import Labels

if TYPE_CHECKING:
    from distillbench.reports.runs import RunData

GROUP = ["dataset", "teacher", "guidance", "images", "budget", "protocol"]  # equal in a table: COMPARABLE without nfe
COSTS = ["train_tflops", "train_teacher_nfe", "train_seconds", "sample_latency_p50_ms"]  # shown by default, if known


@dataclass(frozen=True)
class SummaryData:
    """The summary of several runs in one frame, and the declarations of its scores.

    `summary` has the further columns run, parameters, reasons, notes, and for each score M leads_M: whether the row is
    in the leading group.
    """

    summary: pd.DataFrame
    columns: dict[str, dict[str, str]]  # by score
    several_runs: bool
    labels: Labels
    rule: str = ""  # what it means to lead

    def method(self, name: object) -> str:
        """The label of a method; its name, if another method has the same label."""
        names = {str(m) for m in self.summary["method"].dropna()}
        label = self.labels.method_label(str(name)).short
        return str(name) if any(self.labels.method_label(m).short == label for m in names - {str(name)}) else label

    @property
    def possible(self) -> list[str]:
        """Names of columns that a table can have."""
        names = ["run", *KEYS, "training_seeds", "sampling_seeds", "status", *self.columns]
        numbers = [n for n in self.summary if n.startswith(("train_", "sample_")) and n not in self.columns]
        return [*names, *numbers, "parameters"]

    @staticmethod
    def of(runs: Sequence[RunData]) -> SummaryData:
        columns: dict[str, dict[str, str]] = {}
        for run in runs:
            for name, declared in run.columns.items():
                if columns.setdefault(name, declared)["direction"] != declared["direction"]:
                    raise UserError(f"the runs disagree about which values of {quoted(name)} are better")
        directions = {name: declared["direction"] for name, declared in columns.items()}
        full = [run for run in runs if len(run.table)]
        together = _together(full, directions)
        groups = [together] if together is not None else [(run.table, run.summary, run.name) for run in full]
        frames = []
        said = ""
        for table, summary, name in groups:
            summary = with_intervals(summary, table)
            order = table[KEYS].drop_duplicates()
            known = table.groupby(KEYS, dropna=False, sort=False)["parameters"].first().reset_index()
            frame = order.merge(summary, on=KEYS, how="right").merge(known, on=KEYS, how="left")
            place = {key: i for i, key in enumerate(_keys(order))}
            ranks = [place.get(key, len(place)) for key in _keys(frame)]
            frame = frame.iloc[sorted(range(len(frame)), key=ranks.__getitem__)]
            records = frame.to_dict("records")
            reasons, notes = [_reasons(table, row) for row in records], [_notes(table, row) for row in records]
            frames.append(frame.assign(run=name, reasons=reasons, notes=notes))
        summary = pd.concat(frames, ignore_index=True) if frames else _empty(columns)
        for name, direction in directions.items():
            for column in (name, f"{name}_training_low", f"{name}_training_high"):
                if column not in summary:  # of runs without rows, or without this score
                    summary[column] = pd.array([pd.NA] * len(summary), dtype="Float64")
            missing = summary.get(f"{name}_missing", pd.Series(pd.NA, summary.index, dtype="Int64"))
            summary[f"{name}_missing"] = missing.fillna(0)
            summary[f"leads_{name}"] = leaders(summary, name, direction) if len(summary) else False
        if together is not None:
            stars = find_stars(together[0], summary, directions, [run.influences for run in full])
            summary = summary.assign(**{f"leads_{name}": marks for name, marks in stars.groups.items()})
            said = stars.said_of_groups
        elif any(summary[f"leads_{name}"].any() for name in directions):
            said = INTERVALS
        return SummaryData(summary, columns, len(frames) > 1, Labels.of(run.labels for run in runs), said)


def _together(runs: Sequence[RunData], directions: dict[str, str]) -> tuple[pd.DataFrame, pd.DataFrame, str] | None:
    """Table, summary and name of all runs together; None if they contradict each other, so that each stands alone."""
    if not runs:
        return None
    name = ", ".join(dict.fromkeys(run.name for run in runs))
    if len(runs) == 1:
        return runs[0].table, runs[0].summary, name
    table = pd.concat([run.table for run in runs], ignore_index=True)
    for score in directions:
        if score not in table:
            table[score] = pd.array([pd.NA] * len(table), dtype="Float64")
    table = table.drop_duplicates([*KEYS, *SEEDS, "status", *directions, "key"])
    if table.duplicated([*KEYS, *SEEDS]).any():
        return None
    try:
        return table, summarise(table, directions), name
    except ValueError:
        return None


def _empty(columns: Mapping[str, Any]) -> pd.DataFrame:
    names = [*KEYS, "training_seeds", "sampling_seeds", "status", *columns, *COSTS, "parameters", "run", "reasons"]
    names += ["notes"]
    return pd.DataFrame(columns=list(dict.fromkeys(names)), dtype="object")


def _keys(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    rows = frame[KEYS].astype(object).where(frame[KEYS].notna(), None)
    return list(rows.itertuples(index=False, name=None))


def _reasons(table: pd.DataFrame, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(status, reason) of the rows behind a row of the summary that are not ok, without repeats."""
    if row["status"] == "ok":
        return []
    bad = _behind(table[table["status"] != "ok"], row)
    pairs = zip(bad["status"].fillna("unknown"), bad["reason"].fillna("no reason was recorded"), strict=True)
    return list(dict.fromkeys((str(status), str(reason)) for status, reason in pairs))


def _notes(table: pd.DataFrame, row: Mapping[str, Any]) -> list[str]:
    """The notes of the rows behind a row of the summary, without repeats."""
    noted = table[table["note"].fillna("") != ""]
    return list(dict.fromkeys(_behind(noted, row)["note"])) if len(noted) else []


def _behind(rows: pd.DataFrame, row: Mapping[str, Any]) -> pd.DataFrame:
    """Those of `rows` that a row of the summary is the mean of."""
    for name in KEYS:
        empty = rows[name].isna()
        same = empty if pd.isna(row[name]) else rows[name].eq(row[name]).fillna(False) | (empty & (name == "images"))
        rows = rows[same]
    return rows


def comparable_sets(summary: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each table. Teachers, which have no budget, and rows without images are in all that they fit."""
    open_ended = ("images", "budget")
    keys = summary[GROUP].astype(object).where(summary[GROUP].notna(), None).to_dict("records")
    whole = [key for key in keys if all(key[name] is not None and key[name] != "" for name in open_ended)]
    whole = _each_once(whole)

    def fits(key: dict[str, Any], into: dict[str, Any]) -> bool:
        return all(key[n] == into[n] or (n in open_ended and key[n] in (None, "")) for n in GROUP)

    found, used = [], [False] * len(keys)
    for one in whole:
        members = [i for i, key in enumerate(keys) if fits(key, one)]
        for i in members:
            used[i] = True
        found.append(summary.iloc[members])
    alone = [i for i in range(len(keys)) if not used[i]]
    for one in _each_once([keys[i] for i in alone]):
        found.append(summary.iloc[[i for i in alone if keys[i] == one]])
    return found


def _each_once(keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(key) for key in dict.fromkeys(tuple(key.items()) for key in keys)]
