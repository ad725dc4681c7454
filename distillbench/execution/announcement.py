"""The first lines of a run: its cells, how long they will take, and where the results go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distillbench.errors import first_of
from distillbench.runs.forecast import SHORT_SECONDS, forecast_of_run, why_none
from distillbench.runs.remains import Remains
from distillbench.runs.shared_context import Cell
from distillbench.runs.time_plan import MOST_NAMED, about
from distillbench.system.progress import Progress


def announce(cells: Sequence[Cell], remains: Sequence[Remains], folder: Path, progress: Progress) -> None:
    """Say which cells are left, how long they will take, and the `folder` of results.

    Cells that run in this process are not timed before: that would change the memory that is measured in them.
    """
    left = [(index, cell.label) for index, (cell, what) in enumerate(zip(cells, remains, strict=True)) if what.any]
    finished = f", {len(cells) - len(left):,} of them finished" if len(left) < len(cells) else ""
    progress.say(f"{len(cells):,} cell{'s' * (len(cells) != 1)}{finished}; results: {folder}")
    if not left:
        return
    why = why_none(cells) or ("" if cells[0].shared.config.isolate else "isolate=false: --dry-run estimates the time")
    times = None if why else forecast_of_run(cells, remains)
    seconds = {} if times is None else {index: times.of_cell(index) for index, _ in left}
    named = [f"{label} {about(seconds[index])}" if seconds else label for index, label in left]
    progress.say(f"to do: {first_of(named, MOST_NAMED)}")
    if times is None:
        progress.say(f"time: {f'no estimate ({why})' if why else f'less than about {about(SHORT_SECONDS)}'}")
    for line in [] if times is None else times.lines(cells[0].shared.device == "cpu"):
        progress.say(line)
