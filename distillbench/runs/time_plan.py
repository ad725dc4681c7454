"""How long a run will take: the seconds of each part of its cells, their sums, and what they are called."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from distillbench.errors import first_of

MOST_NAMED = 8  # things in a line
SMALL_SHARE = 0.02  # of the largest part, below which a part is not named
LARGE_SHARE = 0.1  # of the run's time, to be named among the settings that shorten it
LONG_SECONDS = 3600.0  # on a CPU, after which the settings that shorten a run are named


class Part(StrEnum):
    """What the time of a run goes into."""

    teacher = "training the teacher"
    reference = "the teacher's many-step samples"
    real = "features of the real images"
    preparation = "noise-image pairs"
    training = "training"
    sampling = "sampling"
    scoring = "scoring"
    speed = "timing of sampling"
    starting = "starting processes"


BEFORE = (Part.teacher, Part.reference, Part.real)  # done once for all cells


@dataclass(frozen=True)
class Lever:
    """A setting, as written, and the seconds of the run that are in proportion to it."""

    setting: str
    seconds: float


@dataclass(frozen=True)
class TimePlan:
    """The seconds of a run. `cells` are those of each cell, by part; {} for one that is finished.

    `before` is done once, before the cells or by the first that needs it. `left_out` says what the seconds leave out,
    `scaled` what was timed with fewer images than the run has.
    """

    cells: Sequence[Mapping[Part, float]]
    before: Mapping[Part, float] = field(default_factory=dict)
    at_once: int = 1  # cells that run at a time
    levers: Sequence[Lever] = ()
    left_out: Sequence[str] = ()
    scaled: Sequence[str] = ()

    def parts(self) -> dict[Part, float]:
        """The seconds of each part, summed over the cells; parts of no time are left out."""
        sums = {part: sum(cell.get(part, 0.0) for cell in [self.before, *self.cells]) for part in Part}
        return {part: seconds for part, seconds in sums.items() if seconds > 0}

    def of_cell(self, index: int) -> float:
        """The seconds of a cell."""
        return sum(self.cells[index].values())

    @property
    def seconds(self) -> float:
        """From beginning to end: each cell begins, in their order, as soon as one of `at_once` places is free."""
        free = [0.0] * self.at_once
        for cell in self.cells:
            heapq.heapreplace(free, free[0] + sum(cell.values()))
        return sum(self.before.values()) + max(free)

    @property
    def large_levers(self) -> list[Lever]:
        """The settings that shorten the run most."""
        total = sum(self.parts().values())
        large = [lever for lever in self.levers if lever.seconds >= LARGE_SHARE * total]
        return sorted(large, key=lambda lever: -lever.seconds)

    def lines(self, on_cpu: bool) -> list[str]:
        """What a user should know: the time and its parts, how it was estimated, and how a long run gets shorter."""
        missing = [f"not in this time: {what}" for what in self.left_out[:MOST_NAMED]]
        if not self.parts():
            return ["time: not known", *missing] if missing else ["time: nothing is left to do"]
        parts = sorted(self.parts().items(), key=lambda part: -part[1])
        found = [f"time: about {about(self.seconds)}, from a few timed steps at the machine's present load"]
        if self.at_once > 1:
            found.append(f"{self.at_once} cells at a time, as if none slowed another; these are sums:")
        found += [_entry(part, seconds) for part, seconds in parts if seconds >= SMALL_SHARE * parts[0][1]]
        if self.scaled:
            found.append(f"less exact: {first_of(self.scaled, MOST_NAMED)}")
        found += missing
        if on_cpu and self.seconds > LONG_SECONDS and self.large_levers:
            found.append("Over an hour on the CPU. These parts of it are in proportion to a setting:")
            found += [_entry(lever.setting, lever.seconds) for lever in self.large_levers]
        return found


def _entry(what: str, seconds: float) -> str:
    """A line of a list."""
    return f"  {what:36} {about(seconds):>10}"


def summed(levers: Iterable[Lever]) -> list[Lever]:
    """One lever for each setting."""
    sums: dict[str, float] = {}
    for lever in levers:
        sums[lever.setting] = sums.get(lever.setting, 0.0) + lever.seconds
    return [Lever(setting, seconds) for setting, seconds in sums.items()]


def about(seconds: float) -> str:
    """A time in two digits at most: "20 s", "4 min", "2 h 10 min", "3 days"; "-" for none."""
    if not seconds:
        return "-"
    for below, unit, step, name in ((10, 1, 1, "s"), (92, 1, 5, "s"), (870, 60, 1, "min"), (3450, 60, 5, "min")):
        if seconds < below:
            return f"{max(step * round(seconds / unit / step), 1)} {name}"
    hours, minutes = divmod(10 * round(seconds / 600), 60)
    if hours < 10:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{round(seconds / 3600)} h" if seconds < 47.5 * 3600 else f"{round(seconds / 86400):,} days"
