"""Results from the literature, shown next to measured results and never among them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from distillbench.errors import UserError

if TYPE_CHECKING:
    from distillbench.reports.runs import RunData

FILE = Path(__file__).with_name("published.csv")
LABEL = "published elsewhere, other teachers, budgets and evaluators: not comparable"
COLUMNS: dict[str, str] = {  # column: pandas type; docs/published.md
    "method": "string",
    "teacher": "string",
    "dataset": "string",
    "resolution": "Int64",
    "nfe": "Int64",
    "metric": "string",
    "value": "Float64",
    "precision": "Float64",
    "recall": "Float64",
    "training_cost": "string",
    "data_free": "string",
    "source": "string",
    "read": "string",
    "note": "string",
}
NEEDED = ("method", "dataset", "resolution", "metric", "value", "data_free", "source", "read")  # empty in no row
METRICS = {"FID": ("FID ↓", "Fréchet Inception distance"), "IS": ("Inception score ↑", "Inception score")}  # labels
READ = ("first-hand", "second-hand", "disputed")
DATA_FREE = ("yes", "no", "unknown")
CASE = ["method", "dataset", "resolution", "nfe", "metric"]  # different values of one case are disputed


def read_published(file: Path = FILE) -> pd.DataFrame:
    """The rows of a file of published results, with the types of COLUMNS. Raises UserError with every faulty line."""
    try:
        text = pd.read_csv(file, dtype="string", keep_default_na=False, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file.name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(text.index, pd.RangeIndex):  # pandas takes surplus fields as the row's name
        raise UserError(f"{file.name} has rows of more than {len(text.columns)} fields")
    if list(text) != list(COLUMNS):
        raise UserError(f"{file.name} has columns {', '.join(map(str, text))}. Needed: {', '.join(COLUMNS)}")
    text = text.mask(text == "")
    frame, faults = pd.DataFrame(index=text.index), []
    for name, kind in COLUMNS.items():
        if kind == "string":
            frame[name] = text[name]
            continue
        numbers = pd.to_numeric(text[name], errors="coerce").astype("Float64")
        numbers = numbers.mask(numbers.abs() > 2**53) if kind == "Int64" else numbers  # infinities too
        bad = text[name].notna() & (numbers.isna() | ((numbers % 1 != 0) & (kind == "Int64")))
        faults += _fault(text.index[bad.fillna(False)], f"{name} is no {'whole ' if kind == 'Int64' else ''}number")
        frame[name] = numbers.mask(bad).astype(kind)
    faults += _faults(frame) if not faults else []
    if faults:
        raise UserError(f"{file.name}: {'; '.join(faults)}")
    return frame


def _faults(frame: pd.DataFrame) -> list[str]:
    """What is wrong with typed rows; [] if nothing is."""
    faults = []
    for name in NEEDED:
        faults += _fault(frame.index[frame[name].isna()], f"no {name}")
    for name, possible in (("metric", tuple(METRICS)), ("read", READ), ("data_free", DATA_FREE)):
        wrong = frame[name].notna() & ~frame[name].isin(possible)
        faults += _fault(frame.index[wrong], f"{name} is none of {', '.join(possible)}")
    for name, low, high in (
        ("resolution", 1, 4096),
        ("nfe", 1, 10_000),
        ("value", 0, 1000),
        ("precision", 0, 1),
        ("recall", 0, 1),
    ):
        out = ~frame[name].between(low, high) & frame[name].notna()
        faults += _fault(frame.index[out.fillna(False)], f"{name} is not within {low} and {high}")
    text = [name for name, kind in COLUMNS.items() if kind == "string"]
    untidy = (
        frame[text].apply(lambda column: column.ne(column.str.strip()) | column.str.contains("[\n\r\t]")).fillna(False)
    )
    faults += _fault(frame.index[untidy.fillna(False).any(axis=1)], "spaces around a text, or a line break in it")
    again = frame.duplicated([*CASE, "teacher", "value", "source"])
    faults += _fault(frame.index[again], "the same as an earlier row")
    cases = frame.groupby(CASE, dropna=False)["value"].transform("nunique")
    disputed = frame["read"].eq("disputed").fillna(False)
    case = ", ".join(CASE)
    faults += _fault(frame.index[disputed & (cases < 2)], f"disputed, but no other value has the same {case}")
    faults += _fault(frame.index[~disputed & (cases > 1)], f"another value has the same {case}: all must be disputed")
    return faults


def _fault(rows: pd.Index, fault: str) -> list[str]:
    return [f"line {', '.join(str(row + 2) for row in rows)}: {fault}"] if len(rows) else []


@cache
def _shipped() -> pd.DataFrame:
    return read_published()


def published(dataset: str, resolution: int) -> pd.DataFrame:
    """The published rows of a dataset at a resolution (side in pixels), by metric, nfe and value.

    Columns and types are those of COLUMNS; no rows if nothing is known.
    """
    every = _shipped()
    found = every[every["dataset"].eq(dataset) & every["resolution"].eq(resolution)]
    return found.sort_values(["metric", "nfe", "value", "method"], kind="stable", ignore_index=True)


def published_section(runs: Iterable[RunData]) -> pd.DataFrame:
    """The published rows of the datasets and resolutions of `runs`.

    Reports show them in a section of their own under LABEL, never among measured rows. The resolution is that of a
    run's settings; a run without settings (a missing config.yaml) adds no rows.
    """
    asked = {
        (str(dataset.get("kind")), dataset["resolution"])
        for run in runs
        for config in run.configs
        if isinstance(dataset := config.get("dataset"), dict) and isinstance(dataset.get("resolution"), int)
    }
    parts = [part for one in sorted(asked) if len(part := published(*one))]
    return pd.concat(parts, ignore_index=True) if parts else published("", 0)
