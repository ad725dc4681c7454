"""Peaks of memory: on the GPU by torch's allocator and by NVML, and of the resident memory of the process."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from distillbench.errors import Unavailable
from distillbench.metering.energy import NO_GPU
from distillbench.metering.nvml import gpu_of

MIB = 2**20
BLOCK = 512  # bytes; the memory of a tensor on a GPU is a multiple of it
SECONDS_BETWEEN_SAMPLES = 0.02


class Peak:
    """A peak in MiB, set when the measured block ends; None with the `reason` if there is none."""

    def __init__(self, reason: str = "") -> None:
        self.mib: float | None = None
        self.reason = reason

    def raise_to(self, size: float) -> None:
        """Raise the peak to `size` bytes if it is lower."""
        self.mib = max(self.mib or 0.0, size / MIB)


class SampledPeak(Peak):
    """The peak of ``size()``, in bytes, which a thread samples every 20 ms, and at both ends of the block."""

    def __init__(self, size: Callable[[], float]) -> None:
        super().__init__()
        self.size, self.running = size, True
        self.lock, self.done = threading.Lock(), threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)

    def _sample(self) -> None:
        with self.lock:
            if self.reason or not self.running:
                return
            try:
                self.raise_to(self.size())
            except Unavailable as reason:
                self.mib, self.reason = None, str(reason)

    def _watch(self) -> None:
        while not self.done.wait(SECONDS_BETWEEN_SAMPLES):
            self._sample()

    def __enter__(self) -> SampledPeak:
        self._sample()
        self.watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.watcher.join()
        self._sample()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not sample in the block."""
        self._sample()
        with self.lock:
            self.running = False
        try:
            yield
        finally:
            self.running = True


class GpuPeak(Peak):
    """The peak of memory allocated to tensors; `reserved` is that of torch's allocator, `device` that of the whole GPU.

    `others`: bytes of tensors from before the block, which are subtracted.
    """

    def __init__(self, device: str, others: int = 0) -> None:
        super().__init__()
        self.torch_device, self.others = device, others
        self.reserved = Peak()  # by the allocator: for tensors and cached
        self.device: Peak = Peak()  # by NVML: all processes, CUDA contexts, the driver

    def begin(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def end(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        self.raise_to(torch.cuda.max_memory_allocated(self.torch_device) - self.others)
        if self.others:
            self.reserved.reason = (
                f"{self.others / MIB:,.0f} MiB are held by earlier work of this process, in blocks that may be shared"
            )
        else:
            self.reserved.raise_to(torch.cuda.max_memory_reserved(self.torch_device))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count memory that the block allocates and frees."""
        if self.reason:
            yield
            return
        self.end()
        with ExitStack() as stack:
            if isinstance(self.device, SampledPeak):
                stack.enter_context(self.device.paused())
            try:
                yield
            finally:
                self.begin()


def release_memory() -> None:
    """Free the cached memory of torch's allocator."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def bytes_on_gpu(tensors: Iterable[Tensor]) -> int:
    """Bytes of GPU memory that `tensors` take; no tensor may be a view of another. Duplicates count once."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.device.type == "cuda"}
    return sum(math.ceil(size / BLOCK) * BLOCK for size in sizes.values())


@contextmanager
def peak_gpu_mib(device: str, own: int | None = None) -> Iterator[GpuPeak]:
    """Peaks on the GPU `device` during the block (``torch.cuda.max_memory_allocated``, ``_reserved``; NVML).

    `own`: bytes of existing tensors that count; None: all of them.
    """
    peak = GpuPeak(device)
    if device != "cpu":
        release_memory()
        peak.others = 0 if own is None else max(0, torch.cuda.memory_allocated(device) - own)
    if device == "cpu":
        for each in (peak, peak.reserved, peak.device):
            each.reason = NO_GPU
        yield peak
        return
    with ExitStack() as stack:
        try:
            peak.device = stack.enter_context(SampledPeak(stack.enter_context(gpu_of(device)).used_bytes))
        except Unavailable as reason:
            peak.device = Peak(str(reason))
        peak.begin()
        yield peak
        peak.end()


def bytes_in_use(device: str) -> int | None:
    """Bytes in use on the GPU `device` by all processes and the driver, by NVML; None if it is unknown."""
    if device == "cpu":
        return None
    try:
        with gpu_of(device) as gpu:
            return gpu.used_bytes()
    except Unavailable:
        return None


@dataclass(frozen=True)
class Before:
    """Bytes on a GPU before a measurement, which do not belong to it; None if unknown."""

    tensors: int = 0  # of this process
    in_use: int | None = None  # of all processes and of the driver, before this one began

    def subtract_from(self, gpu: GpuPeak) -> None:
        """Subtract them from the peaks; a peak that cannot be separated from them becomes None."""
        shared = "earlier work of this process holds memory too (evaluation.timing=inline)"
        if gpu.mib is not None:
            gpu.mib -= self.tensors / MIB
        if gpu.reserved.mib is not None and self.tensors:
            gpu.reserved.mib, gpu.reserved.reason = None, shared
        if gpu.device.mib is None:
            return
        if self.tensors or self.in_use is None:
            gpu.device.mib, gpu.device.reason = None, shared if self.tensors else "not known before the measurement"
        elif (own := gpu.device.mib - self.in_use / MIB) > 0:
            gpu.device.mib = own
        else:
            gpu.device.mib, gpu.device.reason = None, "other processes gave memory back during the measurement"


@contextmanager
def peak_rss_mib() -> Iterator[SampledPeak]:
    """Peak of the resident memory of this process during the block, sampled every 20 ms."""
    process = psutil.Process()
    with SampledPeak(lambda: process.memory_info().rss) as peak:
        yield peak
