"""Tables for papers: Markdown, LaTeX with booktabs, CSV."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import pandas as pd
from tabulate import tabulate

from distillbench.errors import UserError, nearest, quoted, unknown
from distillbench.statistics import KEYS, SEEDS, TEACHER, arrow, leaders, summarise

if TYPE_CHECKING:
    from distillbench.reports.runs import RunData

Form = Literal["markdown", "latex", "csv"]
GROUP = ["dataset", "teacher", "guidance", "images", "budget", "protocol"]  # of one table: COMPARABLE without nfe
COSTS = ["train_seconds", "train_teacher_nfe", "sample_latency_p50_ms"]  # shown unless other columns are asked for
NONE = "–"  # a value that is empty
HEADINGS = {
    "nfe": "NFE",
    "images": "images scored",
    "train_images": "training images",
    "train_seconds": "training (s)",
    "train_teacher_seconds": "of it teacher (s)",
    "train_student_seconds": "of it student (s)",
    "train_compile_seconds": "of it compiler (s)",
    "train_other_seconds": "of it other (s)",
    "train_teacher_nfe": "teacher evaluations in training",
    "train_student_nfe": "student evaluations in training",
    "train_tflops": "training (10^12 FLOP)",
    "train_joules": "training (J)",
    "sample_latency_p50_ms": "latency (ms)",
    "sample_latency_p95_ms": "latency, 95th percentile (ms)",
    "sample_images_per_second": "images per second",
    "sample_best_batch": "batch of most images per second",
    "sample_gflops": "sampling (10^9 FLOP)",
    "sample_decoder_latency_ms": "decoder latency (ms)",
    "sample_text_encoder_latency_ms": "text encoder latency (ms)",
    "training_seeds": "training seeds",
    "sampling_seeds": "sampling seeds",
}
_MOST = 12  # decimals


def paper_table(
    runs: Sequence[RunData],
    columns: Sequence[str] | None = None,
    precision: Mapping[str, int] | None = None,
    sort: str | None = None,
    form: Form = "markdown",
) -> str:
    """The summary of `runs` as text for a paper: one table for each set of rows that may be compared.

    columns: names of the summary, scores and costs; None: method, nfe, the scores and COSTS, and what is needed to tell
    rows apart. precision: decimals by column; others have as many as their interval allows, or four significant digits.
    sort: a column, the better first for a score; with "-" before it, the other way round. None: the order of the run.

    A score is its mean, plus or minus half its interval over training seeds where it has one; bold where it leads
    (`statistics.leaders`). A table with rows that are not ok has a column status, and their reasons follow it: as a
    list in Markdown, as comments in LaTeX. CSV is one table without formatting: half widths and leads in columns of
    their own (NAME_plus_minus, NAME_leads), and in front what tells several sets apart. LaTeX needs booktabs.

    Raises UserError for a column that does not exist, an unknown form and decimals that are no such number.
    """
    if form not in get_args(Form):
        raise unknown("form", str(form), get_args(Form))
    data = _Data.of(runs)
    asked = list(dict.fromkeys(columns)) if columns is not None else None
    if asked is not None and not asked:
        raise UserError(f"no columns are asked for. Possible: {', '.join(data.possible)}")
    for name in [*(asked or []), *(precision or {}), *([sort.removeprefix("-")] if sort else [])]:
        if name not in data.possible:
            close = nearest(name, data.possible)
            raise UserError(f"no column {quoted(name)}.{close} Possible: {', '.join(data.possible)}")
    for name, digits in (precision or {}).items():
        if isinstance(digits, bool) or not isinstance(digits, int) or not 0 <= digits <= _MOST:
            raise UserError(f"precision of {name} is {digits!r}. Possible: 0 to {_MOST} decimals")
    if form == "csv":
        return _csv(data, asked, precision or {}, sort)
    tables = [_Table.of(data, rows, asked, precision or {}, sort) for rows in _sets(data.summary)]
    problems = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    return _markdown(tables, problems) if form == "markdown" else _latex(tables, problems)


# --- digits ----------------------------------------------------------------------------------------------------------


def decimals(value: float, half_width: float | None = None) -> int:
    """How many decimals a value deserves: down to the digit that its half width still says something of.

    The half width keeps two digits where its first three are below 355 and one above, as the Particle Data Group rounds
    (so 1.234 has two decimals at 0.04 and at 0.12). Without one, four significant digits. Never below 0.
    """
    if half_width is not None and math.isfinite(half_width) and half_width > 0:
        lead = math.floor(math.log10(half_width))
        first = round(half_width / 10 ** (lead - 2))
        return max(0, min(_MOST, (1 if first < 355 else 0) - lead))
    if value == 0 or not math.isfinite(value):
        return 0
    return max(0, min(_MOST, 3 - math.floor(math.log10(abs(value)))))


def _number(value: Any, digits: int | None = None) -> str:
    """A value without an interval; thousands are separated."""
    if isinstance(value, int) and digits is None:
        return f"{value:,}"
    value = float(value)
    if digits is None and value.is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.{decimals(value) if digits is None else digits}f}"


# --- what is shown ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """The summary of several runs in one frame, and what its scores declare."""

    summary: pd.DataFrame  # and `run`, `parameters`, `reasons`, `notes`, `leads_M` for each score M
    columns: dict[str, dict[str, str]]  # by score
    several_runs: bool

    @property
    def possible(self) -> list[str]:
        """Names that may be columns."""
        names = ["run", *KEYS, "training_seeds", "sampling_seeds", "status", *self.columns]
        numbers = [n for n in self.summary if n.startswith(("train_", "sample_")) and n not in self.columns]
        return [*names, *numbers, "parameters"]

    @staticmethod
    def of(runs: Sequence[RunData]) -> _Data:
        columns: dict[str, dict[str, str]] = {}
        for run in runs:
            for name, told in run.columns.items():
                if columns.setdefault(name, told)["direction"] != told["direction"]:
                    raise UserError(f"the runs disagree about which values of {quoted(name)} are better")
        directions = {name: told["direction"] for name, told in columns.items()}
        full = [run for run in runs if len(run.table)]
        together = _together(full, directions)
        groups = [together] if together is not None else [(run.table, run.summary, run.name) for run in full]
        frames = []
        for table, summary, name in groups:
            order = table[KEYS].drop_duplicates()
            known = table.groupby(KEYS, dropna=False, sort=False)["parameters"].first().reset_index()
            frame = order.merge(summary, on=KEYS, how="right").merge(known, on=KEYS, how="left")
            place = {key: i for i, key in enumerate(_keys(order))}
            ranks = [place.get(key, len(place)) for key in _keys(frame)]
            frame = frame.iloc[sorted(range(len(frame)), key=ranks.__getitem__)]
            records = frame.to_dict("records")
            reasons, notes = [_reasons(table, row) for row in records], [_notes(table, row) for row in records]
            frames.append(frame.assign(run=name, reasons=reasons, notes=notes))
        summary = pd.concat(frames, ignore_index=True) if frames else _empty(columns)
        for name, direction in directions.items():
            for column in (name, f"{name}_training_low", f"{name}_training_high"):
                if column not in summary:  # of runs without rows, or without this score
                    summary[column] = pd.array([pd.NA] * len(summary), dtype="Float64")
            missing = summary.get(f"{name}_missing", pd.Series(pd.NA, summary.index, dtype="Int64"))
            summary[f"{name}_missing"] = missing.fillna(0)
            summary[f"leads_{name}"] = leaders(summary, name, direction) if len(summary) else False
        return _Data(summary, columns, len(frames) > 1)


def _together(runs: Sequence[RunData], directions: dict[str, str]) -> tuple[pd.DataFrame, pd.DataFrame, str] | None:
    """Table, summary and name of all runs; None where they measured the same differently, so that each stands alone."""
    if not runs:
        return None
    name = ", ".join(dict.fromkeys(run.name for run in runs))
    if len(runs) == 1:
        return runs[0].table, runs[0].summary, name
    table = pd.concat([run.table for run in runs], ignore_index=True)
    for score in directions:
        if score not in table:
            table[score] = pd.array([pd.NA] * len(table), dtype="Float64")
    table = table.drop_duplicates([*KEYS, *SEEDS, "status", *directions, "key"])
    if table.duplicated([*KEYS, *SEEDS]).any():
        return None
    try:
        return table, summarise(table, directions), name
    except ValueError:
        return None


def _empty(columns: Mapping[str, Any]) -> pd.DataFrame:
    names = [*KEYS, "training_seeds", "sampling_seeds", "status", *columns, *COSTS, "parameters", "run", "reasons"]
    names += ["notes"]
    return pd.DataFrame(columns=list(dict.fromkeys(names)), dtype="object")


def _keys(frame: pd.DataFrame) -> list[tuple[Any, ...]]:
    rows = frame[KEYS].astype(object).where(frame[KEYS].notna(), None)
    return list(rows.itertuples(index=False, name=None))


def _reasons(table: pd.DataFrame, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(status, reason) of the rows behind a row of the summary that are not ok, each once."""
    if row["status"] == "ok":
        return []
    bad = _behind(table[table["status"] != "ok"], row)
    pairs = zip(bad["status"].fillna("unknown"), bad["reason"].fillna("no reason was recorded"), strict=True)
    return list(dict.fromkeys((str(status), str(reason)) for status, reason in pairs))


