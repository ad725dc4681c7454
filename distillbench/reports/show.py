"""The table of runs in the terminal or as CSV, with chosen columns, filtered and sorted; failed rows stay visible."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import pandas as pd
from rich.console import Console

from distillbench.errors import UserError, nearest, quoted, unknown
from distillbench.records.costs import is_end, with_intervals
from distillbench.records.stars import find_stars
from distillbench.records.statistics import KEYS, SEEDS
from distillbench.reports.labels import Labels
from distillbench.reports.runs import RunData
from distillbench.reports.terminal_table import (
    COSTS,
    STAR,
    columns_that_fit,
    fits,
    number,
    plain,
    put,
    row_name,
    say,
    score_table,
    shared_seeds,
    table_notes,
    there,
    with_stars,
)

Rows = Literal["summary", "all"]
Form = Literal["table", "csv", "json"]
RUN = "run"  # the column that tells runs apart where several are shown
IDENTITY = [*KEYS, *SEEDS]  # identify a measurement; failed rows have these columns too

_FILTER = re.compile(r"\s*(?P<column>[^<>=!]+?)\s*(?P<sign><=|>=|!=|=|<|>)\s*(?P<value>.*?)\s*", re.DOTALL)
_SIGNS: dict[str, Callable[[pd.Series, float], pd.Series]] = {
    "<": lambda column, value: column < value,
    "<=": lambda column, value: column <= value,
    ">": lambda column, value: column > value,
    ">=": lambda column, value: column >= value,
}


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """The selected rows of one or several runs."""

    frame: pd.DataFrame
    labels: Labels
    several: bool  # runs: the frame has a column RUN
    columns: list[str]  # that were asked for; empty: all
    failed: pd.DataFrame  # rows of the table that are not ok and that the filters let through
    noted: pd.DataFrame  # those with a note
    star: str = ""  # what a star means


def select(
    runs: Sequence[RunData], columns: Sequence[str], sort: Sequence[str], where: Sequence[str], rows: Rows
) -> Shown:
    """The rows of `runs` that the filters let through, sorted. A name in `sort` that begins with - is descending.

    A summary has one row for each of KEYS. Raises UserError for names, filters and values that do not exist.
    """
    names = run_names(runs)
    found = [_rows_of(run, rows) for run in runs]
    parts, stars = [part for part, _ in found], dict.fromkeys(said for _, said in found if said)
    if len(runs) > 1:
        filled = [pd.array([name] * len(part), dtype="string") for part, name in zip(parts, names, strict=True)]
        parts = [part.assign(**{RUN: name}) for part, name in zip(parts, filled, strict=True)]
    some = [part for part in parts if len(part)] or parts[:1]
    order = list(dict.fromkeys(name for part in parts for name in part.columns))
    frame = pd.concat(some, ignore_index=True).reindex(columns=order)
    possible = [name for name in order if not _is_hidden(name)]
    for name in columns:
        _check_column(name, possible, rows)
    keys = [(name.removeprefix("-"), not name.startswith("-")) for name in sort]
    for name, _ in keys:
        _check_column(name, possible, rows)
    tables = [run.table.assign(**{RUN: name}) for run, name in zip(runs, names, strict=True) if len(run.table)]
    whole = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    masks = [_passes(frame, text, possible, rows, strict=True) for text in where]
    for mask in masks:
        frame = frame[mask.reindex(frame.index)]
    for text in where if tables else []:
        whole = whole[_passes(whole, text, [*IDENTITY, RUN], rows, strict=False)]
    for name, ascending in reversed(keys):  # the first decides; what has no value comes last
        frame = frame.sort_values(name, ascending=ascending, kind="stable", na_position="last")
    failed = noted = pd.DataFrame()
    if tables:
        failed, noted = whole[~_is_ok(whole)], whole[whole["note"].fillna("") != ""]
    labels = Labels.of(run.labels for run in runs)
    star = "; or ".join(stars) + (", in its own run" if stars and len(runs) > 1 else "")
    return Shown(frame.reset_index(drop=True), labels, len(runs) > 1, list(columns), failed, noted, star)


def run_names(runs: Sequence[RunData]) -> list[str]:
    """Unique names of the runs: their folders' names, or their paths if names are equal."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


