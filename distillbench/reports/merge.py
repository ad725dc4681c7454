"""Merging runs, such as those of several machines, into one folder in the layout of a run."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml

from distillbench.errors import UserError
from distillbench.records.layout import CELLS
from distillbench.records.settings_file import write_settings
from distillbench.records.statistics import summarise
from distillbench.records.table import FIRST, LAST, LATER, make_along, make_table, write_table
from distillbench.reports.labels import METHOD, NAMES, Labels
from distillbench.reports.merge_files import MergedTrials, copy_keyed, merge_trials
from distillbench.reports.reproduce import COMMAND
from distillbench.reports.runs import RunData
from distillbench.reports.show import IDENTITY, run_names
from distillbench.reports.terminal_table import number, plain, row_name
from distillbench.storage.files import write_text

Keep = Literal["first", "last"]
MERGED = "merged"  # key of the list of the runs' environments in environment.json of a merged folder
TEXTS = [name for name, kind in (FIRST | LAST).items() if kind == "string"]
MOST_NAMED = 5  # conflicts in a message
SAME = 1e-12  # largest relative difference of equal scores: reading CSV can change the last bit


@dataclass(frozen=True)
class Merged:
    """The content of a merged folder."""

    table: pd.DataFrame
    summary: pd.DataFrame
    along: pd.DataFrame
    labels: Labels  # the declarations of each score, and the names of each method
    configs: list[dict[str, Any]]
    environment: dict[str, Any]
    notes: list[str]  # texts on what was left out, kept once or chosen
    commands: list[str] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)  # of the runs, those first whose rows are kept
    trials: MergedTrials = field(default_factory=MergedTrials)


def merge(runs: Sequence[RunData], keep: Keep | None = None) -> Merged:
    """The rows of all runs, in order, each measurement once.

    Rows with equal IDENTITY are one measurement if status, key and scores are equal: the first is kept, with its costs.
    Otherwise they are a conflict: a UserError that names them, or with `keep` the first or last of them. Rows of
    different devices are different measurements, so no cost is averaged across devices. Raises UserError also if runs
    were written by versions whose columns differ (apart from empty ones), or declare a score differently.

    Merging is associative: merge(merge(a, b), c), merge(a, merge(b, c)) and merge(a, b, c) hold the same.
    """
    names = [plain(name) for name in run_names(runs)]
    labels = _declared(runs, names)
    scores = list(labels.columns)
    for run, name in zip(runs, names, strict=True):
        if not len(run.table):
            raise UserError(f"{name}: no rows to merge. {'; '.join(run.problems)}".strip())
    lacking = _check_schema(runs, names, "table", [*FIRST, *LAST])
    tables = [_tidy(make_table(records(run.table), scores)) for run in runs]
    table, notes = _once(tables, names, IDENTITY, scores, keep)
    _check_schema(runs, names, "along", [*make_along([], []).columns, "device"])
    alongs = [_tidy(_with_device(run, scores)) for run in runs]
    along, more = _once(alongs, names, [*IDENTITY, "fraction"], scores, keep)
    directions = {score: str(declared["direction"]) for score, declared in labels.columns.items()}
    try:
        summary = summarise(table, directions)
    except ValueError as error:
        raise UserError(f"the merged table has no summary: {error}") from None
    environments = [one for run in runs for one in _environments(run)]
    configs = _different([config for run in runs for config in run.configs])
    notes += [f"along training: {note}" for note in more]
    notes += [f"{name}: its settings are not known" for run, name in zip(runs, names, strict=True) if not run.configs]
    if lacking:
        notes.append(f"columns that a run lacks, and that are empty in the others, are left out: {', '.join(lacking)}")
    order = slice(None, None, -1 if keep == "last" else 1)
    folders = [run.folder for run in runs[order]]
    trials = merge_trials(folders, names[order])
    notes += trials.notes
    return Merged(
        table.drop(columns=lacking), summary, along, labels, configs, {MERGED: _different(environments)}, notes,
        list(dict.fromkeys(command for run in runs for command in run.commands)), folders, trials,
    )  # fmt: skip


def write(merged: Merged, folder: Path) -> None:
    """Write the folder completely or not at all. It must not exist."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--output must name a folder that does not exist, got {plain(folder)!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:100]}.") as temporary:
        made = Path(temporary) / "run"  # not the temporary folder itself, which only its owner can read
        made.mkdir()
        write_table(merged.table, made)
        write_table(merged.summary, made, "summary")
        if len(merged.along):
            write_table(merged.along, made, "along")
        texts = {
            "columns.json": json.dumps(
                {**merged.labels.columns, METHOD: merged.labels.methods}, indent=2, ensure_ascii=False
            )
            + "\n",
            "environment.json": json.dumps(merged.environment, indent=2) + "\n",
        }
        if merged.configs:
            texts["config.yaml"] = write_settings(merged.configs, _yaml)
        if merged.commands:
            texts[COMMAND] = "".join(f"{command}\n" for command in merged.commands)
        for name, text in texts.items():
            write_text(made / name, text)
        copy_keyed(merged.folders, made)
        merged.trials.write(made)
        if folder.is_dir():
            folder.rmdir()
        os.replace(made, folder)


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def left_out(runs: Sequence[RunData], output: Path) -> list[str]:
    """Texts on what of the runs is not in `output`: pictures, students and records stay where they are."""
    lines = ["samples.png and weights/ are not merged: they stay in the runs' folders"]
    for place in dict.fromkeys(run.folder.resolve().parent for run in runs):
        if not (place / CELLS).is_dir():
            lines.append(f"there are no records in {plain(place / 'cells')}")
            continue
        beside = place == output.resolve().parent
        found = "which is beside the merged folder" if beside else "where reports of the merged folder do not look"
        lines.append(f"records are not copied: they stay in {plain(place / 'cells')}, {found}")
    return lines


