"""Charts of a report as plain data for plotly, and what changes in them when the reader chooses something.

A chart is `figure` (plotly's data and layout), `choices` ({axis: {option: {"label", "traces", "axes"}}}: what an option
sets in each trace, in order, and in the axes of the layout), `fronts` (lines to add, by the chosen options), `labels`
(texts that the page's script places beside points) and `alt`, a text in its place. Names come from plugins and plotly
renders some HTML in texts, so all names are escaped here.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distillbench.errors import counted
from distillbench.reports.axes import known, scale, side_by_side
from distillbench.reports.labels import Label, Labels
from distillbench.reports.looks import GREY, Look
from distillbench.reports.words import listed, number, plus_minus

MOST_SERIES = 24  # with looks of their own; more are drawn as one series, named on hover
MOST_BARS = 60
OF_HARDWARE = ("seconds", "latency", "per_second", "joules", "mib")  # these costs have noise, so no Pareto front
DIFFERENT = 1.1  # largest value over smallest, from which on bars are drawn
OTHER = Look(GREY, "circle")

Chart = dict[str, Any]
Mean = tuple[float | None, float | None, float | None]  # mean, ends of its interval


@dataclass(frozen=True)
class Point:
    """A row of the summary as charts need it. `values` are costs by column; `scores` by name."""

    series: str
    label: str
    teacher: bool
    nfe: int | None
    values: dict[str, float | None]
    scores: dict[str, Mean]


@dataclass(frozen=True)
class Curve:
    """A method along its training, as means over its seeds with the smallest and the largest value: in order."""

    series: str
    nfe: int
    seeds: int
    points: list[tuple[dict[str, float | None], dict[str, Mean]]] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)  # of the budget, of each point


@dataclass(frozen=True)
class Style:
    """How series look: `leading` ones are emphasised. More than MOST_SERIES series have no looks of their own."""

    looks: Mapping[str, Look]
    labels: Labels
    leading: Collection[str] = ()

    def of(self, series: str) -> Look:
        return self.looks.get(series, OTHER)

    def is_strong(self, series: str) -> bool:
        return not self.leading or series in self.leading

    def score(self, name: str) -> str:
        """The title of an axis."""
        label = self.labels.label(name)
        return safe(f"{label.short} {label.arrow}".strip())

    def cost(self, name: str) -> str:
        return safe(with_unit(self.labels.label(name)))


def safe(text: object) -> str:
    """Text with HTML escaped, so that plotly shows it as it is."""
    return html.escape(str(text), quote=False)


def with_unit(label: Label) -> str:
    return f"{label.short}, {label.unit}" if label.unit else label.short


# --- scores over costs -----------------------------------------------------------------------------------------------


def quality(points: Sequence[Point], costs: Sequence[str], score: str, style: Style) -> Chart | None:
    """A score over a cost: points of a method are joined, with intervals and the Pareto front of the means.

    None if no student has both. Over a cost of training, the teacher is a line at its best value.
    """
    costs = [cost for cost in costs if _has(points, cost, score)]
    costs.sort(key=lambda cost: len({p.values.get(cost) for p in points if not p.teacher} - {None}) == 1)  # equal: last
    if not costs:
        return None
    scored = [p for p in points if p.scores[score][0] is not None and any(p.values.get(c) is not None for c in costs)]
    series = _series(scored, style)
    values = [[p.scores[score][0] for p in own] for own in series.values()]
    axis = {"title": _title(style.score(score)), **scale(values)}
    traces = [_points_trace(name, own, score, axis, style) for name, own in series.items()]
    teacher = _teachers_best(points, score) if all(cost.startswith("train_") for cost in costs) else None
    x = {cost: _cost_option(cost, list(series.values()), style, teacher is not None) for cost in costs}
    fronts = {cost: front for cost in costs if (front := _front(scored, cost, score, style.labels.label(score).arrow))}
    labels = _labels(series, style)
    if teacher is not None:
        value, text = teacher
        traces.append(_line_trace(text, value))
        labels.append({"trace": len(traces) - 1, "point": 1, "text": safe(text), "strong": False, "line": True})
        if value > 0 or axis["type"] == "linear":
            axis |= scale([*values, [value]])
    figure = _figure(traces, {"yaxis": axis})
    names = [name for name in series if not series[name][0].teacher]
    first = style.labels.label(costs[0])
    alt = (
        f"Chart of {style.labels.label(score).short} over {first.short} for {counted(len(names), 'method')}: "
        f"{listed(names)}. The table Comparison has its numbers."
    )
    return {"figure": figure, "choices": {"x": x}, "fronts": fronts, "labels": labels, "alt": alt}


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 6}


def _has(points: Sequence[Point], cost: str, score: str) -> bool:
    return any(p.values.get(cost) is not None and p.scores[score][0] is not None for p in points if not p.teacher)


def _series(points: Sequence[Point], style: Style) -> dict[str, list[Point]]:
    """The points of each series; all in one if there are too many series, the teacher's apart."""
    found: dict[str, list[Point]] = {}
    few = len({p.series for p in points}) <= MOST_SERIES
    for p in points:
        found.setdefault(p.series if few or p.teacher else "all methods", []).append(p)
    return found


