"""Progress of long steps: bars in a terminal, plain lines elsewhere, both with the estimated time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

__all__ = ["Progress"]

SECONDS_BETWEEN_LINES = 10.0
REFRESHES_PER_SECOND = 2  # drawing takes CPU time from measurements


class Step:
    """A running step: ``advance(fraction, note)`` reports how much of it is done."""

    def __init__(self, show: Callable[[float, str], None]) -> None:
        self._show = show

    def advance(self, fraction: float, note: str = "") -> None:
        self._show(min(fraction, 1.0), note)


class Progress:
    """Shows lines and the progress of long steps. ``Progress(None)`` shows nothing."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self._bars: Bars | None = None  # shown while steps run, one line per step
        self._drawn = 0  # number of running steps
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """Print one line."""
        if self.console is not None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, label: str) -> Iterator[Step]:
        """A block whose progress is shown under `label`."""
        if self.console is None:
            yield Step(lambda fraction, note: None)
        elif not self.console.is_terminal:
            yield self._lines(label)
        else:
            with self._drawing(self.console) as bars:
                task = bars.add_task(label, total=None, note="")  # a pulse until the first report
                try:
                    yield Step(lambda fraction, note: bars.update(task, total=1.0, completed=fraction, note=note))
                finally:
                    bars.remove_task(task)

    @contextmanager
    def _drawing(self, console: Console) -> Iterator[Bars]:
        """The bars, shown from the start of the first step to the end of the last one, in any thread."""
        with self._lock:
            self._drawn += 1
            if self._bars is None:
                self._bars = _bars(console)
                self._bars.start()
            bars = self._bars
        try:
            yield bars
        finally:
            with self._lock:
                self._drawn -= 1
                if not self._drawn:
                    bars.stop()
                    self._bars = None

    def _lines(self, label: str) -> Step:
        start = last = time.perf_counter()
        first: tuple[float, float] | None = None  # time and fraction of the first report

        def show(fraction: float, note: str) -> None:
            nonlocal first, last
            now = time.perf_counter()
            first = first or (now, fraction)
            if now - last < SECONDS_BETWEEN_LINES or fraction <= first[1]:
                return
            last = now
            left = (now - first[0]) * (1 - fraction) / (fraction - first[1])
            self.say(f"{label}: {fraction:.0%}, {now - start:.0f} s, about {left:.0f} s left  {note}".rstrip())

        return Step(show)


def _bars(console: Console) -> Bars:
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
    columns += [TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left")]
    columns += [TextColumn("{task.fields[note]}", markup=False)]
    return Bars(*columns, console=console, transient=True, refresh_per_second=REFRESHES_PER_SECOND)