# --- declarations ----------------------------------------------------------------------------------------------------


def _declared(runs: Sequence[RunData], names: Sequence[str]) -> Labels:
    """The declarations of all scores. Raises UserError if two runs declare one score differently, beyond its names."""
    columns: dict[str, dict[str, str]] = {}
    origin: dict[str, str] = {}
    for run, name in zip(runs, names, strict=True):
        for score, declared in run.columns.items():
            if score not in columns:
                columns[score], origin[score] = declared, name
                continue
            before = columns[score]
            for fact in dict.fromkeys([*before, *declared]):
                if fact not in NAMES and before.get(fact) != declared.get(fact):
                    raise UserError(
                        f"{plain(score)} is declared differently: its {plain(fact)} is {before.get(fact)!r} in "
                        f"{origin[score]} and {declared.get(fact)!r} in {name}. These two scores cannot be merged"
                    )
    return Labels.of(run.labels for run in runs)


def _check_schema(runs: Sequence[RunData], names: Sequence[str], file: str, known: Sequence[str]) -> list[str]:
    """Columns that some run's file lacks and that are empty in the others. Raises UserError for other differences."""
    raw: dict[str, pd.DataFrame] = {}
    for run, name in zip(runs, names, strict=True):
        frame = _raw(run, name, file)
        if frame is None:
            continue
        raw[name] = frame
        declared = {*known, *run.columns}
        strange = [plain(column) for column in frame.columns if column not in declared and not _empty(frame[column])]
        if strange:
            raise UserError(
                f"{name}: {file} was written by another version, or its columns.json is not whole: nothing declares "
                f"{', '.join(strange)}"
            )
    needed = [c for c in (known if file == "table" else known[:-1]) if c in {*FIRST, *LAST} and c not in LATER]
    lacking: list[str] = []
    for name, frame in raw.items():
        for column in (column for column in needed if column not in frame):
            filled = [other for other, one in raw.items() if column in one and not _empty(one[column])]
            if filled:
                raise UserError(
                    f"{name}: {file} was written by another version than {filled[0]}, it has no {column}: train and "
                    "score again with one version to compare them"
                )
            lacking.append(column)
    return list(dict.fromkeys(lacking))


def _raw(run: RunData, name: str, file: str) -> pd.DataFrame | None:
    """The file as it was written; None if there is none. Raises UserError if it cannot be read."""
    found = False
    for suffix, read in {".parquet": pd.read_parquet, ".csv": pd.read_csv}.items():
        path = run.folder / f"{file}{suffix}"
        if not path.is_file():
            continue
        found = True
        try:
            return read(path)
        except Exception:  # pandas and pyarrow raise much for a damaged file; the other form may be whole
            continue
    if found:
        raise UserError(f"{name}: its {file} is damaged and cannot be merged")
    return None


