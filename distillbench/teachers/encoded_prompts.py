"""Embeddings of prompts by the teacher's text encoder: computed once, cached on disk, indexed by label.

The time that encoding took is stored too, so that every method is charged for it, also if the embeddings were cached.
This time depends on the device, so prompts are encoded again for another device.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillbench.storage.checksummed import read_array, write_checksum
from distillbench.storage.files import key_of, write_atomically
from distillbench.system.environment import device_name
from distillbench.system.precision import tf32
from distillbench.system.progress import Progress
from distillbench.system.transfers import fits_on, to_device

BATCH = 16
READ = 1024  # rows of a table that are copied to a device at a time
Encode = Callable[[list[str]], Tensor]  # texts to (B,L,D)


class EncodedPrompts:
    """The embeddings of a run: row i (L,D) is prompt i, the last row is the empty text; float32, memory-mapped.

    A GPU holds all rows if they take at most an eighth of its free memory. Otherwise it holds only the empty text; the
    other rows are copied for each batch, and labels on the GPU are first copied to the CPU, which waits for the GPU.
    """

    def __init__(self, file: Path, seconds: float) -> None:
        self.file, self._seconds = file, seconds  # for encoding all prompts
        self.rows: np.ndarray = np.load(file, mmap_mode="r")
        self._held: dict[torch.device, Tensor] = {}  # all rows, or only the last one

    def __reduce__(self) -> tuple:
        return EncodedPrompts, (self.file, self._seconds)  # another process maps the file again

    def __deepcopy__(self, memo: dict) -> EncodedPrompts:
        return self

    def __call__(self, labels: Tensor, device: torch.device | None = None) -> Tensor:
        """The embeddings (B,L,D) of `labels` (B,) on `device` (default: the labels' device)."""
        device = device or labels.device
        held = self._on(device)
        if len(held) == len(self.rows):
            rows = held.index_select(0, to_device(labels, device))
        else:
            rows = to_device(torch.from_numpy(self.rows[labels.cpu().numpy()]), device)
        return rows.to(torch.get_default_dtype())

    def empty(self, count: int, device: torch.device) -> Tensor:
        """The embedding of the empty text, `count` times: (count,L,D)."""
        return self._on(device)[-1:].to(torch.get_default_dtype()).expand(count, -1, -1)

    def _on(self, device: torch.device) -> Tensor:
        """The rows that `device` holds; copied to it at the first call."""
        if device not in self._held:
            rows = self.rows if fits_on(device, self.rows.nbytes) else self.rows[-1:]
            held = torch.empty(rows.shape, device=device, dtype=torch.float32)
            for first in range(0, len(rows), READ):
                part = slice(first, first + READ)
                held[part].copy_(torch.from_numpy(rows[part].copy()))
            self._held[device] = held
        return self._held[device]

    def seconds(self, count: int) -> float:
        """Seconds that the encoding of `count` of the prompts took: their share. Loading the encoder is not charged."""
        return self._seconds * count / (len(self.rows) - 1)


class PlaceholderPrompts:
    """Embeddings of zeros (L,D), for a dry run, where only shapes matter."""

    def __init__(self, length: int, width: int) -> None:
        self.length, self.width = length, width

    def __call__(self, labels: Tensor, device: torch.device | None = None) -> Tensor:
        return self.empty(len(labels), device or labels.device)

    def empty(self, count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, self.length, self.width, device=device)

    def seconds(self, count: int) -> float:
        return 0.0


def encode_prompts(
    prompts: Sequence[str], encode: Encode, encoder_sha256: str, cache: Path, device: str, progress: Progress
) -> EncodedPrompts:
    """The embeddings of `prompts`, from `cache` or computed now on `device`, in float32.

    `encoder_sha256` identifies everything that determines the embedding of a text: tokenizer, encoder, and their use.
    """
    recipe = {"encoder_sha256": encoder_sha256, "prompts_key": key_of(list(prompts)), "count": len(prompts)}
    recipe |= {"device": device_name(device)} | ({} if device == "cpu" else {"tf32": False})
    file = cache / f"prompts-{key_of(recipe)}.npy"
    known = _found(file, len(prompts) + 1)
    if known is None:
        took: list[float] = []
        with tf32(False, device):
            write_atomically(file, lambda path: took.append(_write(prompts, encode, Path(path), progress)))
        seconds = took[-1]
        write_checksum(file, {**recipe, "seconds": seconds})
        known = EncodedPrompts(file, seconds)
    return known


def _found(file: Path, rows: int) -> EncodedPrompts | None:
    try:
        table = read_array(file)
        seconds = float(json.loads(file.with_suffix(".json").read_text())["seconds"])
    except (ValueError, KeyError, TypeError):  # older files lack the seconds
        return None
    fits = table.ndim == 3 and len(table) == rows and table.dtype == np.float32
    return EncodedPrompts(file, seconds) if fits and 0 <= seconds < math.inf else None


def _write(prompts: Sequence[str], encode: Encode, path: Path, progress: Progress) -> float:
    """Write the embeddings. Returns the seconds without those of the empty text, whose encoding loads the encoder."""
    empty = encode([""]).float().cpu().numpy()
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(prompts) + 1, *empty.shape[1:]))
    table[-1:] = empty
    start = time.perf_counter()
    with torch.no_grad(), progress.step("encoding prompts") as step:
        for first in range(0, len(prompts), BATCH):
            batch = list(prompts[first : first + BATCH])
            table[first : first + len(batch)] = encode(batch).float().cpu().numpy()
            step.advance((first + len(batch)) / len(prompts))
    seconds = time.perf_counter() - start  # .cpu() has waited for the device
    table.flush()
    return seconds
