"""Readers of pixel arrays: npz, npy, idx (MNIST), the pickled batches of CIFAR and Downsampled ImageNet.

Uncompressed npz arrays are memory-mapped; everything else is loaded once, as uint8. Pickled batches are read by
:mod:`distillbench.storage.safe_pickle`, which builds plain containers and numeric arrays and executes nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePath
from typing import Any, BinaryIO

import numpy as np

from distillbench.datasets.annotations import READ_WITHOUT, as_classes, set_labels
from distillbench.datasets.image_folders import check_expanded
from distillbench.datasets.image_readers import DAMAGE, Reader, dataset_error, of_split, some, split_named
from distillbench.errors import quoted
from distillbench.storage.npz import NotNpz, Npz, check_memory, read_npy
from distillbench.storage.safe_pickle import Array, RefusedName, read_arrays

BATCH = re.compile(r"((train_)?data_batch(_\d+)?|test_batch|val_data)")  # file names of pickled batches
CIFAR100, CIFAR100_FOLDER = ("train", "test"), "cifar-100-python"  # its file names and their folder
CHUNK = 1024  # images hashed at a time
USUAL_UNREAD = ("mean",)  # arrays that are ignored without a note
MAP = "map_clsloc.txt"  # Downsampled ImageNet's class list, with lines such as "n02119789 1 kit_fox"


@dataclass(frozen=True)
class Part:
    """Images of one array, and their labels."""

    name: str
    images: np.ndarray  # (N,H,W,C) uint8
    labels: np.ndarray | None = None  # as stored: (N,), or (N,K) one-hot


class ArrayReader(Reader):
    """Images in one or several arrays."""

    encoded = False

    def __init__(self, kind: str, parts: Sequence[Part], notes: Sequence[str] = ()) -> None:
        self.kind, self.parts, self.notes = kind, list(parts), list(notes)
        self._ends = np.array(list(accumulate(len(part.images) for part in self.parts)), dtype=np.int64)
        if not len(self):
            raise dataset_error(f"no images in {', '.join(part.name for part in parts)}")
        labels = [part.labels for part in self.parts if part.labels is not None]
        if labels and len(labels) < len(self.parts):
            bare = next(part.name for part in self.parts if part.labels is None)
            raise dataset_error(f"{bare} has no labels, but other arrays have. {READ_WITHOUT}")
        if labels and len({(label.ndim, label.dtype.kind in "iub") for label in labels}) == 1:
            set_labels(self, as_classes(np.concatenate(labels), self.parts[0].name, self.name))
        elif labels:
            values = [value for label in labels for value in label.tolist()]
            set_labels(self, as_classes(values, self.parts[0].name, self.name))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[Part, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number], index - (int(self._ends[number - 1]) if number else 0)

    def open(self, index: int) -> np.ndarray:
        part, row = self._place(index)
        return part.images[row]

    def name(self, index: int) -> str:
        part, row = self._place(index)
        return f"{part.name}[{row}]"

    def checksum(self, index: int) -> tuple[int, int]:
        image = self.open(index)
        if image.shape[2] == 4 and image[..., 3].min(initial=255) < 255:
            self.transparent = True
        return zlib.crc32(image.tobytes()), image.nbytes

    def fingerprint(self, workers: int = 1) -> str:
        """SHA-256 of the pixels as (N,H,W,C), independent of the file format."""
        digest = hashlib.sha256()
        for part in self.parts:
            for start in range(0, len(part.images), CHUNK):
                images = part.images[start : start + CHUNK]
                digest.update(images.tobytes())
                if images.shape[3] == 4 and not self.transparent:
                    self.transparent = bool(images[..., 3].min(initial=255) < 255)
        return digest.hexdigest()


def _pixels(array: np.ndarray, name: str) -> np.ndarray:
    """A view of `array` as (N,H,W,C). Channels may be first or last, or missing if images are grey."""
    if array.dtype != np.uint8:
        raise dataset_error(f"{name} must hold 8-bit values (uint8), got {array.dtype}{_to_8_bits(array)}")
    one = array.ndim == 3 and array.shape[1] != array.shape[2] and array.shape[2] in (1, 3, 4)
    if array.ndim == 3 and not one:
        return array[..., None]
    for channels in ((1, 3), (4,)):  # (N,4,H,W) is tried last, as 4 may also be a height
        if array.ndim == 4 and array.shape[3] in channels:
            return array
        if array.ndim == 4 and array.shape[1] in channels:
            return array.transpose(0, 2, 3, 1)
    hint = ", which looks like a single image: use np.stack(images)" if one else ""
    raise dataset_error(
        f"{name} must be images (N,H,W,C), (N,C,H,W) or (N,H,W) of 1, 3 or 4 channels, got {array.shape}{hint}"
    )


def _to_8_bits(array: np.ndarray) -> str:
    """How to convert an array of another type to 8 bits, as the end of a message."""
    if array.dtype.kind == "f" and array.size:
        low, high = float(array.min()), float(array.max())
        if low >= 0 and high <= 1:
            return " between 0 and 1: save (255 * images).round().astype('uint8')"
        if low >= -1 and high <= 1:
            return " between -1 and 1: save (127.5 * (images + 1)).round().astype('uint8')"
        return ": save images between 0 and 255 by .round().astype('uint8')"
    if array.dtype.kind in "iu" and array.size and array.min() >= 0 and array.max() <= 255:
        return " of values between 0 and 255: save images.astype('uint8')"
    return ""


def _flat_pixels(array: np.ndarray, name: str) -> np.ndarray:
    """A view of CIFAR's rows (N, 3*S*S), red first, as (N,S,S,3)."""
    side = round((array.shape[1] / 3) ** 0.5) if array.ndim == 2 else 0
    if array.ndim != 2 or array.shape[1] != 3 * side * side:
        return _pixels(array, name)
    return _pixels(array.reshape(len(array), 3, side, side), name)