def _notes(table: pd.DataFrame, row: Mapping[str, Any]) -> list[str]:
    """The notes of the rows behind a row of the summary, each once."""
    noted = table[table["note"].fillna("") != ""]
    return list(dict.fromkeys(_behind(noted, row)["note"])) if len(noted) else []


def _behind(rows: pd.DataFrame, row: Mapping[str, Any]) -> pd.DataFrame:
    """Those of `rows` that a row of the summary is made of."""
    for name in KEYS:
        empty = rows[name].isna()
        same = empty if pd.isna(row[name]) else rows[name].eq(row[name]).fillna(False) | (empty & (name == "images"))
        rows = rows[same]
    return rows


def _sets(summary: pd.DataFrame) -> list[pd.DataFrame]:
    """The rows of each table. A teacher, which has no budget, and a row without images join all that they fit."""
    open_ended = ("images", "budget")
    keys = summary[GROUP].astype(object).where(summary[GROUP].notna(), None).to_dict("records")
    whole = [key for key in keys if all(key[name] is not None and key[name] != "" for name in open_ended)]
    whole = _each_once(whole)

    def fits(key: dict[str, Any], into: dict[str, Any]) -> bool:
        return all(key[n] == into[n] or (n in open_ended and key[n] in (None, "")) for n in GROUP)

    found, used = [], [False] * len(keys)
    for one in whole:
        members = [i for i, key in enumerate(keys) if fits(key, one)]
        for i in members:
            used[i] = True
        found.append(summary.iloc[members])
    alone = [i for i in range(len(keys)) if not used[i]]
    for one in _each_once([keys[i] for i in alone]):
        found.append(summary.iloc[[i for i in alone if keys[i] == one]])
    return found