def _empty(column: pd.Series) -> bool:
    return bool((column.isna() | column.astype("string").eq("").fillna(True)).all())


# --- rows ------------------------------------------------------------------------------------------------------------


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain values, None for empty ones."""
    columns = [[None if pd.isna(x) else x for x in frame[name].tolist()] for name in frame]
    return [dict(zip(frame.columns, row, strict=True)) for row in zip(*columns, strict=True)]


def _tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """Replace empty texts by "", as a run writes them; reading CSV makes them empty."""
    return frame.assign(**{name: frame[name].fillna("") for name in TEXTS if name in frame})


def _with_device(run: RunData, scores: list[str]) -> pd.DataFrame:
    """The rows along training, with their device from the table."""
    try:
        along = make_along(records(run.along), scores)
    except (TypeError, ValueError) as error:
        raise UserError(f"{run.name}: along is damaged: {plain(error)}") from None
    if "device" in run.along:
        return along.assign(device=run.along["device"].astype("string").to_numpy()).astype({"device": "string"})
    same = [name for name in IDENTITY if name != "device"]
    places = _tidy(run.table)[[*same, "device"]].drop_duplicates(same)
    return _tidy(along).merge(places, on=same, how="left")


def _once(
    frames: Sequence[pd.DataFrame], names: Sequence[str], identity: list[str], scores: list[str], keep: Keep | None
) -> tuple[pd.DataFrame, list[str]]:
    """All rows, each measurement once, and notes. Raises UserError for a conflict, unless `keep` chooses a row."""
    filled = [frame for frame in frames if len(frame)]
    if not filled:
        return frames[0], []
    table = pd.concat(filled, ignore_index=True)
    origin = [name for frame, name in zip(frames, names, strict=True) for _ in range(len(frame))]
    group = table.groupby(identity, dropna=False, sort=False).ngroup()
    repeated = group[group.duplicated(keep=False)]
    conflicts, equal = [], 0
    rows = records(table) if len(repeated) else []
    for first, *others in repeated.index.groupby(repeated).values():
        for place in others:
            row, why = rows[place], _difference(rows[first], rows[place], scores)
            if why is None:
                equal += 1
                continue
            what, before, after = why
            told = f"{what} {number(before)} in {origin[first]}, {number(after)} in {origin[place]}"
            conflicts.append(plain(f"{row_name(row)} on {row['device'] or 'an unknown device'}: {told}"))
    listed = "; ".join(conflicts[:MOST_NAMED])
    listed += f"; and {len(conflicts) - MOST_NAMED} more" if len(conflicts) > MOST_NAMED else ""
    if conflicts and keep is None:
        raise UserError(
            f"the runs disagree on {len(conflicts)} row{'s' * (len(conflicts) > 1)}: {listed}. "
            "--keep first or --keep last takes those of one run"
        )
    notes = [f"{len(conflicts)} rows in conflict, the {keep} of each is kept: {listed}"] if conflicts else []
    if equal:
        which = keep or "first"
        notes.append(f"{equal} rows are in several runs with equal scores: kept once, with the costs of the {which}")
    return table[~table.duplicated(identity, keep=keep or "first")].reset_index(drop=True), notes


def _difference(one: dict[str, Any], other: dict[str, Any], scores: list[str]) -> tuple[str, Any, Any] | None:
    """(column, value, value) of a difference; None for rows of one measurement."""
    for score in scores:
        a, b = (np.nan if row[score] is None else row[score] for row in (one, other))
        if not np.isclose(a, b, rtol=SAME, atol=0, equal_nan=True):
            return score, one[score], other[score]
    for name in ("status", "key"):
        if one.get(name) != other.get(name):
            return name, one.get(name), other.get(name)
    return None


def _environments(run: RunData) -> list[dict[str, Any]]:
    """The environment of a run, or those of the runs that it was merged from, each with the run's name."""
    merged = run.environment.get(MERGED)
    if isinstance(merged, list):
        return [one for one in merged if isinstance(one, dict)]
    return [{"run": run.name, **run.environment}]


def _different(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The documents in order, without repeats."""
    found: dict[str, dict[str, Any]] = {}
    for document in documents:
        found.setdefault(json.dumps(document, sort_keys=True, default=str), document)
    return list(found.values())
