"""Datasets of image files: what a path is, found out by content; crops and resizes with names; images kept as read.

| setting  | words in `resizer`                                                              |
|----------|---------------------------------------------------------------------------------|
| `crop`   | center: the largest centred square; none: images must be square                 |
| `resize` | pillow_bicubic, pillow_lanczos, pillow_box: one resize of Pillow, which smooths |
|          | adm: Dhariwal and Nichol's; none: images must have the side already             |
"""

from __future__ import annotations

import hashlib
import importlib
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distillbench.array_files import is_idx, open_batch_archive, open_batches, open_idx, open_npz, open_plain
from distillbench.datasets import Dataset, DatasetConfig
from distillbench.errors import UserError, nearest, quoted
from distillbench.files import canonical_json
from distillbench.options import option, require_between, require_one_of, require_positive
from distillbench.readers import (
    DAMAGE,
    LARGEST_IMAGE,
    SUFFIXES,
    FolderReader,
    HubReader,
    ParquetReader,
    Reader,
    ZipReader,
    map_in_order,
    of_split,
    split_folder,
    trouble,
)

__all__ = ["FileConfig", "FileDataset"]

HUB = "hub:"
MOST_CLASSES = 2**20
LABELS = ("auto", "folders", "captions", "none")
CROPS = {"center": "centre crop", "none": "no crop"}
ADM = "adm"
FILTERS = {
    "pillow_bicubic": Image.Resampling.BICUBIC,
    "pillow_lanczos": Image.Resampling.LANCZOS,
    "pillow_box": Image.Resampling.BOX,
}
RESIZES = {
    "pillow_bicubic": "Pillow bicubic",
    "pillow_lanczos": "Pillow Lanczos",
    "pillow_box": "Pillow box",
    ADM: "halved by box and resized by Pillow bicubic as Dhariwal and Nichol do",
    "none": "not resized",
}
ACCEPTED = (
    "EDM's dataset zip or any zip of images, a folder of images, .npz, idx or .parquet files, CIFAR's python batches, "
    "or a hub dataset as hub:OWNER/NAME with dataset.download=true"
)


# --- what a path is --------------------------------------------------------------------------------------------------


def open_source(path: str, split: str = "all", labels: str = "auto", download: bool = False) -> Reader:
    """The images of a split at `path`, whatever kind of source it is. Raises UserError.

    `labels`: "auto" takes what the source has, labels before captions; "folders": the folders of images are classes;
    "captions": captions only; "none": neither.
    """
    if path.startswith(HUB):
        reader = _open_hub(path.removeprefix(HUB), split, download)
    else:
        reader = _open_path(Path(path), split, labels)
    if labels == "folders" and not isinstance(reader, FolderReader | ZipReader):
        raise UserError(f"dataset.labels=folders needs a folder or zip of images, dataset.path is {reader.kind}")
    if labels == "captions" and reader.captions is None:
        raise UserError(f"dataset.labels=captions: no captions in {quoted(path)} ({reader.kind})")
    if labels in ("captions", "none"):
        reader.labels = None
    if labels in ("folders", "none") or reader.labels is not None:
        reader.captions = None
    return reader


def _open_path(path: Path, split: str, labels: str) -> Reader:
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise trouble(f"cannot look at {quoted(str(path))}: {error.strerror}") from error
    if is_folder:
        return _open_folder(path, split, labels)
    if not is_file:
        raise trouble(f"no folder {str(path)!r}, and no file of that name.{_neighbour(path)}")
    try:
        with open(path, "rb") as file:
            start = file.read(8)
        with open_plain(path) as file:
            content = file.read(8)
    except DAMAGE as error:
        raise trouble(f"cannot read {str(path)!r}: {error}") from error
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return open_npz([path], split) if path.suffix == ".npz" else ZipReader(path, split, labels)
    if start[:4] == b"PAR1":
        return ParquetReader([path])
    if is_idx(content):
        return open_idx([path], split)
    if start[:2] == b"\x1f\x8b" or _is_tar(path):
        return open_batch_archive(path, split)
    if path.suffix.lower() in SUFFIXES:
        raise trouble(f"{str(path)!r} is a single image: name its folder")
    raise trouble(f"no folder, and no kind of file that is read here: {str(path)!r}. Possible: {ACCEPTED}")


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except DAMAGE:
        return False


