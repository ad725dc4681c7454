"""Figures for papers as PDF, SVG and PNG, drawn by matplotlib; the same run gives the same bytes."""

from __future__ import annotations

import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from distillbench.errors import unknown
from distillbench.records.statistics import TEACHER, arrow
from distillbench.reports.looks import GREY, MARKERS, PALETTE, places
from distillbench.reports.paper_data import GROUP, HEADINGS, SummaryData, comparable_sets
from distillbench.storage.files import write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from distillbench.reports.runs import RunData

FORMATS = ("pdf", "svg", "png")
AXES = {"nfe": "nfe", "latency": "sample_latency_p50_ms", "training": "train_seconds"}  # end of a file's name: column
LINES = ("-", "--", "-.", ":")
_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "text.parse_math": False,  # a "$" in a name is no formula
    "axes.formatter.use_mathtext": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "distillbench",
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "figure.dpi": 100,
}
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"Creator": "distillbench", "Producer": None, "CreationDate": None, "ModDate": None},
    "svg": {"Creator": "distillbench", "Date": None},
    "png": {"Software": "distillbench"},
}
_ALONG = [
    *GROUP,
    "method",
    "settings",
    "nfe",
    "training_seed",
    "fraction",
    "train_images",
]
_MOST_ROWS, _MOST_COLUMNS = 40, 10  # of a grid of samples


def write_figures(runs: Sequence[RunData], folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Draw the figures of `runs` into `folder` (created if missing) in all `formats`; returns the written files.

    SCORE-nfe, SCORE-latency, SCORE-training: a score of the summary over evaluations, latency and seconds of training,
    with its interval over training seeds, if there is one. SCORE-along: over training. samples: images of every method
    and the teacher from the same noise. A figure without values is left out. Rows that may not be compared are in
    separate figures: those of the second set end in -2. Each of several runs has its own samples.

    An axis is logarithmic if its values are positive and span more than a decade. A method has the same colour, marker
    and line in all figures of one call. Raises UserError for an unknown format.
    """
    for form in formats:
        if form not in FORMATS:
            raise unknown("format", str(form), FORMATS)
    data = SummaryData.of(runs)
    files = _Files(folder, tuple(dict.fromkeys(formats)))
    with _style():
        looks = _looks(data, runs)
        for number, rows in enumerate(comparable_sets(data.summary)):
            for score in data.columns:
                for end, column in AXES.items():
                    figure = _against(rows, data, score, column, looks)
                    files.write(figure, f"{score}-{end}", number)
        alongs = [run.along for run in runs if len(run.along) and set(_ALONG) <= set(run.along)]
        along = pd.concat(alongs, ignore_index=True) if alongs else pd.DataFrame()
        for number, part in enumerate(_alike(along)):
            for score in data.columns:
                files.write(_along(part, data, score, looks), f"{score}-along", number)
        for number, run in enumerate(runs):
            files.write(_samples(run), "samples", number)
    return files.written


# --- how it looks ----------------------------------------------------------------------------------------------------


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's defaults and our style while drawing, whatever the user has configured."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


@dataclass(frozen=True)
class _Look:
    color: str
    marker: str
    line: str


def _looks(data: SummaryData, runs: Sequence[RunData]) -> dict[str, _Look]:
    """The look of each method, by name, so that the order of rows does not matter."""
    names = set(data.summary["method"].dropna()) | {str(m) for run in runs for m in run.along.get("method", [])}
    teachers = sorted(name for name in names if name.startswith(TEACHER))
    looks = {name: _Look(GREY, "*", LINES[i % len(LINES)]) for i, name in enumerate(teachers)}
    for name, i in places(names).items():
        line = LINES[i // len(PALETTE) % len(LINES)]
        looks[name] = _Look(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)], line)
    return looks


def _plain(text: str, longest: int = 60) -> str:
    """Text on one line, without characters that XML forbids, at most `longest` long; matplotlib hides a leading "_"."""
    kinds = ("Cc", "Cs", "Cn", "Co", "Zl", "Zp")
    text = " ".join("".join(" " if unicodedata.category(c) in kinds else c for c in str(text)).split())
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return f" {text}" if text.startswith("_") else text


def _score_label(data: SummaryData, score: str) -> str:
    declared = data.columns[score]
    unit = f"\n({_plain(declared['unit'])})" if declared.get("unit") else ""
    return f"{_plain(score)} {arrow(declared['direction'])}".rstrip() + unit


def _new(columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 + 2.6 * (columns - 1), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, sharex=True, sharey=True, squeeze=False)
    return figure, list(axes[0])


def _scale(axes: Axes, which: str, values: Sequence[float], ticks: Sequence[float] = ()) -> None:
    """Make an axis logarithmic if its positive values span more than a decade; ticks are plain numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    good = [v for v in values if math.isfinite(v)]
    plain = FuncFormatter(_tick)
    if good and min(good) > 0 and max(good) / min(good) > 10:
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        if max(good) / min(good) < 1000:
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(plain)
    if ticks:
        axis.set_ticks(list(ticks))
        axis.set_minor_locator(NullLocator())


def _tick(value: float, _: int | None = None) -> str:
    """A tick's label: 0.25, 1,000, 50k, 2.5M."""
    for size, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= size:
            return f"{value / unit:,.6g}{letter}"
    return f"{value:,.6g}"


def _legend(figure: Figure, drawn: dict[str, Any]) -> None:
    if drawn:
        columns = math.ceil(len(drawn) / 16)
        figure.set_figwidth(figure.get_figwidth() + 1.6 * (columns - 1))
        figure.legend(list(drawn.values()), list(drawn), loc="outside right upper", frameon=False, ncols=columns)


# --- figures ---------------------------------------------------------------------------------------------------------


def _floats(column: pd.Series) -> NDArray[np.float64]:
    return pd.to_numeric(column, errors="coerce").astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)


