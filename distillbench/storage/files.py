"""Files that are whole or absent, and the names that content gives itself."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench.errors import UserError

if TYPE_CHECKING:  # reports need files and no tensors
    from torch import Tensor

LFS_START = b"version https://git-lfs.github.com/spec/"
TEMPORARY = ".writing-"  # begins the name of a file that is not whole yet

__all__ = ["canonical_json", "key_of", "sha256_file", "sha256_tensors", "signed", "write_atomically"]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(value: Any) -> str:
    """The name of a plain value: 16 hexadecimal digits of the SHA-256 of its canonical JSON."""
    return key_of_text(canonical_json(value))


def key_of_text(text: str) -> str:
    """The name of a plain value whose canonical JSON is `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def signed(plain: dict[str, Any]) -> dict[str, Any]:
    """Plain values with the SHA-256 of all of them as ``sha256``: ``plain == signed(plain)`` unless it is damaged."""
    rest = {name: value for name, value in plain.items() if name != "sha256"}
    return rest | {"sha256": hashlib.sha256(canonical_json(rest).encode()).hexdigest()}


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors: the same weights, the same hash, in any file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def git_lfs_pointer(start: bytes) -> str:
    """What to say of a file that starts so, if it is a pointer of Git LFS; else nothing."""
    if not start.startswith(LFS_START):
        return ""
    return "it is a pointer of Git LFS, a text that stands for the file: fetch it with `git lfs pull`"


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """``write(temporary_path)``, then rename to `path`: a reader sees the old file or the new one, never a part."""
    write_named(path.parent, write, lambda temporary: path.name, path.suffix)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8 as :func:`write_atomically` writes."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_named(folder: Path, write: Callable[[str], Any], name: Callable[[Path], str], suffix: str = "") -> Path:
    """``write(temporary_path)``, then rename to ``name(temporary_path)`` in `folder`, which may depend on the content.

    Once it returns, the file outlives a loss of power. Where it raises, nothing is left.
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
        temporary.unlink(missing_ok=True)  # it is still there where both were links to one file
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(folder)
    return path


def sync(folder: Path) -> None:
    """Have the folder's list of names written, where the system can."""
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


def check_writable(folder: Path) -> None:
    """Raise UserError unless files can be made in `folder`, or in the closest parent that exists. Leaves nothing."""
    parent = folder.absolute()
    try:
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
        tempfile.TemporaryFile(dir=parent).close()
        if not os.access(parent, os.W_OK):
            raise PermissionError(f"{parent} is read-only")
    except OSError as error:
        raise UserError(f"results_dir: cannot write to {str(folder)!r}: {error.strerror or error}") from error
