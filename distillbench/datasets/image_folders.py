"""Readers of encoded images in a folder, a zip or tars, and notes on the files that they ignore.

Names are paths with `/`; backslashes of archives made on Windows become `/`, and `./` is removed. Links in a folder are
followed, because its user made them. A link in an archive, or a name that points outside it, is refused.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tarfile
import threading
import zipfile
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distillbench.datasets.annotations import Beside, annotate, belongs_to_images, clean, composed
from distillbench.datasets.image_readers import (
    DAMAGE,
    LARGEST_FILE,
    OPAQUE,
    SUFFIXES,
    EncodedReader,
    dataset_error,
    is_opaque,
    is_transparent,
    may_be_transparent,
    of_split,
    some,
    split_folder,
    unreadable,
)
from distillbench.errors import LONGEST_REASON, UserError, quoted
from distillbench.storage.npz import check_memory

MOST_LINKED = 100_000  # linked folders that are entered
MOST_EXPANDED = 200  # times the archive's size: images compress far less than that
OF_SYSTEMS = ("._", "__MACOSX", ".DS_Store", "Thumbs.db", "desktop.ini")  # files that operating systems create
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
HEAD = 4096  # first bytes of a zip member, enough to see whether it may be transparent
EDM_IMAGE = re.compile(r"\d{5}/img\d{8}\.png")  # the names of EDM's dataset tool, whose images are grey or RGB


# --- names -----------------------------------------------------------------------------------------------------------


def member_name(name: str, archive: str) -> str:
    """The cleaned name of a member. Raises UserError if it points outside the archive."""
    cleaned = clean(name)
    if ".." in cleaned.split("/"):
        raise dataset_error(f"{archive!r} has {quoted(name)}, which points outside it")
    return cleaned


def is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def files_below(root: Path) -> list[str]:
    """Every file below `root`, also through links, as a path with `/`.

    Raises UserError for a broken link, a link to a folder that contains it, and a folder that cannot be read.
    """
    found: list[str] = []
    linked = 0
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [
        ("", (_identity(root),))
    ]  # folders, each with the identities of its parents and its own
    while todo:
        prefix, above = todo.pop()
        for entry in _entries(root, prefix):
            name = prefix + entry.name
            if entry.is_symlink() and (why := _broken(entry)):
                if is_hidden(name):
                    continue
                raise dataset_error(f"{quoted(name)} is a link to {quoted(os.readlink(entry.path))}, {why}")
            if not entry.is_dir():
                found.append(name)
                continue
            identity = _identity(Path(entry.path))
            if identity in above:
                raise dataset_error(f"{quoted(name)} is a link to a folder that contains it")
            linked += entry.is_symlink()
            if linked > MOST_LINKED:
                raise dataset_error(f"more than {MOST_LINKED:,} folders below {str(root)!r} are links")
            todo.append((f"{name}/", (*above, identity)))
    return found


def _entries(root: Path, prefix: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root / prefix) as entries:
            return list(entries)
    except OSError as error:
        raise dataset_error(f"cannot list the folder {quoted(prefix or str(root))}: {error.strerror}") from error


def _broken(entry: os.DirEntry[str]) -> str:
    """Why a link is broken, or an empty string."""
    try:
        entry.stat()
    except OSError as error:
        return "which links back to it" if error.errno == errno.ELOOP else "which does not exist"
    return ""


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


# --- choosing files --------------------------------------------------------------------------------------------------


class ImageFiles(EncodedReader):
    """Image files with names, and files beside them that may hold labels and captions."""

    @abstractmethod
    def content(self, name: str) -> bytes:
        """The bytes of a file by its cleaned name. Raises one of :data:`DAMAGE` if it cannot be read."""

    def data(self, index: int) -> bytes:
        try:
            return self.content(self.names[index])
        except DAMAGE as error:
            raise unreadable(self.names[index], error) from error

    def _choose(self, every: Sequence[str], split: str, labels: str, where: str) -> None:
        """Choose the images of a split among the files `every`, sorted by path, and set their labels or captions.

        `where` names the source in messages, as in "below 'faces'".
        """
        shown = [name for name in every if not is_hidden(name)]
        images = sorted(filter(is_image, shown), key=lambda name: name.split("/"))
        if split != "all":
            _check_depth(images, split)
        super().__init__(of_split(images, split, split_folder, where.partition(" ")[2]))
        if not self.names:
            raise dataset_error(f"no image ({', '.join(sorted(SUFFIXES))}) {where}{_alternatives(shown)}")
        self.notes += _ignored(every, images, split)
        annotate(self, Beside(shown, images, self.content), labels)


def _check_depth(images: Sequence[str], split: str) -> None:
    """Raise UserError if the folders of splits lie too deep to be found: every split would hold all images."""
    deep = next((name for name in images if split_folder(name, deepest=len(name))), None)
    if deep is not None and not any(map(split_folder, images)):
        raise dataset_error(
            f"split={split}: the folders of splits may be at most two levels deep, got {quoted(deep)}. Give their "
            "parent folder as dataset.path (unpack an archive first), or use all images (dataset.split=all)"
        )


def _ignored(every: Sequence[str], images: Sequence[str], split: str) -> list[str]:
    """Notes on ignored files, with the reason."""
    notes = []
    known = set(images)
    others = [name for name in every if not is_hidden(name) and name not in known]
    stems = {composed(os.path.splitext(name)[0]) for name in images} if others else set()
    if others := [name for name in others if not _of_a_system(name) and not belongs_to_images(name, stems)]:
        notes.append(f"ignored, not a supported image format: {by_suffix(others)}")
    if hidden := sorted(name for name in every if is_hidden(name) and is_image(name) and not _of_a_system(name)):
        notes.append(f"ignored, hidden by a dot: {by_suffix(hidden)}")
    if split != "all" and (outside := [n for n in images if not split_folder(n)]) and len(outside) < len(images):
        notes.append(f"ignored, not in the folder of a split: {by_suffix(outside)}")
    return notes


def _of_a_system(name: str) -> bool:
    return any(part.startswith(OF_SYSTEMS) for part in name.split("/"))


def by_suffix(names: Iterable[str]) -> str:
    """The number of files with each suffix, and the first names, for messages."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(os.path.splitext(name)[1].lower() or "without suffix", []).append(name)
    return ", ".join(f"{len(group):,} {suffix} ({some(group)})" for suffix, group in sorted(groups.items()))