def _rows_of(run: RunData, rows: Rows) -> tuple[pd.DataFrame, str]:
    """The table, or its summary in the order of the run with columns of stars; and what a star means."""
    if rows == "all" or not len(run.table):
        return run.table.copy(), ""
    stars = find_stars(run.table, run.summary, run.directions, [run.influences])
    marked = with_stars(with_intervals(run.summary, run.table), stars)
    order = run.table[KEYS].assign(settings=run.table["settings"].fillna("")).drop_duplicates()
    found = order.merge(marked.drop_duplicates(KEYS), on=KEYS, how="left")
    return found[list(marked.columns)][found["status"].notna()], stars.said


def _is_hidden(column: str) -> bool:
    """Whether a column only says how others are printed."""
    return column.endswith(STAR) or is_end(column)


def _is_ok(table: pd.DataFrame) -> pd.Series:
    return table["status"].eq("ok").fillna(False).astype(bool)


def _check_column(name: str, possible: Sequence[str], rows: Rows) -> None:
    if name not in possible:
        kind = "column of the summary" if rows == "summary" else "column"
        raise unknown(kind, name, map(plain, possible), " (--rows all has others)" if rows == "summary" else "")


def _passes(frame: pd.DataFrame, text: str, possible: Sequence[str], rows: Rows, strict: bool) -> pd.Series:
    """True where a row meets the condition `text`. Unless `strict`, unknown columns and values exclude no row."""
    found = _FILTER.fullmatch(text)
    if not found:
        raise UserError(f"--where takes COLUMN, one of = != < <= > >=, and a value, as in 'nfe<=2', got {quoted(text)}")
    name, sign, value = found["column"], found["sign"], found["value"]
    if name not in possible:
        if strict:
            _check_column(name, possible, rows)
        return pd.Series(True, index=frame.index)
    column = frame[name]
    if pd.api.types.is_numeric_dtype(column):
        return _passes_number(column, name, sign, value, text)
    if sign in _SIGNS:
        raise UserError(f"{name} holds text, which takes = and != only, got {quoted(text)}")
    column = column.astype("string").fillna("")
    there = set(column)
    wanted = [value] if value in there else [part.strip() for part in value.split(",")]
    for part in wanted:
        if strict and sign == "=" and part and part not in there and len(frame):
            values = sorted(there - {""})
            listed = ", ".join(plain(one) for one in values[:20]) or "none"
            raise UserError(f"no row has {name} {quoted(part)}.{plain(nearest(part, values))} Possible: {listed}")
    inside = column.isin(wanted)
    return (inside if sign == "=" else ~inside).astype(bool)


def _passes_number(column: pd.Series, name: str, sign: str, value: str, text: str) -> pd.Series:
    column = column.astype("Float64")
    parts = [part.strip() for part in value.split(",")] if sign in ("=", "!=") else [value]
    wanted = [_float(part, name, text) for part in parts]
    if sign in _SIGNS:
        limit = wanted[0]
        if limit is None:
            raise UserError(f"{name} is compared with nothing in {quoted(text)}")
        return _SIGNS[sign](column, limit).fillna(False).astype(bool)
    inside = column.isin([x for x in wanted if x is not None]).fillna(False).astype(bool)
    if None in wanted:
        inside |= column.isna()
    return inside if sign == "=" else ~inside


def _float(part: str, name: str, text: str) -> float | None:
    """The number, or None for an empty text."""
    if not part:
        return None
    try:
        x = float(part)
    except ValueError:
        x = math.nan
    if math.isnan(x):
        raise UserError(f"{name} holds numbers, got {quoted(part)} in {quoted(text)}")
    return x


# --- printing ------------------------------------------------------------------------------------------------------


