"""The history of a method: what every run measured of it, and how its score changed from run to run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from distillbench.reports.axes import is_log
from distillbench.reports.entries import Entry
from distillbench.reports.groups import Group, Place, compared, heading
from distillbench.reports.looks import PALETTE, SYMBOLS
from distillbench.reports.tables import Cell, Column, Comparison, Table, comparison_table
from distillbench.reports.words import brief, plus_minus

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 220, 60, 20, 16, 34  # of a chart, in units of its view box
Measured = tuple[str, str, str, str, Group]  # a run's name, page, date and version, and the method's rows in it


@dataclass(frozen=True)
class Mark:
    """A mean with its interval at a place of a chart."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True)
class Line:
    """The means at one number of evaluations, from the oldest run to the newest."""

    nfe: int
    colour: str
    symbol: str
    marks: list[Mark]

    @property
    def path(self) -> str:
        return " ".join(f"{mark.x:.1f},{mark.y:.1f}" for mark in self.marks)


@dataclass(frozen=True)
class Chart:
    """A score over runs. `ticks`: (place, text) of the score's axis; `runs`: (place, name)."""

    alt: str
    lines: list[Line]
    ticks: list[tuple[float, str]]
    runs: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT


@dataclass(frozen=True)
class History:
    """The rows of a method that may be compared with each other, of all runs, the newest first."""

    title: str
    summary: str
    heading: str  # of the score in the chart
    table: Table
    chart: Chart | None  # with two runs at least
    runs: list[str] = field(default_factory=list)


def history(measured: Sequence[Measured]) -> list[History]:
    """The histories of one method, one for each group of rows that may be compared. The newest run comes first."""
    places: dict[Place, list[Measured]] = {}
    for one in measured:
        places.setdefault(one[-1].place, []).append(one)
    return [_history(f"h{number}", several) for number, several in enumerate(places.values(), 1)]


def _history(id_: str, measured: Sequence[Measured]) -> History:
    group = measured[0][-1]
    scores = {score: direction for one in measured for score, direction in one[-1].scores.items()}
    entries = [(one, entry) for one in measured for entry in one[-1].entries]
    leads = {score: [None] * len(entries) for score in scores}
    table = comparison_table(id_, Comparison([entry for _, entry in entries], scores, leads, True, group.labels))
    _add_runs(table, [one for one, _ in entries])
    main = next((score for score, direction in scores.items() if direction != "none"), "")
    label = group.labels.label(main)
    more = [f"protocol {group.facts['protocol']}"] if group.facts["protocol"] else []
    return History(
        title=heading(group),
        summary=" · ".join([compared(group), *more]),
        heading=f"{label.short} {label.arrow}".strip() if main else "",
        table=table,
        chart=_chart(measured, main, label.short) if main else None,
        runs=[one[0] for one in measured],
    )


def _add_runs(table: Table, measured: Sequence[Measured]) -> None:
    """Put the run, its date and its version in front."""
    at = next(i for i, column in enumerate(table.columns) if column.name == "run")
    run = table.columns.pop(at)
    run.shown = True
    about = [
        run,
        Column("date", "date", "the day on which the run's folder was written", True, True, "descending"),
        Column("version", "version", "commit or version of distillbench", True, True),
    ]
    for row, (name, page, date, version, _) in zip(table.rows, measured, strict=True):
        row.pop(at)
        row[:0] = [
            Cell(name, name, href=page),
            Cell(date or "–", date or None, kind="" if date else "none", title="" if date else "not recorded"),
            Cell(version or "–", version or None, kind="" if version else "none"),
        ]
    table.columns[:0] = about
    for column in table.columns:
        column.shown = column.shown and column.name != "method"


def _chart(measured: Sequence[Measured], score: str, name: str) -> Chart | None:
    if len(measured) < 2:
        return None
    runs = list(reversed(measured))  # the oldest first
    points = [(at, entry) for at, one in enumerate(runs) for entry in one[-1].entries if _known(entry, score)]
    ends = [_ends(entry, score) for _, entry in points]
    if not points:
        return None
    flat = [[value for three in ends for value in three]]
    log = is_log(flat)
    place = math.log if log else float
    low, high = place(min(flat[0])), place(max(flat[0]))
    room = (high - low) or abs(high) or 1.0

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (0.5 if high == low else (high - place(value)) / room)

    def x(at: int) -> float:
        return LEFT + 40 + (WIDTH - LEFT - RIGHT - 80) * at / (len(runs) - 1)

    lines = []
    evaluations = sorted({int(entry.values["nfe"]) for _, entry in points})
    for number, nfe in enumerate(evaluations):
        aside = 7 * (number - (len(evaluations) - 1) / 2)  # so that intervals do not cover each other
        marks = [
            Mark(
                x(at) + aside,
                y(mean),
                y(below),
                y(above),
                f"{runs[at][0]}, NFE {nfe}: {plus_minus(mean, below, above)}",
            )
            for (at, entry), (mean, below, above) in zip(points, ends, strict=True)
            if entry.values["nfe"] == nfe
        ]
        lines.append(Line(nfe, PALETTE[number % len(PALETTE)], SYMBOLS[number % len(SYMBOLS)], marks))
    middle = math.exp((low + high) / 2) if log else (low + high) / 2
    values = dict.fromkeys([min(flat[0]), middle, max(flat[0])])
    alt = f"Chart of {name} over {len(runs)} runs, from {runs[0][0]} to {runs[-1][0]}. The table below has its numbers."
    names = [(x(at), _short(" ".join(filter(None, (one[0], one[2]))))) for at, one in enumerate(runs)]
    return Chart(
        alt, lines, [(y(value), brief(value)) for value in values], names if len(runs) <= 6 else _ends_of(names)
    )


def _ends_of(names: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    return [names[0], names[-1]]


def _short(text: str, longest: int = 24) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _known(entry: Entry, score: str) -> bool:
    value = entry.values.get(score)
    return value is not None and math.isfinite(value) and entry.values["nfe"] is not None


def _ends(entry: Entry, score: str) -> tuple[float, float, float]:
    """The mean and the ends of its interval over training seeds, which are the mean itself without one."""
    mean = float(entry.values[score])
    low, high, source = entry.interval(score)
    known = source == "training" and low is not None and high is not None
    return (mean, float(low), float(high)) if known else (mean, mean, mean)  # type: ignore[arg-type]
