"""A run's folder as reports read it: what is missing or damaged becomes a problem, the rest is used."""

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
from distillbench.records.influences import InfluenceFiles
from distillbench.records.layout import CELLS
from distillbench.records.sample_grid import unstack_shown
from distillbench.records.sample_strips import read_strips
from distillbench.records.settings_file import read_settings
from distillbench.records.statistics import KEYS, SEEDS, summarise
from distillbench.records.table import FIRST, LAST, LATER, make_along, make_table
from distillbench.reports.labels import METHOD, Labels
from distillbench.reports.reproduce import COMMAND

TWICE = "rows of one measurement differ; the first ones are used"
KEY = re.compile(r"[\w-]{1,64}")  # of an evaluation; cannot be a path or a pattern
FILES = ("table.parquet", "table.csv", "config.yaml", "columns.json")  # any of them makes a folder a run


@dataclass(frozen=True)
class RunData:
    """The files of a run. A missing or damaged one is an empty frame or {}, and `problems` says so."""

    folder: Path
    table: pd.DataFrame  # docs/columns.md
    summary: pd.DataFrame  # over seeds, computed from the table
    along: pd.DataFrame  # scores along training
    columns: dict[str, dict[str, str]]  # what each score declares: unit, direction, network, needs, protocol
    configs: list[dict[str, Any]]  # resolved settings, one for each point of the grid
    environment: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    methods: dict[str, dict[str, str]] = field(default_factory=dict)  # label and title of each method
    commands: list[str] = field(default_factory=list)  # that reproduce it, with what differs from defaults
    notes: list[str] = field(default_factory=list)  # what is no problem, such as columns that an older version lacks

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def directions(self) -> dict[str, str]:
        """By score: lower, higher or none."""
        return {name: declared["direction"] for name, declared in self.columns.items()}

    @property
    def labels(self) -> Labels:
        """The names of its columns and methods for people."""
        return Labels(self.columns, self.methods)

    @property
    def influences(self) -> InfluenceFiles:
        """How much each image moves the scores of each row, for :func:`leading_groups`."""
        return InfluenceFiles(self.folder)

    def shown(self, key: str) -> list[tuple[int, int, np.ndarray]]:
        """(nfe, sampling seed, images (N,C,H,W) uint8) of the evaluation `key`; [] if there are none.

        The images are of rows that are ok, of the first sampling seed, by nfe; every evaluation has the same noise.
        They are read from the record in cells/, or if that is missing or damaged, from the strips in the run's folder.
        """
        if not KEY.fullmatch(key):
            return []
        return self._of_record(key) or self._of_strips(key)

    def _of_strips(self, key: str) -> list[tuple[int, int, np.ndarray]]:
        if not len(self.table):
            return []
        seeds = self.table.loc[self.table["key"].eq(key).fillna(False), "sampling_seed"].dropna()
        first = int(seeds.iloc[0]) if len(seeds) else 0
        return [(nfe, first, images) for nfe, images in read_strips(self.folder, key).items()]

    def _of_record(self, key: str) -> list[tuple[int, int, np.ndarray]]:
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
        """The records of all evaluations beside the run, by key."""
        found = (self.folder.parent / CELLS).glob("*/evaluation-*.json")
        return {record.stem.removeprefix("evaluation-"): record for record in found}


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def read_run(folder: Path) -> RunData:
    """The run in `folder`. Raises UserError only if the folder does not exist or has no file of a run."""
    if not folder.is_dir():
        runs = [path.name for path in folder.parent.iterdir() if _is_run(path)] if folder.parent.is_dir() else []
        usual = Path("results", folder)
        near = f" Did you mean {str(usual)!r}?" if _is_run(usual) else nearest(folder.name, runs)
        raise UserError(f"no run {str(folder)!r}.{near} Possible: {', '.join(sorted(runs)) or 'none'}")
    if not _is_run(folder):
        raise UserError(f"{str(folder)!r} is not a run: it has none of {', '.join(FILES)}")
    problems: list[str] = []
    notes: list[str] = []
    columns, methods = _declared(folder, problems)
    table = _frame(folder, "table", problems)
    table = make_table([], list(columns)) if table is None else _known(table, columns, problems, notes)
    along = _frame(folder, "along", problems, needed=False)
    if along is not None and not {"method", "training_seed", "nfe", "fraction", "status", *columns} <= set(along):
        problems.append("along is damaged or written by another version: it is ignored")
        along = None
    configs = _configs(folder, problems)
    missing = _unfinished(table, configs)
    problems += [f"not finished: no rows of {', '.join(missing)}"] if missing else []
    summary = _summary(table, columns, problems)
    return RunData(
        folder, table, summary, make_along([], list(columns)) if along is None else along, columns, configs,
        _json(folder / "environment.json", problems), problems, methods, _commands(folder), notes,
    )  # fmt: skip


