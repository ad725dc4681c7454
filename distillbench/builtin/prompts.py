"""Prompts without images, for data-free distillation of text-to-image teachers."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from distillbench import Dataset, DatasetConfig, UserError, hookimpl, option
from distillbench.datasets.annotations import texts_in
from distillbench.errors import nearest, quoted, unknown
from distillbench.options import require_between, require_positive
from distillbench.storage.files import canonical_json

LARGEST_FILE = 2**30  # bytes
COLUMNS = ("prompt", "caption", "text")  # of which the first that exists is used


class Prompts(Dataset):
    """Prompts without images, for data-free distillation of a text-to-image teacher.

    Prompt i is class i. The prompts of `evaluation_path` come last and are used only for evaluation, those of `path`
    only for training. Without `evaluation_path` both use all prompts.
    """

    name = "prompts"
    licence = "that of the texts"

    @dataclass
    class Config(DatasetConfig):
        path: str = option("", "file of prompts (required): .txt (one per line), .jsonl, .csv or .parquet", path=True)
        evaluation_path: str = option("", "file of prompts for evaluation only; empty: those of path", path=True)
        limit: int = option(0, "number of prompts of path to use; 0: all")
        resolution: int = option(512, "height and width of the generated images in pixels")

        def __post_init__(self) -> None:
            require_positive(self, "resolution")
            require_between(self, 0, 2**31, "limit")

    def __init__(self, config: Config) -> None:
        if not config.path:
            formats = ".txt with one prompt per line, or .jsonl, .csv or .parquet with a column prompt, caption or text"
            raise UserError(f"dataset=prompts needs dataset.path=FILE, the prompts: {formats}")
        trained, notes = read_prompts(config.path, "dataset.path")
        trained = trained[: config.limit or None]
        asked: list[str] = []
        more: list[str] = []
        if config.evaluation_path:
            asked, more = read_prompts(config.evaluation_path, "dataset.evaluation_path")
        self.notes = [*notes, *more]
        self.prompts = trained + asked
        self.classes = len(self.prompts)
        self.evaluated = range(len(trained), self.classes) if asked else None
        self.shape = (3, config.resolution, config.resolution)
        self.split = f"{len(trained):,} prompts" + (f", evaluated on {len(asked):,} others" if asked else "")
        self.sha256 = hashlib.sha256(canonical_json([trained, asked]).encode()).hexdigest()

    def __len__(self) -> int:
        return 0

    def read(self, indices: Tensor) -> Tensor:
        raise UserError("dataset=prompts has no images: use a dataset of images with captions")


def read_prompts(path: str, setting: str) -> tuple[list[str], list[str]]:
    """The non-empty texts of a file in order, and notes. `setting` names the file in messages. Raises UserError."""
    file = Path(path)
    try:
        there = file.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"{setting}: cannot access {quoted(path)}: {error.strerror}") from error
    if not there:
        names = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"{setting}: no file {quoted(path)}.{nearest(file.name, names)}")
    if file.suffix not in READERS:
        raise unknown("kind of file", file.suffix, READERS, f" for prompts ({setting}={file.name})")
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"{file.name!r} has more than {LARGEST_FILE:,} bytes")
        rows = READERS[file.suffix](file)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    except Exception as error:  # pyarrow raises many types for a damaged file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{setting}: cannot read {file.name!r}: {first}") from error
    texts = [" ".join(row[0].split()) for row in rows if row]
    texts = [text for text in texts if text]
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # possible in JSON, but no text encoder accepts it
            raise UserError(f"{setting}: unpaired surrogate in {file.name!r}: {quoted(text)}")
    if not texts:
        raise UserError(f"{setting}: no prompt in {file.name!r}")
    notes, several = [], sum(len(row) > 1 for row in rows)
    if file.suffix != ".txt" and len(texts) < len(rows):  # an empty line of a .txt file is not a missing prompt
        notes.append(f"{file.name}: {len(rows) - len(texts):,} of {len(rows):,} rows have no text and are ignored")
    if several:
        notes.append(f"{file.name}: {several:,} of {len(rows):,} rows have several texts: the first is used")
    return texts, notes


def _column(columns: Sequence[str], where: str) -> str:
    found = next((column for column in COLUMNS if column in columns), None)
    if found is None:
        raise UserError(f"{where} has no {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; it has {', '.join(columns)}")
    return found


Rows = list[list[str]]  # the texts of each row: none, one or several


def _text_lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8-sig").split("\n")


def _lines(file: Path) -> Rows:
    return [[line] for line in _text_lines(file)]


def _objects(file: Path) -> Rows:
    """JSON lines, each an object or a text."""
    rows: Rows = []
    for number, line in enumerate(_text_lines(file), 1):
        if line.strip():
            entry: Any = json.loads(line)
            where = f"line {number} of {file.name!r}"
            if isinstance(entry, dict):
                entry = entry[_column(list(entry), where)]
            if isinstance(entry, bool | int | float):
                raise UserError(f"{where} is not a text: {quoted(line)}")
            rows.append(texts_in(entry))
    return rows


def _csv(file: Path) -> Rows:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        column = _column(list(rows.fieldnames or []), repr(file.name))
        return [texts_in(row[column]) for row in rows]


def _parquet(file: Path) -> Rows:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file, page_checksum_verification=True) as table:
        column = _column(table.schema_arrow.names, repr(file.name))
        if not 0 <= table.metadata.num_rows <= file.stat().st_size:  # more rows would all be the same text
            raise UserError(f"the header of {file.name!r} declares {table.metadata.num_rows:,} rows")
        return [texts_in(text) for text in table.read([column])[column].to_pylist()]


READERS: dict[str, Callable[[Path], Rows]] = {
    ".txt": _lines,
    ".jsonl": _objects,
    ".csv": _csv,
    ".parquet": _parquet,
}


@hookimpl(api=2)
def register_datasets(register) -> None:
    register(Prompts)
