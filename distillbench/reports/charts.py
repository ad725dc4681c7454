"""Plotly figures of a report, and what changes in them when the reader chooses another score or cost.

A chart is plain data: `figure` (plotly's data and layout), `choices` ({axis: {option: {"label", "traces", "axes"}}}:
what an option sets in each trace, in order, and in the axes of the layout) and `fronts` (lines to add, by the chosen
options). Names come from plugins and plotly renders some HTML in texts, so all names are escaped here.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from distillbench.records.statistics import TEACHER
from distillbench.reports.words import heading, number

COLOURS = ["#3f7fd6", "#d4702b", "#2c9a6b", "#b3559f", "#c5443f", "#7f6bd0", "#a07d16", "#2597ad"]  # on white and black
NEUTRAL = "#858b95"
SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "hexagon"]
MOST_SERIES = 24  # with colours of their own; more are drawn as one series, named on hover
MOST_BARS = 60
COSTS_ALONG = (
    "train_seconds",
    "train_images",
    "train_teacher_nfe",
    "train_student_nfe",
    "train_tflops",
    "train_joules",
)
OF_HARDWARE = ("seconds", "latency", "per_second", "joules", "mib")  # compared only within one device

Chart = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A row of the summary as charts need it. `values` are costs by column; `scores` (mean, low, high) by name."""

    series: str
    label: str
    teacher: bool
    device: str
    nfe: int | None
    values: dict[str, float | None]
    scores: dict[str, tuple[float | None, float | None, float | None]]


@dataclass(frozen=True)
class Line:
    """A student along its training: points of (costs by column, scores by name), in order."""

    series: str
    nfe: int
    label: str
    points: list[tuple[dict[str, float | None], dict[str, float | None]]] = field(default_factory=list)