def _against(rows: pd.DataFrame, data: SummaryData, score: str, column: str, looks: dict[str, _Look]) -> Figure | None:
    """The score over a column of the summary, with a line for each method; None if no row has both."""
    if column not in rows:
        return None
    x, y = _floats(rows[column]), _floats(rows[score])
    low, high = (_floats(rows[f"{score}_training_{end}"]) for end in ("low", "high"))
    shown = np.isfinite(x) & np.isfinite(y)
    if not shown.any():
        return None
    figure, (axes,) = _new()
    drawn: dict[str, Any] = {}
    names = _series(rows)
    evaluations = _floats(rows["nfe"])
    for name in dict.fromkeys(name for name, here in zip(names, shown, strict=True) if here):
        places = np.array([i for i in range(len(rows)) if names[i] == name and shown[i]])
        places = places[np.argsort(evaluations[places], kind="stable")]
        look = looks[rows["method"].iloc[places[0]]]
        known = np.isfinite(low[places]) & np.isfinite(high[places])
        ends = np.stack([y[places] - low[places], high[places] - y[places]])
        ends = np.where(known, ends, 0).clip(min=0)
        bars = axes.errorbar(
            x[places], y[places], yerr=ends if known.any() else None,
            color=look.color, marker=look.marker, linestyle=look.line, capsize=2.5, elinewidth=1.0,
        )  # fmt: skip
        drawn[_plain(name)] = bars
        if column != "nfe":
            for i in places if len(places) > 1 else []:
                axes.annotate(
                    f"{evaluations[i]:.0f}", (x[i], y[i]), textcoords="offset points", xytext=(4, 4), fontsize=6.5,
                    color=look.color,
                )  # fmt: skip
    _scale(axes, "y", [*y[shown], *low[shown & np.isfinite(low)], *high[shown & np.isfinite(high)]])
    _scale(axes, "x", list(x[shown]), sorted({int(v) for v in x[shown]}) if column == "nfe" else ())
    axes.set_xlabel(HEADINGS[column] + ("" if column == "nfe" else "; numbers at points: NFE"))
    axes.set_ylabel(_score_label(data, score))
    _legend(figure, drawn)
    return figure


def _series(rows: pd.DataFrame) -> list[str]:
    """The series of each row: its method, with settings, device and run if they are needed to tell rows apart."""
    names = rows["method"].astype(object).fillna("").tolist()
    for column in ("settings", "device", "run"):
        often = pd.Series(list(zip(names, rows["nfe"].fillna(-1), strict=True))).duplicated(keep=False)
        twice = {name for name, more in zip(names, often, strict=True) if more}
        extra = rows[column].astype(object).fillna("").tolist()
        names = [
            f"{name} [{more}]" if name in twice and more else name for name, more in zip(names, extra, strict=True)
        ]
    return names


def _alike(along: pd.DataFrame) -> list[pd.DataFrame]:
    """Sets of rows along training that may be compared, apart from the number of evaluations."""
    if not len(along):
        return []
    return [part for _, part in along.groupby(GROUP, dropna=False, sort=False)]


