"""The time left of a run while its cells run: by the estimate before it, or by the cells that are done."""

from __future__ import annotations

import time
from collections.abc import Iterable

from distillbench.runs.time_plan import TimePlan


class CellTimes:
    """Seconds since the run began, and about how many are left.

    An estimate before the run is scaled by what the cells that are done have taken; a small share of the run, such as
    the teacher's cell, scales it little. Without an estimate, cells are taken to be alike.
    """

    def __init__(self, todo: Iterable[int], plan: TimePlan | None, at_once: int = 1) -> None:
        """`todo`: the indices of the cells that are left, of which `at_once` run at a time."""
        self.start = time.perf_counter()
        self.at_once = at_once
        self.left_of = {index: 1.0 if plan is None else max(plan.of_cell(index), 1e-3) for index in todo}
        self.known = plan is not None
        self.begun = self.start  # when the last cell was done
        self.done = 0.0  # the share of the work that is done, in the units of `left_of`

    def finish(self, index: int) -> None:
        """The cell at `index` is done now."""
        self.done += self.left_of.pop(index, 0.0)
        self.begun = time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float | None:
        """None: unknown, before the first cell is done without an estimate."""
        if not self.done and not self.known:
            return None
        left, taken = sum(self.left_of.values()), self.begun - self.start
        expected = left / self.at_once if self.known else 0.0  # counts like time that was seen
        seconds = left * (taken + expected) / (self.done + self.at_once * expected)
        return max(0.0, seconds - (time.perf_counter() - self.begun))
