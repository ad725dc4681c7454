"""Datasets of image files: detect the kind of source at a path, read its labels, cache decoded images."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distillbench.datasets.annotations import METADATA, composed
from distillbench.datasets.array_readers import (
    ArrayReader,
    holds_batches,
    is_idx,
    is_npy,
    open_batch_archive,
    open_batches,
    open_idx,
    open_npy,
    open_npz,
    open_plain,
)
from distillbench.datasets.dataset import Dataset, DatasetConfig
from distillbench.datasets.image_fit import CROPS, RESIZES, Fit
from distillbench.datasets.image_folders import (
    TARS,
    FolderReader,
    ImageFiles,
    TarReader,
    ZipReader,
    by_suffix,
    files_below,
    is_hidden,
    is_image,
    tar_members,
)
from distillbench.datasets.image_readers import (
    DAMAGE,
    SUFFIXES,
    Reader,
    dataset_error,
    map_in_order,
    of_split,
    some,
    split_folder,
)
from distillbench.datasets.tables import HubReader, ParquetReader
from distillbench.errors import UserError, nearest, quoted
from distillbench.options import option, require_between, require_one_of, require_positive
from distillbench.storage.downloads import located, read_record
from distillbench.storage.files import canonical_json, git_lfs_pointer
from distillbench.storage.source_messages import ACCEPTED, hub_needs, missing_dataset, usual_line
from distillbench.storage.sources import known, of_dataset

__all__ = ["FileConfig", "FileDataset"]

HUB = "hub:"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
TRANSPARENCY = "alpha over white"
MOST_CLASSES = 2**20
LABELS = ("auto", "folders", "captions", "none")
ADVICE = {  # for files of unsupported kinds, by suffix
    **dict.fromkeys((".h5", ".hdf5", ".mat", ".pt", ".pth", ".pkl", ".pickle"), "save its arrays by np.savez('a.npz', "
                    "images=images, labels=labels), images uint8 (N,H,W,C)"),
    **dict.fromkeys((".mdb", ".lmdb", ".tfrecord", ".tfrecords", ".rec"), "write its images to a folder or zip"),
    **dict.fromkeys((".rar", ".7z", ".zst", ".lz4"), "unpack it"),
    ".arrow": "save it as parquet by the library `datasets`: dataset.to_parquet('a.parquet')",
}  # fmt: skip


# --- detecting the kind of source ------------------------------------------------------------------------------------


def open_source(path: str, split: str = "all", labels: str = "auto", download: bool = False) -> Reader:
    """A reader for the images of a split at `path`, for every supported kind of source. Raises UserError.

    `labels`: "auto" takes the source's labels, or its captions if it has no labels; "folders": the folder of an image
    is its class; "captions": captions only; "none": neither.
    """
    if path.startswith(HUB):
        reader = _open_hub(path.removeprefix(HUB), split, download, labels=labels)
    else:
        reader = _open_path(_found(Path(path)), split, labels)
    if labels == "folders" and not isinstance(reader, ImageFiles):
        raise UserError(f"dataset.labels=folders needs a folder, zip or tar of images, dataset.path is {reader.kind}")
    if labels == "captions" and reader.captions is None:
        raise UserError(f"dataset.labels=captions: no captions in {quoted(path)} ({reader.kind})")
    if reader.labels is not None:
        reader.captions = None
    return reader


def _found(path: Path) -> Path:
    """`path`, or an existing file whose name differs only in Unicode normalisation (NFC, NFD)."""
    try:
        if path.exists() or not path.parent.is_dir():
            return path
        return next((entry for entry in path.parent.iterdir() if composed(entry.name) == composed(path.name)), path)
    except (OSError, ValueError):
        return path


def _open_path(path: Path, split: str, labels: str) -> Reader:
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise dataset_error(f"cannot access {quoted(str(path))}: {error.strerror}") from error
    if is_folder:
        return _open_folder(path, split, labels)
    if not is_file:
        raise dataset_error(f"no file or folder {str(path)!r}.{_suggestion(path)}{_hub_hint(path)}")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        with open_plain(path) as file:
            content = file.read(8)
    except DAMAGE as error:
        raise dataset_error(f"cannot read {str(path)!r}: {error}") from error
    labelled = labels not in ("none", "captions")
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return open_npz([path], split, labelled) if path.suffix == ".npz" else ZipReader(path, split, labels)
    if start[:4] == b"PAR1":
        return ParquetReader([path], labels)
    if is_npy(start):
        return open_npy([path], split, labelled)
    if is_idx(content):
        return open_idx([path], split, labelled)
    if start[:2] == b"\x1f\x8b" or _is_tar(path):
        members = tar_members(path)
        if holds_batches(members):
            return open_batch_archive(path, split, labelled)
        return TarReader({path: members}, split, labels)
    raise dataset_error(_unsupported(path, start))


def _unsupported(path: Path, start: bytes) -> str:
    """The message for a file of an unsupported kind."""
    if why := git_lfs_pointer(start):
        return f"{str(path)!r} cannot be read: {why}"
    if path.suffix.lower() in SUFFIXES:
        return f"{str(path)!r} is a single image: give its folder"
    advice = ADVICE.get(path.suffix.lower())
    hint = f". For {path.suffix} files: {advice}" if advice else ""
    return f"{str(path)!r} is not a supported kind of file{hint}. Possible: {ACCEPTED}"


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except DAMAGE:
        return False


def _open_folder(path: Path, split: str, labels: str) -> Reader:
    """The kind of a folder follows from its files: CIFAR batches, idx, npz, npy, parquet, images, or tars."""
    every = files_below(path)
    shown = sorted(name for name in every if not is_hidden(name))
    images = [name for name in shown if is_image(name)]
    reader: Reader | None = _open_arrays(path, shown, split, labels not in ("none", "captions"), bool(images))
    reader = reader or _open_tables(path, shown, split, labels, bool(images))
    if reader is None:
        return FolderReader(path, every, split, labels)
    if images:
        reader.notes = [*reader.notes, f"ignored beside {reader.kind}: {by_suffix(images)}"]
    return reader


def _open_arrays(path: Path, shown: list[str], split: str, labelled: bool, images: bool) -> ArrayReader | None:
    batches = open_batches(path, split, labelled)
    if batches is not None:
        return batches
    files = [path / name for name in shown if "/" not in name]
    if idx := [file for file in files if "idx3" in file.name]:
        return open_idx(idx, split, labelled)
    if npz := [file for file in files if file.suffix == ".npz"]:
        return open_npz(npz, split, labelled)
    npy = [file for file in files if file.suffix == ".npy"]
    return open_npy(npy, split, labelled) if npy and not images else None


def _open_tables(path: Path, shown: list[str], split: str, labels: str, images: bool) -> Reader | None:
    tables = [name for name in shown if name.endswith(".parquet") and not (images and Path(name).name in METADATA)]
    tars = [] if images else [name for name in shown if name.lower().endswith(TARS)]
    for names, open_them in ((tables, ParquetReader), (tars, lambda paths, labels: _open_tars(paths, split, labels))):
        if names:
            words = lambda name: [*split_folder(name), Path(name).name]
            chosen = of_split(names, split, words, quoted(str(path)))
            return open_them([path / name for name in chosen], labels)
    return None


def _open_tars(paths: list[Path], split: str, labels: str) -> Reader:
    if len(paths) == 1:
        return _open_path(paths[0], split, labels)
    return TarReader({path: tar_members(path) for path in paths}, split, labels)


def _suggestion(path: Path) -> str:
    """`` Did you mean 'x'?`` for the most similar name in the folder of `path`."""
    folder = next(parent for parent in [*path.parents, Path(".")] if parent.is_dir())
    if folder != path.parent:
        return f" The folder {str(path.parent)!r} does not exist either"
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return ""
    return nearest(path.name, names)


def _hub_hint(path: Path) -> str:
    """How to read the dataset of the hub that `path` may be meant as."""
    name = path.as_posix()
    if not HUB_ID.fullmatch(name) or path.parent.is_dir():
        return ""
    return f". If it is a dataset of the hub: {hub_needs(name, False) or f'dataset.path={HUB}{name}'}"


def _open_hub(name: str, split: str, download: bool, library: ModuleType | None = None, labels: str = "auto") -> Reader:
    """A dataset of the `datasets` library, which is imported unless the caller passes it."""
    if library is None:
        if missing := hub_needs(name, download):
            raise UserError(missing)
        library = importlib.import_module("datasets")
    return HubReader(name, split, library, labels)


# --- the dataset -----------------------------------------------------------------------------------------------------


@dataclass
class FileConfig(DatasetConfig):
    """Settings of all datasets of files. Each dataset has its own defaults."""

    path: str = option(
        "", "the images: EDM's zip, a folder, npz, idx, parquet, CIFAR's batches or hub:OWNER/NAME", path=True
    )
    split: str = option("all", "which part, where the source has parts: train, test or all")
    resolution: int = option(32, "height and width in pixels")
    crop: str = option("center", "center: the largest centred square; none: images must be square")
    resize: str = option("pillow_bicubic", f"{', '.join(RESIZES)} (images must have the side already)")
    labels: str = option("auto", "auto: those in the source, else its captions; folders, captions or none")
    download: bool = option(False, "download the published files, or what a path hub:OWNER/NAME names")
    workers: int = option(4, "threads that decode images; results are the same for any number")
    memory_mib: int = option(1024, "decoded images are cached in memory if all of them fit into this size in MiB")

    def __post_init__(self) -> None:
        require_positive(self, "resolution")
        require_one_of(self, "split", ("train", "test", "all"))
        require_one_of(self, "crop", CROPS)
        require_one_of(self, "resize", RESIZES)
        require_one_of(self, "labels", LABELS)
        require_between(self, 1, 64, "workers")
        require_between(self, 0, 2**24, "memory_mib")


class FileDataset(Dataset):
    """Images at ``dataset.path``. A subclass for a published dataset says what it contains and where to get it."""

    Config: ClassVar[type[FileConfig]]
    title: ClassVar[str]  # a description of one line
    origin: ClassVar[str]  # where to get it, and how its usual file is made
    usual: ClassVar[str]  # the name of its usual file
    count: ClassVar[Mapping[str, int]] = {}  # published number of images in each split; empty: unknown
    known_classes: ClassVar[int] = 0  # published number of classes; 0: as many as the source has
    known_names: ClassVar[Sequence[str]] = ()
    channels: ClassVar[int] = 3
    installed: ClassVar[str] = ""  # where a package of a Linux distribution installs its files

    def __init__(self, config: FileConfig) -> None:
        self.config = config
        if self.count and config.split not in self.count:
            raise UserError(
                f"dataset.split must be one of {', '.join(self.count)} for {self.name}, got {config.split!r}"
            )
        installed = self.installed if self.installed and Path(self.installed).is_dir() else ""
        self.source = None if config.path or installed else of_dataset(self.name, dataclasses.asdict(config))
        self.path = config.path or installed or self._fetched()
        self.reader = open_source(self.path, config.split, config.labels, config.download)
        self.shape = (self._channels(), config.resolution, config.resolution)
        self.fit = Fit(self._channels(), config.resolution, config.crop, config.resize)
        self.workers = config.workers if self.reader.encoded else 1
        self._check_count()
        self.split = self._split()
        self._label()
        self._decode([0])  # so that an unreadable source fails before a run begins
        self.sha256 = self._sha256()
        self.resizer = self._resizer()
        self.notes = [*self._provenance(), *self.reader.notes, *self._notes()]
        small = len(self) * int(np.prod(self.shape)) <= config.memory_mib * 2**20
        self._cache = torch.empty(len(self) if small else 0, *self.shape, dtype=torch.uint8)
        self._cached = torch.zeros(len(self._cache), dtype=torch.bool)

    def _channels(self) -> int:
        return self.channels

    def _fetched(self) -> str:
        """The files that were downloaded. Raises UserError if they are not there."""
        path = None if self.source is None else located(self.source)
        if path is None:
            raise UserError(self._missing())
        return str(path)

    def _check_count(self) -> None:
        """Refuse a download with another number of images than published."""
        if self.source is not None and self.source.images not in (None, len(self)):
            raise dataset_error(
                f"{self.source.origin} has {len(self):,} images and {self.source.title} has {self.source.images:,}: it "
                f"is not the published set. To use it as it is: dataset.path={self.path}"
            )

    def _provenance(self) -> list[str]:
        """Where the images were downloaded from, and what must be known about them."""
        record = None if self.source is None else read_record(self.source)
        if self.source is None or record is None:
            return []
        commit = f", commit {record.commit[:12]}" if record.commit else ""
        notes = [f"images from {self.source.origin}{commit}, by {self.source.publisher}"]
        return [*notes, self.source.note] if self.source.note else notes

    def _missing(self) -> str:
        if self.source is not None:
            return missing_dataset(self.source, usual_line(self.source), known().get(self.source.teacher))
        return (
            f"dataset={self.name} needs dataset.path=PATH, the files of {self.title}. PATH may be {ACCEPTED}. Example: "
            f"distillbench run 'methods=[boot,cm]' dataset={self.name} dataset.path={self.usual}. {self.origin}"
        )

    def _split(self) -> str:
        published = self.count.get(self.config.split, len(self))
        return self.config.split + ("" if published == len(self) else f" ({len(self):,} of {published:,})")

    def _label(self) -> None:
        self.class_names = self.reader.class_names or self.known_names
        self.targets: Tensor | None = None
        if self.reader.labels is not None:
            self.targets = torch.from_numpy(self.reader.labels)
            found = max(int(self.targets.max()) + 1, self.reader.class_count)
            if found > MOST_CLASSES:
                raise dataset_error(f"a label is {found - 1:,}: at most {MOST_CLASSES:,} classes are read")
            self.classes = self.known_classes or found
            if found > self.classes:
                raise dataset_error(f"a label is {found - 1}, and {self.name} has the classes 0 to {self.classes - 1}")
        elif self.reader.captions is not None:
            self.prompts = self.reader.captions
            self.classes = len(self.prompts)

    def _sha256(self) -> str:
        """SHA-256 over the stored images, how they are cropped and resized, and their labels or captions."""
        identity: dict[str, Any] = {
            "stored": self.reader.fingerprint(self.workers),
            "shape": self.shape,
            "fit": [self.fit.crop, self.fit.resize],
            "split": self.config.split,
        }
        if self.targets is not None:
            identity["labels"] = hashlib.sha256(self.targets.numpy().astype("<i8").tobytes()).hexdigest()
        elif self.prompts is not None:
            identity["captions"] = list(self.prompts)
            if self.reader.several_captions:
                identity["of_several_captions"] = "first"
        if self.reader.transparent:
            identity["transparency"] = TRANSPARENCY
        return hashlib.sha256(canonical_json(identity).encode()).hexdigest()

    def _resizer(self) -> str:
        """How images were cropped and resized, and that transparent ones were composited over white."""
        words = [self.fit.words] if self.fit.words != "none" or not self.reader.transparent else []
        return ", ".join([TRANSPARENCY, *words] if self.reader.transparent else words)

    def _notes(self) -> list[str]:
        """Notes on the labels for the user."""
        if self.targets is None:
            return []
        counts = torch.bincount(self.targets, minlength=self.classes)
        empty = (counts == 0).nonzero().flatten().tolist()
        notes = []
        if empty:
            which = f"class {empty[0]} has" if len(empty) == 1 else f"{len(empty):,} classes ({some(empty)}) have"
            notes.append(
                f"{which} no image, of {self.classes:,} classes: conditional=true samples all classes equally often"
            )
        if (named := len(self.reader.class_names)) > self.classes:
            notes.append(f"the source names {named:,} classes, and its labels are below {self.classes:,}")
        return notes

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, indices: Tensor) -> Tensor:
        if not len(self._cache):
            return self._decode(indices.tolist())
        missing = indices[~self._cached[indices]].unique()
        if len(missing):
            self._cache[missing] = self._decode(missing.tolist())
            self._cached[missing] = True
        return self._cache[indices]

    def labels(self, indices: Tensor) -> Tensor:
        """Classes (B,). With captions, the class of an image is its index."""
        return indices.clone() if self.targets is None else self.targets[indices]

    def image(self, index: int) -> np.ndarray:
        """Image `index` (C,H,W) uint8, decoded from its source. Raises UserError if it is damaged."""
        return self.fit(self.reader.open(index), self.reader.name(index))

    def _decode(self, indices: list[int]) -> Tensor:
        images = map_in_order(self.image, indices, self.workers)
        return torch.from_numpy(np.stack(images)) if images else torch.empty(0, *self.shape, dtype=torch.uint8)
