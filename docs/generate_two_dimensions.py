"""Writes the pictures and the tables of docs/two_dimensions.md: ``python docs/generate_two_dimensions.py``.

A point has the colour of the direction of its noise, so colours show which noise became which sample: a method that
keeps the teacher's map has the teacher's colours at the teacher's places.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

DOCS = Path(__file__).resolve().parent
PAGE, PICTURES = DOCS / "two_dimensions.md", DOCS / "two_dimensions"
REFERENCE = DOCS.parent / "results" / "reference" / "two_dimensions"
DISTRIBUTIONS = "mixture", "checkerboard", "spiral"
MARKS = "<!-- tables -->\n", "<!-- end of tables -->\n"
BETWEEN = "The sliced Wasserstein distance to the true distribution, and the share of samples outside it:\n"
COLUMNS, SIDE, DPI = 5, 1.6, 120  # panels in a row, inches of a panel
IN_STRIP = 1200  # points of each panel
SHADES = 128  # colours of a stored picture
BACKGROUND, TEXT, FRAME = "#ffffff", "#222222", "#bbbbbb"
FIRST = {
    "noise": "noise",
    "true": "true distribution",
    "teacher@256": "teacher, 256 steps",
    "teacher@4": "teacher, 4 steps",
}


def colours(noise: np.ndarray) -> np.ndarray:
    """sRGB (N,3) of the direction of each noise (N,2): a closed path through CIELAB.

    Right is ochre, up light green, left blue, down dark purple. Lightness and the blue-yellow axis alone tell all
    directions apart, so eyes that see no difference between red and green do, too.
    """
    x, y = (noise / np.linalg.norm(noise, axis=1, keepdims=True)).T
    L, a, b = 52 + 24 * y, -32 * y, 58 * x
    f = (L + 16) / 116
    cubes = np.stack([f + a / 500, f, f - b / 200], axis=1)
    xyz = np.where(cubes > 6 / 29, cubes**3, 3 * (6 / 29) ** 2 * (cubes - 4 / 29)) * [0.9505, 1, 1.089]
    linear = xyz @ np.array([[3.2406, -0.9689, 0.0557], [-1.5372, 1.8758, -0.204], [-0.4986, 0.0415, 1.057]])
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def students(names: Iterable[str]) -> dict[str, list[str]]:
    """For each method in order its names among `names`, such as "cm@1" and "cm@4", from the fewest evaluations on."""
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: int(name.partition("@")[2] or 0)):
        method = name.partition("@")[0]
        if method not in ("noise", "true", "teacher"):
            found.setdefault(method, []).append(name)
    return dict(sorted(found.items()))


def panel(ax: Axes, points: np.ndarray, shades: np.ndarray | str, title: str, reach: float = 1.1) -> None:
    """One set of points (N,2) on equal axes."""
    x, y = points.astype(float).T
    ax.scatter(x, y, s=2.0, c=shades, linewidths=0, rasterized=True)
    ax.set_title(title, fontsize=9, color=TEXT, pad=3)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
    for spine in ax.spines.values():
        spine.set_color(FRAME)


def picture(points: Mapping[str, np.ndarray]) -> Figure:
    """The noise, the distribution, the teacher, and each method at its fewest evaluations."""
    shown = FIRST | {names[0]: title(method, names[0]) for method, names in students(points).items()}
    figure, axes = grid(len(shown), COLUMNS)
    shades = colours(points["noise"].astype(float))
    for ax, (name, words) in zip(axes, shown.items(), strict=False):
        panel(ax, points[name], "#444444" if name == "true" else shades, words, 3.0 if name == "noise" else 1.1)
    return figure


def strip(method: str, sets: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """One method at its fewest and at its most evaluations. `sets`: the points of each distribution."""
    panels = [(name, row) for name, points in sets.items() for row in students(points)[method]]
    figure, axes = grid(len(panels), max(len(panels), 4))
    for ax, (name, row) in zip(axes, panels, strict=False):
        nfe = row.partition("@")[2]
        words = f"{name}, {nfe} step{'s' if nfe != '1' else ''}"
        noise = sets[name]["noise"][:IN_STRIP].astype(float)
        panel(ax, sets[name][row][:IN_STRIP], colours(noise), words)
    return figure


def title(method: str, name: str) -> str:
    """The method, and its evaluations unless it has one."""
    nfe = name.partition("@")[2]
    return method if nfe == "1" else f"{method}, {nfe} steps"


def grid(panels: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A figure of at least `panels` axes; those that are left over are empty."""
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(columns * SIDE, lines * (SIDE + 0.2)), layout="constrained", dpi=DPI, facecolor=BACKGROUND)
    axes = list(figure.subplots(lines, columns, squeeze=False).ravel())
    for ax in axes[panels:]:
        ax.axis("off")
    return figure, axes


