"""Large arrays that are computed once, cached in files under the hash of their recipe, and memory-mapped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distillbench.storage.checksummed import read_array, write_checksum
from distillbench.storage.files import key_of, write_atomically
from distillbench.storage.locks import wait_for_lock
from distillbench.system.progress import Progress


def array_file(folder: Path, recipe: dict[str, Any]) -> Path:
    """The file of the array of `recipe`."""
    return folder / f"{key_of(recipe)}.npy"


def cached_array(
    folder: Path,
    what: str,
    recipe: dict[str, Any],
    shape: tuple[int, ...],
    fill: Callable[[np.ndarray], None],
    progress: Progress,
) -> np.ndarray:
    """A float32 array of `shape`, computed by ``fill(array)`` once for each `recipe` (all that determines its values).

    It is a copy-on-write memory map of a file in `folder`. One process computes it; others wait for that process.
    """
    file = array_file(folder, recipe)
    found = _found(file, what, recipe, shape, progress)
    if found is None:
        with wait_for_lock(file, what, progress):
            found = _found(file, what, recipe, shape, progress)
            if found is None:
                _make(file, recipe, shape, fill)
                return np.load(file, mmap_mode="c")
    return found


def _make(file: Path, recipe: dict[str, Any], shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> None:
    def write(path: str) -> None:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        fill(array)
        array.flush()

    file.with_suffix(".json").unlink(missing_ok=True)  # the checksum of an earlier array
    write_atomically(file, write)
    write_checksum(file, {"recipe": recipe})


def _found(
    file: Path, what: str, recipe: dict[str, Any], shape: tuple[int, ...], progress: Progress
) -> np.ndarray | None:
    """The cached array; None if it is missing or damaged."""
    if not file.with_suffix(".json").exists():
        return None
    try:
        array = read_array(file, {"recipe": recipe}, mode="c")
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError("its shape or dtype is wrong")
        return array
    except ValueError as error:
        progress.say(f"{what} in {file} cannot be used ({error}) and is computed again")
        return None
