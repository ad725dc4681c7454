"""Where images come from: each source of files behind one small contract, :class:`Reader`.

Encoded images (PNG, JPEG, WebP, BMP) lie in a folder, a zip, parquet files or a dataset of a hub; arrays of pixels are
in :mod:`distillbench.array_files`. A reader keeps names and labels in memory and reads an image when it is asked for.
Its fingerprint tells the data apart, not the place: a zip and the folder that it was packed from have the same.

Every error is a UserError that names ``dataset.path`` and the file at fault.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import math
import os
import stat
import struct
import threading
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from distillbench.errors import LONGEST_REASON, UserError, nearest, quoted

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # all that is decoded, whatever a file is called
LARGEST_FILE = 2**28  # bytes of one encoded image, and of a file of labels or captions
LARGEST_IMAGE = Image.MAX_IMAGE_PIXELS or 2**26  # pixels; Pillow warns from there, and here that is an error
PNG_DEPTH = 24  # where a PNG has the bits of a channel
KEPT_ROWS = 2**30  # bytes of parquet row groups that are kept decompressed
SPLITS = {"train": ("train", "training", "data"), "test": ("test", "t10k", "val", "valid", "validation")}  # their names
IMAGE_COLUMNS = ("image", "images", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "class", "fine_label")
CAPTION_COLUMNS = ("text", "caption", "prompt")

# What decoders raise at damaged files.
DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, RuntimeError, NotImplementedError),
    *(ArithmeticError, MemoryError, AssertionError, AttributeError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

T = TypeVar("T")


class Reader(ABC):
    """Images by number, as they are stored. Labels and captions belong to images; either may be absent."""

    kind: str  # what the source is, in words
    encoded: bool = True  # images take time to decode, outside of Python's lock: threads pay
    labels: np.ndarray | None = None  # (N,) int64
    class_names: Sequence[str] = ()  # by label, where the source names them
    captions: Sequence[str] | None = None  # N texts

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def open(self, index: int) -> Image.Image | np.ndarray:
        """Image `index`, decoded: of Pillow, or uint8 (H,W,C). Raises UserError where it is damaged."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What image `index` is called in its source."""

    @abstractmethod
    def checksum(self, index: int) -> tuple[int, int]:
        """CRC-32 and size of image `index` as it is stored."""

    def checksums(self, workers: int = 1) -> list[tuple[int, int]]:
        """That of every image."""
        return map_in_order(self.checksum, range(len(self)), workers)

    def fingerprint(self, workers: int = 1) -> str:
        """SHA-256 over what is stored, in order: the same for the same images, wherever they lie."""
        checksums = np.array(self.checksums(workers), dtype="<u8")
        return hashlib.sha256(checksums.tobytes()).hexdigest()


def map_in_order(call: Callable[[Any], T], items: Sequence[Any], workers: int) -> list[T]:
    """``[call(item) for item in items]`` on `workers` threads. An error is that of the first item that has one."""
    if workers < 2 or len(items) < 2:
        return [call(item) for item in items]
    size = math.ceil(len(items) / workers)
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(len(parts)) as pool:
        return [result for part in pool.map(lambda part: [call(item) for item in part], parts) for result in part]


def trouble(message: str) -> UserError:
    return UserError(f"dataset.path: {message}")


def unreadable(name: str, error: Exception) -> UserError:
    """`name` cannot be read as an image, in words that hold no address of an object."""
    why = "no image format is recognised" if isinstance(error, UnidentifiedImageError) else str(error)
    return trouble(f"cannot read {quoted(name)} as an image: {why[:LONGEST_REASON] or type(error).__name__}")


def decode(data: bytes, name: str) -> Image.Image:
    """The image in `data`. Raises UserError."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(f"it has {image.width:,} x {image.height:,} pixels, at most {LARGEST_IMAGE:,} are read")
        if image.format in ("PNG", "WEBP") and image.is_animated:  # type: ignore[attr-defined]
            raise ValueError(f"it is an animation of {image.n_frames:,} pictures")  # type: ignore[attr-defined]
        if image.format == "PNG":
            if data[PNG_DEPTH] > 8 and not image.mode.startswith("I"):  # Pillow drops half the bits of colours
                raise ValueError("it has more than 8 bits a channel: convert it to 8 bits")
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()  # compares checksums, which load() does not
        image.load()
    except DAMAGE as error:
        raise unreadable(name, error) from error
    return image


class EncodedReader(Reader):
    """Images that are stored as files of an image format."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    @abstractmethod
    def data(self, index: int) -> bytes:
        """Image `index` as it is stored. Raises UserError."""

    def open(self, index: int) -> Image.Image | np.ndarray:
        return decode(self.data(index), self.name(index))

    def checksum(self, index: int) -> tuple[int, int]:
        data = self.data(index)
        return zlib.crc32(data), len(data)