def _numbers(array: np.ndarray, images: np.ndarray, name: str) -> np.ndarray:
    """Labels as stored, (N,) or (N,K) one-hot, checked against the number of images."""
    one_hot = array.ndim == 2 and len(array) == len(images) and array.shape[1] > 1
    if (array.size != len(images) and not one_hot) or array.dtype.kind not in "iubfUS":
        raise dataset_error(
            f"{name} must be {len(images)} whole numbers, got {array.dtype} {array.shape}. {READ_WITHOUT}"
        )
    return array if one_hot else array.reshape(-1)


# --- npz -------------------------------------------------------------------------------------------------------------


def open_npz(files: Sequence[Path], split: str, labelled: bool) -> ArrayReader:
    """Arrays `images` and `labels`, arr_0 and arr_1, NAME_images and NAME_labels, x_train and y_train, or `data`.

    `data` is Downsampled ImageNet's (N, 3*S*S), whose labels start at 1.
    """
    files = [Path(name) for name in _batches(map(str, files), split, quoted(str(files[0].parent)))]
    flat: list[Part] = []
    parts: list[Part] = []
    unread: list[str] = []
    for path in files:
        arrays = _Npz(path)
        pairs = {"data": "labels"} if "data" in arrays.names else _pairs(arrays.names)
        if not pairs:
            wanted = "images, arr_0, NAME_images, x_train or data"
            raise dataset_error(f"{path.name!r} has no array {wanted}; it has {', '.join(arrays.names[:10]) or 'none'}")
        known = {*pairs, *pairs.values(), *USUAL_UNREAD}
        unread += [f"{path.name}:{name}" for name in arrays.names if name not in known]
        if "data" in pairs:
            flat.append(arrays.part("data", "labels", _flat_pixels, labelled))
        else:
            parts += [arrays.part(key, pairs[key], _pixels, labelled) for key in _batches(pairs, split, path.name)]
    notes = [f"ignored arrays ({len(unread):,}): {some(unread)}"] if unread else []
    return ArrayReader("npz arrays", [*parts, *_from_one(flat, files[0].parent)], notes)


