"""Writes docs/laws-NAME.png from results/reference/laws/*.npz: ``python docs/generate_laws.py``.

Each panel shows the samples of one row. A point has the colour of its noise (hue: direction, lightness: distance from
0), so colours show which noise became which sample: a method that keeps the teacher's map has the teacher's colours.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colors
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
REFERENCE = DOCS.parent / "results" / "reference" / "laws"
COLUMNS, SIDE = 6, 1.55  # panels in a row, inches of a panel
TITLES = {"real": "the distribution", "teacher": "teacher, 256 steps"}


def hues(noise: np.ndarray) -> np.ndarray:
    """The colour of each noise (N,2) as RGB (N,3)."""
    direction = np.arctan2(noise[:, 1], noise[:, 0]) / (2 * math.pi) % 1
    inner = np.exp(-0.5 * (noise**2).sum(axis=1))  # share of the noise that is further from 0
    return colors.hsv_to_rgb(np.stack([direction, 0.35 + 0.65 * (1 - inner), 0.55 + 0.4 * inner], axis=1))


def picture(points: dict[str, np.ndarray]) -> Figure:
    """A panel for the distribution, the teacher, and each method at its fewest evaluations."""
    rows = {"real": "real", "teacher": "teacher"}
    for name in points:
        method, _, nfe = name.partition("@")
        if nfe and (method not in rows or int(nfe) < int(rows[method].partition("@")[2])):
            rows[method] = name
    lines = math.ceil(len(rows) / COLUMNS)
    figure = Figure(figsize=(COLUMNS * SIDE, lines * (SIDE + 0.2)), layout="constrained", dpi=130)
    axes = figure.subplots(lines, COLUMNS, squeeze=False).ravel()
    seen = hues(points["noise"].astype(float))
    for ax, (method, row) in zip(axes, rows.items(), strict=False):
        x, y = points[row].astype(float).T
        ax.scatter(x, y, s=1.5, c="0.35" if method == "real" else seen, linewidths=0)
        nfe = row.partition("@")[2]
        ax.set_title(TITLES.get(method, method if nfe in ("", "1") else f"{method}, {nfe} steps"), fontsize=8)
        ax.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")
    for ax in axes[len(rows) :]:
        ax.axis("off")
    return figure


if __name__ == "__main__":
    matplotlib.use("Agg")
    for file in sorted(REFERENCE.glob("*.npz")):
        with np.load(file) as kept:
            picture(dict(kept)).savefig(DOCS / f"laws-{file.stem}.png")