def _summary(table: pd.DataFrame, columns: dict[str, dict[str, str]], problems: list[str]) -> pd.DataFrame:
    """The summary over seeds. If a table has several rows of one measurement, the first is used, which is a problem."""
    directions = {name: declared["direction"] for name, declared in columns.items()}
    if not len(table):
        return table
    try:
        return summarise(table, directions)
    except ValueError as error:
        problems.append(f"{TWICE}: {error}")
        return summarise(table.drop_duplicates([*KEYS, *SEEDS]), directions)


def _declared(
    folder: Path, problems: list[str]
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:  # fmt: skip
    """The declarations of each score, and the names of each method; {} in runs of earlier versions."""
    declared = _json(folder / "columns.json", problems)
    named = declared.pop(METHOD, {})
    methods = {name: facts for name, facts in named.items() if isinstance(facts, dict)} if type(named) is dict else {}
    good = {
        name: facts
        for name, facts in declared.items()
        if isinstance(facts, dict) and facts.get("direction") in ("lower", "higher", "none")
    }
    if len(good) != len(declared):
        problems.append("columns.json is damaged: scores without a direction are ignored")
    return good, methods


def _known(
    table: pd.DataFrame, columns: dict[str, dict[str, str]], problems: list[str], notes: list[str]
) -> pd.DataFrame:
    """The table with the columns and types of this version; missing columns are empty, which is noted."""
    lacking = [name for name in [*FIRST, *LAST] if name not in table and name not in LATER]
    needed = [name for name in lacking if name in (*KEYS, *SEEDS, "status")]
    if needed:
        problems.append(f"written by another version: no columns {', '.join(needed)}")
    if more := [name for name in lacking if name not in needed]:
        notes.append(f"written by a version of distillbench that had no columns {', '.join(more)}")
    undeclared = [name for name in table if name not in {*FIRST, *LAST, *columns}]
    if undeclared:
        problems.append(f"undeclared columns are ignored: {', '.join(map(str, undeclared))}")
    try:
        rows: list[dict[str, Any]] = table.astype(object).where(table.notna(), None).to_dict("records")  # type: ignore[assignment]
        return make_table(rows, list(columns))
    except (TypeError, ValueError, ArithmeticError) as error:
        problems.append(f"the table is damaged: {error}")
        return make_table([], list(columns))


def _frame(folder: Path, name: str, problems: list[str], needed: bool = True) -> pd.DataFrame | None:
    """<name>.parquet, or <name>.csv if that is missing or damaged."""
    readers = {".parquet": pd.read_parquet, ".csv": pd.read_csv}
    found = False
    for suffix, read in readers.items():
        file = folder / f"{name}{suffix}"
        if not file.is_file():
            continue
        found = True
        try:
            return read(file)
        except Exception as error:  # pandas and pyarrow can raise anything for a damaged file
            problems.append(f"{file.name} is damaged: {' '.join(str(error).split())[:100]}")
    if needed and not found:
        problems.append(f"there is no {name}: the run has finished no cell")
    return None


class _Plain(yaml.SafeLoader):
    """YAML without aliases: nine lines of aliases can stand for a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, which settings never have")
        return super().compose_node(parent, index)


def _is_config(document: Any) -> bool:
    """Whether a document can be a run's settings, as far as reports use them."""
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
            problems.append("config.yaml is damaged: documents that are not settings are ignored")
        return good
    except FileNotFoundError:
        problems.append("config.yaml is missing: settings are not known")
    except (OSError, ValueError, OverflowError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"config.yaml is damaged: {' '.join(str(error).split())[:100]}")
    return []


def _commands(folder: Path) -> list[str]:
    """The lines of COMMAND; [] without the file, as in runs of older versions."""
    try:
        return [line for line in (folder / COMMAND).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError):
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
    """Methods and seeds of the settings that have no row."""
    there = {(row.method, row.training_seed) for row in table[["method", "training_seed"]].itertuples()}
    wanted = [(name, config.get("seed")) for config in configs for name in config.get("methods") or {}]
    return [f"{name} (seed {seed})" for name, seed in dict.fromkeys(wanted) if (name, seed) not in there]
