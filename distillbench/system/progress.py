"""Progress of long steps: bars in a terminal, plain lines elsewhere, both with the estimated time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

__all__ = ["Progress"]

SECONDS_BETWEEN_LINES = 10.0
REFRESHES_PER_SECOND = 2  # drawing takes CPU time from measurements


class Step:
    """A running step: ``advance(fraction, note)`` reports how much of it is done."""

    def __init__(self, show: Callable[[float, str], None]) -> None:
        self._show = show

    def advance(self, fraction: float, note: str = "") -> None:
        self._show(min(fraction, 1.0), note)


class Times:
    """Seconds that a step has taken, and about how many it will still take, as fast as since its first report.

    A training that is resumed begins with a fraction above 0, which this process has not worked for.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.first: tuple[float, float] | None = None  # time and fraction of the first report
        self.end: float | None = None  # the estimated time at which the step is done

    def report(self, fraction: float) -> None:
        """`fraction` of the step is done now."""
        now = time.perf_counter()
        begin, done = self.first = self.first or (now, fraction)
        if fraction > done:
            self.end = now + (now - begin) * (1 - fraction) / (fraction - done)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    @property
    def left(self) -> float | None:
        """None: unknown, because two reports that differ are needed."""
        return None if self.end is None else max(0.0, self.end - time.perf_counter())


class TimesColumn(ProgressColumn):
    """Such as "0:05 elapsed, about 1:40 left"; the second part only where it is known."""

    def render(self, task: Task) -> Text:
        times: Times = task.fields["times"]
        left = "" if times.left is None else f", about {_clock(times.left)} left"
        return Text(f"{_clock(times.elapsed)} elapsed{left}")


def _clock(seconds: float) -> str:
    """Such as 1:40, or 2:01:40 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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
                times = Times()
                task = bars.add_task(label, total=None, note="", times=times)  # a pulse until the first report

                def show(fraction: float, note: str) -> None:
                    times.report(fraction)
                    bars.update(task, total=1.0, completed=fraction, note=note)

                try:
                    yield Step(show)
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
        times = Times()
        last = 0.0  # seconds after the start at which a line was printed

        def show(fraction: float, note: str) -> None:
            nonlocal last
            times.report(fraction)
            elapsed = times.elapsed
            if elapsed - last < SECONDS_BETWEEN_LINES or times.left is None:
                return
            last = elapsed
            self.say(f"{label}: {fraction:.0%}, {elapsed:.0f} s, about {times.left:.0f} s left  {note}".rstrip())

        return Step(show)


def _bars(console: Console) -> Bars:
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
    columns += [TimesColumn(), TextColumn("{task.fields[note]}", markup=False)]
    return Bars(*columns, console=console, transient=True, refresh_per_second=REFRESHES_PER_SECOND)
