"""Atomic writes of files, and hashes of files, tensors and plain values."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench.errors import UserError

if TYPE_CHECKING:  # reports need files and no tensors
    from torch import Tensor

LFS_START = b"version https://git-lfs.github.com/spec/"
FEWER = "fewer evaluation.images or another results_dir"  # what takes less room, or room elsewhere
TEMPORARY = ".writing-"  # prefix of the names of files that are being written

__all__ = ["canonical_json", "key_of", "sha256_file", "sha256_tensors", "signed", "write_atomically"]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(value: Any) -> str:
    """The key of a plain value: the first 16 hexadecimal digits of the SHA-256 of its canonical JSON."""
    return key_of_text(canonical_json(value))


def key_of_text(text: str) -> str:
    """The key of a plain value whose canonical JSON is `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def signed(plain: dict[str, Any]) -> dict[str, Any]:
    """`plain` with the SHA-256 of its other values as ``sha256``; ``plain == signed(plain)`` unless it is damaged."""
    rest = {name: value for name, value in plain.items() if name != "sha256"}
    return rest | {"sha256": hashlib.sha256(canonical_json(rest).encode()).hexdigest()}


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, independent of the file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def git_lfs_pointer(start: bytes) -> str:
    """A message if a file with this `start` is a pointer of Git LFS; otherwise the empty string."""
    if not start.startswith(LFS_START):
        return ""
    return "it is a pointer of Git LFS and not the file itself: fetch it with `git lfs pull`"


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """``write(temporary_path)``, then rename it to `path`: readers see the old or the new file, never a part of it."""
    write_named(path.parent, write, lambda temporary: path.name, path.suffix)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 by :func:`write_atomically`."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_named(folder: Path, write: Callable[[str], Any], name: Callable[[Path], str], suffix: str = "") -> Path:
    """``write(temporary_path)``, then rename it to ``name(temporary_path)`` in `folder`. Returns the new path.

    The name may depend on the content. When it returns, the file is on the disk (fsync). If it raises, it leaves no
    file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, text = tempfile.mkstemp(dir=folder, prefix=TEMPORARY, suffix=suffix)
    os.close(handle)
    temporary = Path(text)
    try:
        write(text)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        path = folder / name(temporary)
        temporary.replace(path)
        temporary.unlink(missing_ok=True)  # rename() does nothing if both are hard links to one file
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(folder)
    return path


def sync(folder: Path) -> None:
    """Flush the folder's entries to the disk (fsync), if the operating system supports it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_room(folder: Path, size: int, what: str, instead: str = FEWER) -> None:
    """Raise UserError unless `size` bytes, for `what`, are free on the disk of `folder`, which need not exist yet."""
    free = shutil.disk_usage(_existing(folder)).free
    if size > free:
        raise UserError(
            f"{what} takes {size / 2**30:,.1f} GiB on disk, and {free / 2**30:,.1f} GiB are free in {str(folder)!r}. "
            f"Free some, or set {instead}"
        )


def _existing(folder: Path) -> Path:
    """`folder` or its nearest existing parent."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    return parent


def check_writable(folder: Path, setting: str = "results_dir") -> None:
    """Raise UserError, which names the `setting`, unless files can be created in `folder` or its nearest parent."""
    try:
        parent = _existing(folder)
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
        tempfile.TemporaryFile(dir=parent).close()
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"{parent} is read-only")
    except OSError as error:
        raise UserError(f"{setting}: cannot write to {str(folder)!r}: {error.strerror or error}") from error