# --- parts of a dataset ----------------------------------------------------------------------------------------------


def split_named(word: str) -> str:
    """The split that a folder, file or array is named for ("t10k-images", "validation"), or nothing."""
    first = word.lower().replace("_", "-").split(".")[0].split("-")[0]
    return next((split for split, names in SPLITS.items() if first in names), "")


def of_split(names: Sequence[str], split: str, words: Callable[[str], Sequence[str]], what: str) -> list[str]:
    """Those of `names` that belong to `split`, by the words in each that may name one.

    All of them where no word names a split, or `split` is "all". Of several names for one split the first in
    :data:`SPLITS` is taken: images called val are not the test set where there is one called test.
    """
    named = {name: next((word for word in words(name) if split_named(word)), "") for name in names}
    if split == "all" or not any(named.values()):
        return list(names)
    ours = {word for word in named.values() if split_named(word) == split}
    if not ours:
        others = ", ".join(sorted({word for word in named.values() if word}))
        raise trouble(f"{what} has nothing of split={split}, only {others}")
    spelled = {word: word.lower().replace("_", "-").split(".")[0].split("-")[0] for word in ours}
    best = min(spelled.values(), key=SPLITS[split].index)
    return [name for name in names if spelled.get(named[name]) == best]


def split_folder(name: str) -> list[str]:
    """The folders, at most two deep, that are called as a split and nothing more: train in "afhq/train/cat/1.png"."""
    every = {alias for names in SPLITS.values() for alias in names} - {"data"}
    return [part for part in name.split("/")[:-1][:2] if part.lower() in every]


# --- folders and zips ------------------------------------------------------------------------------------------------


class FolderReader(EncodedReader):
    """Image files below a folder, in the order of their paths."""

    kind = "folder of images"

    def __init__(self, root: Path, split: str, labels: str) -> None:
        every = [_relative(folder, file, root) for folder, _, files in os.walk(root) for file in files]
        super().__init__(_images(every, split, repr(str(root))))
        if not self.names:
            raise trouble(f"no image ({', '.join(sorted(SUFFIXES))}) below {str(root)!r}{_packed(every)}")
        self.root = root
        _annotate(self, set(every), lambda name: read_inside(root, name), labels)

    def data(self, index: int) -> bytes:
        name = self.names[index]
        try:
            return read_inside(self.root, name)
        except DAMAGE as error:
            raise unreadable(name, error) from error


def read_inside(root: Path, name: str) -> bytes:
    """The content of the file `name` below `root`. Raises ValueError for what is no file of its own in there."""
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"it leads out of the folder {str(root)!r}: copy the file there")
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is no file")
    _check_size(found.st_size)
    return path.read_bytes()


def _relative(folder: str, file: str, root: Path) -> str:
    return Path(folder, file).relative_to(root).as_posix()


class ZipReader(EncodedReader):
    """Images in a zip, among them those that EDM's dataset tool writes, in the order of their paths."""

    def __init__(self, path: Path, split: str, labels: str) -> None:
        self.path = path
        self._open()
        every = [info.filename for info in self._zip.infolist() if not info.filename.endswith("/")]
        if len(set(every)) != len(every):
            again = next(name for name, count in Counter(every).items() if count > 1)
            raise trouble(f"{path.name!r} is a zip that has {quoted(again)} twice")
        super().__init__(_images(every, split, repr(path.name)))
        if not self.names:
            raise trouble(f"no image ({', '.join(sorted(SUFFIXES))}) in {str(path)!r}")
        self._infos = [self._zip.getinfo(name) for name in self.names]
        _annotate(self, set(every), lambda name: self._read(self._zip.getinfo(name)), labels)
        self.kind = "zip of images" if self.labels is None else "zip of images with labels"

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.path)
        except DAMAGE as error:
            raise trouble(
                f"{str(self.path)!r} is a zip that is damaged or cut off: {str(error)[:LONGEST_REASON]}"
            ) from error
        self._lock = threading.Lock()  # decoding is what takes time, and needs no lock

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_zip", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def data(self, index: int) -> bytes:
        info = self._infos[index]
        try:
            return self._read(info)
        except DAMAGE as error:
            raise unreadable(info.filename, error) from error

    def _read(self, info: zipfile.ZipInfo) -> bytes:
        """A member, and of one that goes on beyond its size no more than that."""
        _check_size(info.file_size)
        with self._lock, self._zip.open(info) as file:
            data = file.read(info.file_size)
        if len(data) != info.file_size:
            raise ValueError("it is cut off")
        return data

    def checksum(self, index: int) -> tuple[int, int]:
        info = self._infos[index]  # of the central directory: nothing else is read
        return info.CRC, info.file_size


