"""Prompts as the teacher's text encoder gives them: encoded once, kept on disk, looked up by label.

Beside the table stands how long that took, so that whoever trains on texts is charged, also who finds them encoded. A
price is one device's: on another the texts are encoded anew.
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
    """The table of a run: row i (L,D) is prompt i, the last row is the empty text. float32, mapped from its file.

    On a GPU the whole table is held where it takes an eighth of the free memory at most; otherwise the empty text, and
    the others are copied when they are needed. Labels that are already on the GPU must then be waited for.
    """

    def __init__(self, file: Path, seconds: float) -> None:
        self.file, self._seconds = file, seconds  # that all prompts took
        self.rows: np.ndarray = np.load(file, mmap_mode="r")
        self._held: dict[torch.device, Tensor] = {}  # all rows, or the last one alone

    def __reduce__(self) -> tuple:
        return EncodedPrompts, (self.file, self._seconds)  # another process maps the file again

    def __deepcopy__(self, memo: dict) -> EncodedPrompts:
        return self

    def __call__(self, labels: Tensor, device: torch.device | None = None) -> Tensor:
        """(B,L,D) of `labels` (B,) on `device`, by default that of the labels."""
        device = device or labels.device
        held = self._on(device)
        if len(held) == len(self.rows):
            rows = held.index_select(0, to_device(labels, device))
        else:
            rows = to_device(torch.from_numpy(self.rows[labels.cpu().numpy()]), device)
        return rows.to(torch.get_default_dtype())

    def empty(self, count: int, device: torch.device) -> Tensor:
        """The empty text, `count` times: (count,L,D)."""
        return self._on(device)[-1:].to(torch.get_default_dtype()).expand(count, -1, -1)

    def _on(self, device: torch.device) -> Tensor:
        """What of the table stays on `device`, read when it is first needed."""
        if device not in self._held:
            rows = self.rows if fits_on(device, self.rows.nbytes) else self.rows[-1:]
            held = torch.empty(rows.shape, device=device, dtype=torch.float32)
            for first in range(0, len(rows), READ):
                part = slice(first, first + READ)
                held[part].copy_(torch.from_numpy(rows[part].copy()))
            self._held[device] = held
        return self._held[device]

    def seconds(self, count: int) -> float:
        """That it took to encode `count` of the prompts: their share. The encoder's loading is nobody's."""
        return self._seconds * count / (len(self.rows) - 1)


class PlaceholderPrompts:
    """Texts of zeros (L,D), for a dry run, where only shapes matter."""

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
    """The table of `prompts`, found in `cache` or encoded now on `device`, in float32.

    `encoder_sha256` identifies everything that turns a text into numbers: tokenizer, encoder, how they are used.
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
    except (ValueError, KeyError, TypeError):  # or from before their price was kept
        return None
    fits = table.ndim == 3 and len(table) == rows and table.dtype == np.float32
    return EncodedPrompts(file, seconds) if fits and 0 <= seconds < math.inf else None


def _write(prompts: Sequence[str], encode: Encode, path: Path, progress: Progress) -> float:
    """Returns the seconds that the prompts took, after the empty text, for which the encoder is loaded."""
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
