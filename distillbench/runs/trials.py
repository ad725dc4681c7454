"""Seconds of a piece of work by its number of images, from a few trials that take little time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from distillbench.evaluation.timing import OUT_OF_MEMORY, Timer

ENOUGH_SECONDS, ENOUGH_CALLS = 0.2, 10  # of repeated trials


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
    """The line through trials of ``work(n)`` with n = `first` and as many images up to `full` as `seconds` allow.

    The first trial of each size is a warm-up, unless there is no time for another. A trial is begun only if it is
    expected to end in time; the first one always. Where memory runs out, fewer images are enough.
    """
    spent = small = timer.seconds(partial(work, first))
    if spent + small <= seconds:
        small, used = _repeated(partial(work, first), timer, (seconds - spent) / 4)
        spent += used
    size = full if small <= 0 else min(full, int(first * (seconds - spent) / (3 * small)))
    if size < 2 * first:
        return Line(0.0, small / first, first)
    try:
        spent += timer.seconds(partial(work, size))
        large, _ = _repeated(partial(work, size), timer, seconds - spent)
    except OUT_OF_MEMORY:
        return Line(0.0, small / first, first)
    each = min(max(0.0, large - small) / (size - first), large / size)
    return Line(large - each * size, each, size)


def _repeated(call: Callable[[], object], timer: Timer, seconds: float) -> tuple[float, float]:
    """The mean of one or more calls, and their sum, which is about `seconds` at most."""
    taken = [timer.seconds(call)]
    while len(taken) < ENOUGH_CALLS and sum(taken) < ENOUGH_SECONDS and sum(taken) + taken[-1] <= seconds:
        taken.append(timer.seconds(call))
    return sum(taken) / len(taken), sum(taken)
