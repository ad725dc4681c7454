"""Readers of tables of encoded images: parquet files, and datasets of the library `datasets`."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from distillbench.datasets.annotations import CAPTION_COLUMNS, LABEL_COLUMNS, as_classes, set_captions, set_labels
from distillbench.datasets.image_folders import read_inside
from distillbench.datasets.image_readers import DAMAGE, EncodedReader, dataset_error, unreadable
from distillbench.errors import LONGEST_REASON, UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

CACHED_BYTES = 2**30  # of decompressed parquet row groups
IMAGE_COLUMNS = ("image", "images", "img", "jpg", "png")


class TableReader(EncodedReader):
    """Rows with a column of images, and optional columns of labels and captions."""

    def _choose(self, columns: Sequence[str], labels: str, where: str) -> tuple[str, str | None, str | None]:
        """The columns of images, labels and captions, as the setting `labels` asks."""
        image = next((column for column in IMAGE_COLUMNS if column in columns), None)
        if image is None:
            raise dataset_error(f"{where} has no column {' or '.join(IMAGE_COLUMNS)}; it has {', '.join(columns)}")
        label = next((column for column in LABEL_COLUMNS if column in columns), None)
        caption = next((column for column in CAPTION_COLUMNS if column in columns), None)
        return image, label if labels == "auto" else None, caption if labels in ("auto", "captions") else None

    def _annotate(
        self, where: str, columns: Sequence[str], chosen: tuple[str, str | None, str | None],
        values: Callable[[str], list[Any]], labels: str,
    ) -> None:  # fmt: skip
        """Set labels, or else captions, from ``values(column)``. Adds a note on the ignored columns."""
        image, label, caption = chosen
        read = [image]
        if label is not None:
            set_labels(self, as_classes(values(label), where, self.name))
            read.append(label)
        if caption is not None and self.labels is None:
            set_captions(self, values(caption), where)
            read.append(caption)
        if labels != "none" and (unread := [column for column in columns if column not in read]):
            self.notes.append(f"ignored columns: {', '.join(unread)} (used: {', '.join(read)})")


class ParquetReader(TableReader):
    """Rows of parquet files: encoded images, with labels or captions beside them.

    Row groups are decompressed on demand and cached up to :data:`CACHED_BYTES` in total. Reading a larger dataset in
    random order decompresses the same groups repeatedly.
    """

    kind = "parquet files"

    def __init__(self, files: Sequence[Path], labels: str) -> None:
        self.files = list(files)
        self._groups: list[tuple[int, int]] = []  # index of the file, and of the group in it
        self._cache: OrderedDict[int, Any] = OrderedDict()
        super().__init__(())
        counts: list[int] = []
        named: list[Sequence[str]] = []
        chosen: tuple[str, str | None, str | None] | None = None
        columns: dict[str, None] = {}  # of all files, in order
        for number, path in enumerate(self.files):
            with _table_errors(path), _parquet(path) as file:
                here = file.schema_arrow.names
                groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                if min(groups, default=0) < 0 or sum(groups) > path.stat().st_size:  # an image has at least one byte
                    raise ValueError(f"its header declares {sum(groups):,} rows")
                chosen = chosen or self._choose(here, labels, path.name)
                if missing := [column for column in chosen if column is not None and column not in here]:
                    raise dataset_error(f"{path.name} has no column {missing[0]}, but {self.files[0].name} has")
                named += [_names_in(file.schema_arrow.metadata or {}, chosen[1])] if chosen[1] and sum(groups) else []
            columns |= dict.fromkeys(here)
            self._groups += [(number, group) for group in range(len(groups))]
            counts += groups
        self._ends = np.array(list(accumulate(counts)), dtype=np.int64)
        total = int(self._ends[-1]) if counts else 0
        if not total or chosen is None:
            raise dataset_error(f"{self.files[0].name!r} has no rows")
        if any(list(names) != list(named[0]) for names in named):
            raise dataset_error(f"{self.files[0].name!r} and other files have different class names: read one of them")
        self.names, self.column = range(total), chosen[0]  # type: ignore[assignment]  # rows have no names
        self.class_names = named[0] if named else ()
        self._annotate(self.files[0].name, list(columns), chosen, self._values, labels)
        self._lock = threading.Lock()

    def _values(self, column: str) -> list[Any]:
        values: list[Any] = []
        for path in self.files:
            with _table_errors(path), _parquet(path) as file:
                values += file.read([column])[column].to_pylist()
        return values

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_cache": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_lock": threading.Lock()})

    def _place(self, index: int) -> tuple[int, int]:
        """The row group of image `index`, and its row in it."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def name(self, index: int) -> str:
        group, _ = self._place(index)
        return f"{self.files[self._groups[group][0]].name} row {index}"

    def data(self, index: int) -> bytes:
        group, row = self._place(index)
        with self._lock:
            rows = self._cache.pop(group) if group in self._cache else self._read(group)
            self._cache[group] = rows
            while len(self._cache) > 1 and sum(cached.nbytes for cached in self._cache.values()) > CACHED_BYTES:
                self._cache.popitem(last=False)
        with _table_errors(self.files[self._groups[group][0]]):
            cell = rows[row].as_py()
        return stored(cell, self.name(index), self.files[self._groups[group][0]].parent)

    def _read(self, group: int) -> Any:
        number, inside = self._groups[group]
        with _table_errors(self.files[number]), _parquet(self.files[number]) as file:
            return file.read_row_group(inside, [self.column])[self.column]


