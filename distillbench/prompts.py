"""Prompts as the teacher's text encoder gives them: encoded once, kept on disk, looked up by label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillbench.files import key_of, write_atomically
from distillbench.kept_tensors import read_array, seal_array
from distillbench.progress import Progress

BATCH = 16
Encode = Callable[[list[str]], Tensor]  # texts to (B,L,D)


class EncodedPrompts:
    """The table of a run: row i (L,D) is prompt i, the last row is the empty text. float32, mapped from its file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: np.ndarray = np.load(file, mmap_mode="r")

    def __reduce__(self) -> tuple:
        return EncodedPrompts, (self.file,)  # another process maps the file again

    def __deepcopy__(self, memo: dict) -> EncodedPrompts:
        return self

    def __call__(self, labels: Tensor) -> Tensor:
        rows = torch.from_numpy(self.rows[labels.cpu().numpy()])
        return rows.to(labels.device, torch.get_default_dtype())


class PlaceholderPrompts:
    """Texts of zeros (L,D), for a dry run, where only shapes matter."""

    def __init__(self, length: int, width: int) -> None:
        self.length, self.width = length, width

    def __call__(self, labels: Tensor) -> Tensor:
        return torch.zeros(len(labels), self.length, self.width, device=labels.device)


def encode_prompts(
    prompts: Sequence[str], encode: Encode, encoder_sha256: str, cache: Path, progress: Progress
) -> EncodedPrompts:
    """The table of `prompts`, found in `cache` or encoded now.

    `encoder_sha256` identifies everything that turns a text into numbers: tokenizer, encoder, how they are used.
    """
    recipe = {"encoder_sha256": encoder_sha256, "prompts_key": key_of(list(prompts)), "count": len(prompts)}
    file = cache / f"prompts-{key_of(recipe)}.npy"
    known = _found(file, len(prompts) + 1)
    if known is None:
        write_atomically(file, lambda path: _write(prompts, encode, Path(path), progress))
        seal_array(file, recipe)
        known = EncodedPrompts(file)
    return known


def _found(file: Path, rows: int) -> EncodedPrompts | None:
    try:
        table = read_array(file)
    except ValueError:
        return None
    fits = table.ndim == 3 and len(table) == rows and table.dtype == np.float32
    return EncodedPrompts(file) if fits else None


def _write(prompts: Sequence[str], encode: Encode, path: Path, progress: Progress) -> None:
    empty = encode([""]).float().cpu().numpy()
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(prompts) + 1, *empty.shape[1:]))
    table[-1:] = empty
    with torch.no_grad(), progress.step("encoding prompts") as step:
        for first in range(0, len(prompts), BATCH):
            batch = list(prompts[first : first + BATCH])
            table[first : first + len(batch)] = encode(batch).float().cpu().numpy()
            step.advance((first + len(batch)) / len(prompts))
    table.flush()
