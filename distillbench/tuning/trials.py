"""Trials as plain values, what they cost together, and their table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from distillbench.records.table import write_table

COSTS = ("train_images", "train_seconds", "train_joules")
SETTING = "setting:"  # prefix of the columns of settings
TYPES = {
    "method": "string",
    "trial": "Int64",
    "status": "string",
    "score": "Float64",
    "metric": "string",
    "nfe": "Int64",
    "train_images": "Int64",
    "train_seconds": "Float64",
    "train_joules": "Float64",
}


@dataclass(frozen=True)
class Outcome:
    """How a trial ended. `status`: ok, failed, diverged or pruned. Costs that were not measured are None.

    `share`: of the budget, of the training in which it ended; below 1 with halving.
    """

    status: str
    score: float | None = None
    reason: str = ""
    costs: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(COSTS))
    share: float = 1.0


@dataclass(frozen=True)
class Trial:
    """A trial of a method. `outcome` None: it has not ended."""

    method: str
    number: int
    settings: dict[str, Any]
    outcome: Outcome | None = None


def best_of(trials: Sequence[Trial], direction: str) -> Trial | None:
    """The trial with the best score, the first of equal ones; None if none is ok. `direction`: lower or higher."""
    good = [trial for trial in trials if trial.outcome is not None and trial.outcome.status == "ok"]
    sign = -1 if direction == "higher" else 1
    return min(good, key=lambda trial: (sign * _score(trial), trial.number), default=None)


def _score(trial: Trial) -> float:
    assert trial.outcome is not None and trial.outcome.score is not None
    return trial.outcome.score


def spent(trials: Sequence[Trial], cost: str) -> tuple[float, list[Trial]]:
    """The sum of a cost over the trials that ended, and those of them whose cost was not measured."""
    ended = [(trial, trial.outcome.costs.get(cost)) for trial in trials if trial.outcome is not None]
    return sum(value for _, value in ended if value is not None), [trial for trial, value in ended if value is None]


def trials_table(trials: Sequence[Trial], metric: str, nfe: int) -> pd.DataFrame:
    """One row for each trial that ended. Settings are JSON, empty where a method has no such setting."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.settings))
    rows = [_row(trial, trial.outcome, metric, nfe) for trial in trials if trial.outcome is not None]
    types = TYPES | {SETTING + name: "string" for name in names} | {"reason": "string"}
    columns = {name: pd.array([row.get(name) for row in rows], dtype=kind) for name, kind in types.items()}  # type: ignore[call-overload]
    return pd.DataFrame(columns)


def _row(trial: Trial, outcome: Outcome, metric: str, nfe: int) -> dict[str, Any]:
    own = {"method": trial.method, "trial": trial.number, "status": outcome.status, "score": outcome.score}
    settings = {SETTING + name: json.dumps(value) for name, value in trial.settings.items()}
    return {**own, "metric": metric, "nfe": nfe, **outcome.costs, **settings, "reason": outcome.reason}


def write_trials(trials: Sequence[Trial], metric: str, nfe: int, folder: Path, name: str = "trials") -> None:
    """<name>.csv and <name>.parquet in `folder`, each replaced as a whole."""
    write_table(trials_table(trials, metric, nfe), folder, name)
