"""Large arrays that are computed once, part by part, and cached in files under the hash of their recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from distillbench.storage.checksummed import read_array, write_checksum
from distillbench.storage.files import key_of, write_atomically
from distillbench.storage.locks import wait_for_lock
from distillbench.system.progress import Progress

DTYPE = np.dtype(np.float32)
Fill = Callable[[Callable[[np.ndarray], Any]], None]


def array_file(folder: Path, recipe: dict[str, Any]) -> Path:
    """The file of the array of `recipe`."""
    return folder / f"{key_of(recipe)}.npy"


def cached_array(
    folder: Path,
    what: str,
    recipe: dict[str, Any],
    shape: tuple[int, ...],
    fill: Fill,
    progress: Progress,
) -> Path:
    """The .npy file in `folder` of a float32 array of `shape`, computed once for each `recipe`.

    `recipe` is all that determines the values. ``fill(write)`` calls ``write(part)`` for each part of the array in
    order, so it is never in memory as a whole. One process computes it; others wait for that process.
    """
    file = array_file(folder, recipe)
    if not _found(file, what, recipe, shape, progress):
        with wait_for_lock(file, what, progress):
            if not _found(file, what, recipe, shape, progress):
                _make(file, recipe, shape, fill)
    return file


def _make(file: Path, recipe: dict[str, Any], shape: tuple[int, ...], fill: Fill) -> None:
    size = math.prod(shape) * DTYPE.itemsize

    def write(path: str) -> None:
        with open(path, "wb") as opened:
            npy.write_array_header_1_0(
                opened, {"descr": npy.dtype_to_descr(DTYPE), "fortran_order": False, "shape": shape}
            )
            start = opened.tell()
            fill(lambda part: opened.write(np.ascontiguousarray(part, DTYPE).data))
            if opened.tell() - start != size:
                raise RuntimeError(f"an array {shape} has {size:,} bytes, {opened.tell() - start:,} were written")

    file.with_suffix(".json").unlink(missing_ok=True)  # the checksum of an earlier array
    write_atomically(file, write)
    write_checksum(file, {"recipe": recipe})


def _found(file: Path, what: str, recipe: dict[str, Any], shape: tuple[int, ...], progress: Progress) -> bool:
    """Whether the array is cached; False if its file is damaged."""
    if not file.with_suffix(".json").exists():
        return False
    try:
        array = read_array(file, {"recipe": recipe})
        if array.shape != shape or array.dtype != DTYPE:
            raise ValueError("its shape or dtype is wrong")
        return True
    except ValueError as error:
        progress.say(f"{what} in {file} cannot be used ({error}) and is computed again")
        return False
