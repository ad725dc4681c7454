"""Tables for papers as Markdown and as LaTeX."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import pandas as pd
from tabulate import tabulate

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

    headings: list[tuple[str, str]]  # text, arrow
    cells: list[list[Cell]]
    caption: list[str]  # sentences
    notes: list[str]  # on rows that are not ok
    label: str


def markdown(tables: list[PaperTable], problems: list[str]) -> str:
    parts = []
    for table in tables:
        headings = [_markdown_text(f"{words} {sign}".strip()) for words, sign in table.headings]
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
    return _one_line(text).translate(_MARKDOWN)


def latex(tables: list[PaperTable], problems: list[str]) -> str:
    parts = ["% needs \\usepackage{booktabs}\n"]
    for i, table in enumerate(tables):
        headings = []
        for words, sign in table.headings:
            headings.append(f"{_latex_text(words)} {_latex_text(sign)}".strip())
        # columns by number: two headings may read the same
        frame = pd.DataFrame([[_latex_cell(cell) for cell in row] for row in table.cells], columns=range(len(headings)))
        align = ["r" if any(row[j].number for row in table.cells) else "l" for j in range(len(headings))]
        style = frame.style.hide(axis="index").format_index(lambda j, h=headings: h[j], axis=1)
        drawn = style.to_latex(
            column_format="".join(align),
            hrules=True,
            caption=f"{_latex_text('. '.join(table.caption))}.",
            label=f"tab:{table.label}-{i + 1}",
            position="htbp",
            position_float="centering",
        )
        parts.append(drawn + "".join(f"% not ok: {_comment(note)}\n" for note in table.notes))
    if not tables:
        parts.append("% there are no rows to show\n")
    parts += ["".join(f"% {_comment(problem)}\n" for problem in problems)] if problems else []
    return "\n".join(parts)


def _latex_cell(cell: Cell) -> str:
    if not cell.text:
        return "--"
    if cell.half_width:
        inner = f"{cell.text} \\pm {cell.half_width}".replace(",", "{,}")
        return f"$\\mathbf{{{inner}}}$" if cell.leads else f"${inner}$"
    return cell.text.replace("-", "$-$", 1) if cell.number else _latex_text(cell.text)


_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after the end of a line, these would be arguments of it
    "]": "{]}",
    "*": "{*}",
    '"': "''",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "→": r"$\rightarrow$",
    "←": r"$\leftarrow$",
    "↔": r"$\leftrightarrow$",
    "⇒": r"$\Rightarrow$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": "$-$",
    "–": "--",
    "—": "---",
    "…": r"\ldots{}",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "∞": r"$\infty$",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
}
_GREEK = {
    **{"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta"},
    **{"ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "µ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho"},
    **{"σ": "sigma", "τ": "tau", "υ": "upsilon", "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Δ": "Delta"},
}
_LATEX |= {letter: f"$\\{name}$" for letter, name in _GREEK.items()}
_ACCENTS = "\u0300\u0301\u0302\u0303\u0308\u030a\u030c\u0327"  # that Latin letters of pdflatex's own fonts can have


def _latex_text(text: str) -> str:
    """Text escaped for any LaTeX engine; a character that plain fonts lack becomes its code point, [U+1234]."""
    return "".join(_latex_character(character) for character in _one_line(text))


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    apart = unicodedata.normalize("NFD", character)
    accented = len(apart) == 2 and apart[0].isascii() and apart[0].isalpha() and apart[1] in _ACCENTS
    if character.isascii() or (ord(character) < 0x100 and accented):
        return character
    return f"{{[}}U+{ord(character):04X}{{]}}"


def _comment(text: str) -> str:
    """Text for a LaTeX comment, which must not have a line break."""
    return _one_line(text)


def _one_line(text: str) -> str:
    """Text with control characters, separators and runs of spaces replaced by single spaces."""
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") else c for c in text).split())
