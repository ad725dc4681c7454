"""Writes docs/samples.png and the table of docs/results.md: ``python docs/generate_results.py``."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
from PIL import Image

DOCS = Path(__file__).resolve().parent
REFERENCE = DOCS.parent / "results" / "reference"
RUN = REFERENCE / "digits"
PAGE = DOCS / "results.md"
MARKS = "<!-- table -->\n", "<!-- end of table -->\n"
FD, RMSE = "fd_efficientnet_lite0", "teacher_rmse"
TOP, HEIGHT = 3, 52  # of samples-seed0.png: above its rows, and of each of them


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
    """The rows at one evaluation, or at the fewest that a method has, for the README."""
    head = ["method", "FD ↓", "RMSE to teacher ↓", "training, TFLOP", "teacher evaluations"]
    rows = [
        [
            row["method"], _mean(row, FD, 1), _mean(row, RMSE, 3),
            "" if math.isnan(row["train_tflops"]) else f"{row['train_tflops']:.1f}", _count(row["train_teacher_nfe"]),
        ]
        for row in _fewest(_summary())
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def _summary() -> list[dict]:
    found = pd.read_csv(RUN / "summary.csv")
    teacher = found["method"].str.startswith("teacher:")
    return pd.concat([found[teacher], found[~teacher]]).to_dict("records")


def _fewest(rows: list[dict]) -> list[dict]:
    """Of each method, the row with the fewest evaluations."""
    fewest: dict[str, dict] = {}
    for row in rows:
        if row["nfe"] < fewest.setdefault(row["method"], row)["nfe"]:
            fewest[row["method"]] = row
    return list(fewest.values())


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
    """The rows of samples-seed0.png that the README shows: the teacher at 1 and most evaluations, students at 1."""
    whole = Image.open(RUN / "samples-seed0.png").convert("RGB")
    table = pd.read_csv(RUN / "table.csv")
    shown_rows = table[table["training_seed"].isna() | (table["training_seed"] == 0)].reset_index()
    teacher = shown_rows["method"].str.startswith("teacher:")
    best = shown_rows.index == shown_rows[teacher]["nfe"].idxmax()
    rows = shown_rows.index[(shown_rows["nfe"] == 1) | best].tolist()
    shown = Image.new("RGB", (whole.width, HEIGHT * len(rows) + 2 * TOP), "white")
    for place, row in enumerate(rows):
        strip = whole.crop((0, TOP + HEIGHT * row, whole.width, TOP + HEIGHT * (row + 1)))
        shown.paste(strip, (0, TOP + HEIGHT * place))
    return shown


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    picture().save(DOCS / "samples.png", optimize=True)
    print(short_table())
