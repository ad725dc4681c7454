"""Tables for papers as LaTeX, as wide as a conference's columns."""

from __future__ import annotations

import re
import textwrap
import unicodedata

from distillbench.reports.paper_forms import Cell, PaperTable, one_line
from distillbench.reports.paper_style import INCH_PT, STYLES, PaperStyle

PACKAGES = "% needs \\usepackage{booktabs,siunitx,graphicx}\n"
NUMBERS = "\\sisetup{detect-weight,mode=text,group-digits=integer,group-separator={,},group-minimum-digits=4}\n"
PLAIN = re.compile(r"-?[\d,]+(\.\d+)?")
SIZES = {"small": 9.0, "footnotesize": 8.0, "scriptsize": 7.0}  # pt, in a document of 10 pt
SEPARATION = {"small": 5.0, "footnotesize": 4.0, "scriptsize": 3.0}  # pt at each side of a column
MEAN_WIDTH = 0.52  # of a character, as a part of the size: digits have 0.5 in Computer Modern
BOLD = 1.15  # of bold digits
LONGEST_UNIT = 12  # characters of a unit in a heading; the caption has longer ones
SHORTEST = 9  # characters of a heading's line, from which on it is broken


def latex(tables: list[PaperTable], problems: list[str], style: PaperStyle = "neurips") -> str:
    """One float for each table, no wider than the text of `style`.

    The size of the letters is the largest at which it fits, in two-column styles first in a column, then across both. A
    table that is wider even at the smallest size is scaled.
    """
    parts = [PACKAGES]
    for number, table in enumerate(tables, 1):
        parts.append(_float(table, number, style) + "".join(f"% not ok: {one_line(note)}\n" for note in table.notes))
    if not tables:
        parts.append("% there are no rows to show\n")
    parts += ["".join(f"% {one_line(problem)}\n" for problem in problems)] if problems else []
    return "\n".join(parts)


def _float(table: PaperTable, number: int, style: PaperStyle) -> str:
    page = STYLES[style]
    fitting = ((size, inches) for inches in (page.column, page.text) for size in SIZES if _fits(table, size, inches))
    size, inches = next(fitting, ("", page.text))
    star = "*" if page.text > page.column and inches == page.text else ""
    units = [f"{h.short} in {h.unit}" for h in table.headings if len(h.unit) > LONGEST_UNIT]
    caption = ". ".join([*table.caption, *([f"Units: {'; '.join(units)}"] if units else [])])
    body = _tabular(table)
    if not size:
        size, body = "scriptsize", f"\\resizebox{{\\linewidth}}{{!}}{{{body.rstrip()}}}\n"
    return (
        f"\\begin{{table{star}}}[htbp]\n\\centering\n\\caption{{{latex_text(caption)}.}}\n"
        f"\\label{{tab:{table.label}-{number}}}\n\\vskip 0.6ex\n\\{size}\n"
        f"\\setlength{{\\tabcolsep}}{{{SEPARATION[size]:g}pt}}\n{NUMBERS}{body}\\end{{table{star}}}\n"
    )


# --- columns ---------------------------------------------------------------------------------------------------------


def _column(table: PaperTable, at: int) -> list[Cell]:
    return [row[at] for row in table.cells]


def _digits(cells: list[Cell]) -> tuple[int, int]:
    """The most digits before and after the decimal point."""
    texts = [cell.text.replace(",", "") for cell in cells if PLAIN.fullmatch(cell.text)]
    whole, _, part = zip(*(text.lstrip("-").partition(".") for text in texts), strict=True)
    return max(map(len, whole)), max(map(len, part))


def _is_number(cells: list[Cell]) -> bool:
    """Whether a column has numbers, which are aligned at their decimal points."""
    return any(cell.number and PLAIN.fullmatch(cell.text) for cell in cells)


def _tabular(table: PaperTable) -> str:
    columns = [_column(table, at) for at in range(len(table.headings))]
    specification, headings = "", [_heading_lines(table, at) for at in range(len(columns))]
    for cells in columns:
        if not _is_number(cells):
            specification += "l"
            continue
        whole, part = _digits(cells)
        sign = "-" if any(cell.text.startswith("-") for cell in cells) else ""
        form = f"table-format={sign}{whole}.{part}" if part else f"table-format={sign}{whole}"
        specification += f"S[{form}]"
        specification += "@{\\,}l" if any(cell.half_width for cell in cells) else ""
    most = max(map(len, headings), default=1)
    headings = [[""] * (most - len(lines)) + lines for lines in headings]  # the last lines side by side
    lines = [_heading_line(table, headings, i) for i in range(most)]
    body, before = [], None
    for row in table.cells:
        method = row[table.method].text if table.method is not None else ""
        texts: list[str] = []
        for at, cell in enumerate(row):
            again = at == table.method and method == before
            texts += [""] if again else _cells(cell, columns[at])
        if before not in (None, method):
            body.append("\\addlinespace\n")
        body.append(f"{' & '.join(texts)} \\\\\n")
        before = method
    return (
        f"\\begin{{tabular}}{{{specification}}}\n\\toprule\n{''.join(lines)}\\midrule\n{''.join(body)}"
        "\\bottomrule\n\\end{tabular}\n"
    )


