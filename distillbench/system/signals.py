"""Signals that stop a run: a training saves its state first, everything else stops at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SECONDS_OF_ONE_REQUEST = 3.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal has stopped the work. Results until then are saved."""

    def __init__(self, name: str = "interrupted") -> None:
        super().__init__(name)
        self.name = name


class Stop:
    """Whether a signal has asked to stop, as a callable."""

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self.names: set[str] = set()  # of all that came
        self.again = False  # whether a second request came
        self.patient = False
        self.since = 0.0

    def __call__(self) -> bool:
        return bool(self.name)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """A block in which the first signal only sets `name`; the block polls it, saves its state and ends."""
        before, self.patient = self.patient, True
        try:
            yield
        finally:
            self.patient = before

    def ask(self, name: str) -> None:
        """Handle a signal: raise Interrupted, except for the first request in a patient block.

        Signals within SECONDS_OF_ONE_REQUEST are one request: schedulers and launchers both signal every process.
        """
        again = bool(self.name) and time.monotonic() - self.since > SECONDS_OF_ONE_REQUEST
        self.again |= again
        self.names.add(name)
        if not self.name:
            self.name, self.since = name, time.monotonic()
        if again or not self.patient:
            raise Interrupted(name)


@contextmanager
def stopping(numbers: Sequence[signal.Signals] = STOP_SIGNALS) -> Iterator[Stop]:
    """In the block the signals `numbers` (Ctrl-C, and SIGTERM, which schedulers send before they kill) set the Stop."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.ask(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield stop
        return
    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
