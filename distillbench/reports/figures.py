"""Figures for papers as PDF, SVG and PNG, drawn by matplotlib; the same run gives the same bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distillbench.errors import unknown
from distillbench.records.fronts import fronts
from distillbench.records.statistics import KEYS, SEEDS, TEACHER
from distillbench.reports.axes import side_by_side
from distillbench.reports.charts import with_unit
from distillbench.reports.figure_style import POINTS, legend, name_points, new_figure, plain, scale
from distillbench.reports.figure_style import style as drawing_style
from distillbench.reports.looks import GREY, MARKERS, PALETTE, places
from distillbench.reports.paper_data import GROUP, SummaryData, comparable_sets
from distillbench.reports.paper_style import STYLES, Page, PaperStyle
from distillbench.storage.files import write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from distillbench.reports.runs import RunData

FORMATS = ("pdf", "svg", "png")
AXES = {  # end of a file's name: columns, of which the first that has values is drawn
    "nfe": ("nfe",),
    "latency": ("sample_latency_p50_ms",),
    "training": ("train_tflops", "train_seconds"),
}
LINES = ("-", "--", "-.", ":")
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
MOST_PANELS = 6
TALLEST_SAMPLES = 8.5  # inches


def write_figures(
    runs: Sequence[RunData], folder: Path, formats: Sequence[str] = FORMATS, style: PaperStyle = "neurips"
) -> list[Path]:
    """Draw the figures of `runs` into `folder` (created if missing) in all `formats`; returns the written files.

    SCORE-nfe, SCORE-latency, SCORE-training: a score of the summary over evaluations, latency and the cost of training,
    with its interval over training seeds, if there is one. SCORE-along: over training, as means with a band from the
    smallest to the largest seed. samples: images of every method and the teacher from the same noise. A figure without
    values is left out. Rows that may not be compared are in separate figures: those of the second set end in -2. Each
    of several runs has its own samples.

    Figures are as wide as a column of `style`, several panels as wide as its text. Axes, colours and markers are those
    of the HTML report; points of equal cost are drawn side by side. A grey band joins the points that are best for
    their cost beyond the uncertainty (`records.fronts`), where there are two at least. Raises UserError for an unknown
    format.
    """
    for form in formats:
        if form not in FORMATS:
            raise unknown("format", str(form), FORMATS)
    data = SummaryData.of(runs)
    files = _Files(folder, tuple(dict.fromkeys(formats)))
    page = STYLES[style]
    with drawing_style(page):
        looks = _looks(data, runs)
        for number, rows in enumerate(comparable_sets(data.summary)):
            for score in data.columns:
                for end, columns in AXES.items():
                    column = next((c for c in columns if c in rows and rows[c].notna().any()), columns[-1])
                    best = best_for_cost(runs, data, score, column) if column != "nfe" else []
                    figure = _against(rows, data, score, column, looks, page, best)
                    files.write(figure, f"{score}-{end}", number)
        alongs = [run.along for run in runs if len(run.along) and set(_ALONG) <= set(run.along)]
        along = pd.concat(alongs, ignore_index=True) if alongs else pd.DataFrame()
        for number, part in enumerate(_alike(along)):
            for score in data.columns:
                files.write(_along(part, data, score, looks, page), f"{score}-along", number)
        for number, run in enumerate(runs):
            files.write(_samples(run, page), "samples", number)
    return files.written


# --- how it looks ----------------------------------------------------------------------------------------------------


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


def _label(data: SummaryData, column: str) -> str:
    """The title of an axis. Units of scores are in tables."""
    label = data.labels.label(column)
    if column in data.columns:
        return plain(f"{label.short} {label.arrow}".strip())
    return plain(with_unit(label))


# --- figures ---------------------------------------------------------------------------------------------------------


def _floats(column: pd.Series) -> NDArray[np.float64]:
    return pd.to_numeric(column, errors="coerce").astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)


def best_for_cost(runs: Sequence[RunData], data: SummaryData, score: str, cost: str) -> list[list[tuple[float, float]]]:
    """The (cost, score) of points that are best for their cost beyond the uncertainty, by cost, for each group.

    Points of costs of training are compared at the same number of evaluations only.
    """
    tables = [run.table for run in runs if len(run.table) and {score, cost} <= set(run.table)]
    direction = str(data.columns[score]["direction"])
    if not tables or direction == "none":
        return []
    table = pd.concat(tables, ignore_index=True).drop_duplicates([*KEYS, *SEEDS])
    table[score] = table[score].where(table[score].abs() < math.inf)
    each = cost.startswith("train_")
    found = fronts(table, score, direction, cost, [run.influences for run in runs], each_nfe=each)
    return [[(p.cost, p.score) for p in front.points if p.place == "on"] for front in found]


def _against(
    rows: pd.DataFrame, data: SummaryData, score: str, column: str, looks: dict[str, _Look], page: Page,
    best: Sequence[Sequence[tuple[float, float]]],
) -> Figure | None:  # fmt: skip
    """The score over a column of the summary, with a line for each method; None if no row has both."""
    if column not in rows:
        return None
    x, y = _floats(rows[column]), _floats(rows[score])
    low, high = (_floats(rows[f"{score}_training_{end}"]) for end in ("low", "high"))
    shown = np.isfinite(x) & np.isfinite(y)
    if not shown.any():
        return None
    figure, (axes,) = new_figure(page)
    drawn: dict[str, Any] = {}
    names, evaluations = _series(rows, data), _floats(rows["nfe"])
    series = {name: _places(names, shown, evaluations, name) for name in dict.fromkeys(names)}
    series = {name: at for name, at in series.items() if len(at)}
    aside = side_by_side([[float(v) for v in x[at]] for at in series.values()])
    texts = []
    for (name, at), beside in zip(series.items(), aside, strict=True):
        moved = [float(v or 0) for v in beside]  # none is empty: only rows with values are in series
        look = looks[rows["method"].iloc[at[0]]]
        known = np.isfinite(low[at]) & np.isfinite(high[at])
        ends = np.stack([y[at] - low[at], high[at] - y[at]])
        ends = np.where(known, ends, 0).clip(min=0)
        line, caps, bars = axes.errorbar(
            moved, y[at], yerr=ends if known.any() else None, color=look.color, marker=look.marker,
            linestyle=look.line, capsize=1.5, elinewidth=0.7, capthick=0.7,
        ).lines  # fmt: skip
        drawn[plain(name)] = line
        for part in (*caps, *bars):  # a wide interval would hide other points
            part.set(alpha=0.4, zorder=1)
        if column != "nfe" and len(at) > 1:
            pairs = zip(moved, at, strict=True)
            texts += [(v, float(y[i]), f"{evaluations[i]:.0f}", look.color) for v, i in pairs]
    _fronts(axes, best, list(zip(x[shown], y[shown], strict=True)))
    scale(axes, "y", list(y[shown]))
    drawn_at = [value for own in aside for value in own if value is not None]
    scale(axes, "x", drawn_at, sorted({int(v) for v in x[shown]}) if column == "nfe" else ())
    axes.set_xlabel(_label(data, column) + ("; numbers at points: NFE" if texts else ""))
    axes.set_ylabel(_label(data, score))
    legend(figure, drawn)
    name_points(figure, axes, texts)
    return figure


def _places(names: Sequence[str], shown: NDArray[np.bool_], order: NDArray[np.float64], name: str) -> NDArray[np.intp]:
    """The rows of a series that have values, by their number of evaluations."""
    found = np.array([i for i in range(len(names)) if names[i] == name and shown[i]], dtype=np.intp)
    return found[np.argsort(order[found], kind="stable")]


def _fronts(axes: Axes, best: Sequence[Sequence[tuple[float, float]]], shown: Sequence[tuple[float, float]]) -> None:
    """A band along each front of which two points at least are in this figure."""
    for front in best:
        here = [p for p in front if any(np.allclose(p, q, rtol=1e-9) for q in shown)]
        if len(here) > 1:
            axes.step(*zip(*here, strict=True), where="post", color="#000000", alpha=0.12, linewidth=5, zorder=0)


def _series(rows: pd.DataFrame, data: SummaryData) -> list[str]:
    """The series of each row: its method, with settings, device and run if they are needed to tell rows apart."""
    names = [data.method(name) for name in rows["method"].astype(object).fillna("").tolist()]
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


def _along(
    rows: pd.DataFrame, data: SummaryData, score: str, looks: dict[str, _Look], page: Page
) -> Figure | None:  # fmt: skip
    """The score along training, a panel for each number of evaluations: means over seeds, a band over all seeds."""
    if score not in rows:
        return None
    points = pd.DataFrame(
        {
            "series": _along_series(rows, data),
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
    evaluations = sorted(points["nfe"].unique())[:MOST_PANELS]
    figure, panels = new_figure(page, len(evaluations))
    drawn: dict[str, Any] = {}
    for axes, nfe in zip(panels, evaluations, strict=True):
        here = points[points["nfe"] == nfe]
        for series, part in here.groupby("series", sort=True):
            look = looks[part["method"].iloc[0]]
            seeds = part.groupby("fraction").agg(x=("x", "mean"), y=("y", "mean"), low=("y", "min"), high=("y", "max"))
            if part["seed"].nunique() > 1:
                axes.fill_between(seeds["x"], seeds["low"], seeds["high"], color=look.color, alpha=0.18, linewidth=0)
            line = axes.plot(seeds["x"], seeds["y"], color=look.color, marker=look.marker, linestyle=look.line)[0]
            drawn.setdefault(plain(str(series)), line)
        axes.set_title(f"{nfe:.0f} NFE")
        axes.set_xlabel(_label(data, "train_images"))
    scale(panels[0], "x", list(points["x"]))  # both axes are shared by all
    scale(panels[0], "y", list(points["y"]))
    panels[0].set_ylabel(_label(data, score))
    legend(figure, drawn)
    return figure


def _along_series(rows: pd.DataFrame, data: SummaryData) -> list[str]:
    settings = rows["settings"].astype(object).fillna("").tolist()
    methods = rows["method"].astype(str).tolist()
    several = {m for m in methods if len({s for n, s in zip(methods, settings, strict=True) if n == m}) > 1}
    pairs = zip(methods, settings, strict=True)
    return [f"{data.method(m)} [{s}]" if m in several and s else data.method(m) for m, s in pairs]


def _samples(run: RunData, page: Page) -> Figure | None:
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
            short = run.labels.method_label(row["method"]).short
            name = f"{short} [{row['settings']}]" if _twice(first, row["method"]) else short
            picture = np.asarray(images[:_MOST_COLUMNS])
            if picture.ndim == 4 and len(picture):
                lines.append((f"{plain(name, 40)}, {nfe} NFE", picture))
    lines = lines[:_MOST_ROWS]
    if not lines:
        return None
    count, letters = max(len(one) for _, one in lines), page.letters - 1
    width, label_width = page.text, 0.1 + 0.47 * letters / POINTS * max(len(label) for label, _ in lines)  # inches
    side = min((width - label_width) / count, TALLEST_SAMPLES / len(lines))
    width, height = label_width + side * count, side * len(lines)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    for i, (label, row_images) in enumerate(lines):
        top = 1 - side * i / height
        axes = figure.add_axes(
            (label_width / width, top - 0.97 * side / height, side * len(row_images) / width, 0.97 * side / height)
        )
        axes.imshow(_strip(row_images), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
        figure.text(
            (label_width - 0.06) / width, top - 0.5 * side / height, label, ha="right", va="center", fontsize=letters
        )
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