def _each_once(keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(key) for key in dict.fromkeys(tuple(key.items()) for key in keys)]


def _names(data: _Data, rows: pd.DataFrame, asked: list[str] | None) -> list[str]:
    """The columns of a table."""
    names = asked
    if names is None:
        names = ["method", "nfe", *data.columns, *COSTS]
        apart = ["method", "nfe"]
        for name in ("run", "settings", "device"):
            if rows.duplicated(apart).any() and rows[name].nunique(dropna=False) > 1:
                apart.append(name)
        names[1:1] = apart[2:]
    bad = (rows["status"] != "ok").any()
    return [*names, "status"] if bad and "status" not in names else list(names)


def _sorted(data: _Data, rows: pd.DataFrame, sort: str | None) -> pd.DataFrame:
    if not sort or sort.removeprefix("-") not in rows:
        return rows
    name = sort.removeprefix("-")
    ascending = data.columns.get(name, {}).get("direction", "lower") != "higher"
    return rows.sort_values(name, ascending=ascending != sort.startswith("-"), kind="stable", na_position="last")


def _status(row: Mapping[str, Any]) -> str:
    """ok, or which statuses stand behind the row: "diverged", "2 of 3 ok, else failed"."""
    text = str(row["status"])
    words = ", ".join(dict.fromkeys(status for status, _ in row["reasons"])) or "failed"
    if text == "ok":
        return text
    return words if text.startswith("0 of ") else f"{text}, else {words}"


def _half_width(row: Mapping[str, Any], name: str) -> float | None:
    low, high = row.get(f"{name}_training_low"), row.get(f"{name}_training_high")
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return None
    return (float(high) - float(low)) / 2


@dataclass(frozen=True)
class _Cell:
    text: str
    half_width: str = ""
    leads: bool = False
    number: bool = True


def _cell(data: _Data, row: Mapping[str, Any], name: str, precision: Mapping[str, int]) -> _Cell:
    if name == "status":
        return _Cell(_status(row), number=False)
    value = row[name]
    if pd.isna(value) or value == "":
        return _Cell("", number=False)
    if isinstance(value, str):
        return _Cell(value, number=False)
    digits = precision.get(name)
    half = _half_width(row, name) if name in data.columns else None
    if half is None:
        return _Cell(_number(value, digits))
    digits = decimals(float(value), half) if digits is None else digits
    return _Cell(f"{float(value):,.{digits}f}", f"{half:,.{digits}f}", bool(row[f"leads_{name}"]))


def _heading(data: _Data, name: str) -> tuple[str, str]:
    """The words of a heading, and its arrow."""
    if name in data.columns:
        unit = data.columns[name].get("unit", "")
        return f"{name} ({unit})" if unit else name, arrow(data.columns[name]["direction"])
    if name in HEADINGS:
        return HEADINGS[name], ""
    return (f"{name.removesuffix('_mib')} (MiB)" if name.endswith("_mib") else name).replace("_", " "), ""


