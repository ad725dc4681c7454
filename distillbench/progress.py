"""Progress of long steps: a bar with the time left in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Step:
    """A running step: ``advance(fraction, note)`` says how far it is."""

    def __init__(self, show) -> None:
        self._show = show

    def advance(self, fraction: float, note: str = "") -> None:
        self._show(min(fraction, 1.0), note)


class Progress:
    """Where long steps report to. ``Progress(None)`` keeps silent."""

    def __init__(self, console: Console | None) -> None:
        self.console = console

    def say(self, line: str) -> None:
        """One line that stays."""
        if self.console is not None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, label: str) -> Iterator[Step]:
        """A step from 0 to 1."""
        if self.console is None:
            yield Step(lambda fraction, note: None)
        elif self.console.is_terminal:
            with self._bar(label) as step:
                yield step
        else:
            yield self._lines(label)

    @contextmanager
    def _bar(self, label: str) -> Iterator[Step]:
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%")]
        columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
        with Bars(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(label, total=1.0, note="")
            yield Step(lambda fraction, note: bars.update(task, completed=fraction, note=note))

    def _lines(self, label: str) -> Step:
        start = last = time.perf_counter()

        def show(fraction: float, note: str) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last < SECONDS_BETWEEN_LINES or fraction <= 0:
                return
            last = now
            left = (now - start) * (1 - fraction) / fraction
            self.say(f"{label}: {fraction:4.0%}, {now - start:.0f} s, about {left:.0f} s left  {note}".rstrip())

        return Step(show)
