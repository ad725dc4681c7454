"""Tables of scores in the terminal: numbers, headings, intervals and stars, for a run and for `distillbench show`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distillbench.records.numbers import rounded
from distillbench.records.stars import Stars
from distillbench.records.statistics import TEACHER
from distillbench.reports.labels import Label, Labels

STAR = " best"  # suffix of columns that are true where a method leads in a score
COSTS = (  # columns that are shown where they fit
    *("train_tflops", "train_seconds", "sample_latency_p50_ms", "train_teacher_nfe", "train_student_nfe"),
    *("sample_images_per_second", "train_images", "train_joules"),
)
WIDEST = 10_000  # characters of a line where no terminal breaks it
LONGEST_UNIT = 8  # characters of a unit in a heading
NO_LABELS = Labels()
SOURCES = ("training", "sampling")  # of an interval: seeds


def plain(text: object) -> str:
    """Text in which unprintable characters are escaped as in Python (a line end is \\n).

    >>> plain("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def say(console: Console, line: str) -> None:
    """Print a line without markup, control characters and line breaks."""
    console.print(Text(plain(line)), soft_wrap=True)


def number(value: object, width: object = None) -> str:
    """A value, rounded as :func:`rounded` does by `width`, half its interval.

    >>> number(176.84304, 2.7658), number(1870.512704), number(0.1561677, 0.0003), number(1797), number(None)
    ('176.8', '1,871', '0.15617', '1,797', '-')
    """
    if value is None or value is pd.NA:
        return "-"
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, int):
        return f"{value:,}"
    x = float(value)  # type: ignore[arg-type]
    if not math.isfinite(x):
        return "-" if math.isnan(x) else f"{x:g}"
    half = None if width is None or width is pd.NA else abs(float(width))  # type: ignore[arg-type]
    return rounded(x, half)


def row_name(row: Mapping[str, object], settings: object = None, labels: Labels = NO_LABELS) -> str:
    """The name of a row of the table; `settings` replaces the text of its settings."""
    seed, settings = row.get("training_seed"), row["settings"] if settings is None else settings
    words = [labels.method_label(str(row["method"])).short + (f" [{settings}]" if there(settings) else "")]
    words += [f"seed {seed}"] if there(seed) else []
    words += [f"{number(row['nfe'])} NFE", f"noise {number(row['sampling_seed'])}"]
    return ", ".join(words)


def there(value: object) -> bool:
    """Whether a value of a table is not empty."""
    return not pd.isna(value) and value != ""  # type: ignore[call-overload]


def new_table(
    headings: Sequence[str], text: Sequence[bool], fold: bool = False, footer: Sequence[str] | None = None
) -> Table:
    """An empty table. `text` columns are left-aligned; `fold` wraps them; `footer` is its last line."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.show_footer = footer is not None
    for k, (heading, left) in enumerate(zip(headings, text, strict=True)):
        lines = Text("\n".join(plain(part) for part in heading.split("\n")))
        justify: Literal["left", "right"] = "left" if left else "right"
        end = footer[k] if footer else ""
        table.add_column(lines, end, vertical="bottom", no_wrap=not fold, overflow="fold", justify=justify)
    return table


def fits(console: Console, table: Table) -> bool:
    """Whether the table is as narrow as the console."""
    return console.measure(table, options=console.options.update(max_width=WIDEST)).maximum <= console.width


def put(console: Console, table: Table) -> None:
    """Print a table; outside of a terminal without blanks at the ends of lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    console.print(Text("\n".join(line.rstrip() for line in captured.get().splitlines())), soft_wrap=True)


def with_stars(summary: pd.DataFrame, stars: Stars) -> pd.DataFrame:
    """The summary with a column for each score that is true where a method has a star."""
    columns = {name + STAR: marks for name, marks in stars.marks.items()}
    return pd.concat([summary, pd.DataFrame(columns, index=summary.index)], axis=1)


def score_table(frame: pd.DataFrame, names: Sequence[str], labels: Labels, fold: bool = False) -> Table:
    """The columns `names` of `frame` as a table, under their labels.

    Values with an interval are ``mean ± half of it``; where a method leads, a star follows. A blank line parts methods,
    and the teacher's rows are dim.
    """
    rows = frame.to_dict("records")
    columns = {name: _texts(rows, name, labels) for name in names}
    headings = [_heading(labels.label(name), texts) for name, texts in columns.items()]
    table = new_table(headings, [not pd.api.types.is_numeric_dtype(frame[name]) for name in names], fold)
    methods = [str(row.get("method")) for row in rows]
    ends = [method != after for method, after in zip(methods, [*methods[1:], ""], strict=True)]
    parted = sum(ends) == len(set(methods)) < len(methods)
    for k, (row, end) in enumerate(zip(rows, ends, strict=True)):
        cells = [
            Text(texts[k], "bold green" if row.get(name + STAR) is True else "") for name, texts in columns.items()
        ]
        table.add_row(*cells, style="dim" if methods[k].startswith(TEACHER) else None, end_section=parted and end)
    return table