def _check_size(size: int) -> None:
    if size > LARGEST_FILE:
        raise ValueError(f"it has {size:,} bytes, at most {LARGEST_FILE:,} are read")


def _images(every: Iterable[str], split: str, what: str) -> list[str]:
    """The image files of a split among all files, by path; what is hidden is left out."""
    shown = [name for name in every if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]
    images = [name for name in shown if os.path.splitext(name)[1].lower() in SUFFIXES]
    return of_split(sorted(images, key=lambda name: name.split("/")), split, split_folder, what)


def _packed(every: Iterable[str]) -> str:
    """Where to look instead, for a folder that holds no image but an archive."""
    archives = sorted(name for name in every if name.endswith((".zip", ".tar.gz", ".tar")))
    return f"; there is {archives[0]!r}, which dataset.path may name" if archives else ""


# --- labels and captions that lie beside images ----------------------------------------------------------------------


def _annotate(reader: EncodedReader, every: set[str], read: Callable[[str], bytes], labels: str) -> None:
    """Find labels and captions among the files `every`, as far as the setting `labels` asks for them."""
    if labels == "folders":
        _label_by_folder(reader)
    elif labels == "auto":
        if (file := _beside(every, "dataset.json")) is not None:
            _label_by_json(reader, file, read)
        if reader.labels is None:
            _caption(reader, every, read)
    elif labels == "captions":
        _caption(reader, every, read)


def _beside(every: set[str], name: str) -> str | None:
    """The one file called `name`, in the root or the only one below it."""
    found = [name] if name in every else [file for file in every if file.endswith(f"/{name}")]
    return found[0] if len(found) == 1 else None


def _label_by_folder(reader: EncodedReader) -> None:
    folders = []
    for name in reader.names:
        parts, cut = name.split("/")[:-1], split_folder(name)
        parts = parts[parts.index(cut[0]) + 1 :] if cut else parts
        if not parts:
            raise trouble(f"labels=folders: {name!r} lies in no folder that could name its class")
        folders.append(parts[0])
    reader.class_names = sorted(set(folders))
    numbers = {name: number for number, name in enumerate(reader.class_names)}
    reader.labels = np.array([numbers[name] for name in folders], dtype=np.int64)


def _label_by_json(reader: EncodedReader, file: str, read: Callable[[str], bytes]) -> None:
    """EDM's layout: {"labels": [["00000/img00000000.png", 3], ...]}, or null."""
    content = _json(read, file)
    pairs = content.get("labels") if isinstance(content, dict) else None
    if pairs is None:
        return
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise trouble(f"{file}: labels must be a list of [FILE, CLASS] or null")
    by_name = _by_name(reader, file, [(name, label) for name, label in pairs], "a label")
    for name, label in zip(reader.names, by_name, strict=True):
        if not (isinstance(label, int) and not isinstance(label, bool) and 0 <= label < 2**31):
            raise trouble(f"{file}: the label of {name!r} must be a class 0, 1, ..., got {quoted(json.dumps(label))}")
    reader.labels = np.array(by_name, dtype=np.int64)


def _caption(reader: EncodedReader, every: set[str], read: Callable[[str], bytes]) -> None:
    reader.captions = _captions(reader, every, read)
    check_texts(reader.captions or (), "a caption")


