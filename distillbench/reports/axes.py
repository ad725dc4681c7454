"""Axes of charts: logarithmic where the values ask for it, and points of equal cost side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

Values = Sequence[Sequence[float | None]]  # of each series

SPAN = 4.0  # largest value over smallest, from which on an axis is logarithmic
SAME = 0.02  # distance of points on a cost axis, as a part of it, below which they are drawn side by side
STEP = 0.014  # distance of points side by side, as a part of the axis


def known(values: Values) -> list[float]:
    return [v for own in values for v in own if v is not None]


def is_log(values: Values) -> bool:
    """Whether all values are positive and the largest is more than SPAN times the smallest."""
    found = known(values)
    return bool(found) and min(found) > 0 and max(found) > SPAN * min(found)


def scale(values: Values, room: float = 0.08) -> dict[str, Any]:
    """An axis of plotly over `values`, with `room` at both ends as a part of its length."""
    found = known(values)
    if not found:
        return {"type": "linear"}
    low, high = min(found), max(found)
    if is_log(values):
        first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
        digits = (1, 2, 5) if high < 300 * low else (1,)
        ticks = [10.0**e * digit for e in range(first, last + 1) for digit in digits]
        ends, pad = (math.log10(low), math.log10(high)), room * math.log10(high / low)
        return {
            "type": "log", "tickvals": ticks, "ticktext": [tick(t) for t in ticks],
            "range": [ends[0] - pad, ends[1] + pad],
        }  # fmt: skip
    pad = room * (high - low) or abs(high) * 0.5 or 1.0
    return {"type": "linear", "tickvals": None, "ticktext": None, "tickformat": ",", "range": [low - pad, high + pad]}


def tick(value: float) -> str:
    """A short number on an axis: 0.25, 1,000, 50k, 2.5M."""
    for size, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= size:
            return f"{value / unit:,.6g}{letter}"
    return f"{value:,.6g}"


def side_by_side(values: Values) -> list[list[float | None]]:
    """The values, with those moved apart that nearly coincide in different series; each keeps the order of series."""
    log = is_log(values)
    found = known(values)
    if len(found) < 2:
        return [list(own) for own in values]
    place = (lambda v: math.log(v)) if log else (lambda v: v)
    back = (lambda p: math.exp(p)) if log else (lambda p: p)
    length = place(max(found)) - place(min(found)) or abs(place(max(found))) or 1.0
    points = sorted((place(v), s, i) for s, own in enumerate(values) for i, v in enumerate(own) if v is not None)
    clusters: list[list[tuple[float, int, int]]] = []
    for point in points:
        if clusters and point[0] - clusters[-1][0][0] <= SAME * length:
            clusters[-1].append(point)
        else:
            clusters.append([point])
    centres = [sum(p for p, _, _ in one) / len(one) for one in clusters]
    gaps = [b - a for a, b in itertools.pairwise(centres)]
    widest = 0.6 * min(gaps) if gaps else length
    moved = [list(own) for own in values]
    for one, centre in zip(clusters, centres, strict=True):
        series = sorted({s for _, s, _ in one})
        step = min(STEP * length, widest / max(1, len(series) - 1))
        if len(series) > 1:
            for _, s, i in one:
                moved[s][i] = back(centre + step * (series.index(s) - (len(series) - 1) / 2))
    return moved