def columns_that_fit(
    console: Console, frame: pd.DataFrame, names: Sequence[str], labels: Labels, least: int
) -> list[str]:  # fmt: skip
    """The first of the columns `names` that fit into the console; at least `least` of them."""
    shown = list(names)
    while len(shown) > least and not fits(console, score_table(frame, shown, labels)):
        shown.pop()
    return shown


def shared_seeds(summary: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Texts on the numbers of seeds that all rows share, such as "2 training seeds"; and the columns that differ."""
    told, columns = [], []
    for source in SOURCES:
        name = f"{source}_seeds"
        students = summary[summary["training_seeds"] > 0] if source == "training" else summary
        counts = students[name].unique()
        if len(counts) > 1:
            columns.append(name)
        elif len(counts) and counts[0] > 1:
            told.append(f"{counts[0]} {source} seeds")
    return told, columns


def table_notes(frame: pd.DataFrame, shown: Sequence[str], wanted: Sequence[str], labels: Labels) -> list[str]:
    """What the columns are, which of the `wanted` ones are not `shown`, and what the intervals are."""
    notes = []
    for name in shown:
        label = labels.label(name)
        if name in labels.columns and label.short != name:
            unit = f", in {label.unit}" if label.unit else ""
            notes.append(f"{label.short}: {label.long}{unit} ({name})")
    if hidden := [labels.label(name).short for name in wanted if name not in shown]:
        notes.append(f"not shown, as too wide: {', '.join(hidden)} (distillbench show --columns or --csv)")
    found = [source for source in SOURCES if any(_has_interval(frame, name, source) for name in shown)]
    for source in found:
        rest = ", where there is none over training seeds" if source == "sampling" and len(found) > 1 else ""
        notes.append(f"±: half of the 95 % interval of the mean over {source} seeds{rest}")
    return notes


def _has_interval(frame: pd.DataFrame, name: str, source: str) -> bool:
    low = f"{name}_{source}_low"
    return low in frame and bool(frame[low].notna().any())


def _heading(label: Label, texts: Sequence[str]) -> str:
    """The label with its unit and arrow, in lines that are as long as the longest of `texts` or of its words."""
    words = [
        *plain(label.short).replace("_", "_ ").split(),
        *[f"({label.unit})"] * (0 < len(label.unit) <= LONGEST_UNIT),
    ]
    width = max(map(len, [*words, *texts]))
    lines = textwrap.wrap(" ".join(words), width, break_long_words=False, break_on_hyphens=False)
    lines = [line.replace("_ ", "_") for line in lines]
    if label.arrow and len(lines[-1]) + 2 <= width:
        lines[-1] += f" {label.arrow}"
    elif label.arrow:
        lines.append(label.arrow)
    return "\n".join(lines)


def _texts(rows: Sequence[Mapping[str, object]], name: str, labels: Labels) -> list[str]:
    """The cells of a column. Means, ± and stars are below each other."""
    if name == "method":
        return [plain(labels.method_label(str(row[name])).short) for row in rows]
    parts = [_mean_and_half(row, name) for row in rows]
    width = max((len(half) for _, half in parts), default=0)
    halves = [f" ± {half:>{width}}" if half else " " * (3 + width) * (width > 0) for _, half in parts]
    stars = ["*" if row.get(name + STAR) is True else " " for row in rows]
    stars = stars if "*" in stars else [""] * len(rows)
    return [f"{mean}{half}{star}" for (mean, _), half, star in zip(parts, halves, stars, strict=True)]


def _mean_and_half(row: Mapping[str, object], name: str) -> tuple[str, str]:
    """A value, and half of its interval, or "" if it has none."""
    for source in SOURCES:
        low, high = row.get(f"{name}_{source}_low"), row.get(f"{name}_{source}_high")
        if low is not None and high is not None and there(low) and there(high):
            half = (float(high) - float(low)) / 2  # type: ignore[arg-type]
            return number(row[name], half), number(half, half)
    return number(row[name]), ""