def print_csv(console: Console, shown: Shown) -> None:
    """Write the rows as CSV with all digits."""
    console.file.write(shown.frame[_written(shown)].to_csv(index=False))


def print_json(console: Console, shown: Shown) -> None:
    """Write the rows as JSON with all digits, with the names of columns and methods for people."""
    names = _written(shown)
    methods = dict.fromkeys(shown.frame["method"].dropna())
    found = {
        "columns": {name: asdict(shown.labels.label(name)) for name in names},
        "methods": {name: asdict(shown.labels.method_label(name)) for name in methods},
        "rows": json.loads(shown.frame[names].to_json(orient="records", double_precision=15)),
    }
    console.file.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _written(shown: Shown) -> list[str]:
    """The columns to write: those asked for, or all."""
    names = shown.columns or [name for name in shown.frame.columns if not _is_hidden(name)]
    if shown.several and not shown.columns:
        names = [RUN, *(name for name in names if name != RUN)]
    return names


def print_rows(console: Console, shown: Shown, rows: Rows) -> None:
    """Print the rows as a table with the chosen columns, or with as many as fit; then failed rows and notes."""
    frame = shown.frame
    if not len(frame):
        say(console, "no rows")
    elif shown.columns:
        _print_table(console, shown, shown.columns)
    else:
        _print_what_fits(console, shown, rows)
    for row in shown.failed.to_dict("records"):
        where = f"{row[RUN]}: " if shown.several else ""
        reason = row["reason"] if there(row["reason"]) else "no reason is recorded"
        say(console, f"{where}{row_name(row, labels=shown.labels)}: {number(row['status'])}: {reason}")
    notes = [(row[RUN] if shown.several else "", row["note"], row) for row in shown.noted.to_dict("records")]
    for run, note in dict.fromkeys((run, note) for run, note, _ in notes):
        rows_of = [
            f"{shown.labels.method_label(row['method']).short}, {number(row['nfe'])} NFE"
            for r, n, row in notes
            if (r, n) == (run, note)
        ]
        say(console, f"{f'{run}: ' if run else ''}note on {'; '.join(dict.fromkeys(rows_of))}: {note}")


def _print_what_fits(console: Console, shown: Shown, rows: Rows) -> None:
    frame = shown.frame
    values = {
        name: frame[name].replace("", pd.NA).dropna().unique() for name in ("dataset", "teacher", "budget", "device")
    }
    shared = [f"{name} {found[0]}" for name, found in values.items() if len(found) == 1]
    counts, seeds_columns = shared_seeds(frame) if rows == "summary" else ([], [])
    say(console, ", ".join([*shared, *counts]))
    names = (
        [RUN] * shown.several + [name for name in ("dataset", "teacher") if len(values[name]) > 1] + ["method", "nfe"]
    )
    seeds = SEEDS if rows == "all" else []
    for telling_apart in ("settings", "guidance", "budget", "images", "device", "protocol"):
        differs = frame[telling_apart].nunique(dropna=False) > 1
        names += [telling_apart] if differs and frame.duplicated([*names, *seeds]).any() else []
    names += seeds or seeds_columns
    names += ["status"] if (frame["status"] != "ok").any() else []
    first = len(names)
    scores = [name for name in shown.labels.columns if name in frame]
    wanted = [*names, *scores, *(name for name in COSTS if frame[name].notna().any())]
    names = columns_that_fit(console, frame, wanted, shown.labels, least=first + 1)  # the first score stays
    _print_table(console, shown, names)
    notes = table_notes(frame, names, wanted, shown.labels)
    if any(frame[name + STAR].eq(True).any() for name in scores if name + STAR in frame):
        notes.append(f"*: {shown.star}")
    for line in notes:
        say(console, line)


def _print_table(console: Console, shown: Shown, names: list[str]) -> None:
    """The columns `names`, whose texts are wrapped if the console is too narrow."""
    drawn = score_table(shown.frame, names, shown.labels)
    put(console, drawn if fits(console, drawn) else score_table(shown.frame, names, shown.labels, fold=True))