def safe(text: object) -> str:
    """Text with HTML escaped, so that plotly shows it as it is."""
    return html.escape(str(text), quote=False)


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and symbol of each series for all charts of a section; teachers are grey."""
    found, students = {}, 0
    for name in names:
        if name.startswith(TEACHER):
            found[name] = (NEUTRAL, "x")
        else:
            found[name] = (COLOURS[students % len(COLOURS)], SYMBOLS[students // len(COLOURS) % len(SYMBOLS)])
            students += 1
    return found


def quality(
    points: Sequence[Point], costs: Sequence[str], directions: dict[str, str], style: dict[str, tuple[str, str]]
) -> Chart | None:
    """Scores over a cost, with intervals and the Pareto front of the means. None if no point has both."""
    costs = [cost for cost in costs if any(p.values.get(cost) is not None for p in points)]
    costs.sort(key=lambda cost: len({p.values.get(cost) for p in points} - {None}) == 1)  # equal for all: last
    scores = [score for score in directions if any(p.scores[score][0] is not None for p in points)]
    if not costs or not scores:
        return None
    points = [p for p in points if any(p.values.get(cost) is not None for cost in costs)]
    series = _series(points)
    connected = not any(cost.startswith("train_") for cost in costs)  # all rows of a student have its training cost
    traces = [_quality_trace(name, own, connected, style) for name, own in series.items()]
    x = {cost: _cost_option(cost, [[p.values.get(cost) for p in own] for own in series.values()]) for cost in costs}
    y = {score: _score_option(score, directions[score], list(series.values())) for score in scores}
    fronts = {f"{cost}|{score}": _fronts(points, cost, score, directions[score]) for cost in costs for score in scores}
    found = {options: lines for options, lines in fronts.items() if lines}
    return {"figure": _figure(traces), "choices": {"x": x, "y": y}, "fronts": found}


def _quality_trace(name: str, points: list[Point], connected: bool, style: dict[str, tuple[str, str]]) -> go.Scatter:
    """The points of one series; the values of its axes come with the chosen options."""
    known = name in style
    colour, symbol = style.get(name, (NEUTRAL, "circle"))
    return go.Scatter(
        name=safe(name),
        mode="lines+markers" if connected and len(points) > 1 and known else "markers",
        line={"color": colour, "width": 1.5, "dash": "dot" if name.startswith(TEACHER) else "solid"},
        marker={"color": colour, "symbol": symbol, "size": 8 if known else 5},
        opacity=1 if known else 0.6,
        text=[safe(p.label) for p in points],
        hovertemplate="<b>%{text}</b><br>%{customdata}<extra></extra>",
    )


def along_training(
    lines: Sequence[Line], directions: dict[str, str], style: dict[str, tuple[str, str]]
) -> Chart | None:
    """Scores over the cost of training so far, a line for each student. None without scores or costs."""
    scores = [s for s in directions if any(v[s] is not None for line in lines for _, v in line.points)]
    costs = [c for c in COSTS_ALONG if any(v.get(c) is not None for line in lines for v, _ in line.points)]
    if not scores or not costs:
        return None
    nfes = sorted({line.nfe for line in lines})
    dashes = dict(zip(nfes, itertools.cycle(_DASHES), strict=False))
    traces = [_line_trace(line, dashes[line.nfe], style) for line in lines]
    x = {c: _cost_option(c, [[v.get(c) for v, _ in line.points] for line in lines]) for c in costs}
    for option in x.values():
        option["axes"]["xaxis"] |= {"type": "linear", "tickvals": None, "ticktext": None, "rangemode": "tozero"}
    y = {}
    for score in scores:
        values = [[v[score] for _, v in line.points] for line in lines]
        axis = {"title": {"text": _score_title(score, directions[score])}, **_scale(values)}
        y[score] = {"label": score, "traces": [{"y": v} for v in values], "axes": {"yaxis": axis}}
    shown = {
        str(n): {"label": f"{n}", "traces": [{"visible": line.nfe == n} for line in lines], "axes": {}} for n in nfes
    }
    if len(nfes) > 1:
        shown["all"] = {"label": "all", "traces": [{"visible": True} for _ in lines], "axes": {}}
    return {"figure": _figure(traces), "choices": {"x": x, "y": y, "nfe": shown}, "fronts": {}}


def _line_trace(line: Line, dash: str, style: dict[str, tuple[str, str]]) -> go.Scatter:
    colour, symbol = style.get(line.series, (NEUTRAL, "circle"))
    return go.Scatter(
        name=safe(line.series),
        mode="lines+markers",
        line={"color": colour, "width": 1.5, "dash": dash},
        marker={"color": colour, "symbol": symbol, "size": 6},
        text=[safe(line.label)] * len(line.points),
        hovertemplate="<b>%{text}</b><br>%{x:,.4~g}: %{y:,.4~g}<extra></extra>",
    )


_DASHES = ["solid", "dash", "dot", "dashdot", "longdash"]


@dataclass(frozen=True)
class _Bar:
    name: str
    value: float
    series: str
    device: str


def bars(points: Sequence[Point], columns: Sequence[str], style: dict[str, tuple[str, str]]) -> Chart | None:
    """A bar for each row with a value; for costs of training one for each method, as its rows share them."""
    of_column = {column: found for column in columns if (found := _bars(points, column))}
    if not of_column:
        return None
    choices = {column: _bar_option(column, found, style) for column, found in of_column.items()}
    most = max(min(len(found), MOST_BARS) for found in of_column.values())
    bar = go.Bar(orientation="h", textposition="auto", hovertemplate="<b>%{customdata}</b><br>%{text}<extra></extra>")
    figure = _figure([bar])
    figure["layout"] |= {"height": 80 + 26 * most, "bargap": 0.3, "hovermode": "closest"}
    figure["layout"]["yaxis"] |= {"type": "category", "ticks": ""}
    figure["layout"]["xaxis"] |= {"type": "linear", "rangemode": "tozero"}
    return {"figure": figure, "choices": {"x": choices}, "fronts": {}}


def _bars(points: Sequence[Point], column: str) -> list[_Bar]:
    found: dict[str, _Bar] = {}
    for p in points:
        value = p.values.get(column)
        if value is not None:
            name = p.series if column.startswith("train_") else p.label
            if name in found and found[name].device != p.device:
                name = f"{name} · {p.device}"
            found.setdefault(name, _Bar(name, value, p.series, p.device))
    return list(found.values())


def _bar_option(column: str, found: list[_Bar], style: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """The first MOST_BARS bars; plotly draws the first one at the bottom."""
    shown = found[:MOST_BARS][::-1]
    more = f" (the first {MOST_BARS} of {len(found):,})" if len(found) > MOST_BARS else ""
    trace = {
        "x": [bar.value for bar in shown],
        "y": [safe(bar.name if len(bar.name) <= 48 else f"{bar.name[:23]}…{bar.name[-24:]}") for bar in shown],
        "text": [number(bar.value) for bar in shown],
        "customdata": [f"{safe(bar.name)}<br>{safe(bar.device)}" for bar in shown],
        "marker": {"color": [style.get(bar.series, (NEUTRAL, ""))[0] for bar in shown]},
    }
    axes = {"xaxis": {"title": {"text": heading(column) + more}}}
    return {"label": heading(column), "traces": [trace], "axes": axes}


def _series(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by series, in order of their evaluations; one series of all if there are more than MOST_SERIES."""
    series: dict[str, list[Point]] = {}
    for p in points:
        series.setdefault(p.series, []).append(p)
    if len(series) > MOST_SERIES:
        return {f"{len(points):,} rows": list(points)}
    return {name: sorted(own, key=lambda p: p.nfe or 0) for name, own in series.items()}


