"""Labels and captions, from files beside images and from columns of tables.

| file                               | content                                                                |
|------------------------------------|------------------------------------------------------------------------|
| dataset.json                       | EDM's layout: {"labels": [["00000/img00000000.png", 3], ...]}, or null |
| metadata.jsonl, .csv or .parquet   | layout of `datasets`: file_name, and a column of labels or captions    |
| NAME.cls, NAME.txt beside NAME.png | a label, a caption (WebDataset's layout)                               |

A file of the first two kinds applies to the images in its folder and below; one in the root applies to all images.
Names are compared in Unicode's NFC, because file systems and programs normalise differently.

Labels become classes 0, 1, ... if they are whole numbers (also as floats or text), one-hot vectors, or texts, whose
classes are numbered in sorted order. -1 and null mean no label. A caption is a text; null becomes the empty text, and
of a list of texts the first is used.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import reprlib
import unicodedata
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distillbench.datasets.image_readers import DAMAGE, EncodedReader, dataset_error, some, split_folder
from distillbench.errors import LONGEST_REASON, nearest, quoted

LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
CAPTION_COLUMNS = ("text", "caption", "prompt")
LABELS_FILE = "dataset.json"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the first that exists is used
BESIDE = (".txt", ".cls")
FILE_NAME = "file_name"
WHOLE = re.compile(r"[+-]?\d{1,15}(\.0*)?")  # a whole number in text
NO_LABEL = -1
MOST_ROWS = 100  # in metadata.parquet, per file of the source
READ_WITHOUT = "dataset.labels=none reads only the images"


# --- labels as classes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """`numbers` (N,) int64, or None if no image has a label; names of classes, and their declared count or 0."""

    numbers: np.ndarray | None
    names: Sequence[str] = ()
    count: int = 0
    notes: Sequence[str] = ()


def _are_classes(values: np.ndarray) -> bool:
    if values.ndim != 1 or values.dtype.kind not in "iu" or not values.size:
        return False
    return bool(values.min() >= 0 and values.max() < 2**31)


def as_classes(values: Sequence[Any] | np.ndarray, where: str, name: Callable[[int], str] | None = None) -> Labels:
    """Stored labels to classes. Raises UserError if they are ambiguous. ``name(i)`` is the name of image i."""
    if isinstance(values, np.ndarray) and _are_classes(values):
        return Labels(values.astype(np.int64))
    plain, width = _without_vectors([_plain(value) for value in values])
    if all(value is None or (isinstance(value, str) and WHOLE.fullmatch(value)) for value in plain):
        plain = [None if value is None else int(float(value)) for value in plain]
    of = name or (lambda index: f"row {index}")
    missing = [index for index, value in enumerate(plain) if value is None or value == NO_LABEL]
    if plain and len(missing) == len(plain):
        return Labels(None, notes=[f"{where}: every label is -1 or null, so the images have none"])
    if missing:
        raise dataset_error(
            f"{where}: labels must be classes 0, 1, ...: {len(missing):,} of {len(plain):,} are -1 or null, such as "
            f"that of {quoted(of(missing[0]))}. {READ_WITHOUT}"
        )
    if plain and all(isinstance(value, str) for value in plain):
        names = sorted(set(plain))
        numbers = {text: number for number, text in enumerate(names)}
        note = f"{where}: labels are texts; their {len(names):,} classes are numbered in sorted order"
        return Labels(np.array([numbers[value] for value in plain], dtype=np.int64), names, notes=[note])
    for index, value in enumerate(plain):
        if not (isinstance(value, int) and 0 <= value < 2**31):
            raise dataset_error(
                f"{where}: labels must be classes 0, 1, ...: the label of {quoted(of(index))} must be a class, got "
                f"{quoted(reprlib.repr(value))}. {READ_WITHOUT}"
            )
    return Labels(np.array(plain, dtype=np.int64), count=width)


def _plain(value: Any) -> Any:
    """A label of numpy, bytes, float or nested type as int, text, list or None; other values unchanged."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, list | tuple) and len(value) == 1 and not isinstance(value[0], list | tuple):
        return _plain(value[0])
    return value


def _without_vectors(values: list[Any]) -> tuple[list[Any], int]:
    """One-hot vectors of equal length as indices, and that length; other labels unchanged, and 0."""
    first = values[0] if values else None
    if not isinstance(first, list | tuple):
        return values, 0
    hot = []
    for value in values:
        entries = list(value) if isinstance(value, list | tuple) and len(value) == len(first) else []
        if sum(entry == 1 for entry in entries) != 1 or sum(entry == 0 for entry in entries) != len(entries) - 1:
            return values, 0
        hot.append(next(place for place, entry in enumerate(entries) if entry == 1))
    return hot, len(first)


