"""Energy in joules that a GPU uses while a block runs: of the whole board, including other processes.

NVML's counter is updated only every 20 to 100 ms, so each end of a measurement is off by up to 0.1 s: blocks shorter
than MIN_SECONDS have no value. Every pause adds two ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from distillbench.errors import Unavailable, UserError, unknown
from distillbench.metering.nvml import Gpu, Slice, gpu_of

MIN_SECONDS = 2.0
NO_GPU = "no GPU in use"


@dataclass(frozen=True)
class Energy:
    """Joules; None with the `reason` if they are unknown."""

    joules: float | None = None
    reason: str = ""

    def __add__(self, more: Energy) -> Energy:
        if self.joules is None or more.joules is None:
            return Energy(None, self.reason or more.reason)
        return Energy(self.joules + more.joules)


NO_ENERGY = Energy(0.0)


class JouleMeter(Protocol):
    """A source of energy: `end` returns the joules since `begin`. Both may raise Unavailable."""

    def begin(self) -> None: ...

    def end(self) -> float: ...


class NvmlMeter:
    """The GPU's energy counter (nvmlDeviceGetTotalEnergyConsumption): Volta and later, no MIG slices."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def begin(self) -> None:
        self.start = self.gpu.joules()

    def end(self) -> float:
        return self.gpu.joules() - self.start


class ZeusMeter:
    """The package zeus (ml-energy/zeus); for GPUs without an energy counter it integrates their power."""

    def __init__(self, monitor: Any) -> None:
        self.monitor = monitor

    def begin(self) -> None:
        with _as_unavailable():
            self.monitor.begin_window("distillbench")

    def end(self) -> float:
        with _as_unavailable():
            return float(sum(self.monitor.end_window("distillbench").gpu_energy.values()))


@contextmanager
def _as_unavailable() -> Iterator[None]:
    """Raise Unavailable for any error of zeus (each vendor has its own classes): no training may fail for it."""
    try:
        yield
    except Exception as error:
        raise Unavailable(f"zeus: {error}") from error


@contextmanager
def _nvml(device: str) -> Iterator[JouleMeter]:
    with gpu_of(device) as gpu:
        yield NvmlMeter(gpu)


@contextmanager
def _zeus(device: str) -> Iterator[JouleMeter]:
    monitor = _zeus_monitor()
    _check_whole(device)
    index = torch.device(device).index
    # zeus counts devices as torch does, after CUDA_VISIBLE_DEVICES
    index = torch.cuda.current_device() if index is None else index
    with _as_unavailable():
        meter = ZeusMeter(monitor(gpu_indices=[index], cpu_indices=[]))
    yield meter


def _check_whole(device: str) -> None:
    """Raise Unavailable for a slice of a GPU: zeus would measure the whole GPU."""
    try:
        with gpu_of(device) as gpu:
            if gpu.is_slice:
                raise Slice("zeus: the device is a slice of a GPU (MIG), and zeus measures the whole GPU")
    except Slice:
        raise
    except Unavailable:  # zeus does not need NVML on all devices, for example on AMD GPUs
        pass


def _zeus_monitor() -> Any:
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError as error:
        raise UserError("energy by zeus needs the package zeus: pip install distillbench[zeus]") from error
    return ZeusMonitor


SOURCES: dict[str, Callable[[str], AbstractContextManager[JouleMeter]]] = {"nvml": _nvml, "zeus": _zeus}


def check_source(source: str) -> None:
    """Raise UserError for an unknown source of energy, or one whose package is not installed."""
    if source not in SOURCES:
        raise unknown("source of energy", source, SOURCES)
    if source == "zeus":
        _zeus_monitor()


class EnergyWatch:
    """The energy of a block until now, in `used`."""

    def __init__(self, device: str) -> None:
        self.device, self.reason = device, ""
        self.meter: JouleMeter | None = None
        self._running = False
        self._joules = self._seconds = 0.0

    @property
    def used(self) -> Energy:
        if self._running:
            with self.paused():
                pass  # reads the counter
        if self.reason:
            return Energy(None, self.reason)
        if self._seconds < MIN_SECONDS:
            return Energy(None, f"{self._seconds:.2g} s are too short for the GPU's energy counter")
        return Energy(self._joules)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the energy of the block."""
        self.end()
        try:
            yield
        finally:
            self.begin()

    def restart(self) -> None:
        """Set the energy and its time to 0."""
        with self.paused():
            self._joules = self._seconds = 0.0

    def begin(self) -> None:
        """Wait for the device and start counting."""
        if self.meter is None or self.reason:
            return
        torch.cuda.synchronize(self.device)
        self._since, self._running = time.perf_counter(), True
        try:
            self.meter.begin()
        except Unavailable as reason:
            self.reason, self._running = str(reason), False

    def end(self) -> None:
        """Wait for the device and stop counting."""
        if self.meter is None or not self._running:
            return
        torch.cuda.synchronize(self.device)
        self._seconds += time.perf_counter() - self._since
        self._running = False
        try:
            self._joules += self.meter.end()
        except Unavailable as reason:
            self.reason = str(reason)


@contextmanager
def energy(device: str, source: str = "nvml") -> Iterator[EnergyWatch]:
    """Energy of the GPU `device` while the block runs, by `source`. Waits for the device at both ends."""
    check_source(source)
    watch = EnergyWatch(device)
    with ExitStack() as stack:
        if device == "cpu":
            watch.reason = NO_GPU
        else:
            try:
                watch.meter = stack.enter_context(SOURCES[source](device))
            except Unavailable as reason:
                watch.reason = str(reason)
        watch.begin()
        try:
            yield watch
        finally:
            watch.end()
