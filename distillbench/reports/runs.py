"""A run's folder as it is read for reports: whatever is missing or damaged is said, and the rest is used."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file  # without torch, which takes seconds to import

from distillbench.errors import UserError, nearest
from distillbench.run_settings import read_settings
from distillbench.sample_grid import unstack_shown
from distillbench.statistics import KEYS, SEEDS, summarise
from distillbench.table import FIRST, LAST, LATER, make_along, make_table

TWICE = "rows of one measurement differ, of which the first count"
KEY = re.compile(r"[\w-]{1,64}")  # of an evaluation: no path, no pattern
NOT_RUNS = ("cells", "cache")  # folders beside runs that are none


@dataclass(frozen=True)
class RunData:
    """What a run left. Frames are empty where it left nothing; `problems` says what is missing or damaged, in words."""

    folder: Path
    table: pd.DataFrame  # docs/columns.md
    summary: pd.DataFrame  # over seeds, computed anew from the table
    along: pd.DataFrame  # scores along training
    columns: dict[str, dict[str, str]]  # what each score declares: unit, direction, network, needs, protocol
    configs: list[dict[str, Any]]  # resolved settings, one for each point of the grid
    environment: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def directions(self) -> dict[str, str]:
        """By score: lower, higher or none."""
        return {name: told["direction"] for name, told in self.columns.items()}

    def shown(self, key: str) -> list[tuple[int, int, np.ndarray]]:
        """(nfe, sampling seed, images (N,C,H,W) uint8) that were kept of the evaluation `key`; [] if they are gone.

        They are of the rows that are ok, of the first sampling seed, in the order of their nfe, from the same noise in
        every evaluation.
        """
        if not KEY.fullmatch(key):
            return []
        if record := self._evaluations.get(key):
            try:
                rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
                first = rows[0]["sampling_seed"] if rows else 0
                good = [row for row in rows if row["status"] == "ok" and row["sampling_seed"] == first]
                images = unstack_shown(load_file(record.with_suffix(".safetensors")))
                if any(x.ndim != 4 or x.dtype != np.uint8 or x.shape[1] not in (1, 3) for x in images):
                    return []
                return [(row["nfe"], first, x) for row, x in zip(good, images, strict=True)]
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
                return []
        return []

    @functools.cached_property
    def _evaluations(self) -> dict[str, Path]:
        """The records of evaluations beside the run, by their keys: all names are read once."""
        found = (self.folder.parent / "cells").glob("*/evaluation-*.json")
        return {record.stem.removeprefix("evaluation-"): record for record in found}


def read_run(folder: Path) -> RunData:
    """The run in `folder`. Raises UserError only where there is no such folder, or it holds nothing of a run."""
    if not folder.is_dir():
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        runs = [name for name in beside if name not in NOT_RUNS]
        raise UserError(
            f"no run {str(folder)!r}.{nearest(folder.name, runs)} Possible: {', '.join(sorted(runs)) or 'none'}"
        )
    names = ("table.parquet", "table.csv", "config.yaml", "columns.json")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{str(folder)!r} is not a run: it has none of {', '.join(names)}")
    problems: list[str] = []
    columns = _columns(folder, problems)
    table = _frame(folder, "table", problems)
    table = make_table([], list(columns)) if table is None else _known(table, columns, problems)
    along = _frame(folder, "along", problems, needed=False)
    if along is not None and not {"method", "training_seed", "nfe", "fraction", "status", *columns} <= set(along):
        problems.append("along is damaged, or written by another version: it is left out")
        along = None
    configs = _configs(folder, problems)
    missing = _unfinished(table, configs)
    problems += [f"not finished: no rows of {', '.join(missing)}"] if missing else []
    summary = _summary(table, columns, problems)
    return RunData(
        folder, table, summary, make_along([], list(columns)) if along is None else along, columns, configs,
        _json(folder / "environment.json", problems), problems,
    )  # fmt: skip


def _summary(table: pd.DataFrame, columns: dict[str, dict[str, str]], problems: list[str]) -> pd.DataFrame:
    """Over seeds; of a table that measures something twice the first rows count, and that is said."""
    directions = {name: told["direction"] for name, told in columns.items()}
    if not len(table):
        return table
    try:
        return summarise(table, directions)
    except ValueError as error:
        problems.append(f"{TWICE}: {error}")
        return summarise(table.drop_duplicates([*KEYS, *SEEDS]), directions)


def _columns(folder: Path, problems: list[str]) -> dict[str, dict[str, str]]:
    declared = _json(folder / "columns.json", problems)
    good = {
        name: told
        for name, told in declared.items()
        if isinstance(told, dict) and told.get("direction") in ("lower", "higher", "none")
    }
    if len(good) != len(declared):
        problems.append("columns.json is damaged: some scores have no direction and are left out")
    return good


def _known(table: pd.DataFrame, columns: dict[str, dict[str, str]], problems: list[str]) -> pd.DataFrame:
    """The table with the columns and types of this version; what it lacks is empty, and said."""
    lacking = [name for name in [*FIRST, *LAST] if name not in table and name not in LATER]
    if lacking:
        problems.append(f"written by another version: without {', '.join(lacking)}")
    undeclared = [name for name in table if name not in {*FIRST, *LAST, *columns}]
    if undeclared:
        problems.append(f"columns that nothing declares are left out: {', '.join(map(str, undeclared))}")
    try:
        rows: list[dict[str, Any]] = table.astype(object).where(table.notna(), None).to_dict("records")  # type: ignore[assignment]
        return make_table(rows, list(columns))
    except (TypeError, ValueError, ArithmeticError) as error:
        problems.append(f"the table is damaged: {error}")
        return make_table([], list(columns))


def _frame(folder: Path, name: str, problems: list[str], needed: bool = True) -> pd.DataFrame | None:
    """<name>.parquet, or <name>.csv where that is missing or damaged."""
    readers = {".parquet": pd.read_parquet, ".csv": pd.read_csv}
    found = False
    for suffix, read in readers.items():
        file = folder / f"{name}{suffix}"
        if not file.is_file():
            continue
        found = True
        try:
            return read(file)
        except Exception as error:  # pandas and pyarrow raise much for a damaged file
            problems.append(f"{file.name} is damaged: {' '.join(str(error).split())[:100]}")
    if needed and not found:
        problems.append(f"there is no {name}: the run has finished no cell")
    return None


class _Plain(yaml.SafeLoader):
    """YAML without aliases: nine lines of them stand for a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, which settings do not need")
        return super().compose_node(parent, index)