def set_labels(reader: Any, labels: Labels) -> None:
    reader.labels, reader.class_count = labels.numbers, labels.count
    reader.class_names = labels.names or reader.class_names
    reader.notes = [*reader.notes, *labels.notes]


# --- captions --------------------------------------------------------------------------------------------------------


def set_captions(reader: Any, values: Sequence[Any], where: str) -> None:
    """Set the captions of `reader` from stored texts, lists of texts, or null. Raises UserError for other values."""
    try:
        texts = [texts_in(value) for value in values]
    except ValueError as error:
        raise dataset_error(f"{where}: {error}") from error
    check_texts((found[0] for found in texts if found), "a caption")
    bare, several = sum(not found or not found[0].strip() for found in texts), sum(len(found) > 1 for found in texts)
    notes = []
    if bare:
        notes.append(f"{where}: {bare:,} of {len(texts):,} images have no caption: the empty text is used")
    if several:
        notes.append(f"{where}: {several:,} of {len(texts):,} images have several captions: the first is used")
    reader.notes = [*reader.notes, *notes]
    reader.captions = [found[0] if found else "" for found in texts] if any(texts) else None
    reader.several_captions = several > 0


def texts_in(value: Any) -> list[str]:
    """The captions of one image: none, one or several. Raises ValueError for values that are not text."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, list | tuple) and not any(isinstance(part, list | tuple) for part in value):
        return [text for part in value for text in texts_in(part)]
    raise ValueError(f"a caption must be a text or a list of texts, got {quoted(reprlib.repr(value))}")


def check_texts(texts: Iterable[str], what: str) -> None:
    """Raise UserError for unpaired surrogates, which JSON can express and no text encoder accepts."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise dataset_error(f"{what} is not valid text: {quoted(text)}") from error


# --- files beside images ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """The files of a source: all that are not hidden, the images of all splits, and how to read a file."""

    every: Sequence[str]
    images: Sequence[str]
    read: Callable[[str], bytes]


def belongs_to_images(name: str, stems: Container[str] | None = None) -> bool:
    """Whether a file's name allows it to hold labels or captions. `stems`: the images' names without suffix."""
    if name.rpartition("/")[2] in (LABELS_FILE, *METADATA):
        return True
    stem, suffix = os.path.splitext(name)
    return suffix in BESIDE and (stems is None or composed(stem) in stems)


def annotate(reader: EncodedReader, beside: Beside, labels: str) -> None:
    """Set labels or captions of `reader` from the files beside images, as the setting `labels` asks."""
    if labels == "none":
        return
    if labels == "folders":
        _label_by_folder(reader)
        return
    metadata = _serving(METADATA, reader.names, beside)
    _read_beside(reader, beside, metadata, labels)
    _note_unread(reader, beside, metadata)


def _read_beside(reader: EncodedReader, beside: Beside, metadata: dict[str, list[str]], labels: str) -> None:
    """Labels from dataset.json, else from metadata, else from one file per image; captions from the last two."""
    if labels == "auto" and (files := _serving((LABELS_FILE,), reader.names, beside)):
        pairs = {file: _labels_file(beside, file) for file in files}
        if any(found is not None for found in pairs.values()):
            _set_labels(reader, beside, files, {file: found or [] for file, found in pairs.items()})
            if metadata:
                unread = some(sorted(metadata))
                reader.notes.append(f"{unread} is ignored because there are labels: dataset.labels=captions uses it")
            return
    if metadata:
        _metadata(reader, beside, metadata, labels)
    elif labels == "auto" and (values := _of_each(reader, beside, ".cls", "label")) is not None:
        set_labels(reader, as_classes(values, "the labels beside images (.cls)", reader.name))
    bare = reader.labels is None and reader.captions is None
    if bare and (values := _of_each(reader, beside, ".txt", "caption")) is not None:
        set_captions(reader, values, "the captions beside images (.txt)")


def _note_unread(reader: EncodedReader, beside: Beside, metadata: dict[str, list[str]]) -> None:
    """Add notes on ignored files: second tables in one folder, and captions that labels or metadata replace."""
    taken = {file.rpartition("/")[0]: file for file in metadata}
    for file in beside.every:
        folder, _, kind = file.rpartition("/")
        if kind in METADATA and folder in taken and file != taken[folder]:
            reader.notes.append(f"{file} is ignored because {quoted(taken[folder])} lies beside it")
    captions = {os.path.splitext(composed(name))[0] for name in beside.every if name.endswith(".txt")}
    texts = sum(os.path.splitext(composed(name))[0] in captions for name in reader.names) if captions else 0
    why = "there are labels: dataset.labels=captions uses them" if reader.labels is not None else ""
    if reader.captions is not None and metadata:
        why = f"{some(sorted(metadata))} has captions"
    if texts and why:
        reader.notes.append(f"{texts:,} captions beside images (.txt) are ignored because {why}")


