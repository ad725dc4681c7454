"""Timers for one call on a device, and the search for the batch size of the highest throughput."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:  # the fresh process imports no more than it needs
    pass


WARM_UP_CALLS = 3
LEAST_CALLS = 20  # for a latency; fewer give no 95th percentile
MOST_SECONDS = 60.0  # of calls in one measurement
GROWTH = 1.03  # of throughput when the batch size doubles, to count as growth
STALLS = 2  # doublings in a row without growth, after which no larger batch is tried
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class Timer(Protocol):
    """Times one call, from an idle device to an idle device."""

    def seconds(self, call: Callable[[], object]) -> float: ...


class CpuTimer:
    """Reads the clock: on the CPU the work is done when a call returns."""

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaTimer:
    """Records a pair of events in the current stream. `cuda` is replaced in tests."""

    def __init__(self, device: str, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda

    def seconds(self, call: Callable[[], object]) -> float:
        start, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        stream = self.cuda.current_stream(self.device)
        self.cuda.synchronize(self.device)
        start.record(stream)
        call()
        end.record(stream)
        self.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1000


def timer_of(device: str) -> Timer:
    return CpuTimer() if device == "cpu" else CudaTimer(device)


def repeat(call: Callable[[], object], timer: Timer, least_calls: int, least_seconds: float) -> list[float]:
    """Seconds of each call: at least `least_calls` and `least_seconds`, but none starts after MOST_SECONDS of calls."""
    seconds: list[float] = []
    total = 0.0
    while (len(seconds) < least_calls or total < least_seconds) and total < MOST_SECONDS:
        seconds.append(timer.seconds(call))
        total += seconds[-1]
    return seconds


def warmed_up(call: Callable[[], object], timer: Timer, least_calls: int, least_seconds: float) -> list[float]:
    """The same, after WARM_UP_CALLS that do not count."""
    repeat(call, timer, WARM_UP_CALLS, 0)
    return repeat(call, timer, least_calls, least_seconds)


@dataclass(frozen=True)
class Throughput:
    """The highest throughput, its batch size, and why no larger one was tried if memory ran out."""

    images_per_second: float
    batch: int
    note: str = ""


def best_throughput(
    make_call: Callable[[int], Callable[[], object]], timer: Timer, largest: int, least_seconds: float
) -> Throughput:
    """Try batch sizes 1, 2, 4, ... up to `largest`, until STALLS doublings in a row without GROWTH, or out of memory.

    `make_call(size)` returns the call that samples `size` images. Raises its errors; OutOfMemoryError only at size 1.
    """
    best = Throughput(0.0, 0)
    stalls, size = 0, 1
    while size <= largest and stalls < STALLS:
        try:
            call = make_call(size)
            timer.seconds(call)
            seconds = repeat(call, timer, 1, least_seconds)
        except OUT_OF_MEMORY:
            if not best.batch:
                raise
            return dataclasses.replace(best, note=f"memory ran out at batch {size}")
        rate = size * len(seconds) / sum(seconds)
        stalls = 0 if rate >= GROWTH * best.images_per_second else stalls + 1
        if rate > best.images_per_second:
            best = Throughput(rate, size)
        size *= 2
    return best
