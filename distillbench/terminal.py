"""What the command line prints: definitions, the plan and its price, and the table of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from distillbench.progress import Progress
    from distillbench.shared_context import Cell

WIDEST_TEXT = 120
LONGEST_VERDICT = 1000  # characters
MOST_LINES = 50  # of a plan or a table in a terminal


def new_console() -> Console:
    """As wide as the terminal; elsewhere COLUMNS wide, or 80."""
    from rich.console import Console

    return Console(highlight=False)


def width() -> int:
    return click.HelpFormatter(max_width=WIDEST_TEXT).width


def print_definitions(rows: Iterable[tuple[str, str]]) -> None:
    """Names with their meanings beside them, as --help prints options."""
    lines = [(name, " ".join(meaning.split())) for name, meaning in rows]
    formatter = click.HelpFormatter(max_width=WIDEST_TEXT)
    formatter.indent()
    if lines:
        formatter.write_dl(lines, col_max=36)
    click.echo(formatter.getvalue(), nl=False)


def _new_table(columns: Iterable[str], text: Sequence[str], footer: Sequence[str] | None = None) -> Table:
    """An empty table as narrow as its values. The columns in `text` are flush left, the others are numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.show_footer = footer is not None
    for k, name in enumerate(columns):
        heading, end = "\n".join(name.split("_")), footer[k] if footer else ""
        table.add_column(heading, end, vertical="bottom", no_wrap=True, justify="left" if name in text else "right")
    return table


def print_plan(console: Console, cells: list[Cell]) -> None:
    """What would be run: for each dataset and teacher its cells with their prices, and the sum.

    Of more cells than MOST_LINES those that differ in the seed alone are one line, and the first lines are shown.
    """
    from distillbench.plan import notes_of, teacher_plan

    by_context: dict[int, list[Cell]] = {}
    for cell in cells:
        by_context.setdefault(id(cell.shared), []).append(cell)
    for group, (dataset, name, origin) in zip(by_context.values(), teacher_plan(cells), strict=True):
        price = f", {origin.images:,} images" if origin.images else ""
        console.print(f"dataset {dataset}, teacher {name}: {origin.origin}{price}", markup=False, soft_wrap=True)
        columns = ["cell", "rows at NFE", "train_images", "train_teacher_NFE", "train_student_NFE", "sampling_NFE"]
        footer = [f"sum ({len(group):,} cells)" if len(group) > MOST_LINES else "sum", ""]
        footer += [number(sum(column)) for column in zip(*map(_price, group), strict=True)]
        table = _new_table(columns, text=columns[:2], footer=footer)
        lines = _plan_lines(group)
        for label, nfe, numbers in lines[:MOST_LINES]:
            table.add_row(label, ", ".join(map(str, nfe)), *map(number, numbers))
        console.print(table)
        _say_more(console, len(lines), "lines; the sum is of all")
        for name, why in group[0].shared.unavailable_metrics().items():
            console.print(f"{name} would be empty: {why}", markup=False, soft_wrap=True)
        failing = [cell for cell in group if cell.price_error]
        for cell in failing[:MOST_LINES]:
            console.print(f"{cell.label} would fail: {cell.price_error}", markup=False, soft_wrap=True)
        _say_more(console, len(failing), "cells would fail")
        budget = group[0].shared.config.budget
        if budget.limit == "seconds":
            console.print(f"Each method trains {budget.seconds:g} s; its images and evaluations are not foreseen.")
    for note in notes_of(cells):
        console.print(note, markup=False, soft_wrap=True)
    console.print("dry run: nothing was run or written")


def _plan_lines(cells: list[Cell]) -> list[tuple[str, list[int], tuple[int, ...]]]:
    """(label, numbers of evaluations of its rows, prices) of each line of a plan."""
    from distillbench.plan import changed_settings

    if len(cells) <= MOST_LINES:
        return [(cell.label, cell.nfe, _price(cell)) for cell in cells]
    alike: dict[tuple, list[Cell]] = {}
    for cell in cells:
        settings = changed_settings(cell.method_config)
        alike.setdefault((cell.name, settings, tuple(cell.nfe), _price(cell)), []).append(cell)
    lines = []
    for (name, settings, nfe, price), group in alike.items():
        seeds = f" ({len(group):,} seeds)" if len(group) > 1 else f" (seed {group[0].seed})" if group[0].entry else ""
        numbers = tuple(value * len(group) for value in price)
        lines.append((" ".join(filter(None, [name + seeds, settings])), list(nfe), numbers))
    return lines


