"""Signals that end the work: a training keeps its state first, everything else ends at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SECONDS_OF_ONE_WISH = 3.0
ASKING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal ended the work. What had been reached is kept."""

    def __init__(self, name: str = "interrupted") -> None:
        super().__init__(name)
        self.name = name


class Stop:
    """Whether a signal has asked to stop: a call answers, for whoever waits patiently."""

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self.names: set[str] = set()  # of all that came
        self.again = False  # whether it was asked for a second time
        self.patient = False
        self.since = 0.0

    def __call__(self) -> bool:
        return bool(self.name)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """In the block a first signal only sets the name: the block asks, and ends itself when it can."""
        before, self.patient = self.patient, True
        try:
            yield
        finally:
            self.patient = before

    def ask(self, name: str) -> None:
        """A signal has come: raise Interrupted, but the first time to a patient block.

        What comes within seconds is the same wish: schedulers signal every process, and so does the one above.
        """
        again = bool(self.name) and time.monotonic() - self.since > SECONDS_OF_ONE_WISH
        self.again |= again
        self.names.add(name)
        if not self.name:
            self.name, self.since = name, time.monotonic()
        if again or not self.patient:
            raise Interrupted(name)


@contextmanager
def stopping(numbers: Sequence[signal.Signals] = ASKING) -> Iterator[Stop]:
    """Ctrl-C and SIGTERM, as schedulers send before they kill, ask to stop during the block; or `numbers`."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.ask(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield stop
        return
    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
