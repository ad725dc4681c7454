"""Writes docs/samples.png and the table of docs/results.md: ``python docs/generate_results.py``."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
from PIL import Image

DOCS = Path(__file__).resolve().parent
REFERENCE = DOCS.parent / "results" / "reference"
RUN, LATER = REFERENCE / "digits", (REFERENCE / "digits-continuous",)  # other students, by the same command later
PAGE = DOCS / "results.md"
MARKS = "<!-- table -->\n", "<!-- end of table -->\n"
FD, RMSE = "fd_efficientnet_lite0", "teacher_rmse"
ROWS, TOP, HEIGHT = (0, 4, 5, 6, 9, 12, 13, 16, 17), 3, 52  # of samples-seed0.png: teacher at 1 and 64, students at 1


def table() -> str:
    """Every row of the reference runs: means over training seeds, and half-widths of their 95 % intervals."""
    head = ["method", "NFE", "FD ↓", "RMSE to teacher ↓", "teacher evaluations", "student evaluations", "TFLOP"]
    rows = [
        [
            row["method"], str(row["nfe"]), _mean(row, FD, 1), _mean(row, RMSE, 3), _count(row["train_teacher_nfe"]),
            _count(row["train_student_nfe"]), "" if math.isnan(row["train_tflops"]) else f"{row['train_tflops']:.1f}",
        ]
        for row in _summary()
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def short_table() -> str:
    """The rows at one evaluation, for the README."""
    head = ["method", "FD ↓", "RMSE to teacher ↓", "training, TFLOP", "teacher evaluations"]
    rows = [
        [
            row["method"], _mean(row, FD, 1), _mean(row, RMSE, 3),
            "" if math.isnan(row["train_tflops"]) else f"{row['train_tflops']:.1f}", _count(row["train_teacher_nfe"]),
        ]
        for row in _summary()
        if row["nfe"] == 1
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def _summary() -> list[dict]:
    found, *later = (pd.read_csv(run / "summary.csv") for run in (RUN, *LATER))
    teacher = found["method"].str.startswith("teacher:")
    students = [found[~teacher], *(rows[~rows["method"].str.startswith("teacher:")] for rows in later)]
    return pd.concat([found[teacher], pd.concat(students).sort_values(["method", "nfe"])]).to_dict("records")


def _mean(row: dict, column: str, decimals: int) -> str:
    if math.isnan(row[column]):
        return ""
    half = (row[f"{column}_training_high"] - row[f"{column}_training_low"]) / 2
    return f"{row[column]:,.{decimals}f}" + ("" if math.isnan(half) else f" ± {half:.{decimals}f}")


def _count(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.0f}"


def page(text: str) -> str:
    """`text`, the page, with the table of today's reference runs."""
    before, after = MARKS
    return re.sub(f"{before}.*?{after}", lambda _: before + "\n" + table() + "\n" + after, text, flags=re.DOTALL)


def picture() -> Image.Image:
    """The rows of samples-seed0.png that the README shows."""
    whole = Image.open(RUN / "samples-seed0.png").convert("RGB")
    shown = Image.new("RGB", (whole.width, HEIGHT * len(ROWS) + 2 * TOP), "white")
    for place, row in enumerate(ROWS):
        strip = whole.crop((0, TOP + HEIGHT * row, whole.width, TOP + HEIGHT * (row + 1)))
        shown.paste(strip, (0, TOP + HEIGHT * place))
    return shown


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    picture().save(DOCS / "samples.png", optimize=True)
    print(short_table())