def _cost_option(cost: str, values: list[list[float | None]]) -> dict[str, Any]:
    axis: dict[str, Any] = {"title": {"text": heading(cost)}, **_scale(values, 4)}
    if cost == "nfe":
        axis["tickvals"] = sorted({v for own in values for v in own if v is not None})[:12]
        axis |= {"type": "log", "ticktext": [number(v) for v in axis["tickvals"]]}
    return {"label": heading(cost), "traces": [{"x": own} for own in values], "axes": {"xaxis": axis}}


def _score_option(score: str, direction: str, series: list[list[Point]]) -> dict[str, Any]:
    traces = []
    for own in series:
        triples = [p.scores[score] for p in own]
        trace: dict[str, Any] = {"y": [mean for mean, _, _ in triples]}
        trace["customdata"] = [f"{safe(score)} {_with_interval(*triple)}" for triple in triples]
        trace["error_y"] = {"visible": False}
        if any(low is not None for _, low, _ in triples):
            up = [None if m is None or h is None else h - m for m, _, h in triples]
            down = [None if m is None or low is None else m - low for m, low, _ in triples]
            trace["error_y"] = {
                "type": "data", "symmetric": False, "array": up, "arrayminus": down,
                "thickness": 1, "width": 3, "visible": True,
            }  # fmt: skip
        traces.append(trace)
    axis = {"title": {"text": _score_title(score, direction)}, **_scale([t["y"] for t in traces])}
    return {"label": score, "traces": traces, "axes": {"yaxis": axis}}


def _with_interval(mean: float | None, low: float | None, high: float | None) -> str:
    ends = f" [{number(low, low, high)}, {number(high, low, high)}]" if low is not None and high is not None else ""
    return number(mean, low, high) + ends


def _score_title(score: str, direction: str) -> str:
    arrow = {"lower": " ↓", "higher": " ↑"}.get(direction, "")
    return f"{safe(score)}{arrow}"


def _scale(values: Sequence[Sequence[float | None]], span: float = 8) -> dict[str, Any]:
    """An axis: logarithmic if all values are positive and the largest is more than `span` times the smallest."""
    known = [v for own in values for v in own if v is not None]
    if not known or min(known) <= 0 or max(known) <= span * min(known):
        same = bool(known) and min(known) == max(known) and min(known) >= 0
        return {"type": "linear", "tickvals": None, "ticktext": None, "rangemode": "tozero" if same else "normal"}
    first, last = math.floor(math.log10(min(known))) - 1, math.ceil(math.log10(max(known))) + 1
    digits = (1, 2, 5) if max(known) < 500 * min(known) else (1,)
    ticks = [10.0**e * digit for e in range(first, last + 1) for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,.10g}" for tick in ticks], "rangemode": "normal"}


def _fronts(points: Sequence[Point], cost: str, score: str, direction: str) -> list[dict[str, list[float]]]:
    """The Pareto front of the means as lines: one, or one for each device if the cost depends on the hardware."""
    if direction not in ("lower", "higher"):
        return []
    devices = {p.device for p in points} if any(word in cost for word in OF_HARDWARE) else {None}
    sign = 1 if direction == "lower" else -1
    found = []
    for device in sorted(devices, key=str):
        known = [
            (x, y)
            for p in points
            if (device is None or p.device == device)
            and (x := p.values.get(cost)) is not None
            and (y := p.scores[score][0]) is not None
        ]
        front: list[tuple[float, float]] = []
        for x, y in sorted(known, key=lambda xy: (xy[0], sign * xy[1])):
            if not front or sign * y < sign * front[-1][1]:
                front.append((x, y))
        if len(known) > 1:
            found.append({"x": [x for x, _ in front], "y": [y for _, y in front]})
    return found


def _figure(traces: list[Any]) -> dict[str, Any]:
    """Plain data of a figure. The page's script sets the theme's colours of text and lines, and draws the legend."""
    layout = {
        "template": None, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "autosize": True,
        "height": 330, "margin": {"l": 62, "r": 14, "t": 14, "b": 48}, "hovermode": "closest", "showlegend": False,
        "xaxis": {"automargin": True, "zeroline": False, "exponentformat": "power"},
        "yaxis": {"automargin": True, "zeroline": False, "exponentformat": "power"},
        "font": {"size": 12},
    }  # fmt: skip
    return json.loads(go.Figure(traces, layout).to_json())
