"""``distillbench clean``: list the files of a results folder that can be removed, and remove them when confirmed.

Only files below cells/ and cache/, and temporary files anywhere, are removed: never a run's tables or weights. Symbolic
links are not followed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench.errors import UserError, counted, first_of, quoted, unknown
from distillbench.records.influences import cell_file
from distillbench.records.layout import CACHE, CELLS
from distillbench.records.records import FINAL
from distillbench.storage.files import TEMPORARY, sha256_file
from distillbench.storage.folders import (
    NETWORK_FILE_SYSTEMS,
    file_system,
    files_below,
    folders_below,
    folders_in,
    freed,
    lstat,
    size_of,
    walk,
)
from distillbench.storage.locks import is_locked, try_lock

if TYPE_CHECKING:
    from rich.console import Console

KINDS = {  # the kinds of files that can be removed, with a description
    "temporary": "temporary files of processes that were killed",
    "states": "resume states of finished trainings, and damaged ones that were set aside",
    "failed": "records and tracebacks of failed work; without them the next run tries again",
    "orphans": "cells that no run in this folder refers to",
    "pairs": "noise-image pairs; methods that need them compute them again",
    "latents": "encoded images; the next run that needs them encodes them again",
    "references": "features of real images; the next run that scores extracts them again",
    "answers": "the teacher's many-step samples that scores compare with; the next run samples them again",
}
USUAL = ("temporary", "states")  # the default: files that nothing needs any more
CACHES = ("teachers", "pairs", "latents", "references", "prompts", "answers", "jobs")  # folders of cache/
DAYS = {"temporary": 1.0, "orphans": 1.0}  # the default minimum age
QUIET_SECONDS = 3600.0  # without a change, after which a file that no process has open counts as abandoned
KEY = re.compile(r"[0-9a-f]{16}")  # the name of a cell's folder
STUDENT = re.compile(r"-([0-9a-f]{16})\.safetensors")  # the end of a student's file name in a run's weights/
SCRATCH = re.compile(r"\..+\.[a-z0-9_]{8}")  # temporary folders of exports and merged runs
SCRATCH_HOLDS = {"folder", "run", "package"}  # the only names in such a folder
MIB = 2**20
SHOWN = 5  # most names or errors to print

Busy = Callable[[Path], bool]  # whether a process is working on the cell in this folder


@dataclass
class Removal:
    """The files of one kind to remove. `folders` are removed if they are empty then. `notes` are printed."""

    kind: str
    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, folder: Path) -> None:
        """Add a folder with everything below it."""
        self.files += files_below(folder)
        self.folders += folders_below(folder)


def clean(
    results_dir: Path, what: Sequence[str], older_than_days: float | None, yes: bool, console: Console,
    confirm: Callable[[str], bool], busy: Busy = is_locked,
) -> int:  # fmt: skip
    """Print the files of the kinds `what` (empty: USUAL), and remove them if `yes` or ``confirm(question)``.

    `older_than_days`: only files unchanged for so long; None: DAYS. Returns 1 if something could not be removed,
    else 0. Raises UserError if the folder is not a results folder.
    """
    root = results_folder(results_dir)
    found = find(root, what, older_than_days, busy)
    _report(console, results_dir, found)
    if not any(removal.files or removal.folders for removal in found):
        return 0
    if not yes:
        if not confirm("Remove this?"):
            _say(console, "nothing was removed (--yes removes without asking)")
            return 0
        found = _still(found, find(root, what, older_than_days, busy))  # confirming may have taken hours
    files = [file for removal in found for file in removal.files]
    folders = [folder for removal in found for folder in removal.folders]
    size = freed(files)
    troubles = _remove(root, files, folders)
    for line in troubles[:SHOWN]:
        _say(console, line)
    if len(troubles) > SHOWN:
        _say(console, f"and {len(troubles) - SHOWN:,} more could not be removed")
    _say(
        console,
        "removed, but not everything" if troubles else f"removed: {counted(len(files), 'file')}, {size / MIB:,.1f} MiB",
    )
    return 1 if troubles else 0


def results_folder(folder: Path) -> Path:
    """`folder`, resolved. Raises UserError if it does not look like a results folder."""
    root = folder.resolve()
    if not root.is_dir():
        raise UserError(f"no results folder {quoted(str(folder))}")
    if not is_results_folder(root):
        below = [child.name for child in folders_in(root) if is_results_folder(child)]
        hint = f". Did you mean {str(folder / below[0])!r}?" if below else ""
        raise UserError(f"{quoted(str(folder))} is not a results folder: it has no cells/ or cache/ of a run{hint}")
    return root


def is_results_folder(root: Path) -> bool:
    """Whether it has cells or a cache of runs."""
    return bool(cells_of(root)) or any((root / CACHE / name).is_dir() for name in CACHES)


def find(
    root: Path, what: Sequence[str] = (), older_than_days: float | None = None, busy: Busy = is_locked
) -> list[Removal]:
    """The files of the results folder `root` that could be removed, by kind. No file is listed twice."""
    for name in what:
        if name not in KINDS:
            raise unknown("kind", name, KINDS)
    if older_than_days is not None and not older_than_days >= 0:
        raise UserError(f"--older-than must not be negative, got {older_than_days:g}")
    found: list[Removal] = []
    taken: set[Path] = set()
    for kind in [name for name in KINDS if name in (what or USUAL)]:
        days = DAYS.get(kind, 0.0) if older_than_days is None else older_than_days
        removal = Removal(kind)
        FINDERS[kind](root, time.time() - days * 86400, busy, removal)
        removal.files = [file for file in dict.fromkeys(removal.files) if file not in taken]
        taken.update(removal.files)
        found.append(removal)
    return found


# --- reading a results folder ----------------------------------------------------------------------------------------


def cells_of(root: Path) -> list[Path]:
    """The folders of cells, without links."""
    return [folder for folder in folders_in(root / CELLS) if KEY.fullmatch(folder.name)]


def _changed(paths: Iterable[Path]) -> float:
    """The latest modification time of `paths` in seconds since 1970; the current time if none exists."""
    return max((found.st_mtime for found in filter(None, map(lstat, paths))), default=time.time())


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if it cannot be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# --- the kinds -------------------------------------------------------------------------------------------------------


def _temporary(root: Path, before: float, busy: Busy, removal: Removal) -> None:
    old: list[tuple[Path, os.stat_result]] = []
    young: list[tuple[Path, os.stat_result]] = []
    for at, folders, files in walk(root):
        for name in files:
            found = lstat(at / name)
            if name.startswith(TEMPORARY) and found is not None and stat.S_ISREG(found.st_mode):
                (old if found.st_mtime < before else young).append((at / name, found))
        for name in [name for name in folders if _is_scratch(at / name)]:
            folders.remove(name)
            if _changed([at / name, *files_below(at / name)]) < before:
                removal.add(at / name)
    held = _held(
        [part for part in old if part[1].st_mtime > time.time() - 86400]
    )  # these are listed only with --older-than
    gone = [path for path, _ in old if str(path) not in held] + left_behind(root, young)
    gone = [path for path in gone if (cell := _cell(root, path)) is None or not busy(cell)]
    removal.files += gone
    stay = len(old) + len(young) - len(gone)
    if stay:
        removal.notes.append(f"{counted(stay, 'file')} that may still be written to: skipped")


def _is_scratch(folder: Path) -> bool:
    """Whether this is a temporary folder of an export, a merge or a probe."""
    if folder.is_symlink():
        return False
    if folder.name.startswith(TEMPORARY):
        return True
    try:
        return bool(SCRATCH.fullmatch(folder.name)) and set(os.listdir(folder)) <= SCRATCH_HOLDS
    except OSError:
        return False


def left_behind(root: Path, files: Sequence[tuple[Path, os.stat_result]]) -> list[Path]:
    """The `files` that no process can still be writing to, although they are young.

    They are unchanged for QUIET_SECONDS, not visible to other machines, and not open in any of their owner's processes.
    """
    quiet = [(path, found) for path, found in files if found.st_mtime < time.time() - QUIET_SECONDS]
    if not quiet or file_system(root)[0] in {"", *NETWORK_FILE_SYSTEMS}:
        return []
    held = {owner: _open_files(owner) for owner in {found.st_uid for _, found in quiet}}
    return [path for path, found in quiet if (names := held[found.st_uid]) is not None and str(path) not in names]


def _held(files: Sequence[tuple[Path, os.stat_result]]) -> set[str]:
    """The `files` that a process of their owner is known to have open."""
    return set().union(*(_open_files(owner) or set() for owner in {found.st_uid for _, found in files}))


def _open_files(owner: int) -> set[str] | None:
    """All files that processes of user `owner` have open; None if that cannot be determined."""
    import psutil

    names: set[str] = set()
    for process in psutil.process_iter():
        try:
            if process.uids().effective == owner:
                names.update(file.path for file in process.open_files())
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        except (psutil.AccessDenied, OSError):
            return None
    return names


def _states(root: Path, before: float, busy: Busy, removal: Removal) -> None:
    for cell in cells_of(root):
        states = cell / "resume"
        if states not in folders_in(cell) or busy(cell):
            continue
        files = files_below(states)
        until = _finished(cell) if any(file.name.startswith("state-") for file in files) else 0.0
        spent = []
        for file in files:
            changed = _changed([file])
            done = file.name.startswith("state-") and changed <= until  # later states belong to a new training
            if (done or file.name.startswith("aside-")) and changed < before:
                spent.append(file)
        removal.files += spent
        removal.folders += folders_below(states) if spent else []


def _finished(cell: Path) -> float:
    """When the training in `cell` finished; 0 if it did not, or if its weights are damaged."""
    record = _json(cell / "train.json")
    if record.get("status") not in FINAL:
        return 0.0
    try:
        if record["status"] == "ok" and sha256_file(cell / "student.safetensors") != record.get("weights_sha256"):
            return 0.0
    except OSError:
        return 0.0
    return _changed([cell / "train.json"])


def _failed(root: Path, before: float, busy: Busy, removal: Removal) -> None:
    for cell in cells_of(root):
        if busy(cell):
            continue
        files = [cell / "error.txt"]
        for path in sorted(cell.glob("*.json")):
            if failed_record(_json(path)):
                files += [path, path.with_suffix(".safetensors")]
                files += [cell_file(cell, path.stem.removeprefix("evaluation-"))]
        removal.files += [file for file in files if lstat(file) is not None and _changed([file]) < before]


def failed_record(record: dict[str, Any]) -> bool:
    """Whether the work of a record, or one of its rows, failed."""
    lists = [rows for name in ("rows", "along") if isinstance(rows := record.get(name), list)]
    parts = [record, *(row for rows in lists for row in rows if isinstance(row, dict))]
    stated = [part["status"] for part in parts if isinstance(part.get("status"), str)]
    return any(status not in FINAL for status in stated)


def _orphans(root: Path, before: float, busy: Busy, removal: Removal) -> None:
    trainings, evaluations, unreadable = _named_by_runs(root)
    if unreadable:
        removal.notes.append(
            f"{first_of(unreadable, SHOWN)} cannot be read, so the cells in use are unknown: none is removed"
        )
        return
    named = young = unfinished = 0
    for cell in cells_of(root):
        keys = {path.stem.removeprefix("evaluation-") for path in cell.glob("evaluation-*.json")}
        if cell.name in trainings or keys & evaluations:
            named += 1
        elif busy(cell) or _changed([cell, *files_below(cell)]) >= before:
            young += 1
        else:
            removal.add(cell)
            unfinished += not (cell / "train.json").is_file() and any(cell.glob("resume/**/state-*.safetensors"))
    cells = [folder.name for folder in removal.folders if folder.parent == root / CELLS]
    if cells:
        removal.notes.append(
            f"{counted(len(cells), 'cell')}: {first_of(cells, SHOWN)}. A run that needs them trains again"
        )
    if unfinished:
        removal.notes.append(f"including {counted(unfinished, 'interrupted training')} that could be resumed")
    if young:
        removal.notes.append(f"{counted(young, 'cell')} changed recently or in use: skipped")
    if cells and not named:
        removal.notes.append("no run in this folder refers to any cell: are the runs' folders elsewhere?")


def _named_by_runs(root: Path) -> tuple[set[str], set[str], list[str]]:
    """The keys of trainings and evaluations of all runs below `root`, and the tables that cannot be read."""
    trainings: set[str] = set()
    evaluations: set[str] = set()
    unreadable = []
    for at, folders, files in walk(root):
        if at == root:
            folders[:] = [name for name in folders if name not in (CELLS, CACHE)]
        tables = [at / name for name in ("table.parquet", "table.csv") if name in files]
        if tables:
            keys = _keys(tables)
            evaluations |= keys or set()
            unreadable += [str(tables[0].relative_to(root))] if keys is None else []
        if at.name == "weights":
            trainings |= {match[1] for match in map(STUDENT.search, files) if match}
    return trainings, evaluations, unreadable


def _keys(tables: Sequence[Path]) -> set[str] | None:
    """The column `key` of the first of `tables` that can be read; None if none can."""
    import pandas as pd

    for table in tables:
        read = pd.read_parquet if table.suffix == ".parquet" else pd.read_csv
        try:
            return set(read(table)["key"].dropna().astype(str))
        except Exception:  # pandas and pyarrow raise many types for a damaged file
            continue
    return None


def _pairs(root: Path, before: float, busy: Busy, removal: Removal) -> None:
    seconds, evaluations = 0.0, 0
    for folder in _old(folders_in(_cache(root, "pairs")), before):
        made = _json(folder / "manifest.json")
        seconds += _amount(made.get("seconds"))
        evaluations += sum(int(_amount(made.get(name))) for name in ("teacher_nfe", "student_nfe"))
        removal.add(folder)
    if removal.files:
        removal.notes.append(f"computing them took {seconds:,.0f} s and {counted(evaluations, 'network evaluation')}")


def _latents(root: Path, before: float, busy: Busy, removal: Removal) -> None:
    removal.files += _old(_kept(_cache(root, "latents")), before)
    images = sum(_rows(file) for file in removal.files if file.suffix == ".npy")
    if removal.files:
        removal.notes.append(f"computing them again encodes {counted(images, 'image')}")


def _references(root: Path, before: float, busy: Busy, removal: Removal) -> None:
    removal.files += _old(_kept(_cache(root, "references")), before)
    statistics = sum(file.suffix == ".npz" for file in removal.files)
    if removal.files:
        removal.notes.append(f"computing them again reads the real images {counted(statistics, 'time')}")


def _answers(root: Path, before: float, busy: Busy, removal: Removal) -> None:
    evaluations = 0
    for file in _old(_kept(_cache(root, "answers")), before):
        removal.files.append(file)
        if file.suffix == ".json":
            recipe = _json(file).get("recipe")
            recipe = recipe if isinstance(recipe, dict) else {}
            evaluations += int(_amount(recipe.get("images")) * _amount(recipe.get("nfe")))
    if removal.files:
        removal.notes.append(f"sampling them took {counted(evaluations, 'teacher evaluation')}")


FINDERS: dict[str, Callable[[Path, float, Busy, Removal], None]] = {
    "temporary": _temporary,
    "states": _states,
    "failed": _failed,
    "orphans": _orphans,
    "pairs": _pairs,
    "latents": _latents,
    "references": _references,
    "answers": _answers,
}


def _cache(root: Path, name: str) -> Path:
    """The folder of a cache; a path that does not exist if cache/ is a link."""
    return root / CACHE / name if not (root / CACHE).is_symlink() else root / CACHE / TEMPORARY


def _kept(folder: Path) -> list[Path]:
    """The files below a folder of the cache, without lock files."""
    return [file for file in files_below(folder) if file.suffix != ".claim"]


def _old(paths: Iterable[Path], before: float) -> list[Path]:
    """The `paths` of which neither the folder nor its content changed since `before`."""
    return [path for path in paths if _changed([path, *files_below(path)]) < before]


def _rows(file: Path) -> int:
    import numpy as np

    try:
        return len(np.load(file, mmap_mode="r"))
    except (OSError, ValueError, TypeError):
        return 0


def _amount(value: object) -> float:
    return float(value) if isinstance(value, int | float) and value >= 0 else 0.0


# --- removing --------------------------------------------------------------------------------------------------------


def _still(printed: list[Removal], now: list[Removal]) -> list[Removal]:
    """The files that were printed and can still be removed."""
    files = {file for removal in printed for file in removal.files}
    folders = {folder for removal in printed for folder in removal.folders}
    return [
        Removal(r.kind, [f for f in r.files if f in files], [f for f in r.folders if f in folders], r.notes)
        for r in now
    ]


def _remove(root: Path, files: Sequence[Path], folders: Sequence[Path]) -> list[str]:
    """Remove files and folders, locking each cell meanwhile. Returns messages for what could not be removed."""
    troubles: list[str] = []
    parts: dict[Path | None, tuple[list[Path], list[Path]]] = {}
    for k, paths in enumerate((files, folders)):
        for path in paths:
            parts.setdefault(_cell(root, path), ([], []))[k].append(path)
    for cell, part in parts.items():
        try:
            with try_lock(cell) if cell is not None and cell.is_dir() else nullcontext(True) as mine:
                troubles += (
                    _remove_part(root, *part) if mine else [f"a process is working on {cell and cell.name}: skipped"]
                )
        except OSError as error:
            troubles.append(f"cannot lock {cell and cell.name}: {error.strerror or error}")
    return troubles


def _cell(root: Path, path: Path) -> Path | None:
    """The folder of the cell that `path` is in, or None."""
    names = path.relative_to(root).parts
    return root / names[0] / names[1] if names[0] == CELLS and len(names) > 1 and KEY.fullmatch(names[1]) else None


def _remove_part(root: Path, files: Iterable[Path], folders: Iterable[Path]) -> list[str]:
    """Remove files and empty folders; ones that no longer exist are no error. Returns messages for failures."""
    troubles = []
    for file in files:
        try:
            if not file.parent.resolve().is_relative_to(root):
                troubles.append(f"{file.relative_to(root)} skipped: a link leads out of the results folder")
                continue
            file.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            troubles.append(f"cannot remove {file.relative_to(root)}: {error.strerror or error}")
    for folder in folders:
        try:
            if folder.resolve().is_relative_to(root):
                folder.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                troubles.append(f"cannot remove {folder.relative_to(root)}: {error.strerror or error}")
    return troubles


def _report(console: Console, results_dir: Path, found: list[Removal]) -> None:
    """Print one line for each kind of files to remove, and the notes."""
    from rich.table import Table

    from distillbench.reports.terminal_table import put

    total = [file for removal in found for file in removal.files]
    folders = any(removal.folders for removal in found)
    if not total and not folders:
        _say(console, f"{results_dir}: nothing to remove ({', '.join(removal.kind for removal in found)})")
    else:
        _say(console, f"{results_dir}: to be removed")
        drawn = Table.grid(padding=(0, 2, 0, 0))
        for justify in ("left", "right", "right"):
            drawn.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
        drawn.add_column(overflow="fold")
        some = [removal for removal in found if removal.files or removal.folders]
        for removal in some:
            drawn.add_row(f"  {removal.kind}", *_amounts(removal.files), KINDS[removal.kind])
        if len(some) > 1:
            drawn.add_row("  in all", *_amounts(total), "")
        put(console, drawn)
        none = [removal.kind for removal in found if removal not in some]
        if none:
            _say(console, f"nothing of {', '.join(none)}")
    for removal in found:
        for note in removal.notes:
            _say(console, f"{removal.kind}: {note}")
    shared = size_of(total) - freed(total)
    if shared:
        _say(console, f"{shared / MIB:,.1f} MiB of it have other hard links and stay on the disk")


def _amounts(files: Sequence[Path]) -> tuple[str, str]:
    return counted(len(files), "file"), f"{freed(files) / MIB:,.1f} MiB"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False)