def check_texts(texts: Iterable[str], what: str) -> None:
    """Raise UserError for halves of surrogate pairs, which JSON can spell and no text encoder takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise trouble(f"{what} is no text: {quoted(text)}") from error


def _captions(reader: EncodedReader, every: set[str], read: Callable[[str], bytes]) -> list[str] | None:
    """From metadata.jsonl as the `datasets` library has it (file_name, text), or from NAME.txt beside NAME.png."""
    file = _beside(every, "metadata.jsonl")
    if file is not None:
        pairs = []
        for number, line in enumerate(_text(read, file).splitlines(), 1):
            if line.strip():
                entry = _parsed(line, f"{file}, line {number}")
                column = next((c for c in CAPTION_COLUMNS if isinstance(entry, dict) and c in entry), None)
                if column is None or "file_name" not in entry:
                    wanted = f"file_name and one of {', '.join(CAPTION_COLUMNS)}"
                    raise trouble(f"{file}, line {number}: needs {wanted}, got {quoted(line)}")
                pairs.append((entry["file_name"], str(entry[column])))
        return _by_name(reader, file, pairs, "a caption")
    beside = [os.path.splitext(name)[0] + ".txt" for name in reader.names]
    there = [name in every for name in beside]
    if not any(there):
        return None
    if not all(there):
        raise trouble(f"no caption {beside[there.index(False)]!r}, while other images have theirs")
    return [" ".join(_text(read, name).split()) for name in beside]


def _by_name(reader: EncodedReader, file: str, pairs: list[tuple[Any, T]], what: str) -> list[T]:
    """The values of `pairs` in the order of the images. Raises where a name is unknown or an image has no value."""
    folder = file.rpartition("/")[0]
    values = {f"{folder}/{name}" if folder else str(name): value for name, value in pairs}
    known = set(reader.names)
    absent = [name for name in values if name not in known]
    if absent:
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        raise trouble(
            f"{file} names {quoted(absent[0])}{more}, which is not there.{nearest(absent[0], reader.names[:10_000])}"
        )
    bare = [name for name in reader.names if name not in values]
    if bare:
        more = f" and {len(bare) - 1:,} more" if len(bare) > 1 else ""
        raise trouble(f"{file} has not {what} for {quoted(bare[0])}{more}")
    return [values[name] for name in reader.names]


def _text(read: Callable[[str], bytes], file: str) -> str:
    try:
        return read(file).decode("utf-8-sig")
    except DAMAGE as error:  # UnicodeDecodeError is a ValueError
        raise trouble(f"cannot read {quoted(file)} as text: {str(error)[:LONGEST_REASON]}") from error


def _json(read: Callable[[str], bytes], file: str) -> Any:
    return _parsed(_text(read, file), file)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise trouble(f"{where} is not JSON: {error}") from error


# --- tables ----------------------------------------------------------------------------------------------------------


class ParquetReader(EncodedReader):
    """Rows of parquet files: encoded images, with labels or captions beside them.

    Row groups are decompressed when one of their rows is asked for, and kept up to :data:`KEPT_ROWS` bytes together;
    of a larger set, reading in random order decompresses the same groups again and again.
    """

    kind = "parquet files"

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._groups: list[tuple[int, int]] = []  # number of the file, and of the group in it
        self._kept: OrderedDict[int, Any] = OrderedDict()
        counts: list[int] = []
        labels: list[np.ndarray] = []
        captions: list[str] = []
        for number, path in enumerate(self.files):
            with _table_errors(path), _parquet(path) as file:
                columns = file.schema_arrow.names
                self.column = _column(columns, IMAGE_COLUMNS, path.name)
                groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
                if min(groups, default=0) < 0 or sum(groups) > path.stat().st_size:  # an image has a byte at least
                    raise ValueError(f"it says that it has {sum(groups):,} rows")
                label = next((c for c in LABEL_COLUMNS if c in columns), None)
                caption = next((c for c in CAPTION_COLUMNS if c in columns), None)
                if label is not None:
                    labels.append(class_numbers(file.read([label])[label].to_pylist(), path.name))
                    self.class_names = _names_in(file.schema_arrow.metadata or {}, label)
                if caption is not None:
                    captions += map(str, file.read([caption])[caption].to_pylist())
            self._groups += [(number, group) for group in range(len(groups))]
            counts += groups
        self._ends = np.array(list(accumulate(counts)), dtype=np.int64)
        total = int(self._ends[-1]) if counts else 0
        if not total:
            raise trouble(f"{self.files[0].name!r} holds no row")
        super().__init__(range(total))  # type: ignore[arg-type]  # rows have numbers, no names
        self.labels = np.concatenate(labels) if sum(map(len, labels)) == total else None
        self.captions = captions if len(captions) == total else None
        check_texts(captions, f"{self.files[0].name!r}: a caption")
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_kept": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_lock": threading.Lock()})

    def _place(self, index: int) -> tuple[int, int]:
        """Row group, and row in it."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def name(self, index: int) -> str:
        group, _ = self._place(index)
        return f"{self.files[self._groups[group][0]].name} row {index}"

    def data(self, index: int) -> bytes:
        group, row = self._place(index)
        with self._lock:
            rows = self._kept.pop(group) if group in self._kept else self._read(group)
            self._kept[group] = rows
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > KEPT_ROWS:
                self._kept.popitem(last=False)
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
    """What pyarrow raises, as a UserError about the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):  # pyarrow raises much for a damaged file
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise trouble(f"cannot read {self.path.name!r} as parquet: {why[:LONGEST_REASON]}") from error


def stored(cell: Any, name: str, folder: Path) -> bytes:
    """The encoded image in a table's cell: bytes, or {"bytes": ..., "path": ...} with a path below `folder`."""
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if data is None and isinstance(cell, dict) and isinstance(cell.get("path"), str):
        try:
            data = read_inside(folder, cell["path"])
        except DAMAGE as error:
            raise unreadable(name, error) from error
    if not isinstance(data, bytes):
        raise trouble(f"cannot read {name!r} as an image: it holds {type(data).__name__}, no encoded image")
    return data


