"""Weights of feature networks: files that are downloaded on request and identified by their SHA-256."""

from __future__ import annotations

import functools
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from distillbench.errors import Unavailable, UserError
from distillbench.storage.files import sha256_file, write_atomically, write_text
from distillbench.storage.http_download import Unreachable, download
from distillbench.storage.locks import wait_for_lock
from distillbench.storage.user_cache import user_cache
from distillbench.system.progress import Progress, Step

__all__ = ["WeightsFile", "locate"]

VARIABLE = "DISTILLBENCH_WEIGHTS"  # environment variable: the folder of weights
GET = "distillbench fetch"
IN_A_RUN = ", or evaluation.download=true in a run"


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights. `file` is its name in the weights folder; `others` are other names of the same file.

    `sha256` is empty where its publisher gives none: the first fetch is trusted and writes down the hash that it saw,
    in FILE.sha256 beside the file, and later files must have it.
    """

    file: str
    sha256: str
    url: str
    licence: str
    mib: int
    others: tuple[str, ...] = ()


def weights_folder() -> Path:
    """The folder of weights: $DISTILLBENCH_WEIGHTS, or one in the user's cache."""
    named = os.environ.get(VARIABLE, "")
    return Path(named) if named else user_cache() / "weights"


def known_sha256(weights: WeightsFile, folder: Path) -> str:
    """The SHA-256 that the file must have: as published, or as it was first fetched into `folder`; or ""."""
    if weights.sha256:
        return weights.sha256
    try:
        found = _record(weights, folder).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
    return found if re.fullmatch("[0-9a-f]{64}", found) else ""


def _record(weights: WeightsFile, folder: Path) -> Path:
    """The file with the hash of a file of weights whose publisher gives none."""
    return folder / f"{weights.file}.sha256"


def locate(network: str, weights: WeightsFile, folder: Path) -> Path:
    """The path of the file, in `folder` or in torch.hub's folder, with the right SHA-256.

    Raises Unavailable if it is missing, has another SHA-256, or if its hash was neither published nor written down.
    """
    wanted = known_sha256(weights, folder)
    if not wanted:
        there = (folder / weights.file).is_file()
        raise Unavailable(
            f"the file {weights.file} of {network} was not fetched, so that nothing tells whether it is the right one "
            f"({GET} {network} --from {folder / weights.file})"
            if there
            else f"the weights of {network} are not there: {weights.file} ({GET} {network}{IN_A_RUN})"
        )
    wrong = ""
    for place in (folder, _torch_hub()):
        for name in (weights.file, *weights.others):
            path = place / name
            if not path.is_file():
                continue
            if (found := _sha256(path, path.stat().st_size, path.stat().st_mtime_ns)) == wanted:
                return path
            wrong = f"{name} is not the file that {network} is defined by: sha256 {found[:8]}..., not"
    missing = wrong or f"the weights of {network} are not there: {weights.file}, sha256"
    raise Unavailable(f"{missing} {wanted[:8]}... ({GET} {network}{IN_A_RUN})")


def fetch(network: str, weights: WeightsFile, folder: Path, source: Path | None, progress: Progress) -> Path:
    """Download the file into `folder`, or copy it from `source`: the file, or a folder that holds it by its name.

    Raises UserError if it cannot be downloaded, does not exist, or has another SHA-256.
    """
    target = folder / weights.file
    target.parent.mkdir(parents=True, exist_ok=True)
    wanted = known_sha256(weights, folder)
    if source is None:
        with wait_for_lock(target, network, progress), progress.step(f"{network}: {target.name}") as step:
            if not (wanted and target.is_file() and sha256_file(target) == wanted):
                _write_down(weights, folder, _download(network, weights, target, wanted, step))
        return target
    if source.is_dir():
        source = source / target.name
    if not source.is_file():
        raise UserError(f"no file {str(source)!r}")
    if (found := sha256_file(source)) != (wanted or found):
        replaced = "" if weights.sha256 else f", as first fetched; if you trust it, remove {_record(weights, folder)}"
        raise UserError(f"{source.name} is not {network}: its sha256 is {found}, not {wanted}{replaced}")
    if source.resolve() != target.resolve():
        write_atomically(target, lambda path: shutil.copyfile(source, path))
    _write_down(weights, folder, found)
    return target


def _write_down(weights: WeightsFile, folder: Path, sha256: str) -> None:
    """Keep the hash of a file whose publisher gives none."""
    if not weights.sha256:
        write_text(_record(weights, folder), f"{sha256}\n")


def _download(network: str, weights: WeightsFile, target: Path, wanted: str, step: Step) -> str:
    """Download the file and return its SHA-256, which must be `wanted` unless that is empty."""
    try:
        return download(weights.url, target, wanted or None, step)
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