@dataclass(frozen=True)
class _Table:
    """A table before it is written in any form: words that nothing has escaped yet."""

    headings: list[tuple[str, str]]
    cells: list[list[_Cell]]
    caption: list[str]  # sentences
    notes: list[str]  # about rows that are not ok
    label: str

    @staticmethod
    def of(
        data: _Data, rows: pd.DataFrame, asked: list[str] | None, precision: Mapping[str, int], sort: str | None
    ) -> _Table:
        rows = _sorted(data, rows, sort)
        names = _names(data, rows, asked)
        records: list[dict[str, Any]] = rows.to_dict("records")  # type: ignore[assignment]
        cells = [[_cell(data, row, name, precision) for name in names] for row in records]
        notes = []
        for row in records:
            notes += [f"{row['method']}, {row['nfe']} NFE: {status}: {reason}" for status, reason in row["reasons"]]
            notes += [f"{row['method']}, {row['nfe']} NFE: {note}" for note in row["notes"]]
        label = "".join(c if c.isascii() and c.isalnum() else "-" for c in str(records[0]["dataset"]).lower())
        return _Table(
            [_heading(data, name) for name in names],
            cells,
            _caption(data, rows, names),
            list(dict.fromkeys(notes)),
            label,
        )


def _caption(data: _Data, rows: pd.DataFrame, names: list[str]) -> list[str]:
    def values(name: str) -> str:
        return ", ".join(str(v) for v in rows[name].dropna().unique() if v != "")

    students = rows[~rows["method"].str.startswith(TEACHER).fillna(False).astype(bool)]
    told = [f"Dataset {values('dataset')}, teacher {values('teacher')}"]
    told[0] += f", guidance {values('guidance')}" if values("guidance") else ""
    if values("budget"):
        told.append(f"Budget of each training: {values('budget')}")
    told.append(f"Scores on n = {values('images') or 'unknown'} images")
    for name, what in (("training_seeds", "training"), ("sampling_seeds", "sampling")):
        counts = sorted({int(n) for n in (students if len(students) else rows)[name].dropna()})
        if counts and counts != [0]:
            span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
            told.append(f"{what.capitalize()} seeds: {span}")
    scores = [name for name in names if name in data.columns]
    with_interval = [name for name in scores if rows[f"{name}_training_low"].notna().any()]
    if with_interval:
        kinds = {
            k
            for n in with_interval
            if f"{n}_training_interval" in rows
            for k in rows[f"{n}_training_interval"].dropna()
        }
        how = {"t": "Student's t", "bootstrap": "bootstrap"}
        found = " or ".join(how.get(kind, kind) for kind in sorted(kinds, reverse=True))
        of = "half the width of the 95 % interval of the mean over training seeds"
        told.append(f"±: {of}" + (f" ({found})" if found else "") + "; values without it have too few")
    elif scores:
        told.append("No intervals: no method was trained with two seeds")
    if any(rows[f"leads_{name}"].any() for name in scores):
        told.append("Bold: better than every other method at the same NFE, beyond the intervals of both")
    elif scores:
        told.append("None is marked as best: no interval lies clear of all others")
    return told


# --- forms -----------------------------------------------------------------------------------------------------------


def _markdown(tables: list[_Table], problems: list[str]) -> str:
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


def _markdown_cell(cell: _Cell) -> str:
    text = _markdown_text(cell.text) if cell.text else NONE
    text += f" ± {cell.half_width}" if cell.half_width else ""
    return f"**{text}**" if cell.leads else text


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~$!"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def _markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _one_line(text).translate(_MARKDOWN)


def _latex(tables: list[_Table], problems: list[str]) -> str:
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


def _latex_cell(cell: _Cell) -> str:
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
    """Text that LaTeX sets as it is, with any engine; what plain fonts lack is named by its number."""
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
    """Text for a LaTeX comment, which ends with its line."""
    return _one_line(text)


def _one_line(text: str) -> str:
    """Control characters, line and paragraph separators as spaces, and single ones."""
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") else c for c in text).split())


def _csv(data: _Data, asked: list[str] | None, precision: Mapping[str, int], sort: str | None) -> str:
    apart = [name for name in GROUP if data.summary[name].nunique(dropna=False) > 1]
    several = apart if len(_sets(data.summary)) > 1 else []
    rows = _sorted(data, data.summary, sort)
    names = _names(data, rows, asked)
    names = [*(name for name in several if name not in names), *names]
    columns: dict[str, list[str]] = {}
    for name in names:
        cells: list[_Cell] = [_cell(data, row, name, precision) for row in _records(rows)]
        columns[name] = [cell.text.replace(",", "") if cell.number else cell.text for cell in cells]
        if name in data.columns:
            columns[f"{name}_plus_minus"] = [cell.half_width.replace(",", "") for cell in cells]
            columns[f"{name}_leads"] = ["yes" if cell.leads else "" for cell in cells]
    out = io.StringIO()
    pd.DataFrame(columns).to_csv(out, index=False, lineterminator="\n")
    return out.getvalue()


def _records(rows: pd.DataFrame) -> Iterator[dict[str, Any]]:
    yield from rows.to_dict("records")  # type: ignore[misc]
