"""Files of tensors and arrays with a checksum, so that a damaged file is noticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distillbench.storage.files import canonical_json, sha256_file, sha256_tensors, write_atomically

SHA256 = "distillbench_sha256"  # of the tensors, in the file's header


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write safetensors whose header contains their SHA-256 and the entries of `about`."""
    header = {**(about or {}), SHA256: sha256_tensors(tensors)}
    write_atomically(path, lambda temporary: save_file(dict(tensors), temporary, metadata=header))


def read_tensors(path: Path, needs_checksum: bool = True) -> dict[str, Tensor]:
    """The tensors at `path`. Raises ValueError if the file is damaged or has no SHA-256 although it needs one."""
    try:
        with safe_open(path, framework="pt") as file:
            checksum = (file.metadata() or {}).get(SHA256)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (checksum is not None or needs_checksum) and checksum != sha256_tensors(tensors):
            raise ValueError("its checksum is wrong")
    except FileNotFoundError as error:
        raise ValueError("it does not exist") from error
    except (SafetensorError, OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from error
    return tensors


def write_checksum(path: Path, recipe: Mapping[str, Any]) -> None:
    """Write the recipe of the array at `path` and its SHA-256 to a JSON file beside it."""
    text = json.dumps({**recipe, "sha256": sha256_file(path)}, indent=2)
    write_atomically(path.with_suffix(".json"), lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def read_array(path: Path, recipe: Mapping[str, Any] | None = None, mode: str = "r") -> np.ndarray:
    """The array at `path`, memory-mapped: read-only, or copy-on-write with mode "c".

    Raises ValueError if it is damaged or was computed by another recipe than `recipe`.
    """
    try:
        stored = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or stored.pop("sha256", None) != sha256_file(path):
            raise ValueError("its checksum is wrong")
        if recipe is not None and canonical_json(stored) != canonical_json(recipe):
            raise ValueError("it was computed by another recipe")
        rows = np.lib.format.open_memmap(path, mode=mode)
    except (OSError, RecursionError, EOFError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return rows
