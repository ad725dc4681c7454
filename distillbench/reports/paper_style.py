"""Widths and sizes of letters of conferences, for tables and figures of papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

INCH_PT = 72.27  # points of TeX in an inch
PaperStyle = Literal["neurips", "icml"]


@dataclass(frozen=True)
class Page:
    """Widths in inches, and the size of letters in figures in points."""

    column: float
    text: float
    letters: float


STYLES: dict[PaperStyle, Page] = {
    "neurips": Page(column=5.5, text=5.5, letters=8.0),  # neurips_2024.sty: one column
    "icml": Page(column=3.25, text=6.75, letters=7.5),  # icml2024.sty: two columns
}