def _say_more(console: Console, count: int, what: str) -> None:
    """How many lines were left out."""
    if count > MOST_LINES:
        console.print(f"and {count - MOST_LINES:,} more {what}", markup=False, soft_wrap=True)


def _price(cell: Cell) -> tuple[int, int, int, int]:
    """Foreseen: images, teacher and student evaluations of training, evaluations of sampling."""
    evaluation = cell.shared.config.evaluation
    sampling = sum(cell.nfe) * evaluation.images * len(evaluation.seeds)
    return cell.price.images, cell.price.teacher_nfe, cell.price.student_nfe, sampling


def print_rows(progress: Progress, rows: pd.DataFrame) -> None:
    """A line for each new row, as the table grows; of many that were there already one line for all."""
    if len(rows) > MOST_LINES:
        counts = rows["status"].value_counts()
        progress.say(f"  {len(rows):,} rows: {', '.join(f'{count:,} {status}' for status, count in counts.items())}")
        return
    for row in rows.to_dict("records"):
        values = ", ".join(f"{name} {number(row[name])}" for name in _scores(rows))
        progress.say(f"  {_row_name(row)}: {values if row['status'] == 'ok' else _why(row)}")


def print_table(console: Console, table: pd.DataFrame, summary: pd.DataFrame, directions: dict[str, str]) -> None:
    """Means over seeds with their intervals, with as many columns as fit; every column is in table.csv."""
    from distillbench.statistics import KEYS

    same = [name for name in ("dataset", "teacher", "budget", "device") if table[name].nunique() == 1]
    told = {name: table[name].dropna().iloc[0] for name in same}
    console.print(", ".join(f"{name} {value}" for name, value in told.items() if value), markup=False, soft_wrap=True)
    summary = table[KEYS].drop_duplicates().merge(summary, on=KEYS, how="left")  # in the order of the run
    names = [name for name in ("dataset", "teacher") if name not in same]
    names += ["method", "nfe"]
    for telling_apart in ("settings", "guidance", "budget", "protocol"):
        differs = summary[telling_apart].nunique(dropna=False) > 1
        names += [telling_apart] if differs and summary.duplicated(names).any() else []
    names += [name for name in ("training_seeds", "sampling_seeds") if (summary[name] > 1).any()]
    names += ["status"] if (summary["status"] != "ok").any() else []
    first = len(names)
    names += list(directions)
    optional = ["sample_latency_p50_ms", "train_seconds", "sample_images_per_second"]
    optional += ["train_teacher_nfe", "train_student_nfe", "train_images", "train_tflops", "train_joules"]
    optional = [name for name in optional if summary[name].notna().any()]
    lines = _best_lines(summary, directions)
    unlimited = console.options.update(max_width=10_000)

    def fits(shown: list[str]) -> bool:
        return console.measure(_drawn(summary, shown, directions, lines), options=unlimited).maximum <= console.width

    shown = names + optional
    while len(shown) > first + 1 and not fits(shown):  # the first score is always there
        shown.pop()
    console.print(_drawn(summary, shown, directions, lines))
    if len(lines) < len(summary):
        best = f"the {len(lines)} best by {next(iter(directions))}" if directions else f"the first {len(lines)}"
        console.print(f"{best} of {len(summary):,} (all: summary.csv, distillbench show)", markup=False, soft_wrap=True)
    cut = [name for name in directions if name not in shown]
    notes = [f"not shown: {', '.join(cut)} (summary.csv)"] if cut else []
    for source in ("training", "sampling"):
        if any(summary[f"{name}_{source}_low"].notna().any() for name in directions):
            notes.append(f"{source[0]}[...]: 95 % interval of the mean over {source} seeds")
    for line in notes:
        console.print(line, markup=False, soft_wrap=True)
    for line in _verdicts(summary, directions):
        end = "" if len(line) <= LONGEST_VERDICT else " ..."
        console.print(line[:LONGEST_VERDICT] + end, markup=False, soft_wrap=True)
    bad = table[table["status"] != "ok"]
    for row in bad[:MOST_LINES].to_dict("records"):
        console.print(f"{_row_name(row)}: {_why(row)}", markup=False, soft_wrap=True)
    _say_more(console, len(bad), "rows that are not ok (table.csv)")
    for note, rows in table[table["note"].fillna("") != ""].groupby("note", sort=False):
        named = dict.fromkeys(f"{row['method']}, {row['nfe']} NFE" for row in rows.to_dict("records"))
        console.print(f"note on {'; '.join(named)}: {note}", markup=False, soft_wrap=True)
    for name in directions:
        reasons = table.loc[table[name].isna() & (table["status"] == "ok"), "reason"]
        if table[name].isna().all() and len(reasons):
            console.print(f"{name} is empty: {_reason_of(name, reasons.iloc[0])}", markup=False, soft_wrap=True)


