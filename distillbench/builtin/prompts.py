"""Texts without images, for data-free distillation of text-to-image teachers."""

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
from distillbench.errors import nearest, quoted, unknown
from distillbench.files import canonical_json
from distillbench.options import require_between, require_positive

LARGEST_FILE = 2**30  # bytes
COLUMNS = ("prompt", "caption", "text")  # of a table or of an object, the first that is there


class Prompts(Dataset):
    """Prompts alone: no images. A text-to-image teacher is distilled from them without data.

    Prompt i is class i. Those of `evaluation_path` come last, and evaluation asks for them only; training asks for
    those of `path`. Without `evaluation_path` both ask for all.
    """

    name = "prompts"
    licence = "that of the texts"

    @dataclass
    class Config(DatasetConfig):
        path: str = option("", "the prompts (required): .txt (one a line), .jsonl, .csv or .parquet", path=True)
        evaluation_path: str = option(
            "", "prompts for evaluation only, in such a file; empty: those of path", path=True
        )
        limit: int = option(0, "the first so many prompts of path; 0: all")
        resolution: int = option(512, "side in pixels of the images that the teacher makes")

        def __post_init__(self) -> None:
            require_positive(self, "resolution")
            require_between(self, 0, 2**31, "limit")

    def __init__(self, config: Config) -> None:
        if not config.path:
            formats = ".txt with a prompt a line, or .jsonl, .csv or .parquet with a column prompt, caption or text"
            raise UserError(f"dataset=prompts needs dataset.path=FILE, the prompts: {formats}")
        trained = read_prompts(config.path, "dataset.path")[: config.limit or None]
        asked = read_prompts(config.evaluation_path, "dataset.evaluation_path") if config.evaluation_path else []
        self.prompts = trained + asked
        self.classes = len(self.prompts)
        self.evaluated = range(len(trained), self.classes) if asked else None
        self.shape = (3, config.resolution, config.resolution)
        self.split = f"{len(trained):,} prompts" + (f", evaluated on {len(asked):,} others" if asked else "")
        self.sha256 = hashlib.sha256(canonical_json([trained, asked]).encode()).hexdigest()

    def __len__(self) -> int:
        return 0

    def read(self, indices: Tensor) -> Tensor:
        raise UserError("dataset=prompts has texts and no images: take a dataset of images with captions")


def read_prompts(path: str, setting: str) -> list[str]:
    """The texts of a file, in order, without empty ones. Raises UserError, with the name of the setting."""
    file = Path(path)
    try:
        there = file.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"{setting}: cannot look at {quoted(path)}: {error.strerror}") from error
    if not there:
        names = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"{setting}: no file {quoted(path)}.{nearest(file.name, names)}")
    if file.suffix not in READERS:
        raise unknown("kind of file", file.suffix, READERS, f" for prompts ({setting}={file.name})")
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"{file.name!r} has more than {LARGEST_FILE:,} bytes")
        texts = READERS[file.suffix](file)
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    except Exception as error:  # pyarrow raises much for a damaged file
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{setting}: cannot read {file.name!r}: {first}") from error
    texts = [" ".join(text.split()) for text in texts]
    texts = [text for text in texts if text]
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):  # which JSON can spell and no encoder takes
            raise UserError(f"{setting}: half of a surrogate pair in {file.name!r}: {quoted(text)}")
    if not texts:
        raise UserError(f"{setting}: no prompt in {file.name!r}")
    return texts


def _column(columns: Sequence[str], where: str) -> str:
    found = next((column for column in COLUMNS if column in columns), None)
    if found is None:
        raise UserError(f"{where} has no {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; it has {', '.join(columns)}")
    return found


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8-sig").split("\n")


def _objects(file: Path) -> list[str]:
    """Each line is an object, or a text."""
    texts = []
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            entry: Any = json.loads(line)
            where = f"line {number} of {file.name!r}"
            if isinstance(entry, dict):
                entry = entry[_column(list(entry), where)]
            if not isinstance(entry, str):
                raise UserError(f"{where} is no text: {quoted(line)}")
            texts.append(entry)
    return texts


def _csv(file: Path) -> list[str]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        column = _column(list(rows.fieldnames or []), repr(file.name))
        return [row[column] or "" for row in rows]


def _parquet(file: Path) -> list[str]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file, page_checksum_verification=True) as table:
        column = _column(table.schema_arrow.names, repr(file.name))
        if not 0 <= table.metadata.num_rows <= file.stat().st_size:  # beyond, it is one text again and again
            raise UserError(f"{file.name!r} says that it has {table.metadata.num_rows:,} rows")
        return [str(text or "") for text in table.read([column])[column].to_pylist()]


READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _lines,
    ".jsonl": _objects,
    ".csv": _csv,
    ".parquet": _parquet,
}


@hookimpl(api=1)
def register_datasets(register) -> None:
    register(Prompts)