def _points_trace(name: str, points: list[Point], score: str, axis: dict[str, Any], style: Style) -> dict[str, Any]:
    """The points of one series; their x come with the chosen cost."""
    look, joined = style.of(name), len(points) > 1 and name in style.looks
    strong = style.is_strong(name)
    size = (9 if strong else 7) if joined or strong else 6
    means = [p.scores[score] for p in points]
    short = style.labels.label(score).short
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": safe(name),
        "mode": "lines+markers" if joined else "markers",
        "line": {"color": look.colour, "width": 2 if strong else 1.2, "dash": "dot" if look.teacher else "solid"},
        "marker": {
            "color": look.colour,
            "symbol": look.symbol,
            "size": size,
        },
        "opacity": 1 if strong or look.teacher else 0.65,
        "y": [mean for mean, _, _ in means],
        "text": [safe(p.label) for p in points],
        "customdata": [f"{safe(short)} {plus_minus(*mean)}" for mean in means],
        "hovertemplate": "<b>%{text}</b><br>%{customdata}<br>%{hovertext}<extra></extra>",
    }
    if strong and any(low is not None for _, low, _ in means):
        trace["error_y"] = _error_bars(means, axis)
    return trace


def _error_bars(means: Sequence[Mean], axis: dict[str, Any]) -> dict[str, Any]:
    """Bars of the intervals; on a logarithmic axis their lower ends stay above zero."""
    floor = 10 ** (axis["range"][0] - 1) if axis["type"] == "log" else float("-inf")
    up = [None if m is None or h is None else h - m for m, _, h in means]
    down = [None if m is None or low is None else m - max(low, floor) for m, low, _ in means]
    return {
        "type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1, "width": 3,
        "visible": True,
    }  # fmt: skip


def _cost_option(cost: str, series: list[list[Point]], style: Style, line: bool) -> dict[str, Any]:
    values = [[p.values.get(cost) for p in own] for own in series]
    axis: dict[str, Any] = {"title": {"text": style.cost(cost)}, **scale(values, 0.12)}
    if cost == "nfe":
        ticks = sorted(set(known(values)))[:12]
        axis |= {"tickvals": ticks, "ticktext": [number(v) for v in ticks]}
    unit = style.labels.label(cost).unit
    traces: list[dict[str, Any]] = [
        {"x": moved, "hovertext": [f"{safe(style.labels.label(cost).short)} {number(v)} {unit}".rstrip() for v in own]}
        for moved, own in zip(side_by_side(values), values, strict=True)
    ]
    if line:
        ends = axis.get("range") or [0, 1]
        traces.append({"x": [10**e if axis["type"] == "log" else e for e in ends]})
    return {"label": style.cost(cost), "traces": traces, "axes": {"xaxis": axis}}


def _teachers_best(points: Sequence[Point], score: str) -> tuple[float, str] | None:
    """The value of the teacher with its most evaluations, and a text."""
    rows = [(p.nfe, mean, p.series) for p in points if p.teacher and p.nfe and (mean := p.scores[score][0]) is not None]
    if not rows:
        return None
    nfe, mean, series = max(rows)
    return mean, f"{series}, NFE {nfe}"


def _line_trace(name: str, value: float) -> dict[str, Any]:
    return {
        "type": "scatter", "name": safe(name), "mode": "lines", "y": [value, value], "hoverinfo": "skip",
        "line": {"color": GREY, "width": 1.2, "dash": "dot"},
    }  # fmt: skip


