"""Large arrays that are made once and kept by their recipe: read from the disk as needed, whole or made again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distillbench.storage.checksummed import read_array, write_checksum
from distillbench.storage.files import key_of, write_atomically
from distillbench.storage.locks import wait_for_lock
from distillbench.system.progress import Progress


def cached_array(
    folder: Path,
    what: str,
    recipe: dict[str, Any],
    shape: tuple[int, ...],
    fill: Callable[[np.ndarray], None],
    progress: Progress,
) -> np.ndarray:
    """A float32 array of `shape` that ``fill(array)`` makes, once for each `recipe`, which says all that decides it.

    It is a memory map of a file in `folder`, private to this process. One process makes it; others wait for it.
    """
    file = folder / f"{key_of(recipe)}.npy"
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

    file.with_suffix(".json").unlink(missing_ok=True)  # of another content
    write_atomically(file, write)
    write_checksum(file, {"recipe": recipe})


def _found(
    file: Path, what: str, recipe: dict[str, Any], shape: tuple[int, ...], progress: Progress
) -> np.ndarray | None:
    """The array, or None where there is none that is whole."""
    if not file.with_suffix(".json").exists():
        return None
    try:
        array = read_array(file, {"recipe": recipe}, mode="c")
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError("it has another shape or type")
        return array
    except ValueError as error:
        progress.say(f"{what} in {file} cannot be used ({error}): made again")
        return None
