"""Peaks of memory: on the GPU as torch's allocator counts it and as NVML sees it, and resident of the process."""

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

from distillbench.energy import NO_GPU
from distillbench.errors import Unavailable
from distillbench.nvml import gpu_of

MIB = 2**20
BLOCK = 512  # bytes; a tensor on a GPU takes a multiple of them
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
    """Most memory that tensors held, and beside it what torch's allocator took from the GPU, and what was in use.

    `others`: bytes of tensors that are there from earlier on, stay, and do not count.
    """

    def __init__(self, device: str, others: int = 0) -> None:
        super().__init__()
        self.torch_device, self.others = device, others
        self.reserved = Peak()  # by the allocator: what tensors held, and what it kept for later ones
        self.device: Peak = Peak()  # on the whole GPU by NVML: all processes, CUDA contexts, the driver

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


def release_memory() -> None:
    """Give back to the GPU what torch's allocator only keeps for later tensors."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def bytes_on_gpu(tensors: Iterable[Tensor]) -> int:
    """What `tensors`, none of them a part of another, take on GPUs; one that comes twice counts once."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.device.type == "cuda"}
    return sum(math.ceil(size / BLOCK) * BLOCK for size in sizes.values())


@contextmanager
def peak_gpu_mib(device: str, own: int | None = None) -> Iterator[GpuPeak]:
    """Peaks on the GPU `device` during the block (``torch.cuda.max_memory_allocated``, ``_reserved``; NVML).

    `own`: bytes of tensors that are there already and count; None: all that are there do.
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
            peak.device = stack.enter_context(Sampled(stack.enter_context(gpu_of(device)).used_bytes))
        except Unavailable as reason:
            peak.device = Peak(str(reason))
        peak.begin()
        yield peak
        peak.end()


def bytes_in_use(device: str) -> int | None:
    """Memory of the GPU `device` that any process or the driver has, by NVML; None where nobody says."""
    if device == "cpu":
        return None
    try:
        with gpu_of(device) as gpu:
            return gpu.used_bytes()
    except Unavailable:
        return None


@dataclass(frozen=True)
class Before:
    """What was on a GPU before a measurement and is no part of it, in bytes; None where that is not known."""

    tensors: int = 0  # of this process
    in_use: int | None = None  # of all processes and of the driver, before this one began

    def leave_out(self, gpu: GpuPeak) -> None:
        """Of these peaks. Where it cannot be told apart from them there is none."""
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
def peak_rss_mib() -> Iterator[Sampled]:
    """Most resident memory of this process during the block, looked at every 20 ms."""
    process = psutil.Process()
    with Sampled(lambda: process.memory_info().rss) as peak:
        yield peak
