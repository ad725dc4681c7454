"""What a merged folder takes from the runs beside their rows: samples, influences, and the trials of searches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from distillbench.errors import UserError
from distillbench.records.influences import FOLDER as INFLUENCES
from distillbench.records.sample_strips import SAMPLES
from distillbench.records.table import write_table
from distillbench.reports.tuning_data import AFTER, SETTING, SETTINGS_FILE, TRIALS
from distillbench.storage.files import write_text

KEYED = (SAMPLES, INFLUENCES)  # folders whose files are named by the key of their evaluation


def copy_keyed(folders: Sequence[Path], made: Path) -> None:
    """Copy the files that are named by the key of their evaluation; of two with one name the first folder's."""
    for folder in reversed(folders):
        for name in KEYED:
            if (folder / name).is_dir():
                shutil.copytree(folder / name, made / name, dirs_exist_ok=True)


@dataclass(frozen=True)
class MergedTrials:
    """The trials of all searches, by the name of their table, and the settings file; {} without a search."""

    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def write(self, folder: Path) -> None:
        for name, table in self.tables.items():
            write_table(table, folder, name)
        if self.settings:
            write_text(folder / SETTINGS_FILE, json.dumps(self.settings, indent=2) + "\n")


def merge_trials(folders: Sequence[Path], names: Sequence[str]) -> MergedTrials:
    """The searches of the runs in `folders`, which are called `names`.

    A search is of one method: its trials are those of the first run that has any, and a note says so if another run has
    other trials. Of the settings of searches those are kept that are equal in all runs. Raises UserError for a damaged
    file.
    """
    tables, notes, origin = {}, [], {}
    for kind in (TRIALS, AFTER):
        parts: dict[str, tuple[str, pd.DataFrame]] = {}  # by method
        for folder, name in zip(folders, names, strict=True):
            table = _table(folder, kind, name)
            for method, part in table.groupby("method", sort=False) if table is not None else []:
                first, kept = parts.setdefault(str(method), (name, part))
                if not _equal(kept, part):
                    notes.append(f"{kind} of {method} differ in {first} and {name}: those of {first} are kept")
        if parts:
            tables[kind] = pd.concat([part for _, part in parts.values()], ignore_index=True)
        if kind == TRIALS:
            origin = {method: name for method, (name, _) in parts.items()}
    found = {name: _settings(folder, name) for folder, name in zip(folders, names, strict=True)}
    return MergedTrials(tables, _one_of({name: one for name, one in found.items() if one}, origin), notes)


def _table(folder: Path, kind: str, name: str) -> pd.DataFrame | None:
    error: Exception | None = None
    for suffix in (".parquet", ".csv"):
        file = folder / f"{kind}{suffix}"
        if not file.is_file():
            continue
        try:
            table = pd.read_parquet(file) if suffix == ".parquet" else _csv(file)
            return table if "method" in table else None
        except Exception as damage:  # pandas and pyarrow can raise anything for a damaged file
            error = damage
    if error is not None:
        raise UserError(f"{name}: its {kind} is damaged and cannot be merged: {' '.join(str(error).split())[:100]}")
    return None


def _csv(file: Path) -> pd.DataFrame:
    """Values of settings stay texts, which are JSON."""
    columns = pd.read_csv(file, nrows=0).columns
    return pd.read_csv(file, dtype={column: str for column in columns if column.startswith(SETTING)})


def _equal(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    def plain(table: pd.DataFrame) -> list[dict[Any, Any]]:
        """The rows without empty values: another method's settings are columns, too."""
        return [{k: v for k, v in row.items() if not pd.isna(v)} for row in table.to_dict("records")]

    return plain(one) == plain(other)


def _settings(folder: Path, name: str) -> dict[str, Any]:
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{name}: its {SETTINGS_FILE} is damaged and cannot be merged")
    return found


def _one_of(found: Mapping[str, Mapping[str, Any]], origin: Mapping[str, str]) -> dict[str, Any]:
    """One settings file: what is equal in all, and what was chosen for each method in the run of its trials."""
    if not found:
        return {}
    merged: dict[str, Any] = {}
    for part in ("tune", "goal"):
        inner = [one[part] if isinstance(one.get(part), dict) else {} for one in found.values()]
        merged[part] = {key: value for key, value in inner[0].items() if all(o.get(key) == value for o in inner)}
    chosen: dict[str, Any] = {}
    for name, one in found.items():
        for method, choice in (one.get("chosen") or {}).items():
            if origin.get(method, name) == name:
                chosen.setdefault(method, choice)
    return {**merged, "chosen": chosen}