def _open_folder(path: Path, split: str, labels: str) -> Reader:
    """A folder is what it holds: batches, idx, npz or parquet files, or images."""
    files = sorted(file for file in path.glob("*") if file.is_file())
    batches = open_batches(path, split)
    if batches is not None:
        return batches
    idx = [file for file in files if "idx3" in file.name]
    if idx:
        return open_idx(idx, split)
    npz = [file for file in files if file.suffix == ".npz"]
    if npz:
        return open_npz(npz, split)
    parquet = sorted(file.relative_to(path).as_posix() for file in path.rglob("*.parquet") if file.is_file())
    if parquet:
        chosen = of_split(parquet, split, lambda name: [*split_folder(name), Path(name).name], quoted(str(path)))
        return ParquetReader([path / name for name in chosen])
    return FolderReader(path, split, labels)


def _neighbour(path: Path) -> str:
    """`` Did you mean 'x'?`` for the nearest name in the folder that `path` would lie in."""
    folder = next(parent for parent in [*path.parents, Path(".")] if parent.is_dir())
    if folder != path.parent:
        return f" There is no folder {str(path.parent)!r} either"
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return ""
    return nearest(path.name, names)


def _open_hub(name: str, split: str, download: bool, library: ModuleType | None = None) -> Reader:
    """A dataset through the `datasets` library, which is imported unless it is given."""
    if not download and not Path(name).is_dir():
        raise UserError(
            f"dataset.path={HUB}{name} would be fetched from the network, and nothing is downloaded unasked: "
            "add dataset.download=true"
        )
    if library is None:
        try:
            library = importlib.import_module("datasets")
        except ImportError as error:
            raise trouble(f"{HUB}{name} needs the package 'datasets': pip install 'distillbench[hub]'") from error
    return HubReader(name, split, library)


# --- from an image to the shape of the dataset -----------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Brings images to C,H,W = `channels`, `side`, `side`, 8 bits. One that has the side already is not touched."""

    channels: int
    side: int
    crop: str
    resize: str

    @property
    def words(self) -> str:
        """What `Dataset.resizer` says. It names the settings, whether or not they change any image."""
        if (self.crop, self.resize) == ("none", "none"):
            return "none"
        return f"{CROPS[self.crop]}, {RESIZES[self.resize]}, 8 bits"

    def __call__(self, image: Image.Image | np.ndarray, name: str) -> np.ndarray:
        """(C,H,W) uint8. Raises UserError where the settings do not allow it; `name` is that of the image."""
        shape = self.side, self.side, self.channels
        if isinstance(image, np.ndarray):
            if image.shape == shape:
                return image.transpose(2, 0, 1)
            image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else np.ascontiguousarray(image))
        if image.mode.startswith(("I", "F")):
            raise trouble(f"{name!r} has more than 8 bits a channel (Pillow's mode {image.mode}): convert it to 8 bits")
        image = image.convert("RGB" if self.channels == 3 else "L")
        if image.size != (self.side, self.side):
            image = self._resized(image, name)
        return np.asarray(image, dtype=np.uint8).reshape(shape).transpose(2, 0, 1)

    def _resized(self, image: Image.Image, name: str) -> Image.Image:
        width, height = image.size
        if width != height and self.crop == "none":
            raise trouble(f"{name!r} is not square ({width}x{height}): set dataset.crop=center, or crop it")
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        if self.resize == "none" and side != self.side:
            choices = "|".join(name for name in RESIZES if name != "none")
            raise trouble(
                f"{name!r} is {width}x{height}, and dataset.resolution={self.side}: choose how it is resized "
                f"(dataset.resize={choices}) or set the resolution"
            )
        if self.resize == ADM:
            return self._resized_as_adm(image, name)
        if width != height:  # cut first: a resize of Pillow's `box` would see pixels beyond it
            image = image.crop((left, top, left + side, top + side))
        return image if self.resize == "none" else image.resize((self.side, self.side), FILTERS[self.resize])

    def _resized_as_adm(self, image: Image.Image, name: str) -> Image.Image:
        """Halve by averages while that leaves enough, resize the shorter side, crop the centre."""
        while min(image.size) >= 2 * self.side:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = self.side / min(image.size)
        if image.width * image.height * scale**2 > LARGEST_IMAGE:
            raise trouble(f"{quoted(name)} is {image.width}x{image.height}: too long to be resized by {ADM}")
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - self.side) // 2, (image.height - self.side) // 2
        return image.crop((left, top, left + self.side, top + self.side))


# --- the dataset -----------------------------------------------------------------------------------------------------


