"""Weights of feature networks: files that are downloaded on request and identified by their SHA-256."""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from distillbench.errors import Unavailable, UserError
from distillbench.storage.files import sha256_file, write_atomically
from distillbench.storage.http_download import Unreachable, download
from distillbench.storage.locks import wait_for_lock
from distillbench.system.progress import Progress, Step

__all__ = ["WeightsFile", "locate"]

VARIABLE = "DISTILLBENCH_WEIGHTS"  # environment variable: the folder of weights


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights. `file` is its name in the weights folder; `others` are other names of the same file."""

    file: str
    sha256: str
    url: str
    licence: str
    mib: int
    others: tuple[str, ...] = ()


def weights_folder() -> Path:
    """The folder of weights: $DISTILLBENCH_WEIGHTS, or one in the user's cache."""
    named = os.environ.get(VARIABLE, "")
    return Path(named) if named else user_cache_path("distillbench") / "weights"


def locate(network: str, weights: WeightsFile, folder: Path) -> Path:
    """The path of the file, in `folder` or in torch.hub's folder, with the right SHA-256.

    Raises Unavailable if it is missing or has another SHA-256.
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


def fetch(network: str, weights: WeightsFile, folder: Path, source: Path | None, progress: Progress) -> Path:
    """Download the file into `folder`, or copy it from `source`: the file, or a folder that holds it by its name.

    Raises UserError if it cannot be downloaded, does not exist, or has another SHA-256.
    """
    target = folder / weights.file
    target.parent.mkdir(parents=True, exist_ok=True)
    if source is None:
        with wait_for_lock(target, network, progress), progress.step(f"{network}: {target.name}") as step:
            if not (target.is_file() and sha256_file(target) == weights.sha256):
                _download(network, weights, target, step)
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


def _download(network: str, weights: WeightsFile, target: Path, step: Step) -> None:
    try:
        download(weights.url, target, weights.sha256, step)
    except Unreachable as error:
        raise UserError(
            f"{error}\n  by hand, where there is a network: curl -LO {weights.url}; then here: distillbench fetch "
            f"{network} --from FOLDER/{weights.url.rpartition('/')[2]}"
        ) from error


def _torch_hub() -> Path:
    from torch.hub import get_dir

    return Path(get_dir()) / "checkpoints"


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, size: int, modified: int) -> str:
    """The hash of a file; `size` and `modified` are part of the cache key, so a changed file is read again."""
    return sha256_file(path)
