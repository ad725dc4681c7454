"""The first lines of a run: its cells, how long they will take, and where the results go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distillbench.errors import counted, first_of
from distillbench.runs.forecast import SHORT_SECONDS, forecast_of_run, why_none
from distillbench.runs.remains import Remains
from distillbench.runs.shared_context import Cell
from distillbench.runs.time_plan import MOST_NAMED, TimePlan, about
from distillbench.system.progress import Progress


def announce(cells: Sequence[Cell], remains: Sequence[Remains], folder: Path, progress: Progress) -> TimePlan | None:
    """Say which cells are left, how long they will take, and the `folder` of results. Returns the estimate.

    Cells that run in this process are not timed before: that would change the memory that is measured in them.
    """
    left = [(index, cell.label) for index, (cell, what) in enumerate(zip(cells, remains, strict=True)) if what.any]
    found, records = len(cells) - len(left), cells[0].shared.folder.cells
    if not left:
        progress.say(f"{found:,} of {counted(len(cells), 'cell')} found in {records}, nothing is trained or sampled")
    elif found:
        progress.say(f"{found:,} of {counted(len(cells), 'cell')} found in {records}, {len(left):,} to do")
    else:
        progress.say(f"{counted(len(cells), 'cell')} to do")
    progress.say(f"results: {folder}")
    if not left:
        return None
    why = why_none(cells) or ("" if cells[0].shared.config.isolate else "isolate=false: --dry-run estimates the time")
    times = None if why else forecast_of_run(cells, remains)
    seconds = {} if times is None else {index: times.of_cell(index) for index, _ in left}
    named = [f"{label} {about(seconds[index])}" if seconds else label for index, label in left]
    progress.say(f"to do: {first_of(named, MOST_NAMED)}")
    if times is None:
        progress.say(f"time: {f'no estimate ({why})' if why else f'less than about {about(SHORT_SECONDS)}'}")
    for line in [] if times is None else times.lines(cells[0].shared.device == "cpu"):
        progress.say(line)
    return times