def _label_by_folder(reader: EncodedReader) -> None:
    folders = []
    for name in reader.names:
        parts, cut = name.split("/")[:-1], split_folder(name)
        parts = parts[parts.index(cut[0]) + 1 :] if cut else parts
        if not parts:
            raise dataset_error(f"labels=folders: {name!r} is not in a folder that could name its class")
        folders.append(parts[0])
    classes: dict[str, str] = {}  # by the NFC name; the first spelling is shown
    for folder in sorted(set(folders)):
        classes.setdefault(composed(folder), folder)
    reader.class_names = list(classes.values())
    numbers = {name: number for number, name in enumerate(classes)}
    reader.labels = np.array([numbers[composed(name)] for name in folders], dtype=np.int64)


def _serving(kinds: Sequence[str], images: Sequence[str], beside: Beside) -> dict[str, list[str]]:
    """The files with a name in `kinds` that apply to some image, each with its images in order."""
    by_folder: dict[str, str] = {}
    for kind in reversed(kinds):
        by_folder |= {name.rpartition("/")[0]: name for name in beside.every if name.rpartition("/")[2] == kind}
    if "" in by_folder:
        return {by_folder[""]: list(images)}
    serving: dict[str, list[str]] = {}
    if not by_folder:
        return serving
    for image in images:
        folder = image.rpartition("/")[0]
        while folder and folder not in by_folder:
            folder = folder.rpartition("/")[0]
        serving.setdefault(by_folder.get(folder, ""), []).append(image)
    bare = serving.pop("", [])
    if bare and serving:
        raise dataset_error(
            f"{quoted(bare[0])} has no {' or '.join(kinds)} in its folder or above it, but other images have "
            f"({next(iter(serving))}). {READ_WITHOUT}"
        )
    return serving


def _labels_file(beside: Beside, file: str) -> list[tuple[Any, Any]] | None:
    content = _parsed(_text(beside.read, file), file)
    pairs = content.get("labels") if isinstance(content, dict) else None
    if pairs is None:
        return None
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise dataset_error(f"{file}: labels must be a list of [FILE, CLASS] or null")
    return [(name, label) for name, label in pairs]


def _set_labels(
    reader: EncodedReader, beside: Beside, files: dict[str, list[str]], pairs: dict[str, list[tuple[Any, Any]]]
) -> None:
    values = _in_order(reader, beside, files, pairs, "a label")
    for name, found in zip(reader.names, values, strict=True):
        if any(_plain(value) != _plain(found[0]) for value in found[1:]):
            raise dataset_error(f"{next(iter(files))} has several labels for {quoted(name)}")
    set_labels(reader, as_classes([found[0] for found in values], next(iter(files)), reader.name))


def _in_order(
    reader: EncodedReader, beside: Beside, files: dict[str, list[str]], pairs: dict[str, list[tuple[Any, Any]]],
    what: str,
) -> list[list[Any]]:  # fmt: skip
    """Each image's values in `files`, in order. Raises UserError if a named file or an image's value is missing."""
    known: dict[str, str] = {}
    for image in beside.images:
        if known.setdefault(composed(image), image) != image:
            raise dataset_error(f"{quoted(image)} exists twice, with names that differ only in Unicode's NFC and NFD")
    every: set[str] | None = None
    values: dict[str, list[Any]] = {}
    for file in files:
        folder = file.rpartition("/")[0]
        absent = []
        for name, value in pairs[file]:
            path = composed(clean(f"{folder}/{name}" if folder else str(name)))
            if path in known:
                values.setdefault(known[path], []).append(value)
                continue
            every = every if every is not None else set(map(composed, beside.every))
            if path not in every:
                absent.append(path)
        if absent:
            more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
            near = nearest(absent[0], reader.names[:10_000])
            raise dataset_error(f"{file} names {quoted(absent[0])}{more}, which does not exist.{near}")
    bare = [name for name in reader.names if name not in values]
    if bare:
        more = f" and {len(bare) - 1:,} more" if len(bare) > 1 else ""
        raise dataset_error(f"{next(iter(files))} lacks {what} for {quoted(bare[0])}{more}. {READ_WITHOUT}")
    return [values[name] for name in reader.names]


