"""A stopwatch that splits seconds between teacher, student, compiler and the rest; it charges one account at a time.

The account changes when a forward pass begins and ends, so accounts never overlap: the time of a network called within
another, or of torch's compiler, is not counted for the outer network. On the CPU a change reads the clock. On a GPU,
which works asynchronously, it records an event in the stream without waiting; the time between two events is read after
both have passed.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Any

import torch

MOST_MARKS = 1024  # events in the queue before passed ones are read: about 3 MiB of CUDA events


class Account(StrEnum):
    """What seconds are charged to."""

    teacher = "teacher"  # forward passes of the teacher and of its frozen copies
    student = "student"  # forward passes of students, backward passes, optimiser steps
    compile = "compile"  # torch's compiler, forward and backward
    other = "other"


class Charging:
    """A block that is charged to an account. Not a generator, which would be slower: a step has a dozen blocks."""

    __slots__ = ("account", "before", "stopwatch")

    def __init__(self, stopwatch: Stopwatch, account: Account) -> None:
        self.stopwatch, self.account, self.before = stopwatch, account, account

    def __enter__(self) -> None:
        self.before = self.stopwatch.switched(self.account)

    def __exit__(self, *error: object) -> None:
        self.stopwatch.switched(self.before)


class Stopwatch:
    """Seconds of each account since construction, for the CPU."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(Account, 0.0)
        self.account = Account.other
        self.stopped = False
        self._begin()

    @staticmethod
    def of(device: str) -> Stopwatch:
        return Stopwatch() if device == "cpu" else CudaStopwatch(device)

    def charging(self, account: Account) -> Charging:
        """Charge the block to `account`, and the time after it to the account before."""
        return Charging(self, account)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Charge the block to no account."""
        self._charge(None)
        self.stopped = True
        try:
            yield
        finally:
            self.stopped = False
            self._begin()

    def switched(self, account: Account) -> Account:
        """Charge `account` from now on; returns the account before."""
        before = self.account
        self._switch(account)
        return before

    def _switch(self, account: Account) -> None:
        if not self.stopped:
            self._charge(account)
        self.account = account

    def read(self) -> dict[Account, float]:
        """Seconds of each account until now; waits for the device."""
        self._switch(self.account)
        self.wait()
        return dict(self.seconds)

    def reset(self) -> None:
        """Set all accounts to 0; waits for the device."""
        self.read()
        self.seconds = dict.fromkeys(Account, 0.0)

    @staticmethod
    def now() -> float:
        """Wall-clock time in seconds."""
        return time.perf_counter()

    def wait(self) -> None:
        """Wait for the device."""

    def _begin(self) -> None:
        self.last = self.now()

    def _charge(self, account: Account | None) -> None:
        """Charge the open account until now; `account` is the next, None for no account."""
        now = self.now()
        self.seconds[self.account] += now - self.last
        self.last = now


class CudaStopwatch(Stopwatch):
    """A stopwatch for a GPU, by events in its current stream."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: deque[tuple[torch.cuda.Event, Account | None]] = deque()  # event, account charged from there on
        self.spare: list[torch.cuda.Event] = []
        super().__init__()

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)
        self._read_events()

    def _begin(self) -> None:
        self._mark(self.account)

    def _charge(self, account: Account | None) -> None:
        self._mark(account)

    def _mark(self, account: Account | None) -> None:
        if not self.spare and len(self.marks) >= MOST_MARKS:
            self._read_events()
        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append((event, account))

    def _read_events(self) -> None:
        """Charge the time between events that have passed. The last one stays: the open account begins there."""
        while len(self.marks) > 1 and self.marks[1][0].query():
            begin, account = self.marks.popleft()
            if account is not None:
                self.seconds[account] += begin.elapsed_time(self.marks[0][0]) / 1000
            self.spare.append(begin)


class CompileWatch:
    """Charges the time of torch's compiler to Account.compile, until :meth:`stop`.

    This includes backward passes, which autograd's thread compiles when they first run. The compiler's callbacks are
    not a stable interface of torch: if they are missing, `reason` says so, and the time stays with the network.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch, self.reason, self.before = stopwatch, "", Account.other
        self.handler: Any = None
        if "torch._dynamo" not in sys.modules:  # seconds to import; optimizers.warm_up() does it
            return
        try:
            from torch._dynamo.callback import callback_handler

            callback_handler.register_start_callback(self._begin)
            callback_handler.register_end_callback(self._end)
            self.handler = callback_handler
        except (ImportError, AttributeError):
            self.reason = f"torch {torch.__version__} does not report when its compiler runs"

    def _begin(self, *about: object) -> None:
        self.before = self.stopwatch.switched(Account.compile)

    def _end(self, *about: object) -> None:
        self.stopwatch.switched(self.before)

    def stop(self) -> None:
        """Remove the callbacks."""
        if self.handler is not None:
            with suppress(AttributeError, ValueError):  # other code has removed all callbacks
                self.handler.remove_start_callback(self._begin)
                self.handler.remove_end_callback(self._end)
            self.handler = None
