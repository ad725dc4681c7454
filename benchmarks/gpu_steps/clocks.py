"""Timing on a device (clocks warmed up, work finished, nothing else timed), and NVML's sensors."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from distillbench.errors import Unavailable
from distillbench.metering.nvml import Gpu, gpu_of

BETWEEN = 0.02  # seconds between two looks at power
SM, MEMORY, GPU = 1, 2, 0  # NVML's clocks and its sensor of temperature


def synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def warm_up(device: str, seconds: float = 2.0) -> None:
    """Multiply matrices until clocks are as high as under load, which takes an idle GPU about a second."""
    size = 4096 if device != "cpu" else 256
    a = torch.randn(size, size, device=device)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(4):
            a @ a
        synchronise(device)


class Marks:
    """Moments in the stream of a device (events), or on the clock of the CPU. Marking waits for nothing."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []

    def add(self) -> None:
        if self.device == "cpu":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append(event)

    def between(self) -> list[float]:
        """Milliseconds between each mark and the next; waits for the device."""
        synchronise(self.device)
        pairs = list(pairwise(self.marks))
        if self.device == "cpu":
            return [1e3 * (end - start) for start, end in pairs]
        return [float(start.elapsed_time(end)) for start, end in pairs]


def milliseconds(
    call: Callable[[], object], device: str, least: int = 10, seconds: float = 1.0, apart: bool = False
) -> list[float]:
    """Of each call, after three that do not count. `apart`: each from an idle device to an idle device, a latency.

    Else calls follow each other without a wait, as in a loop, so that what the host does is hidden where it can be.
    """
    for _ in range(3):
        call()
    synchronise(device)
    marks, found = Marks(device), list[float]()
    marks.add()
    end = time.perf_counter() + seconds
    while len(marks.marks) <= least or (time.perf_counter() < end and len(marks.marks) < 1000):
        if apart:
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            found.append(1e3 * (time.perf_counter() - start))
        else:
            call()
        marks.add()
        if len(marks.marks) % 32 == 0:
            synchronise(device)  # the host must not run away by thousands of calls
    return found if apart else marks.between()


def median(values: list[float]) -> float:
    return statistics.median(values)


# --- NVML ------------------------------------------------------------------------------------------------------------


class Gauges:
    """A GPU's clock, heat, power and what holds it down, by NVML. A gauge that it lacks raises Unavailable."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.nvml = gpu, gpu.nvml

    def ask(self, name: str, *more: Any) -> Any:
        try:
            return getattr(self.nvml, name)(self.gpu.handle, *more)
        except (self.nvml.NVMLError, AttributeError) as error:
            raise Unavailable(f"NVML: {name}: {error}") from error

    def watts(self) -> float:
        return self.ask("nvmlDeviceGetPowerUsage") / 1000

    def limit(self) -> float | None:
        try:
            return self.ask("nvmlDeviceGetEnforcedPowerLimit") / 1000
        except Unavailable:
            return None

    def moment(self) -> dict[str, float]:
        return {
            "sm_mhz": self.ask("nvmlDeviceGetClockInfo", SM),
            "memory_mhz": self.ask("nvmlDeviceGetClockInfo", MEMORY),
            "celsius": self.ask("nvmlDeviceGetTemperature", GPU),
            "watts": self.watts(),
            "throttle": self.ask("nvmlDeviceGetCurrentClocksThrottleReasons"),
        }


@contextmanager
def gauges(device: str) -> Iterator[Gauges | None]:
    """None where there is no NVML."""
    if device == "cpu":
        yield None
        return
    try:
        opened = gpu_of(device)
        gpu = opened.__enter__()
    except Unavailable:
        yield None
        return
    try:
        yield Gauges(gpu)
    finally:
        opened.__exit__(None, None, None)


class Sampled:
    """Values that a thread reads every 20 ms, or every `between` seconds, each with its time."""

    def __init__(self, read: Callable[[], Any], between: float = BETWEEN) -> None:
        self.read, self.between, self.seen = read, between, list[tuple[float, Any]]()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self.done.is_set():
            try:
                self.seen.append((time.perf_counter(), self.read()))
            except Unavailable:
                return
            self.done.wait(self.between)

    def __enter__(self) -> Sampled:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()

    def integral(self, begin: float, end: float) -> float:
        """Of the values over time, by trapezoids; before the first and after the last they stay as they are."""
        inside = [(t, v) for t, v in self.seen if begin <= t <= end]
        if not inside:
            raise Unavailable("nothing could be read")
        points = [(begin, inside[0][1]), *inside, (end, inside[-1][1])]
        return sum((b - a) * (v + w) / 2 for (a, v), (b, w) in pairwise(points))


@contextmanager
def clocks(device: str) -> Iterator[list[dict[str, float]]]:
    """The gauges within the block, four times a second, when it ends; none where one of them is missing.

    Only of moments under load: a GPU that waits for the next measurement lets its clock fall.
    """
    busy: list[dict[str, float]] = []
    with gauges(device) as found:
        if found is None:
            yield busy
            return
        with Sampled(found.moment, 0.25) as sampled:
            yield busy
        seen = [moment for _, moment in sampled.seen]
        most = max((moment["watts"] for moment in seen), default=0.0)
        busy += [moment for moment in seen if moment["watts"] >= 0.7 * most]