def _pairs(names: Sequence[str]) -> dict[str, str]:
    """The image arrays among `names`, each with the name of its labels, which need not exist."""
    fixed = {"images": "labels", "arr_0": "arr_1"}
    found = next(({images: labels} for images, labels in fixed.items() if images in names), {})
    found |= {name: f"{name.removesuffix('_images')}_labels" for name in names if name.endswith("_images")}
    return found | {f"x_{part}": f"y_{part}" for part in ("train", "test") if f"x_{part}" in names}


def _batches(names: Iterable[str], split: str, what: str) -> list[str]:
    """The names of a split in natural order: batch 10 after batch 9, test after train."""

    def key(name: str) -> tuple[bool, list[Any]]:
        stem = PurePath(name).name
        words = re.split(r"(\d+)", stem)
        return _split_in(stem) == "test", [int(word) if word.isdigit() else word for word in words]

    return of_split(sorted(names, key=key), split, lambda name: [_split_in(PurePath(name).name)], what)


def _split_in(name: str) -> str:
    return split_named(name.removeprefix("x_"))


class _Npz(Npz):
    """The arrays of an npz file by name. Raises UserError if it is damaged."""

    def __init__(self, path: Path) -> None:
        try:
            super().__init__(path, mapped=True)
        except NotNpz as error:
            raise dataset_error(f"{str(path)!r} is no npz file: {error}") from error
        except ValueError as error:
            raise dataset_error(f"{str(path)!r} is a damaged or truncated npz file: {error}") from error

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return super().__getitem__(name)
        except ValueError as error:
            raise dataset_error(f"cannot read {name!r} of {self.path.name!r}: {error}") from error

    def part(self, images: str, labels: str, view: Callable[[np.ndarray, str], np.ndarray], labelled: bool) -> Part:
        where = f"{self.path.name}:{images}"
        pixels = view(self[images], where)
        if labels not in self.names or not labelled:
            return Part(where, pixels)
        return Part(where, pixels, _numbers(self[labels], pixels, f"{self.path.name}:{labels}"))


def _from_one(parts: Sequence[Part], folder: Path) -> list[Part]:
    """Downsampled ImageNet's labels from 1 to labels from 0, in the order of WordNet ids if MAP lies beside the files.

    Published class-conditional checkpoints number the 1,000 classes in that order.
    """
    labels = [part.labels for part in parts if part.labels is not None]
    if not labels or any(part.ndim > 1 or part.dtype.kind not in "iu" for part in labels):
        return list(parts)
    if min(part.min() for part in labels if len(part)) <= 0:
        return list(parts)
    order = _wordnet_order(folder / MAP)
    most = max(part.max() for part in labels if len(part))
    if order is not None and most > len(order):
        raise dataset_error(f"{MAP} has {len(order)} classes, but the files have {most}")
    return [
        Part(part.name, part.images, None if part.labels is None else _renumbered(part.labels - 1, order))
        for part in parts
    ]