@dataclass
class FileConfig(DatasetConfig):
    """Settings of every dataset of files. Each dataset has its own defaults."""

    path: str = option(
        "", "the images: EDM's zip, a folder, npz, idx, parquet, CIFAR's batches or hub:OWNER/NAME", path=True
    )
    split: str = option("all", "which part, where the source has parts: train, test or all")
    resolution: int = option(32, "side in pixels")
    crop: str = option("center", "center: the largest centred square; none: images must be square")
    resize: str = option("pillow_bicubic", f"{', '.join(RESIZES)} (images must have the side already)")
    labels: str = option("auto", "auto: those in the source, else its captions; folders, captions or none")
    download: bool = option(False, "allow the library 'datasets' to fetch hub:OWNER/NAME")
    workers: int = option(4, "threads that decode images; results do not depend on it")
    memory_mib: int = option(1024, "decoded images are kept in memory if all of them fit into so many MiB")

    def __post_init__(self) -> None:
        require_positive(self, "resolution")
        require_one_of(self, "split", ("train", "test", "all"))
        require_one_of(self, "crop", CROPS)
        require_one_of(self, "resize", RESIZES)
        require_one_of(self, "labels", LABELS)
        require_between(self, 1, 64, "workers")
        require_between(self, 0, 2**24, "memory_mib")


class FileDataset(Dataset):
    """Images at ``dataset.path``. A dataset of the field says what it consists of and where it is found."""

    Config: ClassVar[type[FileConfig]]
    title: ClassVar[str]  # what it is, in a line
    origin: ClassVar[str]  # where it is found, and how its usual files are made
    usual: ClassVar[str]  # name of its usual file
    count: ClassVar[Mapping[str, int]] = {}  # images in each split, as published; empty: not known
    known_classes: ClassVar[int] = 0  # classes as published; 0: as many as are found
    known_names: ClassVar[Sequence[str]] = ()
    channels: ClassVar[int] = 3
    installed: ClassVar[str] = ""  # where a package of a distribution puts its files

    def __init__(self, config: FileConfig) -> None:
        self.config = config
        if self.count and config.split not in self.count:
            raise UserError(
                f"dataset.split must be one of {', '.join(self.count)} for {self.name}, got {config.split!r}"
            )
        self.path = config.path or (self.installed if self.installed and Path(self.installed).is_dir() else "")
        if not self.path:
            raise UserError(self._missing())
        self.reader = open_source(self.path, config.split, config.labels, config.download)
        self.shape = (self._channels(), config.resolution, config.resolution)
        self.fit = Fit(self._channels(), config.resolution, config.crop, config.resize)
        self.resizer = self.fit.words
        self.workers = config.workers if self.reader.encoded else 1
        self.split = self._split()
        self._label()
        self._decode([0])  # what cannot be read at all is said before a run begins
        self.sha256 = self._sha256()
        small = len(self) * int(np.prod(self.shape)) <= config.memory_mib * 2**20
        self._kept = torch.empty(len(self) if small else 0, *self.shape, dtype=torch.uint8)
        self._there = torch.zeros(len(self._kept), dtype=torch.bool)

    def _channels(self) -> int:
        return self.channels

    def _missing(self) -> str:
        return (
            f"dataset={self.name} needs dataset.path=PATH, the files of {self.title}. PATH may be {ACCEPTED}. Write: "
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
            found = int(self.targets.max()) + 1
            if found > MOST_CLASSES:
                raise trouble(f"a label is {found - 1:,}: at most {MOST_CLASSES:,} classes are read")
            self.classes = self.known_classes or found
            if found > self.classes:
                raise trouble(f"a label is {found - 1}, and {self.name} has the classes 0 to {self.classes - 1}")
        elif self.reader.captions is not None:
            self.prompts = self.reader.captions
            self.classes = len(self.prompts)

    def _sha256(self) -> str:
        """Of what is stored, of how it is brought to its shape, and of labels or captions where there are some."""
        told: dict[str, Any] = {
            "stored": self.reader.fingerprint(self.workers),
            "shape": self.shape,
            "fit": [self.fit.crop, self.fit.resize],
            "split": self.config.split,
        }
        if self.targets is not None:
            told["labels"] = hashlib.sha256(self.targets.numpy().astype("<i8").tobytes()).hexdigest()
        elif self.prompts is not None:
            told["captions"] = list(self.prompts)
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, indices: Tensor) -> Tensor:
        if not len(self._kept):
            return self._decode(indices.tolist())
        missing = indices[~self._there[indices]].unique()
        if len(missing):
            self._kept[missing] = self._decode(missing.tolist())
            self._there[missing] = True
        return self._kept[indices]

    def labels(self, indices: Tensor) -> Tensor:
        """Classes; the images' own numbers where they have captions."""
        return indices.clone() if self.targets is None else self.targets[indices]

    def image(self, index: int) -> np.ndarray:
        """Image `index` (C,H,W) uint8, read anew. Raises UserError where it is damaged."""
        return self.fit(self.reader.open(index), self.reader.name(index))

    def _decode(self, indices: list[int]) -> Tensor:
        images = map_in_order(self.image, indices, self.workers)
        return torch.from_numpy(np.stack(images)) if images else torch.empty(0, *self.shape, dtype=torch.uint8)