def _labels(series: Mapping[str, list[Point]], style: Style) -> list[dict[str, Any]]:
    """The name of each series beside its last point, and the evaluations beside all points of emphasised ones."""
    found = []
    for trace, (name, own) in enumerate(series.items()):
        if name not in style.looks:
            continue
        strong = style.is_strong(name)
        found.append({"trace": trace, "point": len(own) - 1, "text": safe(name), "strong": strong})
        if strong and len(own) > 1:
            found += [
                {"trace": trace, "point": i, "text": number(p.nfe), "strong": False, "small": True}
                for i, p in enumerate(own)
            ]
    return found


def _front(points: Sequence[Point], cost: str, score: str, arrow: str) -> dict[str, list[float]] | None:
    """The Pareto front of the means as a line, of costs that are counted and not measured."""
    if not arrow or any(word in cost for word in OF_HARDWARE):
        return None
    sign = 1 if arrow == "↓" else -1
    pairs = [(x, y) for p in points if (x := p.values.get(cost)) is not None and (y := p.scores[score][0]) is not None]
    front: list[tuple[float, float]] = []
    for x, y in sorted(pairs, key=lambda xy: (xy[0], sign * xy[1])):
        if not front or sign * y < sign * front[-1][1]:
            front.append((x, y))
    return {"x": [x for x, _ in front], "y": [y for _, y in front]} if len(pairs) > 1 else None


# --- along training --------------------------------------------------------------------------------------------------


def along_training(curves: Sequence[Curve], scores: Sequence[str], costs: Sequence[str], style: Style) -> Chart | None:
    """Scores over the cost of training so far: a line for each method, with a band over its seeds."""
    scores = [s for s in scores if any(v[s][0] is not None for curve in curves for _, v in curve.points)]
    costs = [c for c in costs if any(v.get(c) is not None for curve in curves for v, _ in curve.points)]
    if not scores or not costs:
        return None
    traces = [trace for curve in curves for trace in _curve_traces(curve, style)]
    x = {}
    for cost in costs:
        values = [[v.get(cost) for v, _ in curve.points] for curve in curves]
        axis = {"title": {"text": style.cost(cost)}, "type": "linear", "rangemode": "tozero"}
        both = [{"x": part} for own in values for part in ([*own, *own[::-1]], own)]
        x[cost] = {"label": style.cost(cost), "traces": both, "axes": {"xaxis": axis}}
    y = {}
    for score in scores:
        means = [[v[score] for _, v in curve.points] for curve in curves]
        axis = {"title": _title(style.score(score)), **scale([[m for m, _, _ in own] for own in means])}
        short = safe(style.labels.label(score).short)
        both = [part for own in means for part in _curve_values(own, short)]
        y[score] = {"label": short, "traces": both, "axes": {"yaxis": axis}}
    nfes = sorted({curve.nfe for curve in curves})
    shown = {
        str(n): {"label": f"{n}", "traces": [{"visible": c.nfe == n} for c in curves for _ in (0, 1)], "axes": {}}
        for n in nfes
    }
    labels = [
        {"trace": 2 * i + 1, "point": len(c.points) - 1, "text": safe(c.series), "strong": style.is_strong(c.series)}
        for i, c in enumerate(curves)
    ]
    alt = (
        f"Chart of scores along training for {counted(len({c.series for c in curves}), 'method')}: a line each, "
        "with a band from the smallest to the largest value over seeds."
    )
    figure = _figure(traces, {})
    figure["layout"]["height"] = 420
    return {"figure": figure, "choices": {"x": x, "y": y, "nfe": shown}, "fronts": {}, "labels": labels, "alt": alt}


def _curve_traces(curve: Curve, style: Style) -> list[dict[str, Any]]:
    """The band and the line of a curve."""
    look, strong = style.of(curve.series), style.is_strong(curve.series)
    name = safe(curve.series)
    band = {
        "type": "scatter", "name": name, "mode": "none", "fill": "toself", "fillcolor": look.colour,
        "opacity": 0.16 if strong else 0.08, "hoverinfo": "skip", "line": {"width": 0},
    }  # fmt: skip
    text = f"{name}, NFE {curve.nfe}, {counted(curve.seeds, 'seed')}"
    line = {
        "type": "scatter", "name": name, "mode": "lines+markers",
        "line": {"color": look.colour, "width": 2 if strong else 1.2},
        "marker": {"color": look.colour, "symbol": look.symbol, "size": 7 if strong else 5},
        "opacity": 1 if strong else 0.55,
        "text": [text] * len(curve.points),
        "hovertemplate": "<b>%{text}</b><br>%{customdata}<extra></extra>",
    }  # fmt: skip
    return [band, line]


