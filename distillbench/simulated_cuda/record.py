"""Records of copies, waits and launches of operators on simulated GPUs, each with its line of code."""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy
import safetensors
import torch
from torch import nn

from distillbench.diffusion.denoiser import CountedNetwork

NETWORK, BACKWARD, OUTSIDE = "network", "backward", "outside"  # of a step, where an operator is launched

_OWN = str(Path(__file__).parent)
_LIBRARIES = tuple(str(Path(module.__file__).parent) for module in (torch, numpy, safetensors) if module.__file__)
_STANDARD = sysconfig.get_paths()["stdlib"]
_INSTALLED = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib")})


@dataclass(frozen=True)
class Place:
    """A line of code."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


NOWHERE = Place("<unknown>", 0, "")


@dataclass(frozen=True)
class Copy:
    """A copy between the memory of the host and that of a device, or between devices."""

    direction: str  # "host to device", "device to host", "device to device"
    bytes: int
    pinned: bool  # the host's memory
    blocking: bool  # the host waits for it
    place: Place


@dataclass(frozen=True)
class Wait:
    """The host waits for the device: a synchronisation, or a blocking copy."""

    what: str
    place: Place


@dataclass(frozen=True)
class Launch:
    """An operator that computes on the device (not a view)."""

    operator: str
    part: str  # NETWORK, BACKWARD or OUTSIDE
    place: Place


@dataclass
class Record:
    """All events of one thread during a :func:`recording`."""

    copies: list[Copy] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    places: bool = True  # False: launches without their lines, which is faster

    def launched(self, part: str) -> int:
        """Number of operators launched in `part`."""
        return sum(launch.part == part for launch in self.launches)


def by_place(events: Iterable[Copy] | Iterable[Wait] | Iterable[Launch]) -> Counter[Place]:
    """Number of `events` of each line."""
    return Counter(event.place for event in events)


class _Recorder(threading.local):
    """One per thread: a wait in one thread does not stop the others."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.networks = 0  # nested calls of networks
        self.backward = 0  # nested backward passes


RECORDER = _Recorder()


@contextmanager
def recording(places: bool = True) -> Iterator[Record]:
    """Record the events of this thread in the block."""
    record = Record(places=places)
    RECORDER.records.append(record)
    try:
        yield record
    finally:
        RECORDER.records.remove(record)


@contextmanager
def unrecorded() -> Iterator[None]:
    """A block of work of the simulation itself, which is not recorded."""
    before, RECORDER.records = RECORDER.records, []
    try:
        yield
    finally:
        RECORDER.records = before


def place() -> Place:
    """The innermost line of the stack outside torch, the simulation and the standard library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not _is_library(file):
            return Place(file, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return NOWHERE


def _is_library(file: str) -> bool:
    if file.startswith((_OWN, *_LIBRARIES, "<")):
        return True
    return file.startswith(_STANDARD) and not file.startswith(_INSTALLED)


def add_wait(what: str) -> None:
    """Record that the host waits for the device."""
    if RECORDER.records:
        here = place()
        for record in RECORDER.records:
            record.waits.append(Wait(what, here))


def add_copy(direction: str, size: int, pinned: bool, blocking: bool) -> None:
    """Record a copy of `size` bytes; a blocking one is also a wait."""
    if not RECORDER.records:
        return
    here = place()
    for record in RECORDER.records:
        record.copies.append(Copy(direction, size, pinned, blocking, here))
        if blocking:
            memory = "pinned" if pinned else "pageable"
            record.waits.append(Wait(f"copy from {direction} of {size} bytes, {memory} memory", here))


def add_launch(operator: str) -> None:
    """Record the launch of an operator."""
    if not RECORDER.records:
        return
    part = NETWORK if RECORDER.networks else BACKWARD if RECORDER.backward else OUTSIDE
    here = place() if any(record.places for record in RECORDER.records) else NOWHERE
    for record in RECORDER.records:
        record.launches.append(Launch(operator, part, here))


def watch_networks() -> None:
    """Let records tell which operators are launched by networks of teachers and students."""

    def enter(module: nn.Module, *about: Any) -> None:
        if isinstance(module, CountedNetwork):
            RECORDER.networks += 1

    def leave(module: nn.Module, *about: Any) -> None:
        if isinstance(module, CountedNetwork):
            RECORDER.networks -= 1

    nn.modules.module.register_module_forward_pre_hook(enter)
    nn.modules.module.register_module_forward_hook(leave, always_call=True)


def within_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose operators count as those of a backward pass."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        RECORDER.backward += 1
        networks, RECORDER.networks = RECORDER.networks, 0
        try:
            return function(*args, **kwargs)
        finally:
            RECORDER.backward -= 1
            RECORDER.networks = networks

    return inside