def _alternatives(shown: Sequence[str]) -> str:
    """What a source without images holds, as the end of a message."""
    archives = sorted(name for name in shown if name.endswith(ARCHIVES))
    if archives:
        return f"; there is {archives[0]!r}, which may be given as dataset.path"
    return f"; there are {by_suffix(shown)[:LONGEST_REASON]}" if shown else ""


def check_size(size: int) -> None:
    if size > LARGEST_FILE:
        raise ValueError(f"it has {size:,} bytes, at most {LARGEST_FILE:,} are allowed")


# --- folders ---------------------------------------------------------------------------------------------------------


class FolderReader(ImageFiles):
    """Image files below a folder, sorted by path."""

    kind = "folder of images"

    def __init__(self, root: Path, every: Sequence[str], split: str, labels: str) -> None:
        self.root = root
        names = [clean(name) for name in every]
        self._stored = {name: raw for name, raw in zip(names, every, strict=True) if name != raw}
        _check_twice(names if self._stored else (), f"folder {root.name!r}")
        self._choose(names, split, labels, f"below {str(root)!r}")

    def content(self, name: str) -> bytes:
        return read_file(self.root / self._stored.get(name, name))


def read_file(path: Path) -> bytes:
    """The content of a regular file. Raises ValueError for anything else, such as a pipe."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    check_size(found.st_size)
    return path.read_bytes()


def read_inside(root: Path, name: str) -> bytes:
    """The content of the file that a table calls `name`. Raises ValueError if it does not lie below `root`."""
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"it lies outside the folder {str(root)!r}: copy the file there")
    return read_file(path)


def _check_twice(names: Sequence[str], what: str) -> None:
    if len(set(names)) != len(names):
        again = next(name for name, count in Counter(names).items() if count > 1)
        raise dataset_error(f"the {what} has {quoted(again)} twice")


# --- zips ------------------------------------------------------------------------------------------------------------


class ZipReader(ImageFiles):
    """Images in a zip, such as those of EDM's dataset tool, sorted by path."""

    def __init__(self, path: Path, split: str, labels: str) -> None:
        self.path = path
        self._open()
        infos = [info for info in self._zip.infolist() if not info.filename.endswith(("/", "\\"))]
        names = [member_name(info.filename, path.name) for info in infos]
        _check_twice(names, f"zip {path.name!r}")
        for name, info in zip(names, infos, strict=True):
            if stat.S_ISLNK(info.external_attr >> 16) and not is_hidden(name):
                raise _link(path.name, name, "zip -r, without -y")
        self._infos = dict(zip(names, infos, strict=True))
        self._choose(names, split, labels, f"in {str(path)!r}")
        self._edm = "dataset.json" in self._infos
        self._infos = {name: self._infos[name] for name in self.names}
        self.kind = "zip of images" if self.labels is None else "zip of images with labels"

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.path)
        except DAMAGE as error:
            raise dataset_error(
                f"{str(self.path)!r} is a damaged or truncated zip: {str(error)[:LONGEST_REASON]}"
            ) from error
        self._lock = threading.Lock()  # for reading only; decoding, which takes longer, needs no lock

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_zip", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def open(self, index: int) -> Image.Image | np.ndarray:
        image = super().open(index)
        name = self.names[index]
        if isinstance(image, Image.Image) and self._taken_as_opaque(name) and not is_opaque(image):
            raise unreadable(
                name, ValueError("it is transparent, but images of this name must be opaque: call it NAME.png")
            )
        return image

    def content(self, name: str) -> bytes:
        """The bytes of a member, at most its declared size."""
        info = self._infos[name]
        check_size(info.file_size)
        data = self._start(info, info.file_size)
        if len(data) != info.file_size:
            raise ValueError("it is cut off")
        return data

    def _start(self, info: zipfile.ZipInfo, size: int) -> bytes:
        with self._lock, self._zip.open(info) as file:
            return file.read(size)

    def checksum(self, index: int) -> tuple[int, int]:
        """CRC-32 and size from the central directory. The image is read only if it may be transparent."""
        info = self._infos[self.names[index]]
        if not self.transparent and not self._taken_as_opaque(self.names[index]):
            try:
                if may_be_transparent(self._start(info, HEAD)) and is_transparent(self.content(self.names[index])):
                    self.transparent = True
            except DAMAGE:
                pass  # reported when the image is read
        return info.CRC, info.file_size

    def _taken_as_opaque(self, name: str) -> bool:
        """Whether an image counts as opaque by its name. Opening a million images would take minutes."""
        return name.lower().endswith(OPAQUE) or (self._edm and EDM_IMAGE.fullmatch(name) is not None)


