"""Checks of ``distillbench doctor``: caches, records, weights and training checkpoints of a results folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distillbench.cli import clean
from distillbench.cli.doctor_findings import MIB, Finding, Installation
from distillbench.errors import counted, first_of
from distillbench.records.layout import CACHE, CELLS
from distillbench.records.records import (
    EvaluationRecord,
    LevelsRecord,
    OtherVersion,
    SpeedRecord,
    TrainRecord,
    read_record,
)
from distillbench.storage import folders
from distillbench.storage.files import key_of, sha256_file

RECORDS: dict[str, Any] = {  # by the beginning of the file's name
    "train": TrainRecord,
    "evaluation": EvaluationRecord,
    "speed": SpeedRecord,
    "levels": LevelsRecord,
}
HASHED_MIB = 512  # total size of the files that are hashed without --thorough


def check_caches(installation: Installation) -> Iterator[Finding]:
    """Disk space of cells and caches, and files that `distillbench clean` would remove."""
    root = installation.results_dir.resolve()
    if not clean.is_results_folder(root):
        yield Finding("ok", f"no results in {installation.results_dir} yet")
        return
    cells = clean.cells_of(root)
    sizes = {counted(len(cells), "cell"): folders.size_of(file for cell in cells for file in folders.files_below(cell))}
    for folder in folders.folders_in(root / CACHE):
        sizes[f"cache/{folder.name}"] = folders.size_of(folders.files_below(folder))
    yield Finding("ok", ", ".join(f"{name} {size / MIB:,.1f} MiB" for name, size in sizes.items()))
    spent = clean.find(root)
    files = [file for removal in spent for file in removal.files]
    if files:
        counts = ", ".join(f"{len(removal.files):,} {removal.kind}" for removal in spent if removal.files)
        line = f"left over: {counts}, {folders.freed(files) / MIB:,.1f} MiB"
        yield Finding("warning", line, f"distillbench clean --results-dir {installation.results_dir}")


def check_records(installation: Installation) -> Iterator[Finding]:
    """Whether every record can be read and belongs to its file name."""
    good, damaged, others, failed = 0, [], [], 0
    for path in _records(installation.results_dir):
        try:
            content = json.loads(path.read_bytes())
            _read(path, content)
            good += 1
            failed += clean.failed_record(content)
        except FileNotFoundError:
            continue
        except OtherVersion:
            others.append(_short(path))
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
            damaged.append(_short(path))
    if damaged:
        line = f"{len(damaged):,} of {counted(good + len(damaged), 'record')} damaged: {first_of(damaged)}"
        yield Finding("wrong", line, "run the same command again: it computes them again")
    if others:
        line = f"{counted(len(others), 'record')} of another version of distillbench: {first_of(others)}"
        yield Finding("warning", line, "run the same command again: it computes them again")
    if failed:
        advice = "the traceback is in the cell's error.txt; --retry-failed tries again"
        yield Finding("warning", f"{counted(failed, 'record')} of failed work", advice)
    if good or not (damaged or others):
        yield Finding("ok", f"{counted(good, 'record')} can be read")


def _records(results_dir: Path) -> list[Path]:
    found = []
    for cell in clean.cells_of(results_dir):
        paths = sorted(cell.glob("*.json"))
        found += [path for path in paths if path.stem.partition("-")[0] in RECORDS and not path.is_symlink()]
    return found


def _read(path: Path, content: Any) -> TrainRecord | EvaluationRecord | SpeedRecord | LevelsRecord:
    """The record at `path`. Raises ValueError if it is damaged or has the name of another record."""
    name, _, key = path.stem.partition("-")
    record = read_record(path, RECORDS[name], content.get("inputs", {}))
    if record is None:
        raise FileNotFoundError(path)
    if key_of(record.inputs) != (key or path.parent.name):
        raise ValueError(f"the record {path.name} has the name of another record")
    return record


def check_students(installation: Installation) -> Iterator[Finding]:
    """Whether weights, including those of checkpoints, match the hashes in their records."""
    wanted: list[tuple[Path, str]] = []
    missing, damaged = [], []
    for path in _records(installation.results_dir):
        if path.name != "train.json":
            continue
        try:
            record = _read(path, json.loads(path.read_bytes()))
        except (ValueError, TypeError, KeyError, OSError, RecursionError):
            continue  # check_records reports it
        if not isinstance(record, TrainRecord) or record.status != "ok":
            continue
        files = {"student.safetensors": record.weights_sha256} | {c.file: c.sha256 for c in record.checkpoints}
        for name, sha256 in files.items():
            file = path.parent / name
            if Path(name).name != name or not file.is_file():
                missing.append(_short(file) if Path(name).name == name else f"{path.parent.name}: {name!r}")
            else:
                wanted.append((file, sha256))
    chosen, left = _affordable([file for file, _ in wanted], installation.thorough)
    expected = dict(wanted)
    for file in _reading(installation, "reading weights", chosen):
        if _digest(file) != expected[file]:
            damaged.append(_short(file))
    again = "run the same command again: it trains these students again"
    if missing:
        yield Finding("wrong", f"{counted(len(missing), 'weights file')} missing: {first_of(missing)}", again)
    if damaged:
        line = f"{counted(len(damaged), 'weights file')} not as recorded: {first_of(damaged)}"
        yield Finding("wrong", line, again)
    if not missing and not damaged:
        yield Finding("ok", f"{counted(len(chosen), 'weights file')} as recorded{_unread(left)}")


def check_states(installation: Installation) -> Iterator[Finding]:
    """Whether interrupted trainings can be resumed."""
    from distillbench.training.resume import DIGITS

    unfinished, states, aside, damaged = 0, [], 0, []
    for cell in clean.cells_of(installation.results_dir):
        files = [file for file in folders.files_below(cell / "resume") if not file.is_symlink()]
        here = [file for file in files if file.name.startswith("state-") and file.suffix == ".safetensors"]
        aside += sum(file.name.startswith("aside-") for file in files)
        states += here
        unfinished += bool(here)
    chosen, left = _affordable(states, installation.thorough)
    for file in _reading(installation, "reading training checkpoints", chosen):
        digest = _digest(file)
        if digest is not None and file.stem.rpartition("-")[2] != digest[:DIGITS]:
            damaged.append(str(file.relative_to(installation.results_dir / CELLS)))
    if damaged:
        line = f"{counted(len(damaged), 'training checkpoint')} damaged: {first_of(damaged)}"
        yield Finding("warning", line, "nothing: the previous one is used, or the training starts again")
    if aside:
        line = f"{counted(aside, 'damaged training checkpoint')} set aside"
        yield Finding("warning", line, f"distillbench clean --results-dir {installation.results_dir}")
    resume = f"{counted(unfinished, 'interrupted training')}: the same command resumes"
    line = resume if unfinished else "no interrupted training"
    yield Finding("ok", f"{line}{_unread(left)}")


def _affordable(files: Sequence[Path], thorough: bool) -> tuple[list[Path], int]:
    """The smallest of `files`, up to HASHED_MIB in total (all if `thorough`), and how many are left out."""
    sized = sorted((found.st_size, file) for file in files if (found := _stat(file)) is not None)
    chosen, total = [], 0
    for size, file in sized:
        total += size
        if thorough or total <= HASHED_MIB * MIB:
            chosen.append(file)
    return chosen, len(sized) - len(chosen)


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


def _digest(file: Path) -> str | None:
    """The file's SHA-256; None if it has been removed meanwhile."""
    try:
        return sha256_file(file)
    except FileNotFoundError:
        return None


def _reading(installation: Installation, label: str, files: Sequence[Path]) -> Iterator[Path]:
    """Yields each of `files` and shows the progress."""
    if not files:
        return
    with installation.progress.step(label) as step:
        for index, file in enumerate(files):
            yield file
            step.advance((index + 1) / len(files))


def _unread(count: int) -> str:
    return f"; {counted(count, 'large one')} not read (--thorough does)" if count else ""


def _short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