def class_numbers(values: Sequence[Any], where: str) -> np.ndarray:
    """Labels (N,) int64. Raises UserError unless all are classes 0, 1, ..."""
    wrong = next((v for v in values if not isinstance(v, int | np.integer) or isinstance(v, bool) or v < 0), None)
    if wrong is not None or None in values:
        raise trouble(f"{where}: labels must be classes 0, 1, ..., got {quoted(repr(wrong))}")
    if max(values, default=0) >= 2**31:
        raise trouble(f"{where}: labels must be classes 0, 1, ..., got {max(values)}")
    return np.array(values, dtype=np.int64)


def _column(columns: Sequence[str], wanted: Sequence[str], where: str) -> str:
    found = next((column for column in wanted if column in columns), None)
    if found is None:
        raise trouble(f"{where} has no column {' or '.join(wanted)}; it has {', '.join(columns)}")
    return found


def _names_in(metadata: dict[bytes, bytes], label: str) -> Sequence[str]:
    """The names of classes that the `datasets` library leaves in a parquet file."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
    except (KeyError, ValueError, TypeError, RecursionError):
        return ()


class HubReader(EncodedReader):
    """A dataset that the `datasets` library loads: of a hub, or a local folder in a layout that it knows."""

    def __init__(self, name: str, split: str, library: ModuleType) -> None:
        try:
            rows = library.load_dataset(name, split=split)
            column = _column(rows.column_names, IMAGE_COLUMNS, name)
            self.rows = rows.cast_column(column, library.Image(decode=False))
        except UserError:
            raise
        except Exception as error:  # the library, the network or the dataset's own files may fail in any way
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise trouble(f"the library 'datasets' cannot load {name!r}, split {split!r}: {lines[0]}") from error
        super().__init__(range(len(self.rows)))  # type: ignore[arg-type]
        if not len(self.rows):
            raise trouble(f"{name!r} holds no row")
        self.kind, self.dataset, self.column = "dataset of the library 'datasets'", name, column
        label = next((c for c in LABEL_COLUMNS if c in rows.column_names), None)
        caption = next((c for c in CAPTION_COLUMNS if c in rows.column_names), None)
        if label is not None:
            self.labels = class_numbers(list(rows[label]), name)
            feature = rows.features[label]
            self.class_names = feature.names if isinstance(feature, library.ClassLabel) else ()
        if caption is not None:
            self.captions = [str(text) for text in rows[caption]]

    def name(self, index: int) -> str:
        return f"{self.dataset} row {index}"

    def data(self, index: int) -> bytes:
        return stored(self.rows[index][self.column], self.name(index), Path("/"))
