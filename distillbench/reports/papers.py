"""Tables for papers: Markdown, LaTeX with booktabs, CSV."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd

from distillbench.errors import UserError, nearest, quoted, unknown
from distillbench.records.numbers import MOST_DECIMALS, rounded
from distillbench.records.statistics import TEACHER
from distillbench.reports.groups import grouped
from distillbench.reports.paper_data import COSTS, GROUP, SummaryData, comparable_sets
from distillbench.reports.paper_forms import Cell, PaperTable, markdown
from distillbench.reports.paper_latex import latex
from distillbench.reports.paper_style import PaperStyle
from distillbench.reports.words import number

if TYPE_CHECKING:
    from distillbench.reports.runs import RunData

Form = Literal["markdown", "latex", "csv"]


def paper_table(
    runs: Sequence[RunData],
    columns: Sequence[str] | None = None,
    precision: Mapping[str, int] | None = None,
    sort: str | None = None,
    form: Form = "markdown",
    style: PaperStyle = "neurips",
) -> str:
    """The summary of `runs` as text for a paper: one table for each set of rows that may be compared.

    columns: columns of the summary, scores and costs; None: method, nfe, the scores and COSTS that have values, and
    what else it takes to tell rows apart. precision: decimals by column; other columns have as many as their interval
    allows, or four significant digits. sort: a column, for a score the better first; "-" in front reverses the order.
    None: the order of the run.

    A score is its mean ± half its interval over training seeds, if it has one, and bold if it leads
    (`statistics.leaders`). A table with rows that are not ok has a column status, and their reasons follow: as a list
    in Markdown, as comments in LaTeX. CSV is one table without formatting, with half widths and leads in columns of
    their own (NAME_plus_minus, NAME_leads); the first columns tell sets apart. LaTeX is as wide as `style` allows; its
    first line says which packages it needs.

    Raises UserError for unknown columns and forms, and for decimals outside 0 to MOST_DECIMALS.
    """
    if form not in get_args(Form):
        raise unknown("form", str(form), get_args(Form))
    data = SummaryData.of(runs)
    asked = list(dict.fromkeys(columns)) if columns is not None else None
    if asked is not None and not asked:
        raise UserError(f"no columns are given. Possible: {', '.join(data.possible)}")
    for name in [*(asked or []), *(precision or {}), *([sort.removeprefix("-")] if sort else [])]:
        if name not in data.possible:
            close = nearest(name, data.possible)
            raise UserError(f"no column {quoted(name)}.{close} Possible: {', '.join(data.possible)}")
    for name, digits in (precision or {}).items():
        if isinstance(digits, bool) or not isinstance(digits, int) or not 0 <= digits <= MOST_DECIMALS:
            raise UserError(f"precision of {name} is {digits!r}. Possible: 0 to {MOST_DECIMALS} decimals")
    if form == "csv":
        return _csv(data, asked, precision or {}, sort)
    tables = [_table(data, rows, asked, precision or {}, sort) for rows in comparable_sets(data.summary)]
    problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    return markdown(tables, problems) if form == "markdown" else latex(tables, problems, style)


# --- numbers ----------------------------------------------------------------------------------------------------------


def _number(value: Any, digits: int | None = None) -> str:
    """A value without an interval, with thousands separators."""
    text = number(value) if digits is None else f"{float(value):,.{digits}f}"
    return text.replace("−", "-").replace("∞", "inf")


# --- contents ---------------------------------------------------------------------------------------------------------


def _names(data: SummaryData, rows: pd.DataFrame, asked: list[str] | None) -> list[str]:
    """The columns of a table."""
    names = asked
    if names is None:
        names = ["method", "nfe", *data.columns, *(cost for cost in COSTS if cost in rows and rows[cost].notna().any())]
        apart = ["method", "nfe"]
        for name in ("run", "settings", "device"):
            if rows.duplicated(apart).any() and rows[name].nunique(dropna=False) > 1:
                apart.append(name)
        names[1:1] = apart[2:]
    bad = (rows["status"] != "ok").any()
    return [*names, "status"] if bad and "status" not in names else list(names)


def _sorted(data: SummaryData, rows: pd.DataFrame, sort: str | None) -> pd.DataFrame:
    if not sort or sort.removeprefix("-") not in rows:
        return rows
    name = sort.removeprefix("-")
    ascending = data.columns.get(name, {}).get("direction", "lower") != "higher"
    return rows.sort_values(name, ascending=ascending != sort.startswith("-"), kind="stable", na_position="last")


def _status(row: Mapping[str, Any]) -> str:
    """ok, or the statuses behind the row: "diverged", "2 of 3 ok, else failed"."""
    text = str(row["status"])
    words = ", ".join(dict.fromkeys(status for status, _ in row["reasons"])) or "failed"
    if text == "ok":
        return text
    return words if text.startswith("0 of ") else f"{text}, else {words}"


def _half_width(row: Mapping[str, Any], name: str) -> float | None:
    low, high = row.get(f"{name}_training_low"), row.get(f"{name}_training_high")
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return None
    return (float(high) - float(low)) / 2


def _cell(data: SummaryData, row: Mapping[str, Any], name: str, precision: Mapping[str, int]) -> Cell:
    if name == "status":
        return Cell(_status(row), number=False)
    value = row[name]
    if pd.isna(value) or value == "":
        return Cell("", number=False)
    if isinstance(value, str):
        return Cell(value, number=False)
    digits = precision.get(name)
    half = _half_width(row, name)
    if half is None:
        return Cell(_number(value, digits))
    mean, width = (rounded(x, half) if digits is None else f"{x:,.{digits}f}" for x in (float(value), half))
    return Cell(mean, width, bool(row.get(f"leads_{name}")))


def _table(
    data: SummaryData, rows: pd.DataFrame, asked: list[str] | None, precision: Mapping[str, int], sort: str | None
) -> PaperTable:
    rows = _sorted(data, rows, sort)
    names = _names(data, rows, asked)
    records: list[dict[str, Any]] = rows.to_dict("records")  # type: ignore[assignment]
    cells = [[_cell(data, row, name, precision) for name in names] for row in records]
    notes = []
    for row, line in zip(records, cells, strict=True):
        label = data.method(row["method"])
        if "method" in names:
            line[names.index("method")] = Cell(label, number=False)
        notes += [f"{label}, {row['nfe']} NFE: {status}: {reason}" for status, reason in row["reasons"]]
        notes += [f"{label}, {row['nfe']} NFE: {note}" for note in row["notes"]]
    where = "".join(c if c.isascii() and c.isalnum() else "-" for c in str(records[0]["dataset"]).lower())
    return PaperTable(
        [data.labels.label(name) for name in names],
        cells,
        _caption(data, rows, names),
        list(dict.fromkeys(notes)),
        where,
        names.index("method") if "method" in names else None,
    )


def _caption(data: SummaryData, rows: pd.DataFrame, names: list[str]) -> list[str]:
    def values(name: str) -> str:
        return ", ".join(str(v) for v in rows[name].dropna().unique() if v != "")

    students = rows[~rows["method"].str.startswith(TEACHER).fillna(False).astype(bool)]
    facts = [f"Dataset {values('dataset')}", f"teacher {values('teacher')}"]
    facts += [f"guidance {values('guidance')}"] if values("guidance") else []
    facts += [f"{grouped(values('budget'))} for each training"] if values("budget") else []
    facts += [f"{grouped(values('images')) or 'an unknown number of'} samples per row"]
    for name, what in (("training_seeds", "training"), ("sampling_seeds", "sampling")):
        counts = sorted({int(n) for n in (students if len(students) else rows)[name].dropna()})
        if counts and counts != [0] and (what == "training" or counts != [1]):
            span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
            facts.append(f"{span} {what} seed{'s' * (span != '1')}")
    sentences = [", ".join(facts)]
    scores = [name for name in names if name in data.columns]
    with_interval = [name for name in scores if rows[f"{name}_training_low"].notna().any()]
    if with_interval:
        kinds = {
            k
            for n in with_interval
            if f"{n}_training_interval" in rows
            for k in rows[f"{n}_training_interval"].dropna()
        }
        how = {"t": "Student's t", "bootstrap": "bootstrap"}
        found = " or ".join(how.get(kind, kind) for kind in sorted(kinds, reverse=True))
        of = "half the 95 % interval of the mean over training seeds"
        sentences.append(f"±: {of}" + (f" ({found})" if found else "") + "; values without it have too few seeds")
    elif scores:
        sentences.append("No intervals: no method was trained with two seeds")
    if any(rows[f"leads_{name}"].any() for name in scores):
        sentences.append(f"Bold: at its NFE {data.rule}")
    elif scores:
        sentences.append("None is marked as best: methods could not be compared")
    return sentences


def _csv(data: SummaryData, asked: list[str] | None, precision: Mapping[str, int], sort: str | None) -> str:
    apart = [name for name in GROUP if data.summary[name].nunique(dropna=False) > 1]
    several = apart if len(comparable_sets(data.summary)) > 1 else []
    rows = _sorted(data, data.summary, sort)
    names = _names(data, rows, asked)
    names = [*(name for name in several if name not in names), *names]
    columns: dict[str, list[str]] = {}
    for name in names:
        cells: list[Cell] = [_cell(data, row, name, precision) for row in rows.to_dict("records")]
        columns[name] = [cell.text.replace(",", "") if cell.number else cell.text for cell in cells]
        if name in data.columns:
            columns[f"{name}_plus_minus"] = [cell.half_width.replace(",", "") for cell in cells]
            columns[f"{name}_leads"] = ["yes" if cell.leads else "" for cell in cells]
    out = io.StringIO()
    pd.DataFrame(columns).to_csv(out, index=False, lineterminator="\n")
    return out.getvalue()
