"""Tables of scores in the terminal: numbers, headings, intervals and stars, for a run and for `distillbench show`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distillbench.records.statistics import arrow, leaders

STAR = " best"  # suffix of columns that are true where a method leads in a score
COSTS = (  # columns that are shown where they fit
    *("sample_latency_p50_ms", "train_seconds", "sample_images_per_second", "train_teacher_nfe", "train_student_nfe"),
    *("train_images", "train_tflops", "train_joules"),
)
WIDEST = 10_000


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
    """A value rounded to two digits of `width`, half its interval; without a width to four digits.

    >>> number(176.84304, 7.7658), number(1870.512704), number(0.1561677, 0.0003), number(1797), number(None)
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
    w = 0.0 if width is None or width is pd.NA else abs(float(width))  # type: ignore[arg-type]
    if 0 < w < math.inf and w > abs(x) * 1e-12:
        decimals = max(0, 1 - math.floor(math.log10(w)))
        return f"{x:,.{decimals}f}" if decimals <= 8 else f"{x:.4g}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def row_name(row: Mapping[str, object], settings: object = None) -> str:
    """The name of a row of the table; `settings` replaces the text of its settings."""
    seed, settings = row.get("training_seed"), row["settings"] if settings is None else settings
    words = [str(row["method"]) + (f" [{settings}]" if there(settings) else "")]
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
        lines = Text("\n".join(plain(part) for part in heading.split("_")))
        justify: Literal["left", "right"] = "left" if left else "right"
        end = footer[k] if footer else ""
        table.add_column(lines, end, vertical="bottom", no_wrap=not fold, overflow="fold", justify=justify)
    return table


def fits(console: Console, table: Table) -> bool:
    """Whether the table is as narrow as the console."""
    return console.measure(table, options=console.options.update(max_width=WIDEST)).maximum <= console.width


def with_stars(summary: pd.DataFrame, directions: Mapping[str, str]) -> pd.DataFrame:
    """The summary with a column for each score that is true where a method leads in it (`statistics.leaders`)."""
    stars = {name + STAR: leaders(summary, name, direction) for name, direction in directions.items()}
    return pd.concat([summary, pd.DataFrame(stars, index=summary.index)], axis=1)


def score_table(frame: pd.DataFrame, names: Sequence[str], directions: Mapping[str, str], fold: bool = False) -> Table:
    """The columns `names` of `frame` as a table. Scores have arrows, intervals, and a star where a method leads."""
    headings = [f"{name}_{arrow(directions[name])}".rstrip("_") if name in directions else name for name in names]
    table = new_table(headings, [not pd.api.types.is_numeric_dtype(frame[name]) for name in names], fold)
    for row in frame.to_dict("records"):
        table.add_row(*(Text(_cell(row, name)) for name in names))
    return table


def columns_that_fit(
    console: Console, frame: pd.DataFrame, names: Sequence[str], directions: Mapping[str, str], least: int
) -> list[str]:
    """The first of the columns `names` that fit into the console; at least `least` of them."""
    shown = list(names)
    while len(shown) > least and not fits(console, score_table(frame, shown, directions)):
        shown.pop()
    return shown


def _cell(row: dict, name: str) -> str:
    """A value; a score with its interval, and a star if it leads."""
    for source in ("training", "sampling"):
        low, high = row.get(f"{name}_{source}_low"), row.get(f"{name}_{source}_high")
        if low is not None and high is not None and not pd.isna(low) and not pd.isna(high):
            half = (high - low) / 2
            ends = f"{source[0]}[{number(low, half)}, {number(high, half)}]"
            return f"{number(row[name], half)} {ends}{'*' if row.get(name + STAR) is True else ''}"
    return number(row[name])
