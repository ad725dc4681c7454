"""Colours and markers of methods, the same in figures and in the HTML report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from distillbench.records.statistics import TEACHER

# Okabe and Ito's colours, distinct for all kinds of colour vision; without yellow, which is too pale on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX<>h"  # of matplotlib; numbers of colours and markers have no common divisor: 70 pairs differ
SYMBOLS = (  # the same, of plotly
    "circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "triangle-left", "triangle-right",
    "hexagon",
)  # fmt: skip
GREY = "#777777"  # the teacher
TEACHERS_SYMBOL = "star"


@dataclass(frozen=True)
class Look:
    colour: str
    symbol: str  # of plotly
    teacher: bool = False


def places(names: Iterable[str]) -> dict[str, int]:
    """The place of each method in PALETTE and MARKERS, by name, so that the order of rows does not matter."""
    return {name: i for i, name in enumerate(sorted({n for n in names if not n.startswith(TEACHER)}))}


def looks(methods: Mapping[str, str], every: Iterable[str]) -> dict[str, Look]:
    """The look of each series. `methods`: the method of each series; `every`: all methods of the report.

    Series of one method, such as with other settings, have its colour and different markers.
    """
    place, seen, found = places(every), dict.fromkeys(methods.values(), 0), {}
    for series, method in methods.items():
        if method.startswith(TEACHER):
            found[series] = Look(GREY, TEACHERS_SYMBOL, True)
            continue
        i = place[method]
        found[series] = Look(PALETTE[i % len(PALETTE)], SYMBOLS[(i + seen[method]) % len(SYMBOLS)])
        seen[method] += 1
    return found