def _parquet(path: Path) -> ParquetFile:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, page_checksum_verification=True)


class _table_errors:
    """Turns errors of pyarrow into a UserError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):  # pyarrow raises many types
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise dataset_error(f"cannot read {self.path.name!r} as parquet: {why[:LONGEST_REASON]}") from error


def stored(cell: Any, name: str, folder: Path) -> bytes:
    """The encoded image in a table cell: bytes, or {"bytes": ..., "path": ...} with a path below `folder`."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None and isinstance(cell, dict) and isinstance(cell.get("path"), str):
        try:
            data = read_inside(folder, cell["path"])
        except DAMAGE as error:
            raise unreadable(name, error) from error
    if not isinstance(data, bytes):
        what = "no image" if data is None else f"{type(data).__name__}, not an encoded image"
        raise dataset_error(f"cannot read {name!r} as an image: it holds {what}")
    return data


def _names_in(metadata: dict[bytes, bytes], label: str) -> Sequence[str]:
    """The class names that the library `datasets` stores in a parquet file."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
    except (KeyError, ValueError, TypeError, RecursionError):
        return ()


class HubReader(TableReader):
    """A dataset loaded by the library `datasets`: from the hub, or from a local folder in a layout that it supports."""

    def __init__(self, name: str, split: str, library: ModuleType, labels: str = "auto") -> None:
        super().__init__(())
        try:
            rows = library.load_dataset(name, split=split)
            chosen = self.column, label, _ = self._choose(rows.column_names, labels, name)
            self.rows = rows.cast_column(self.column, library.Image(decode=False))
        except UserError:
            raise
        except Exception as error:  # errors of the library, the network or the files
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise dataset_error(f"the library 'datasets' cannot load {name!r}, split {split!r}: {lines[0]}") from error
        self.names = range(len(self.rows))  # type: ignore[assignment]
        if not len(self.rows):
            raise dataset_error(f"{name!r} has no rows")
        self.kind, self.dataset = "dataset of the library 'datasets'", name
        feature = None if label is None else rows.features.get(label)
        self.class_names = feature.names if isinstance(feature, library.ClassLabel) else ()
        self._annotate(name, rows.column_names, chosen, lambda column: list(rows[column]), labels)

    def name(self, index: int) -> str:
        return f"{self.dataset} row {index}"

    def data(self, index: int) -> bytes:
        return stored(self.rows[index][self.column], self.name(index), Path("/"))
