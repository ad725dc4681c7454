"""Peaks of memory: on the GPU as torch's allocator counts it and as NVML sees it, and resident of the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psutil
import torch

from distillbench.energy import NO_GPU
from distillbench.errors import Unavailable
from distillbench.nvml import gpu_of

MIB = 2**20
SECONDS_BETWEEN_SAMPLES = 0.02


class Peak:
    """A peak in MiB, filled in when the watched block ends; None with the reason where there is none."""

    def __init__(self, reason: str = "") -> None:
        self.mib: float | None = None
        self.reason = reason

    def raise_to(self, size: float) -> None:
        """`size` in bytes."""
        self.mib = max(self.mib or 0.0, size / MIB)


class Sampled(Peak):
    """Of a size in bytes that a thread looks at every 20 ms, and that is looked at when the block begins and ends."""

    def __init__(self, size: Callable[[], float]) -> None:
        super().__init__()
        self.size, self.awake = size, True
        self.lock, self.done = threading.Lock(), threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)

    def _look(self) -> None:
        with self.lock:
            if self.reason or not self.awake:
                return
            try:
                self.raise_to(self.size())
            except Unavailable as reason:
                self.mib, self.reason = None, str(reason)

    def _watch(self) -> None:
        while not self.done.wait(SECONDS_BETWEEN_SAMPLES):
            self._look()

    def __enter__(self) -> Sampled:
        self._look()
        self.watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.watcher.join()
        self._look()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block is not looked at."""
        self._look()
        with self.lock:
            self.awake = False
        try:
            yield
        finally:
            self.awake = True


class GpuPeak(Peak):
    """Most memory that tensors held, and beside it what torch's allocator took from the GPU, and what was in use."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.torch_device = device
        self.reserved = Peak()  # by the allocator: what tensors held, and what it kept for later ones
        self.device: Peak = Peak()  # on the whole GPU by NVML: all processes, CUDA contexts, the driver

    def begin(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def end(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        self.raise_to(torch.cuda.max_memory_allocated(self.torch_device))
        self.reserved.raise_to(torch.cuda.max_memory_reserved(self.torch_device))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What the block takes and gives back does not count."""
        if self.reason:
            yield
            return
        self.end()
        with ExitStack() as stack:
            if isinstance(self.device, Sampled):
                stack.enter_context(self.device.paused())
            try:
                yield
            finally:
                self.begin()


@contextmanager
def peak_gpu_mib(device: str) -> Iterator[GpuPeak]:
    """Peaks on the GPU `device` during the block (``torch.cuda.max_memory_allocated``, ``_reserved``; NVML)."""
    peak = GpuPeak(device)
    if device == "cpu":
        for each in (peak, peak.reserved, peak.device):
            each.reason = NO_GPU
        yield peak
        return
    with ExitStack() as stack:
        try:
            peak.device = stack.enter_context(Sampled(stack.enter_context(gpu_of(device)).used_bytes))
        except Unavailable as reason:
            peak.device = Peak(str(reason))
        peak.begin()
        yield peak
        peak.end()


@contextmanager
def peak_rss_mib() -> Iterator[Sampled]:
    """Most resident memory of this process during the block, looked at every 20 ms."""
    process = psutil.Process()
    with Sampled(lambda: process.memory_info().rss) as peak:
        yield peak