def _reason_of(name: str, reasons: str) -> str:
    """Why the column `name` is empty, out of a row's reasons."""
    told = [part.partition(" empty: ") for part in reasons.split("; ")]
    return next((why for names, _, why in told if name in names.split(", ")), reasons)


def _best_lines(summary: pd.DataFrame, directions: dict[str, str]) -> list[int]:
    """Which rows are shown, by their places: all, or the best by the first score."""
    if len(summary) <= MOST_LINES or not directions:
        return list(range(len(summary)))[:MOST_LINES]
    name, direction = next(iter(directions.items()))
    score = summary[name].astype("Float64").to_numpy(dtype=float, na_value=float("nan"))
    order = (-score if direction == "higher" else score).argsort(kind="stable")  # what has none comes last
    return order[:MOST_LINES].tolist()


def _drawn(summary: pd.DataFrame, names: list[str], directions: dict[str, str], lines: list[int]) -> Table:
    from rich.markup import escape

    from distillbench.statistics import arrow, leaders

    headings = [f"{name}_{arrow(directions[name])}".rstrip("_") if name in directions else name for name in names]
    texts = ("dataset", "teacher", "method", "settings", "budget", "protocol", "status")
    drawn = _new_table(headings, text=texts)
    best = {name: leaders(summary, name, directions[name]).tolist() for name in names if name in directions}
    for index, row in zip(lines, summary.iloc[lines].to_dict("records"), strict=True):
        cells = (_cell(row, name, best.get(name, {}) and best[name][index]) for name in names)
        drawn.add_row(*map(escape, cells))
    return drawn


def _cell(row: dict, name: str, best: bool) -> str:
    """A value; of a score with its interval, and a star where it leads beyond doubt."""
    import pandas as pd

    text = number(row[name])
    for source in ("training", "sampling"):
        low, high = row.get(f"{name}_{source}_low"), row.get(f"{name}_{source}_high")
        if low is not None and not pd.isna(low):
            return f"{text} {source[0]}[{number(low)}, {number(high)}]{'*' if best else ''}"
    return text


def _verdicts(summary: pd.DataFrame, directions: dict[str, str]) -> list[str]:
    """For each score and number of evaluations: who leads, or why nobody is marked; not where methods have one seed."""
    from distillbench.statistics import COMPARABLE, verdict

    if not (summary["training_seeds"] > 1).any():
        students = summary[summary["training_seeds"] > 0]
        return ["one training seed: no method is marked as best (seed=0,1,2 trains three)"] if len(students) > 1 else []
    lines = []
    students = summary[~summary["method"].str.startswith("teacher:")]
    for name, direction in directions.items():
        for _, group in students.groupby(COMPARABLE, dropna=False, sort=False) if direction != "none" else []:
            if len(group) > 1:
                lines.append(f"{name}, {group['nfe'].iloc[0]} NFE: {verdict(group, name, direction)}")
    return lines


def _scores(table: pd.DataFrame) -> list[str]:
    """The columns between those that name a row and those that say what it cost."""
    from distillbench.table import FIRST, LAST

    return [name for name in table.columns if name not in FIRST and name not in LAST]


def _row_name(row: dict) -> str:
    seed = number(row["training_seed"])
    return f"{row['method']}{'' if seed == '-' else f' seed {seed}'}, {row['nfe']} NFE, noise {row['sampling_seed']}"


def _why(row: dict) -> str:
    return f"{row['status']}: {row['reason']}"


def number(value: object) -> str:
    import pandas as pd

    if pd.isna(value):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
