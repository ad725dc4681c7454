"""Progress of long steps: bars in a terminal, plain lines elsewhere, both with the estimated time left."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

__all__ = ["Progress"]

SECONDS_BEFORE_LINE = 1.0  # of a step, before its line is printed where there is no terminal: shorter ones have none
SECONDS_BETWEEN_LINES = 10.0
WIDTH_OF_TIMES = 12 + 1 + 4 + 1 + 31 + 1  # characters: the bar, percent, and "elapsed 0:59, about 1:59:59 left"
SHORTEST_LABEL = 12
REFRESHES_PER_SECOND = 2  # drawing takes CPU time from measurements


class Step:
    """A running step: ``advance(fraction, note)`` reports how much of it is done."""

    def __init__(self, show: Callable[[float, str], None]) -> None:
        self._show = show

    def advance(self, fraction: float, note: str = "") -> None:
        self._show(min(fraction, 1.0), note)


class Clock(Protocol):
    """Seconds since the start, and about how many are left; None: unknown."""

    @property
    def elapsed(self) -> float: ...
    @property
    def left(self) -> float | None: ...


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


def times_in_words(times: Clock) -> str:
    """Such as "elapsed 0:05, about 1:40 left"; the second part only where it is known."""
    left = times.left
    return f"elapsed {_clock(times.elapsed)}" + ("" if left is None else f", about {_clock(left)} left")


class LabelColumn(ProgressColumn):
    """The label of a step, shortened so that its times fit."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def render(self, task: Task) -> Text:
        text = Text(task.description, no_wrap=True)
        text.truncate(self.most, overflow="ellipsis")
        return text


class TimesColumn(ProgressColumn):
    """The times of a step."""

    def render(self, task: Task) -> Text:
        return Text(times_in_words(task.fields["times"]), no_wrap=True)


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
            with self._lines(label) as step:
                yield step
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
    def overall(self, total: int, done: int, times: Clock) -> Iterator[Callable[[int, str], None]]:
        """A block with many steps, such as the cells of a run: a line of its own, with the times of the whole.

        Gives ``show(done, label)``, to be called when the next one begins, or another one is done.
        """
        if self.console is None:
            yield lambda done, label: None
        elif not self.console.is_terminal:
            yield lambda done, label: self._stamped(time.time(), f"{label}, {times_in_words(times)}")
        else:
            with self._drawing(self.console) as bars:
                task = bars.add_task(f"{total:,} cells", total=total, completed=done, note="", times=times)
                try:
                    yield lambda done, label: bars.update(task, completed=done, description=label)
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

    @contextmanager
    def _lines(self, label: str) -> Iterator[Step]:
        """A line for the start of the step, with its time, and then one from time to time."""
        times, begin = Times(), time.time()
        last = 0.0  # seconds after the start at which a line was printed

        def show(fraction: float, note: str) -> None:
            nonlocal last
            times.report(fraction)
            elapsed = times.elapsed
            if elapsed - last < SECONDS_BETWEEN_LINES or times.left is None or fraction >= 1:
                return
            last = elapsed
            self._stamped(time.time(), f"{label}: {fraction:.0%}, {times_in_words(times)}  {note}".rstrip())

        start = threading.Timer(SECONDS_BEFORE_LINE, self._stamped, (begin, label))
        start.daemon = True
        start.start()
        try:
            yield Step(show)
        finally:
            start.cancel()

    def _stamped(self, when: float, line: str) -> None:
        """Print a line with the time of day."""
        self.say(f"{time.strftime('%H:%M:%S', time.localtime(when))} {line}")


def _bars(console: Console) -> Bars:
    """Label, bar, percent and times; the note has what is left of the line, and is cut off at its end."""
    note = TextColumn(
        "{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
    )
    columns = [LabelColumn(max(console.width - WIDTH_OF_TIMES, SHORTEST_LABEL)), BarColumn(12), TaskProgressColumn()]
    return Bars(
        *columns, TimesColumn(), note, console=console, expand=True, transient=True,
        refresh_per_second=REFRESHES_PER_SECOND,
    )  # fmt: skip
