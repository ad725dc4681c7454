"""Files of influences: how much each image of a row moves each of its scores, to compare methods on common noise.

A safetensors file for each evaluation has a float32 tensor (n,) "<nfe>/<sampling seed>/<score>" for each row and score:
cells/<train key>/influences-<evaluation key>.safetensors, linked to <run>/influences/<evaluation key>.safetensors.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

FOLDER = "influences"  # in a run's folder
KEY = re.compile(r"[\w-]{1,64}")  # of an evaluation; cannot be a path


def cell_file(cell: Path, key: str) -> Path:
    """The file of the evaluation `key` in the folder of its cell."""
    return cell / f"influences-{key}.safetensors"


def run_file(run: Path, key: str) -> Path:
    """The file of the evaluation `key` in the folder of a run."""
    return run / FOLDER / f"{key}.safetensors"


def tensor_name(nfe: int, sampling_seed: int, score: str) -> str:
    return f"{nfe}/{sampling_seed}/{score}"


class InfluenceFiles:
    """The influences of a run in the folder `run`. A missing or damaged file has none."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def of(self, key: str, nfe: int, sampling_seed: int, score: str) -> NDArray[np.float64] | None:
        """(n,) influences of the images of the row with this key; None if there are none."""
        if not KEY.fullmatch(key):
            return None
        try:
            with safe_open(run_file(self.run, key), "numpy") as file:
                name = tensor_name(nfe, sampling_seed, score)
                values = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118  # not iterable itself
        except (OSError, SafetensorError):
            return None
        return None if values is None or values.ndim != 1 else values.astype(np.float64)