def _curve_values(means: Sequence[Mean], short: str) -> list[dict[str, Any]]:
    lows, highs = [low for _, low, _ in means], [high for _, _, high in means]
    told = [
        f"{short} {number(m)}" + (f", from {number(low)} to {number(high)}" if low != high else "")
        for m, low, high in means
    ]
    return [{"y": [*highs, *lows[::-1]]}, {"y": [m for m, _, _ in means], "customdata": told}]


# --- bars ------------------------------------------------------------------------------------------------------------


def bars(points: Sequence[Point], columns: Sequence[str], style: Style) -> tuple[Chart | None, list[tuple[str, str]]]:
    """Bars of the costs that differ between rows, and (column, text) of those that do not.

    Costs of training are those of a method, as its rows share them.
    """
    choices, same = {}, []
    for column in columns:
        found = _bars(points, column)
        values = list(found.values())
        if not values:
            continue
        low, high = min(v for v, _ in values), max(v for v, _ in values)
        if len(values) > 1 and high > DIFFERENT * low:
            choices[column] = _bar_option(column, found, style)
        else:
            unit = style.labels.label(column).unit
            text = " to ".join(dict.fromkeys((number(low), number(high))))
            same.append((style.labels.label(column).short, f"{text} {unit}".strip()))
    if not choices:
        return None, same
    most = max(len(option["traces"][0]["y"]) for option in choices.values())
    trace = {
        "type": "bar", "orientation": "h", "textposition": "outside", "cliponaxis": False,
        "hovertemplate": "<b>%{y}</b><br>%{text}<extra></extra>",
    }  # fmt: skip
    axes = {"yaxis": {"type": "category", "ticks": ""}, "xaxis": {"type": "linear", "rangemode": "tozero"}}
    figure = _figure([trace], axes)
    figure["layout"] |= {"height": 80 + 24 * most, "bargap": 0.35, "margin": {"l": 62, "r": 60, "t": 14, "b": 48}}
    alt = f"Bars of {listed(style.labels.label(column).short for column in choices)} for each row."
    return {"figure": figure, "choices": {"x": choices}, "fronts": {}, "labels": [], "alt": alt}, same


def _bars(points: Sequence[Point], column: str) -> dict[str, tuple[float, str]]:
    """(value, series) by the name of the bar."""
    found: dict[str, tuple[float, str]] = {}
    for p in points:
        value = p.values.get(column)
        if value is not None:
            found.setdefault(p.series if column.startswith("train_") else p.label, (value, p.series))
    return found


def _bar_option(column: str, found: dict[str, tuple[float, str]], style: Style) -> dict[str, Any]:
    shown = dict(list(found.items())[:MOST_BARS])
    values = [value for value, _ in shown.values()]
    trace = {
        "x": values,
        "y": [safe(name) for name in shown],
        "text": [number(value) for value in values],
        "marker": {"color": [style.of(series).colour for _, series in shown.values()]},
    }
    left = len(found) - len(shown)
    title = style.cost(column) + (f" (the first {MOST_BARS} of {len(found):,} bars)" if left else "")
    axes = {"xaxis": {"title": {"text": title}}, "yaxis": {"autorange": "reversed"}}
    return {"label": style.cost(column), "traces": [trace], "axes": axes}


# --- the figure ------------------------------------------------------------------------------------------------------


def _figure(traces: list[dict[str, Any]], axes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Plain data of a figure. The page's script sets the theme's colours of text and lines, and places labels."""
    common = {"automargin": True, "zeroline": False, "exponentformat": "power"}
    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "autosize": True,
        "height": 330, "margin": {"l": 62, "r": 14, "t": 14, "b": 48}, "hovermode": "closest", "showlegend": False,
        "dragmode": False,
        "xaxis": {**common, **axes.get("xaxis", {})},
        "yaxis": {**common, **axes.get("yaxis", {})},
        "font": {"size": 12},
    }  # fmt: skip
    return {"data": traces, "layout": layout}
