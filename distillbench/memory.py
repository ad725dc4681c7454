"""Peaks of memory: GPU as torch's allocator counts it, and the resident memory of the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

MIB = 2**20
SECONDS_BETWEEN_SAMPLES = 0.02


@dataclass
class Peak:
    """A peak in MiB, filled in when the watched block ends; None with the reason where there is none."""

    mib: float | None = None
    reason: str = ""


@contextmanager
def peak_gpu_mib(device: str) -> Iterator[Peak]:
    """Most memory that tensors held on `device` during the block (``torch.cuda.max_memory_allocated``)."""
    peak = Peak()
    if device == "cpu":
        peak.reason = "no GPU in use"
        yield peak
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    torch.cuda.synchronize(device)
    peak.mib = torch.cuda.max_memory_allocated(device) / MIB


@contextmanager
def peak_rss_mib() -> Iterator[Peak]:
    """Most resident memory of this process during the block, looked at every 20 ms."""
    peak, process, done = Peak(), psutil.Process(), threading.Event()
    peak.mib = process.memory_info().rss / MIB

    def watch() -> None:
        while not done.wait(SECONDS_BETWEEN_SAMPLES):
            peak.mib = max(peak.mib or 0.0, process.memory_info().rss / MIB)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.mib = max(peak.mib or 0.0, process.memory_info().rss / MIB)