def _renumbered(labels: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    return labels if order is None else order[labels]


def _wordnet_order(path: Path) -> np.ndarray | None:
    """(K,) the rank of class k + 1 of a file among the sorted WordNet ids; None if there is no map."""
    if not path.is_file():
        return None
    try:
        rows = [line.split()[:2] for line in path.read_text().splitlines() if line.strip()]
        numbers = {int(number): name for name, number in rows}
    except (ValueError, OSError) as error:
        raise dataset_error(f"{path.name} must have lines such as 'n02119789 1 kit_fox': {error}") from error
    if sorted(numbers) != list(range(1, len(numbers) + 1)):
        raise dataset_error(f"{path.name} must number its classes 1, 2, ...")
    places = {name: place for place, name in enumerate(sorted(numbers.values()))}
    return np.array([places[numbers[number]] for number in sorted(numbers)], dtype=np.int64)


# --- npy -------------------------------------------------------------------------------------------------------------


def is_npy(start: bytes) -> bool:
    return start[:6] == b"\x93NUMPY"


def open_npy(files: Sequence[Path], split: str, labelled: bool) -> ArrayReader:
    """One array per file, named as in an npz (images.npy and labels.npy, ...), or a single file of any name."""
    beside = {path.stem: path for path in files[0].parent.glob("*.npy")}
    names = [path.stem for path in files]
    pairs = _pairs(names)
    if len(files) == 1 and not pairs:
        pairs = {names[0]: f"{names[0]}_labels"}
    if not pairs:
        raise dataset_error(
            f"{str(files[0].parent)!r} has {len(files):,} .npy files, but none is called images, NAME_images or "
            "x_train. Save them as one array (N,H,W,C): np.save('images.npy', np.stack(images))"
        )
    parts = []
    for name in _batches(pairs, split, quoted(str(files[0].parent))):
        images, labels = _pixels(_npy(beside[name]), f"{name}.npy"), None
        if labelled and pairs[name] in beside:
            labels = _numbers(_npy(beside[pairs[name]]), images, f"{pairs[name]}.npy")
        parts.append(Part(f"{name}.npy", images, labels))
    unread = sorted(f"{name}.npy" for name in names if name not in {*pairs, *pairs.values()})
    return ArrayReader("npy arrays", parts, [f"ignored files ({len(unread):,}): {some(unread)}"] if unread else [])


def _npy(path: Path) -> np.ndarray:
    try:
        return read_npy(path)
    except (ValueError, OSError) as error:
        raise dataset_error(f"cannot read {path.name!r} as an array: {error}") from error


# --- idx -------------------------------------------------------------------------------------------------------------


def is_idx(start: bytes) -> bool:
    """Whether a file with this start is an idx file of 8-bit images: two zeros, type 8, three dimensions."""
    return start[:4] == b"\0\0\x08\x03"


def open_idx(files: Sequence[Path], split: str, labelled: bool) -> ArrayReader:
    """idx files as of MNIST, plain or gzipped, with labels in a file beside the images."""
    images = [Path(name) for name in _batches([str(f) for f in files if "images" in f.name or len(files) == 1], split,
                                              quoted(str(files[0].parent)))]  # fmt: skip
    parts = []
    for path in images:
        pixels = _pixels(_idx(path), path.name)
        labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        other = labels.with_name(labels.name.removesuffix(".gz") + ("" if labels.suffix == ".gz" else ".gz"))
        found = next((p for p in (labels, other) if p.is_file() and p != path and labelled), None)
        parts.append(Part(path.name, pixels, None if found is None else _numbers(_idx(found), pixels, found.name)))
    return ArrayReader("idx files", parts)


def _idx(path: Path) -> np.ndarray:
    try:
        with open_plain(path) as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08" or start[3] not in (1, 3):
                raise dataset_error(f"{path.name!r} is not an idx file of 8-bit images or labels")
            shape = np.frombuffer(file.read(4 * start[3]), dtype=">u4").tolist()
            size = math.prod(shape)
            check_memory(size)
            data = file.read(size + 1) if len(shape) == start[3] else b""  # one byte more, to notice extra data
    except DAMAGE as error:
        raise dataset_error(f"cannot read {path.name!r} as idx: {error}") from error
    if len(shape) != start[3] or len(data) != size:
        found = f"{len(data):,} values" if len(data) <= size else "more values"
        raise dataset_error(f"{path.name!r} is damaged or truncated: its header says {shape}, but it has {found}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def open_plain(path: Path) -> BinaryIO:
    """Open a file, decompressing it if it is gzipped."""
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if zipped else open(path, "rb")  # type: ignore[return-value]


# --- batches of CIFAR ------------------------------------------------------------------------------------------------


def open_batches(folder: Path, split: str, labelled: bool) -> ArrayReader | None:
    """CIFAR's or Downsampled ImageNet's pickled batches in a folder or in its subfolders; None if there are none."""
    files = [*folder.glob("*"), *folder.glob("*/*")]
    meta = {file.parent for file in files if file.name == "meta"}
    found = [file for file in files if _is_batch(file, file.parent in meta) and file.is_file()]
    if not found:
        return None
    parts = []
    for name in _batches(map(str, found), split, quoted(str(folder))):
        path = Path(name)
        with open(path, "rb") as file:
            parts.append(_batch(file, path.name, labelled))
    if any(path.name.startswith(("train_", "val_")) for path in found):
        parts = _from_one(parts, found[0].parent)
    return _of_batches(parts, found)


def _is_batch(path: PurePath, beside_meta: bool = False) -> bool:
    """Whether a file has the name of a CIFAR batch. CIFAR-100's lie in CIFAR100_FOLDER or beside a file "meta"."""
    hundred = path.name in CIFAR100 and (path.parent.name == CIFAR100_FOLDER or beside_meta)
    return hundred or BATCH.fullmatch(path.name) is not None


def _of_batches(parts: Sequence[Part], paths: Iterable[PurePath]) -> ArrayReader:
    notes = []
    if any(path.name in CIFAR100 for path in paths) and any(part.labels is not None for part in parts):
        notes.append("labels are the 100 fine classes of CIFAR-100; its 20 coarse classes are ignored")
    return ArrayReader("CIFAR's python batches", parts, notes)


def holds_batches(names: Iterable[str]) -> bool:
    """Whether an archive with these names holds pickled batches."""
    return any(_is_batch(PurePath(name)) for name in names)


def open_batch_archive(path: Path, split: str, labelled: bool) -> ArrayReader:
    """Pickled batches in a tar, read without unpacking it."""
    parts: dict[str, Part | None] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePath(member.name)
                check_expanded(member, path.stat().st_size)
                if member.isfile() and _is_batch(name) and (file := archive.extractfile(member)) is not None:
                    if split != "all" and _split_in(name.name) != split:
                        parts.setdefault(name.name, None)
                    else:
                        parts[name.name] = _batch(io.BytesIO(file.read()), name.name, labelled)
    except (*DAMAGE, tarfile.TarError) as error:
        raise dataset_error(f"{path.name!r} is a damaged or truncated tar: {error}") from error
    chosen = [parts[name] for name in _batches(list(parts), split, path.name)]
    return _of_batches([part for part in chosen if part is not None], map(PurePath, parts))


def _batch(file: BinaryIO, name: str, labelled: bool) -> Part:
    try:
        content = read_arrays(file)
    except RefusedName as error:
        what = quoted(error.name)[1:-1]
        raise dataset_error(
            f"{name!r} refers to {what}, which could run code: refused, nothing was executed"
        ) from error
    except ValueError as error:
        raise dataset_error(f"{name!r} is not a CIFAR batch: {quoted(str(error))}") from error
    if isinstance(content, dict):
        content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    data = content.get("data") if isinstance(content, dict) else None
    if not (isinstance(data, Array) and data.value is not None):
        raise dataset_error(f"{name!r} is not a CIFAR batch: it must hold a dictionary with an array 'data'")
    images = _flat_pixels(data.value, name)
    labels = content.get("labels", content.get("fine_labels"))
    if labels is None or not labelled:
        return Part(name, images)
    if isinstance(labels, list | tuple) and all(type(label) is int for label in labels):
        labels = np.array(labels if all(abs(label) < 2**63 for label in labels) else [-1], dtype=np.int64)
    labels = labels.value if isinstance(labels, Array) else labels
    if not isinstance(labels, np.ndarray):
        raise dataset_error(f"labels of {name} must be {len(images)} whole numbers, got {type(labels).__name__}")
    return Part(name, images, _numbers(labels, images, f"labels of {name}"))