def _link(archive: str, name: str, how: str) -> UserError:
    return dataset_error(
        f"{archive!r} has the link {quoted(name)}, and links in archives are refused: pack the files instead ({how})"
    )


# --- tars ------------------------------------------------------------------------------------------------------------


class TarReader(ImageFiles):
    """Images in one or several tars, such as the shards of a WebDataset, sorted by path.

    Images in an uncompressed tar are read in place; a compressed one is unpacked into memory.
    """

    def __init__(self, tars: Mapping[Path, Members], split: str, labels: str) -> None:
        self.paths = list(tars)
        self._places: dict[str, tuple[int, int, int]] = {}  # index of the tar, and start and size of the file in it
        self._unpacked: dict[str, bytes] = {}
        by_tar = list(tars.values())
        if sum(map(len, by_tar)) > len({name for names in by_tar for name in names}):  # keys of shards may repeat
            if labels == "folders":
                raise dataset_error("dataset.labels=folders: the tars have files of the same name. Possible: auto")
            by_tar = [
                {f"{path.name.split('.')[0]}/{name}": place for name, place in names.items()}
                for path, names in zip(self.paths, by_tar, strict=True)
            ]
        for number, names in enumerate(by_tar):
            for name, place in names.items():
                if isinstance(place, bytes):
                    self._unpacked[name] = place
                else:
                    self._places[name] = (number, *place)
        where = f"in {str(self.paths[0])!r}" + (f" and {len(self.paths) - 1:,} more tars" if self.paths[1:] else "")
        self._choose([*self._places, *self._unpacked], split, labels, where)
        self.kind = "tar of images" if len(self.paths) == 1 else f"{len(self.paths):,} tars of images"

    def content(self, name: str) -> bytes:
        if name in self._unpacked:
            return self._unpacked[name]
        number, start, size = self._places[name]
        check_size(size)
        with open(self.paths[number], "rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) != size:
            raise ValueError("it is cut off")
        return data


Members = dict[str, tuple[int, int] | bytes]  # by cleaned name: start and size of a file in its tar, or its bytes


def tar_members(path: Path) -> Members:
    """The files in a tar. From a compressed tar, images and their labels and captions are read. Raises UserError."""
    packed, size, held = not _is_plain_tar(path), path.stat().st_size, 0
    found: Members = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                check_expanded(member, size)
                name = member_name(member.name, path.name)
                if (member.issym() or member.islnk()) and not is_hidden(name):
                    raise _link(path.name, name, "tar --dereference --hard-dereference")
                if not member.isreg() or member.issparse():
                    continue
                if name in found:
                    raise dataset_error(f"the tar {path.name!r} has {quoted(name)} twice")
                found[name] = (member.offset_data, member.size)
                if packed and (is_image(name) or belongs_to_images(name)):
                    check_size(member.size)
                    held += member.size
                    check_memory(held)
                    file = archive.extractfile(member)
                    found[name] = b"" if file is None else file.read()
    except (*DAMAGE, tarfile.TarError) as error:
        why = str(error)[:LONGEST_REASON]
        raise dataset_error(f"{path.name!r} is a damaged or truncated tar: {why}") from error
    return found


def _is_plain_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):
            return True
    except (*DAMAGE, tarfile.TarError):
        return False


def check_expanded(member: tarfile.TarInfo, size: int) -> None:
    """Raise ValueError before a member is decompressed if its size is implausible for an archive of `size` bytes."""
    if member.size < 0 or member.offset_data + member.size > MOST_EXPANDED * size + 2**20:
        raise ValueError(f"{quoted(member.name)} would have {member.size:,} bytes, too many for compressed images")
