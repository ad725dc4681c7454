"""Seconds of a piece of work by its number of images, from a few trials that take little time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from distillbench.evaluation.timing import OUT_OF_MEMORY, Timer

GROWTH = 4  # of the number of images from one trial to the next
LEAST_SECONDS = 0.2  # for the trials of a piece of work: few images alone would show what a call costs, not an image
AGAIN_SECONDS = 2.0  # a first trial that took less is a warm-up in any case: it may take several times as long
ENOUGH_SECONDS, ENOUGH_CALLS = 0.2, 10  # of trials of the largest size


@dataclass(frozen=True)
class Line:
    """A piece of work on n images takes ``fixed + each * n`` seconds. `timed`: the most images that were tried."""

    fixed: float = 0.0
    each: float = 0.0
    timed: int = 0

    def __call__(self, images: float) -> float:
        return self.fixed + self.each * images

    def over(self, parts: float) -> Line:
        """The line of one of `parts` equal parts of the work."""
        return Line(self.fixed / parts, self.each / parts, self.timed)


class Allowance:
    """The seconds that an estimate may take, in equal shares for the `pieces` of work that are left."""

    def __init__(self, seconds: float, pieces: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self.end, self.pieces = now, now() + seconds, pieces

    @property
    def left(self) -> float:
        return max(0.0, self.end - self.now())

    def share(self) -> float:
        """Seconds for the next piece: what earlier ones did not use is shared by those that follow."""
        self.pieces -= 1
        return self.left / max(1, self.pieces + 1)


def fit(work: Callable[[int], object], first: int, full: int, timer: Timer, seconds: float) -> Line:
    """The line through trials of ``work(n)``: n = `first` and then more, up to `full`, as far as `seconds` allow.

    A trial is begun only if it is expected to end in time; the first one always. It is a warm-up, and taken again
    unless it was long. Where memory runs out, fewer images are enough.
    """
    trials = _Trials(work, timer, max(seconds, LEAST_SECONDS))
    if trials.take(first) <= max(trials.left, AGAIN_SECONDS):
        trials.take(first)
    while trials.size < full and trials.affords(GROWTH * trials.last):
        try:
            trials.take(min(GROWTH * trials.size, full))
        except OUT_OF_MEMORY:
            break
    while trials.calls < ENOUGH_CALLS and trials.repeated < ENOUGH_SECONDS and trials.affords(trials.last):
        trials.take(trials.size)
    return trials.line()


class _Trials:
    """Trials of growing size. Of those of one size the mean counts, but not the first one, a warm-up."""

    def __init__(self, work: Callable[[int], object], timer: Timer, seconds: float) -> None:
        self.work, self.timer, self.left = work, timer, seconds
        self.taken: dict[int, list[float]] = {}  # by size, in the order of the trials

    def take(self, size: int) -> float:
        """One trial; its seconds."""
        seconds = self.timer.seconds(partial(self.work, size))
        self.taken.setdefault(size, []).append(seconds)
        self.left -= seconds
        return seconds

    def affords(self, seconds: float) -> bool:
        return seconds <= self.left

    @property
    def size(self) -> int:
        """The largest that was tried."""
        return max(self.taken)

    @property
    def last(self) -> float:
        return self.taken[self.size][-1]

    @property
    def calls(self) -> int:
        return len(self.taken[self.size])

    @property
    def repeated(self) -> float:
        return sum(self.taken[self.size][1:])

    def line(self) -> Line:
        first, size = min(self.taken), self.size
        small, large = (_mean(self.taken[n]) for n in (first, size))
        if size == first:
            return Line(0.0, small / first, first)
        each = min(max(0.0, large - small) / (size - first), large / size)
        return Line(large - each * size, each, size)


def _mean(seconds: list[float]) -> float:
    """Of the trials after a warm-up, if there are any."""
    counted = seconds[1:] or seconds
    return sum(counted) / len(counted)
