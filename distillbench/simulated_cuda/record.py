"""What a piece of code asks of a simulated GPU: copies, waits and launches of operators, each with its line."""

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

from distillbench.denoiser import CountedNetwork

NETWORK, BACKWARD, OUTSIDE = "network", "backward", "outside"  # where an operator is launched

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
    blocking: bool  # the host waits until it is done
    place: Place


@dataclass(frozen=True)
class Wait:
    """The host waits for the device: a synchronisation, or a blocking copy."""

    what: str
    place: Place


@dataclass(frozen=True)
class Launch:
    """An operator that computes on the device. Views are none."""

    operator: str
    part: str  # NETWORK, BACKWARD or OUTSIDE
    place: Place


@dataclass
class Record:
    """All that one thread asked of simulated devices while it was recorded."""

    copies: list[Copy] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    places: bool = True  # False: launches are counted without looking for their line, which is faster

    def launched(self, part: str) -> int:
        """How many operators were launched in this part."""
        return sum(launch.part == part for launch in self.launches)


def by_place(events: Iterable[Copy] | Iterable[Wait] | Iterable[Launch]) -> Counter[Place]:
    """How many of `events` each line caused."""
    return Counter(event.place for event in events)


class _Recorder(threading.local):
    """Per thread: a wait in one thread holds up no other."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.networks = 0  # calls of networks that are under way
        self.backward = 0  # backward passes that are under way


RECORDER = _Recorder()


@contextmanager
def recording(places: bool = True) -> Iterator[Record]:
    """Record what this thread asks of simulated devices inside the block."""
    record = Record(places=places)
    RECORDER.records.append(record)
    try:
        yield record
    finally:
        RECORDER.records.remove(record)


@contextmanager
def unrecorded() -> Iterator[None]:
    """A block of the simulation's own work."""
    before, RECORDER.records = RECORDER.records, []
    try:
        yield
    finally:
        RECORDER.records = before


def place() -> Place:
    """The innermost line that belongs to neither torch, the simulation nor the standard library."""
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
    """Note that the host waits for the device."""
    if RECORDER.records:
        here = place()
        for record in RECORDER.records:
            record.waits.append(Wait(what, here))


def add_copy(direction: str, size: int, pinned: bool, blocking: bool) -> None:
    """Note a copy of `size` bytes; a blocking one is a wait as well."""
    if not RECORDER.records:
        return
    here = place()
    for record in RECORDER.records:
        record.copies.append(Copy(direction, size, pinned, blocking, here))
        if blocking:
            memory = "pinned" if pinned else "pageable"
            record.waits.append(Wait(f"copy from {direction} of {size} bytes, {memory} memory", here))


def add_launch(operator: str) -> None:
    """Note that an operator is launched."""
    if not RECORDER.records:
        return
    part = NETWORK if RECORDER.networks else BACKWARD if RECORDER.backward else OUTSIDE
    here = place() if any(record.places for record in RECORDER.records) else NOWHERE
    for record in RECORDER.records:
        record.launches.append(Launch(operator, part, here))


def watch_networks() -> None:
    """From now on the record knows which operators are launched by a network of a teacher or a student."""

    def enter(module: nn.Module, *about: Any) -> None:
        if isinstance(module, CountedNetwork):
            RECORDER.networks += 1

    def leave(module: nn.Module, *about: Any) -> None:
        if isinstance(module, CountedNetwork):
            RECORDER.networks -= 1

    nn.modules.module.register_module_forward_pre_hook(enter)
    nn.modules.module.register_module_forward_hook(leave, always_call=True)


def within_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, during which operators count as those of a backward pass."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        RECORDER.backward += 1
        networks, RECORDER.networks = RECORDER.networks, 0
        try:
            return function(*args, **kwargs)
        finally:
            RECORDER.backward -= 1
            RECORDER.networks = networks

    return inside