def _along(rows: pd.DataFrame, data: SummaryData, score: str, looks: dict[str, _Look]) -> Figure | None:
    """The score along training, a panel for each number of evaluations; seeds are thin, their mean is thick."""
    if score not in rows:
        return None
    points = pd.DataFrame(
        {
            "series": _along_series(rows),
            "method": rows["method"].astype(str).tolist(),
            "nfe": _floats(rows["nfe"]),
            "seed": _floats(rows["training_seed"]),
            "x": _floats(rows["train_images"]),
            "fraction": _floats(rows["fraction"]),
            "y": _floats(rows[score]),
        }
    )
    points = points[np.isfinite(points[["nfe", "x", "y"]]).all(axis=1)]
    if not len(points):
        return None
    points = points.groupby(["series", "method", "nfe", "seed", "fraction"], dropna=False, as_index=False).mean()
    evaluations = sorted(points["nfe"].unique())[:6]
    figure, panels = _new(len(evaluations))
    drawn: dict[str, Any] = {}
    for axes, nfe in zip(panels, evaluations, strict=True):
        here = points[points["nfe"] == nfe]
        for series, part in here.groupby("series", sort=True):
            look = looks[part["method"].iloc[0]]
            if part["seed"].nunique() > 1:
                for _, one in part.groupby("seed"):
                    axes.plot(one["x"], one["y"], color=look.color, alpha=0.3, linewidth=0.8)
            mean = part.groupby("fraction", as_index=False)[["x", "y"]].mean()
            line = axes.plot(mean["x"], mean["y"], color=look.color, marker=look.marker, linestyle=look.line)[0]
            drawn.setdefault(_plain(str(series)), line)
        axes.set_title(f"{nfe:.0f} NFE", fontsize=9)
        axes.set_xlabel(HEADINGS["train_images"])
    _scale(panels[0], "x", list(points["x"]))  # both axes are shared by all
    _scale(panels[0], "y", list(points["y"]))
    if panels[0].get_xscale() == "linear":
        panels[0].xaxis.set_major_locator(MaxNLocator(4))
    panels[0].set_ylabel(_score_label(data, score))
    _legend(figure, drawn)
    return figure


def _along_series(rows: pd.DataFrame) -> list[str]:
    settings = rows["settings"].astype(object).fillna("").tolist()
    methods = rows["method"].astype(str).tolist()
    several = {m for m in methods if len({s for n, s in zip(methods, settings, strict=True) if n == m}) > 1}
    return [f"{m} [{s}]" if m in several and s else m for m, s in zip(methods, settings, strict=True)]


def _samples(run: RunData) -> Figure | None:
    """A row of images for each method and number of evaluations, the teacher's best first; a column for each noise.

    None if the run's records have no images.
    """
    lines: list[tuple[str, NDArray[np.uint8]]] = []
    first = run.table[run.table["status"].eq("ok").fillna(False) & run.table["key"].notna()]
    first = first.drop_duplicates(["method", "settings", "teacher", "dataset"])
    teachers = first["method"].str.startswith(TEACHER).fillna(False).astype(bool)
    for row in pd.concat([first[teachers], first[~teachers]]).to_dict("records"):
        kept = run.shown(row["key"])
        for nfe, _, images in reversed(kept) if row["method"].startswith(TEACHER) else kept:
            name = f"{row['method']} [{row['settings']}]" if _twice(first, row["method"]) else row["method"]
            picture = np.asarray(images[:_MOST_COLUMNS])
            if picture.ndim == 4 and len(picture):
                lines.append((f"{_plain(name, 40)}, {nfe} NFE", picture))
    lines = lines[:_MOST_ROWS]
    if not lines:
        return None
    count = max(len(one) for _, one in lines)
    label_width = 0.2 + 0.062 * max(len(label) for label, _ in lines)  # inches, of 7 points
    height, width = 0.55 * len(lines) + 0.1, label_width + 0.55 * count
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    left = label_width / width
    for i, (label, row_images) in enumerate(lines):
        top = 1 - (0.05 + 0.55 * i) / height
        axes = figure.add_axes((left, top - 0.52 / height, 0.55 * len(row_images) / width, 0.52 / height))
        axes.imshow(_strip(row_images), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        figure.text(left - 0.06 / width, top - 0.26 / height, label, ha="right", va="center", fontsize=7)
    return figure


def _twice(rows: pd.DataFrame, method: str) -> bool:
    return int((rows["method"] == method).sum()) > 1


def _strip(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (N,C,H,W) side by side with a white gap: (H, N (W + gap)), for colours (..., 3)."""
    n, channels, height, width = images.shape
    gap = max(1, width // 16)
    if channels == 2:
        images = np.concatenate([images, np.zeros_like(images[:, :1])], axis=1)
    images = images[:, :3]
    padded = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, gap)), constant_values=255)
    strip = padded.transpose(2, 0, 3, 1).reshape(height, n * (width + gap), -1)
    return strip[:, :, 0] if strip.shape[-1] == 1 else strip


# --- files -----------------------------------------------------------------------------------------------------------


class _Files:
    """Writes figures under unique names that are valid in any file system."""

    def __init__(self, folder: Path, formats: tuple[str, ...]) -> None:
        self.folder, self.formats = folder, formats
        self.written: list[Path] = []

    def write(self, figure: Figure | None, name: str, number: int) -> None:
        """`number` is that of the set of rows, or of the run, from 0."""
        if figure is None:
            return
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:80] + (f"-{number + 1}" if number else "")
        taken = {path.stem.lower() for path in self.written}
        while stem.lower() in taken:
            stem += "_"
        if figure.get_layout_engine() is not None:  # laid out once, not again for each form
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        for form in self.formats:
            path = self.folder / f"{stem}.{form}"
            write_atomically(path, partial(figure.savefig, format=form, metadata=_METADATA[form]))
            self.written.append(path)
