"""Tables for papers, and these as Markdown; `paper_latex` writes them as LaTeX."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from tabulate import tabulate

from distillbench.reports.labels import Label

NONE = "–"  # an empty value


@dataclass(frozen=True)
class Cell:
    text: str
    half_width: str = ""
    leads: bool = False
    number: bool = True


@dataclass(frozen=True)
class PaperTable:
    """A table in no particular form; its texts are not escaped."""

    headings: list[Label]
    cells: list[list[Cell]]
    caption: list[str]  # sentences
    notes: list[str]  # on rows that are not ok
    label: str  # to refer to it
    method: int | None = None  # the place of the column that names methods


def markdown(tables: list[PaperTable], problems: list[str]) -> str:
    parts = []
    for table in tables:
        headings = [_markdown_text(label.heading) for label in table.headings]
        lines = [[_markdown_cell(cell) for cell in row] for row in table.cells]
        align = ["right" if any(row[i].number for row in table.cells) else "left" for i in range(len(headings))]
        drawn = tabulate(lines, headings, tablefmt="pipe", colalign=align, disable_numparse=True)
        part = f"{_markdown_text('. '.join(table.caption))}.\n\n{drawn}\n"
        if table.notes:
            part += "\nNot ok:\n\n" + "".join(f"- {_markdown_text(note)}\n" for note in table.notes)
        parts.append(part)
    if not tables:
        parts.append("There are no rows to show.\n")
    if problems:
        parts.append("Of the runs:\n\n" + "".join(f"- {_markdown_text(problem)}\n" for problem in problems))
    return "\n".join(parts)


def _markdown_cell(cell: Cell) -> str:
    text = _markdown_text(cell.text) if cell.text else NONE
    text += f" ± {cell.half_width}" if cell.half_width else ""
    return f"**{text}**" if cell.leads else text


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~$!"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def _markdown_text(text: str) -> str:
    """Text on one line, escaped for Markdown."""
    return one_line(text).translate(_MARKDOWN)


def one_line(text: str) -> str:
    """Text with control characters, separators and runs of spaces replaced by single spaces."""
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") else c for c in text).split())
