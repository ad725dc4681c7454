"""The trials of a search for settings, as ``trials.parquet`` or ``trials.csv`` in a run's folder has them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

TRIALS, AFTER, SETTINGS_FILE = "trials", "sampling_trials", "tuning.json"
SETTING = "setting:"  # prefix of a column; its values are JSON
NEEDED = ("method", "trial", "status", "score", "metric", "nfe")
COSTS = ("train_images", "train_seconds", "train_joules")


@dataclass(frozen=True)
class Trial:
    """One training of a search. `score` is None unless `status` is ok; costs that were not measured are None."""

    number: int
    status: str
    score: float | None
    settings: Mapping[str, Any]
    costs: Mapping[str, float | None]
    reason: str = ""


@dataclass(frozen=True)
class Trials:
    """The trials of all methods, in order, and the score that they are compared by.

    `direction`: lower, higher or "" (unknown). `protocol`: "" if unknown.
    """

    metric: str
    nfe: int | None
    direction: str
    protocol: str
    methods: Mapping[str, list[Trial]]
    problems: list[str] = field(default_factory=list)


def read_trials(folder: Path, columns: Mapping[str, Mapping[str, str]], kind: str = TRIALS) -> Trials | None:
    """The trials in a run's folder; None if it has none. `columns`: what the run's scores declare.

    `kind`: TRIALS, or AFTER for those of the search after training, which has equal trials with every protocol.
    What is missing or damaged becomes a problem, and the rest is used.
    """
    problems: list[str] = []
    table = _table(folder, kind, problems)
    if table is None:
        return Trials("", None, "", "", {}, problems) if problems else None
    lacking = [name for name in NEEDED if name not in table]
    if lacking:
        return Trials("", None, "", "", {}, [*problems, f"{kind} has no columns {', '.join(lacking)}"])
    told = _settings(folder / SETTINGS_FILE, problems)
    searched_by = list(dict.fromkeys(zip(table["metric"].astype(str), table["nfe"].map(_whole), strict=True)))
    if len(searched_by) > 1:
        problems.append(f"{kind} has trials of {len(searched_by)} scores: only those of {searched_by[0][0]} are shown")
    metric, nfe = searched_by[0] if searched_by else ("", None)
    methods: dict[str, list[Trial]] = {}
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        if (str(row["metric"]), _whole(row["nfe"])) != (metric, nfe):
            continue
        trial = _trial(row)
        own = methods.setdefault(str(row["method"]), [])
        if trial is None or any(trial.number == other.number for other in own):
            problems.append(f"{kind} has a trial of {row['method']} without a number of its own: it is left out")
        else:
            own.append(trial)
    for own in methods.values():
        own.sort(key=lambda trial: trial.number)
    direction = columns.get(metric, {}).get("direction") or told("goal", "direction")
    protocol = "equal_trials" if kind == AFTER else str(told("tune", "protocol") or "")
    return Trials(metric, nfe, str(direction or ""), protocol, methods, problems)


def _table(folder: Path, kind: str, problems: list[str]) -> pd.DataFrame | None:
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {".parquet": pd.read_parquet, ".csv": pd.read_csv}
    for suffix, read in readers.items():
        file = folder / f"{kind}{suffix}"
        if file.is_file():
            try:
                return read(file)
            except Exception as error:  # pandas and pyarrow can raise anything for a damaged file
                problems.append(f"{file.name} is damaged: {' '.join(str(error).split())[:100]}")
    return None


def _settings(file: Path, problems: list[str]) -> Callable[[str, str], Any]:
    """What the file says of a setting of a part; None without the file."""
    found: Any = {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError):
        problems.append(f"{file.name} is damaged")

    def told(part: str, name: str) -> Any:
        inner = found.get(part) if isinstance(found, dict) else None
        return inner.get(name) if isinstance(inner, dict) else None

    return told


def _trial(row: Mapping[Any, Any]) -> Trial | None:
    number = _whole(row["trial"])
    if number is None:
        return None
    status = str(row["status"] or "")
    settings = {
        str(name).removeprefix(SETTING): _value(text)
        for name, text in row.items()
        if str(name).startswith(SETTING) and text is not None
    }
    costs = {name: _number(row.get(name)) for name in COSTS}
    score = _number(row["score"]) if status == "ok" else None
    return Trial(number, status, score, settings, costs, str(row.get("reason") or ""))


def _value(text: Any) -> Any:
    """The value of a setting; what is no JSON is a text. A CSV file may have been read as numbers already."""
    if not isinstance(text, str):
        return text.item() if hasattr(text, "item") else text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or number != int(number) else int(number)
