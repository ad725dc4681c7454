"""Whose seconds: a stopwatch that charges one account at a time.

The account changes when a network begins and ends its work, so the accounts never overlap: a network within another
takes its time out of the other's, and torch's compiler out of that of the network it compiles. On the CPU a change
reads the clock. On a GPU, which works behind Python's back, it records an event in the stream and waits for nothing;
what lay between two events is read once both have passed.
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

MOST_MARKS = 1024  # events not yet read, after which passed ones are looked for: about 3 MiB of CUDA events at most


class Account(StrEnum):
    """What time is charged to."""

    teacher = "teacher"  # forwards of the teacher and of its deputies
    student = "student"  # forwards of the student and its copies, backward passes, optimiser steps
    compile = "compile"  # torch's compiler, forward and backward
    other = "other"


class Charging:
    """A block of a stopwatch's account. A class, and no generator: a step has a dozen of them."""

    __slots__ = ("account", "before", "stopwatch")

    def __init__(self, stopwatch: Stopwatch, account: Account) -> None:
        self.stopwatch, self.account, self.before = stopwatch, account, account

    def __enter__(self) -> None:
        self.before = self.stopwatch.switched(self.account)

    def __exit__(self, *error: object) -> None:
        self.stopwatch.switched(self.before)


class Stopwatch:
    """Seconds of each account since it was made, of work that is done where it was asked for (the CPU)."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(Account, 0.0)
        self.account = Account.other
        self.stopped = False
        self._begin()

    @staticmethod
    def of(device: str) -> Stopwatch:
        return Stopwatch() if device == "cpu" else CudaStopwatch(device)

    def charging(self, account: Account) -> Charging:
        """What the block does is charged to `account`, and the time after it to whom it was before."""
        return Charging(self, account)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What the block does is charged to nobody."""
        self._charge(None)
        self.stopped = True
        try:
            yield
        finally:
            self.stopped = False
            self._begin()

    def switched(self, account: Account) -> Account:
        """Charge `account` from now on; the one that was charged before."""
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
        """Every account begins anew; waits for the device."""
        self.read()
        self.seconds = dict.fromkeys(Account, 0.0)

    @staticmethod
    def now() -> float:
        """The clock on the wall, in seconds."""
        return time.perf_counter()

    def wait(self) -> None:
        """Until the device has done what it was asked."""

    def _begin(self) -> None:
        self.last = self.now()

    def _charge(self, account: Account | None) -> None:
        """Close the account that is open; `account` is the next, None for nobody."""
        now = self.now()
        self.seconds[self.account] += now - self.last
        self.last = now


class CudaStopwatch(Stopwatch):
    """The same for a GPU, by events of its current stream."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: deque[tuple[torch.cuda.Event, Account | None]] = deque()  # event, account charged from there on
        self.spare: list[torch.cuda.Event] = []
        super().__init__()

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)
        self._gather()

    def _begin(self) -> None:
        self._mark(self.account)

    def _charge(self, account: Account | None) -> None:
        self._mark(account)

    def _mark(self, account: Account | None) -> None:
        if not self.spare and len(self.marks) >= MOST_MARKS:
            self._gather()
        event = self.spare.pop() if self.spare else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append((event, account))

    def _gather(self) -> None:
        """Charge what lies between events that have passed; the last of them stays, for it begins what is open."""
        while len(self.marks) > 1 and self.marks[1][0].query():
            begin, account = self.marks.popleft()
            if account is not None:
                self.seconds[account] += begin.elapsed_time(self.marks[0][0]) / 1000
            self.spare.append(begin)


class CompileWatch:
    """Charges what torch's compiler works to an account of its own, until :meth:`stop`.

    Backward passes are compiled when they first run, by autograd's thread; the compiler tells of that too. Its
    callbacks are no stable interface of torch: where they are not there, `reason` says so, and the time stays with the
    network.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch, self.reason, self.before = stopwatch, "", Account.other
        self.handler: Any = None
        if "torch._dynamo" not in sys.modules:  # seconds to import; train.warm_up has done it before a training
            return
        try:
            from torch._dynamo.callback import callback_handler

            callback_handler.register_start_callback(self._begin)
            callback_handler.register_end_callback(self._end)
            self.handler = callback_handler
        except (ImportError, AttributeError):
            self.reason = f"torch {torch.__version__} does not tell when its compiler works"

    def _begin(self, *about: object) -> None:
        self.before = self.stopwatch.switched(Account.compile)

    def _end(self, *about: object) -> None:
        self.stopwatch.switched(self.before)

    def stop(self) -> None:
        """The compiler is watched no more."""
        if self.handler is not None:
            with suppress(AttributeError, ValueError):  # someone cleared all callbacks
                self.handler.remove_start_callback(self._begin)
                self.handler.remove_end_callback(self._end)
            self.handler = None