def _heading_lines(table: PaperTable, at: int) -> list[str]:
    """A heading in lines about as wide as its column's cells; a short unit comes last."""
    heading, cells = table.headings[at], _column(table, at)
    width = max(SHORTEST, *(_length(cell) for cell in cells)) if cells else SHORTEST
    lines = textwrap.wrap(heading.short, width, break_long_words=False, break_on_hyphens=False) or [""]
    if heading.unit and len(heading.unit) <= LONGEST_UNIT:
        lines.append(f"({heading.unit})")
    where = -2 if heading.unit and len(heading.unit) <= LONGEST_UNIT else -1
    lines[where] = f"{lines[where]} {heading.arrow}".strip()
    return lines


def _heading_line(table: PaperTable, headings: list[list[str]], number: int) -> str:
    parts = []
    for at, lines in enumerate(headings):
        cells = _column(table, at)
        text = latex_text(lines[number])
        if any(cell.half_width for cell in cells) and _is_number(cells):
            parts.append(f"\\multicolumn{{2}}{{c}}{{{text}}}" if text else " & ")
        else:
            parts.append(f"{{{text}}}" if _is_number(cells) and text else text)
    return f"{' & '.join(parts)} \\\\\n"


def _cells(cell: Cell, column: list[Cell]) -> list[str]:
    """A cell, with its half width in a column of its own if one in the column has any."""
    if not _is_number(column):
        return [latex_text(cell.text) if cell.text else "--"]
    beside = [""] if any(other.half_width for other in column) else []
    if not PLAIN.fullmatch(cell.text) or not cell.number:
        return [f"{{{latex_text(cell.text) if cell.text else '--'}}}", *beside]
    text = cell.text.replace(",", "")
    if cell.half_width:
        half = cell.half_width.replace(",", "{,}")
        beside = [f"$\\pm\\,\\mathbf{{{half}}}$" if cell.leads else f"$\\pm\\,{half}$"]
    return [f"\\bfseries {text}" if cell.leads else text, *beside]


# --- widths ----------------------------------------------------------------------------------------------------------


def _length(cell: Cell) -> int:
    return len(cell.text) + (len(cell.half_width) + 2 if cell.half_width else 0)


def width_pt(table: PaperTable, size: str) -> float:
    """About how wide the table is at a size of letters: by counting characters, rather too wide than too narrow."""
    total = 0.0
    for at in range(len(table.headings)):
        cells = _column(table, at)
        length = max([*(_cell_length(cell) for cell in cells), *(len(line) for line in _heading_lines(table, at))])
        if _is_number(cells):
            whole, part = _digits(cells)
            aside = max((len(cell.half_width) + 2.5 for cell in cells if cell.half_width), default=0)
            length = max(length, whole + whole // 4 * 0.5 + part + 0.6 * bool(part) + aside)
        total += length * MEAN_WIDTH * SIZES[size] + 2 * SEPARATION[size]
    return total


def _cell_length(cell: Cell) -> float:
    return _length(cell) * (BOLD if cell.leads else 1.0)


def _fits(table: PaperTable, size: str, inches: float) -> bool:
    return width_pt(table, size) <= inches * INCH_PT


# --- texts -----------------------------------------------------------------------------------------------------------


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


def latex_text(text: str) -> str:
    """Text escaped for any LaTeX engine; a character that plain fonts lack becomes its code point, [U+1234]."""
    return "".join(_latex_character(character) for character in one_line(text))


def _latex_character(character: str) -> str:
    if character in _LATEX:
        return _LATEX[character]
    apart = unicodedata.normalize("NFD", character)
    accented = len(apart) == 2 and apart[0].isascii() and apart[0].isalpha() and apart[1] in _ACCENTS
    if character.isascii() or (ord(character) < 0x100 and accented):
        return character
    return f"{{[}}U+{ord(character):04X}{{]}}"
