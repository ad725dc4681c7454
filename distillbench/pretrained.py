"""Weights of feature networks: files that are fetched once, on request, and believed only by their SHA-256."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from platformdirs import user_cache_path

from distillbench.errors import Unavailable, UserError
from distillbench.files import sha256_file, write_atomically

__all__ = ["WeightsFile", "locate"]

VARIABLE = "DISTILLBENCH_WEIGHTS"  # environment variable that names another folder


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights. `file` is its name in the weights folder; `others` are names that the same file goes by."""

    file: str
    sha256: str
    url: str
    licence: str
    mib: int
    others: tuple[str, ...] = ()


def weights_folder() -> Path:
    """Where weights are kept: $DISTILLBENCH_WEIGHTS, or the user's cache."""
    named = os.environ.get(VARIABLE, "")
    return Path(named) if named else user_cache_path("distillbench") / "weights"


def locate(network: str, weights: WeightsFile, folder: Path) -> Path:
    """The file, in `folder` or where torch.hub keeps its own, whole and unchanged.

    Raises Unavailable with what is missing, or what it is instead.
    """
    wrong = ""
    for place in (folder, _torch_hub()):
        for name in (weights.file, *weights.others):
            path = place / name
            if not path.is_file():
                continue
            if (found := _sha256(path, path.stat().st_size, path.stat().st_mtime_ns)) == weights.sha256:
                return path
            wrong = f"{name} is not the file that {network} is defined by: sha256 {found[:8]}..., not"
    missing = wrong or f"the weights of {network} are not there: {weights.file}, sha256"
    raise Unavailable(f"{missing} {weights.sha256[:8]}... (distillbench fetch {network})")


def fetch(network: str, weights: WeightsFile, folder: Path, source: Path | None) -> Path:
    """Put the file into `folder`: downloaded, or a copy of `source`, a file or a folder that holds it by its name.

    Only the right bytes get there.
    """
    from torch.hub import download_url_to_file

    target = folder / weights.file
    target.parent.mkdir(parents=True, exist_ok=True)
    if source is None:
        try:
            download_url_to_file(weights.url, str(target), hash_prefix=weights.sha256)
        except (RuntimeError, OSError, HTTPException) as error:  # RuntimeError: the hash is another
            raise UserError(f"cannot fetch {weights.url}: {error}") from error
        return target
    if source.is_dir():
        source = source / target.name
    if not source.is_file():
        raise UserError(f"no file {str(source)!r}")
    if (found := sha256_file(source)) != weights.sha256:
        raise UserError(f"{source.name} is not {network}: its sha256 is {found}, not {weights.sha256}")
    if source.resolve() != target.resolve():
        write_atomically(target, lambda path: shutil.copyfile(source, path))
    return target


def _torch_hub() -> Path:
    from torch.hub import get_dir

    return Path(get_dir()) / "checkpoints"


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Of a file as it is; `size` and `modified` are in the key, so that a changed file is read again."""
    return sha256_file(path)