def save(figure: Figure, file: Path) -> None:
    """Write a picture as PNG with a palette, a third of the size of full colours."""
    full = BytesIO()
    figure.savefig(full, format="png")
    Image.open(full).convert("RGB").quantize(SHADES, dither=Image.Dither.NONE).save(file, optimize=True)


def load(file: Path) -> dict[str, np.ndarray]:
    """The sets of points (N,2) of one distribution."""
    with np.load(file) as kept:
        return dict(kept)


def tables() -> str:
    """The scores of each method at its fewest and at its most evaluations, and of the teacher."""
    rows = pd.read_csv(REFERENCE / "scores.csv")
    nfe = rows.groupby("method")["nfe"]
    ends = (rows["nfe"] == nfe.transform("min")) | (rows["nfe"] == nfe.transform("max"))
    rows = rows[ends | rows["nfe"].isin([4, 16])]
    lines = {key: group.set_index("distribution") for key, group in rows.groupby(["method", "nfe"])}
    teacher = {key: lines.pop(key) for key in list(lines) if key[0] == "teacher"}
    unrelated = next(iter(lines.values()))["unrelated_rmse"]
    floor = next(iter(lines.values()))["sliced_wasserstein_floor"]
    maps = [["method", "NFE", "follows the teacher's map", *DISTRIBUTIONS]]
    maps += [[*_named(key), "yes", *_numbers(line["teacher_rmse"])] for key, line in teacher.items()]
    maps += [[*_named(key), _claim(line), *_numbers(line["teacher_rmse"])] for key, line in lines.items()]
    maps += [["unrelated samples of the teacher", "", "", *_numbers(unrelated)]]
    scores = [["method", "NFE", *DISTRIBUTIONS, *(f"{name}, outside" for name in DISTRIBUTIONS)]]
    scores += [
        [*_named(key), *_numbers(line["sliced_wasserstein"]), *_percent(line["outside"])]
        for key, line in (teacher | lines).items()
    ]
    scores += [["points of the true distribution", "", *_numbers(floor), *["1 %"] * len(DISTRIBUTIONS)]]
    return f"{_markdown(maps)}\n{BETWEEN}\n{_markdown(scores)}"


def _named(key: tuple[str, int]) -> list[str]:
    return [key[0] if key[0] == "teacher" else f"`{key[0]}`", str(key[1])]


def _claim(line: pd.DataFrame) -> str:
    return "yes" if line["keeps_noise"].all() else "no"


def _numbers(values: pd.Series) -> list[str]:
    return [f"{values[name]:.3f}" for name in DISTRIBUTIONS]


def _percent(values: pd.Series) -> list[str]:
    return [f"{100 * values[name]:.0f} %" for name in DISTRIBUTIONS]


def _markdown(lines: list[list[str]]) -> str:
    head, *rows = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *rows])


def page(text: str) -> str:
    """The page `text` with fresh tables between its marks."""
    before, after = MARKS
    head, _, rest = text.partition(before)
    return head + before + "\n" + tables() + "\n" + after + rest.partition(after)[2]


def main() -> None:
    """Write everything."""
    sets = {name: load(REFERENCE / f"{name}.npz") for name in DISTRIBUTIONS}
    PICTURES.mkdir(exist_ok=True)
    for name, points in sets.items():
        save(picture(points), PICTURES / f"{name}.png")
    for method in students(sets["mixture"]):
        save(strip(method, sets), PICTURES / f"{method}.png")
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
