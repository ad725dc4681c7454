"""The look of figures: letters, widths, axes, legends, and texts beside points."""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from distillbench.reports.axes import is_log, tick
from distillbench.reports.paper_style import Page

POINTS = 72.0  # of matplotlib in an inch
MOST_COLUMNS = 8  # of a legend
_STYLE: dict[str, Any] = {
    "font.family": ["STIXGeneral", "DejaVu Sans"],  # both come with matplotlib; the first goes with Times and its kin
    "mathtext.fontset": "stix",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "grid.color": "#e2e2e2",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "text.parse_math": False,  # a "$" in a name is no formula
    "axes.formatter.use_mathtext": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "distillbench",
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
    "figure.dpi": 100,
}
HEIGHT = 0.62  # of the axes of a figure in one column, as a part of its width, at most TALLEST inches
TALLEST = 2.6


@contextmanager
def style(page: Page) -> Iterator[None]:
    """matplotlib's defaults and our style while drawing, whatever the user has configured."""
    sizes = {"font.size": page.letters, "legend.fontsize": page.letters - 0.5, "axes.titlesize": page.letters}
    sizes |= {"xtick.labelsize": page.letters - 0.5, "ytick.labelsize": page.letters - 0.5}
    with matplotlib.style.context(["default", _STYLE | sizes]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def plain(text: str, longest: int = 60) -> str:
    """Text on one line, without characters that XML forbids, at most `longest` long; matplotlib hides a leading "_"."""
    kinds = ("Cc", "Cs", "Cn", "Co", "Zl", "Zp")
    text = " ".join("".join(" " if unicodedata.category(c) in kinds else c for c in str(text)).split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return f" {text}" if text.startswith("_") else text


def new_figure(page: Page, panels: int = 1) -> tuple[Figure, list[Axes]]:
    width = page.column if panels == 1 else page.text
    height = min(HEIGHT * width, TALLEST) if panels == 1 else min(TALLEST, 1.3 * width / panels)
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.02))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)
    return figure, list(axes[0])


def scale(axes: Axes, which: str, values: Sequence[float], ticks: Sequence[float] = (), room: float = 0.06) -> None:
    """Scale an axis to its values, with `room` at its ends, by the rule of the report's charts. Ticks are numbers.

    Intervals that go on beyond the axis are cut: on a logarithmic one, some would go to infinity.
    """
    axis = axes.xaxis if which == "x" else axes.yaxis
    good = [v for v in values if math.isfinite(v)]
    set_limits = axes.set_xlim if which == "x" else axes.set_ylim
    if good and is_log([good]):
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        span = max(good) / min(good)
        if span < 300:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 4.0, 6.0) if span < 12 else (1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
        set_limits(min(good) / span**room, max(good) * span**room)
    elif good:
        pad = room * (max(good) - min(good)) or 0.5 * abs(max(good)) or 1.0
        set_limits(min(good) - pad, max(good) + pad)
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    if ticks:
        axis.set_ticks(list(ticks))
        axis.set_minor_locator(NullLocator())


def legend(figure: Figure, drawn: dict[str, Any]) -> None:
    """A legend below, in as many columns as fit; the figure is made higher by its lines."""
    if not drawn:
        return
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for columns in range(min(len(drawn), MOST_COLUMNS), 0, -1):
        found = figure.legend(
            list(drawn.values()), list(drawn), loc="outside lower center", frameon=False, ncols=columns,
            columnspacing=1.2, handlelength=2.0, handletextpad=0.5, labelspacing=0.25, borderpad=0.1,
        )  # fmt: skip
        box = found.get_window_extent(renderer)
        if box.width <= 0.98 * figure.bbox.width or columns == 1:
            figure.set_figheight(figure.get_figheight() + box.height / figure.dpi + 0.06)
            return
        found.remove()


def name_points(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write texts beside points (x, y, text, colour) where there is room for them; others are left out."""
    figure.draw_without_rendering()
    size, pixels = matplotlib.rcParams["font.size"] - 2, figure.dpi / POINTS
    places = [tuple(axes.transData.transform((x, y))) for x, y, _, _ in points]
    taken = [(x - 3 * pixels, y - 3 * pixels, x + 3 * pixels, y + 3 * pixels) for x, y in places]
    for (px, py), (x, y, text, colour) in zip(places, points, strict=True):
        width, height = 0.55 * size * len(text) * pixels, 0.8 * size * pixels
        for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            cx, cy = px + right * (3.2 * pixels + width / 2), py + up * (3.2 * pixels + height / 2)
            box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
            if not any(box[0] < c and box[2] > a and box[1] < d and box[3] > b for a, b, c, d in taken):
                taken.append(box)
                axes.annotate(
                    text, (x, y), xytext=((cx - px) / pixels, (cy - py) / pixels), textcoords="offset points",
                    fontsize=size, color=colour, ha="center", va="center",
                )  # fmt: skip
                break