def composed(name: str) -> str:
    """`name` in Unicode's NFC."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def clean(name: str) -> str:
    """A name in an archive or table as a path with `/` and without `./`, on whichever system it was written."""
    if "\\" not in name and "//" not in name and not name.startswith(("/", "./")) and "/./" not in name:
        return name
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


# --- metadata --------------------------------------------------------------------------------------------------------


def _metadata(reader: EncodedReader, beside: Beside, files: dict[str, list[str]], labels: str) -> None:
    """Labels from metadata, if some row has one and `labels` is "auto"; else captions."""
    tables = {file: METADATA_READERS[os.path.splitext(file)[1]](beside, file) for file in files}
    rows = [row for table in tables.values() for _, row in table]
    by_label = labels == "auto" and any(column in row for row in rows for column in LABEL_COLUMNS)
    columns = LABEL_COLUMNS if by_label else CAPTION_COLUMNS
    pairs: dict[str, list[tuple[Any, Any]]] = {file: [] for file in files}
    for file, table in tables.items():
        for where, row in table:
            column = next((column for column in columns if column in row), None)
            if FILE_NAME not in row or (column is None and not by_label):
                wanted = f"{FILE_NAME} and one of {', '.join((*CAPTION_COLUMNS, *LABEL_COLUMNS))}"
                raise dataset_error(f"{where}: needs {wanted}, got {quoted(reprlib.repr(row))}")
            pairs[file].append((row[FILE_NAME], None if column is None else row[column]))
    first = next(iter(files))
    if by_label:
        if any(column in row for row in rows for column in CAPTION_COLUMNS):
            reader.notes.append(
                f"captions of {first} are ignored because it has labels: dataset.labels=captions uses them"
            )
        _set_labels(reader, beside, files, pairs)
    else:
        found = _in_order(reader, beside, files, pairs, "a caption")
        set_captions(reader, [[text for value in values for text in _listed(value)] for values in found], first)


def _listed(value: Any) -> Sequence[Any]:
    """The captions of one row as a list."""
    return value if isinstance(value, list) else [value]


Rows = list[tuple[str, dict[str, Any]]]  # of each row, its name in messages and its values


def _jsonl(beside: Beside, file: str) -> Rows:
    rows = []
    for number, line in enumerate(
        _text(beside.read, file).split("\n"), 1
    ):  # splitlines() would also split at characters that a text may contain
        if line.strip():
            row = _parsed(line, f"{file}, line {number}")
            if not isinstance(row, dict):
                raise dataset_error(f"{file}, line {number}: needs {FILE_NAME} and more, got {quoted(line)}")
            rows.append((f"{file}, line {number}", row))
    return rows


def _csv(beside: Beside, file: str) -> Rows:
    try:
        table = csv.DictReader(io.StringIO(_text(beside.read, file), newline=""), strict=True)
        rows = [(f"{file}, line {table.line_num}", {k: v for k, v in row.items() if k is not None}) for row in table]
    except csv.Error as error:
        raise dataset_error(f"{file} is not valid CSV: {str(error)[:LONGEST_REASON]}") from error
    return rows


def _parquet(beside: Beside, file: str) -> Rows:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(pa.BufferReader(beside.read(file)), page_checksum_verification=True) as table:
            if not 0 <= table.metadata.num_rows <= MOST_ROWS * len(beside.every):
                raise ValueError(f"its header declares {table.metadata.num_rows:,} rows")
            wanted = [c for c in (FILE_NAME, *LABEL_COLUMNS, *CAPTION_COLUMNS) if c in table.schema_arrow.names]
            return [(f"{file}, row {number}", row) for number, row in enumerate(table.read(wanted).to_pylist())]
    except Exception as error:  # pyarrow raises many types for a damaged file
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise dataset_error(f"cannot read {quoted(file)} as parquet: {why[:LONGEST_REASON]}") from error


METADATA_READERS: dict[str, Callable[[Beside, str], Rows]] = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


# --- one file for each image -----------------------------------------------------------------------------------------


def _of_each(reader: EncodedReader, beside: Beside, suffix: str, what: str) -> list[str] | None:
    """The text in NAME.suffix beside each NAME.png; None if no image has one."""
    there = {composed(name): name for name in beside.every if name.endswith(suffix)}
    wanted = [os.path.splitext(name)[0] + suffix for name in reader.names]
    found = [there.get(composed(name)) for name in wanted]
    if not any(found):
        return None
    if None in found:
        raise dataset_error(f"no {what} {wanted[found.index(None)]!r}, but other images have one. {READ_WITHOUT}")
    return [" ".join(_text(beside.read, name).split()) for name in found if name is not None]


def _text(read: Callable[[str], bytes], file: str) -> str:
    try:
        return read(file).decode("utf-8-sig")
    except DAMAGE as error:  # UnicodeDecodeError is a ValueError
        raise dataset_error(f"cannot read {quoted(file)} as text: {str(error)[:LONGEST_REASON]}") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise dataset_error(f"{where} is not valid JSON: {error}") from error