def _is_config(document: Any) -> bool:
    """Whether a document may be a run's settings, as far as reports look at them."""
    if not isinstance(document, dict):
        return False
    methods, seed = document.get("methods"), document.get("seed")
    return isinstance(methods, dict | None) and isinstance(seed, int | str | None)


def _configs(folder: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        documents = read_settings(text, lambda part: list(yaml.load_all(part, _Plain)))
        good = [document for document in documents if _is_config(document)]
        if len(good) != len(documents):
            problems.append("config.yaml is damaged: some of it holds no settings and is left out")
        return good
    except FileNotFoundError:
        problems.append("config.yaml is missing: settings are not known")
    except (OSError, ValueError, OverflowError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"config.yaml is damaged: {' '.join(str(error).split())[:100]}")
    return []


def _json(file: Path, problems: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        problems.append(f"{file.name} is damaged")
    except FileNotFoundError:
        problems.append(f"{file.name} is missing")
    except (OSError, ValueError, RecursionError):
        problems.append(f"{file.name} is damaged")
    return {}


def _unfinished(table: pd.DataFrame, configs: list[dict[str, Any]]) -> list[str]:
    """Methods and seeds that the settings name and that have no row."""
    there = {(row.method, row.training_seed) for row in table[["method", "training_seed"]].itertuples()}
    wanted = [(name, config.get("seed")) for config in configs for name in config.get("methods") or {}]
    return [f"{name} (seed {seed})" for name, seed in dict.fromkeys(wanted) if (name, seed) not in there]
