"""What the command line prints: definitions, the plan of a run with its cost, and the table of a run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from distillbench.errors import first_of

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from distillbench.records.leading import Influences, LeadingGroup, Standing
    from distillbench.reports.labels import Labels
    from distillbench.runs.level_tuning import Tuning
    from distillbench.runs.shared_context import Cell
    from distillbench.runs.time_plan import Part, TimePlan
    from distillbench.system.progress import Progress

WIDEST_TEXT = 120
LONGEST_LINE = 10_000
LONGEST_VERDICT = 1000  # characters
TIME = "time\nabout"  # column of a plan
MOST_LINES = 50  # of a plan or a table
MOST_NAMED = 8  # rows in one line of text


def new_console() -> Console:
    """A console as wide as the terminal; without one $COLUMNS wide, or as wide as its lines."""
    from rich.console import Console

    return Console(highlight=False, width=LONGEST_LINE if is_unbounded() else None)


def is_unbounded() -> bool:
    """Whether lines may have any length: no terminal breaks them, and $COLUMNS is not given."""
    return not sys.stdout.isatty() and not os.environ.get("COLUMNS")


def width() -> int:
    """The width of text in the terminal, as click has it for --help."""
    return LONGEST_LINE if is_unbounded() else click.HelpFormatter(max_width=WIDEST_TEXT).width


def print_definitions(rows: Iterable[tuple[str, str]]) -> None:
    """Print names with their meanings beside them, as --help prints options."""
    lines = [(name, " ".join(meaning.split())) for name, meaning in rows]
    formatter = click.HelpFormatter(width=width())
    formatter.indent()
    if lines:
        formatter.write_dl(lines, col_max=36)
    click.echo(formatter.getvalue(), nl=False)


def print_plan(console: Console, cells: list[Cell], times: TimePlan | None = None, why_no_times: str = "") -> None:
    """The plan: for each dataset and teacher a table of its cells with their costs, and what would be empty or fail.

    With `times` also how long the cells will take; `why_no_times` is the reason why there are none.
    Of more than MOST_LINES cells, those that differ only in the seed share a line, and the first lines are shown.
    """
    from distillbench.runs.plan import notes_of, teacher_plan

    seconds = None if times is None else {id(cell): times.of_cell(index) for index, cell in enumerate(cells)}
    by_context: dict[int, list[Cell]] = {}
    for cell in cells:
        by_context.setdefault(id(cell.shared), []).append(cell)
    for group, (dataset, name, origin) in zip(by_context.values(), teacher_plan(cells), strict=True):
        images = f", {origin.images:,} images" if origin.images else ""
        _say(console, f"dataset {dataset}, teacher {name}: {origin.origin}{images}")
        before = {} if times is None or len(by_context) > 1 else times.before
        _print_plan_table(console, group, seconds, before)
        if varied := dict.fromkeys(cell.name for cell in group if cell.cost_varies):
            _say(console, f"{', '.join(varied)}: evaluations are about these, because steps have random costs")
        if compared := {cell.name: cell.compared for cell in group if cell.compared}:
            counted = ", ".join(f"{name} on {count:.3g} images" for name, count in compared.items())
            words = "which costs seconds and train_tflops, and counts as no evaluations"
            _say(console, f"LPIPS is evaluated for each training image: {counted}, {words}")
        for column, why in group[0].shared.unavailable_metrics().items():
            _say(console, f"{column} would be empty: {why}")
        failing = [cell for cell in group if cell.cost_error]
        for cell in failing[:MOST_LINES]:
            _say(console, f"{cell.label} would fail: {cell.cost_error}")
        _say_more(console, len(failing), "cells would fail")
        budget = group[0].shared.config.budget
        if budget.limit == "seconds":
            _say(console, f"Each method trains {budget.seconds:g} s; its images and evaluations cannot be predicted.")
    for note in notes_of(cells):
        _say(console, note)
    for line in [] if times is None else times.lines(cells[0].shared.device == "cpu"):
        _say(console, line)
    if why_no_times:
        _say(console, f"time: no estimate ({why_no_times})")
    _say(console, "dry run: nothing was run or written")


def _print_plan_table(
    console: Console, cells: list[Cell], seconds: dict[int, float] | None, before: Mapping[Part, float]
) -> None:
    """`seconds`: by the id of a cell. `before`: those of what is done once, which the sum includes."""
    from distillbench.reports.terminal_table import fits, number, put
    from distillbench.runs.time_plan import about

    columns = ["cell", "rows at NFE", "training\nimages"]
    columns += [f"{what}\nNFE" for what in ("teacher", "student", "sampling")]
    footer = [f"sum ({len(cells):,} cells)" if len(cells) > MOST_LINES else "sum", ""]
    footer += [number(sum(column)) for column in zip(*map(_cost, cells), strict=True)]
    lines = _plan_lines(cells)
    rows = [[label, ", ".join(map(str, nfe)), *map(number, costs)] for label, nfe, costs, _ in lines[:MOST_LINES]]
    groups = [group for *_, group in lines[:MOST_LINES]]
    tables = [_filled(columns, rows, footer)]
    if seconds is not None:
        times = [about(sum(seconds[id(cell)] for cell in group)) for group in groups]
        longer = [[*row, time] for row, time in zip(rows, times, strict=True)]
        once = {str(part): value for part, value in before.items() if value}
        longer = [[part, *[""] * (len(columns) - 1), about(value)] for part, value in once.items()] + longer
        whole = about(sum(once.values()) + sum(seconds[id(cell)] for cell in cells))
        tables = [_filled([*columns, TIME], longer, [*footer, whole])]
        if not fits(console, tables[0]):
            narrow = [[row[0], row[-1]] for row in longer]
            tables = [_filled(columns, rows, footer), _filled(["cell", TIME], narrow, [footer[0], whole])]
    for table in tables:
        put(console, table)
    _say_more(console, len(lines), "lines; the sum is of all")


def _filled(columns: Sequence[str], rows: Iterable[Sequence[str]], footer: Sequence[str]) -> Table:
    from distillbench.reports.terminal_table import new_table

    table = new_table(columns, [name in ("cell", "rows at NFE") for name in columns], footer=footer)
    for row in rows:
        table.add_row(*row)
    return table


def _plan_lines(cells: list[Cell]) -> list[tuple[str, list[int], tuple[int, ...], list[Cell]]]:
    """(label, numbers of evaluations, costs, cells) of each line of a plan."""
    from distillbench.runs.plan import changed_settings

    if len(cells) <= MOST_LINES:
        return [(cell.label, cell.nfe, _cost(cell), [cell]) for cell in cells]
    alike: dict[tuple, list[Cell]] = {}
    for cell in cells:
        settings = changed_settings(cell.method_config)
        alike.setdefault((cell.name, settings, tuple(cell.nfe), _cost(cell)), []).append(cell)
    lines = []
    for (name, settings, nfe, cost), group in alike.items():
        seeds = f" ({len(group):,} seeds)" if len(group) > 1 else f" (seed {group[0].seed})" if group[0].entry else ""
        costs = tuple(value * len(group) for value in cost)
        lines.append((" ".join(filter(None, [name + seeds, settings])), list(nfe), costs, group))
    return lines


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _say_more(console: Console, count: int, what: str) -> None:
    if count > MOST_LINES:
        _say(console, _more(count, what))


def _more(count: int, what: str) -> str:
    return f"and {count - MOST_LINES:,} more {what}"


def _cost(cell: Cell) -> tuple[int, int, int, int]:
    """Predicted: images, teacher and student evaluations of training, evaluations of sampling."""
    evaluation = cell.shared.config.evaluation
    sampling = sum(cell.nfe) * evaluation.images * len(evaluation.seeds)
    return cell.cost.images, cell.cost.teacher_nfe, cell.cost.student_nfe, sampling


def print_rows(progress: Progress, rows: pd.DataFrame, labels: Labels) -> None:
    """Print a line for each new row; one line for all if there are many, as those of a resumed run.

    The index of `rows` are the settings that differ among the cells of the run.
    """
    from distillbench.reports.terminal_table import number, row_name

    if len(rows) > MOST_LINES:
        counts = rows["status"].value_counts()
        progress.say(f"  {len(rows):,} rows: {', '.join(f'{count:,} {status}' for status, count in counts.items())}")
        return
    for differs, row in zip(rows.index, rows.to_dict("records"), strict=True):
        values = ", ".join(f"{labels.label(name).short} {number(row[name])}" for name in _scores(rows))
        name = row_name(row, differs if isinstance(differs, str) else "", labels)
        progress.say(f"  {name}: {values if row['status'] == 'ok' else _why(row)}")


def print_table(
    console: Console, table: pd.DataFrame, summary: pd.DataFrame, labels: Labels, influences: Sequence[Influences] = ()
) -> None:  # fmt: skip
    """Means over seeds with their intervals, in as many columns as fit, and what must be known about the rows.

    `summary` is that of `table`, `labels` have the scores. All columns are in table.csv and summary.csv.
    """
    from distillbench.records.costs import disturbed, with_intervals
    from distillbench.records.leading import leading_groups
    from distillbench.records.stars import stars_of
    from distillbench.records.statistics import KEYS
    from distillbench.reports.terminal_table import (
        COSTS,
        STAR,
        columns_that_fit,
        put,
        score_table,
        shared_seeds,
        table_notes,
        with_stars,
    )

    directions = labels.directions
    same = [name for name in ("dataset", "teacher", "budget", "device") if table[name].nunique() == 1]
    shared = {name: table[name].dropna().iloc[0] for name in same}
    summary = table[KEYS].drop_duplicates().merge(summary, on=KEYS, how="left")  # in the order of the run
    lines = _best_lines(summary, directions)
    counts, seeds = shared_seeds(summary)
    _say(console, ", ".join([*(f"{name} {value}" for name, value in shared.items() if value), *counts]))
    names = _describing_columns(summary, same, seeds)
    wanted = [*names, *directions, *(name for name in COSTS if summary[name].notna().any())]
    retrained = bool((summary["training_seeds"] > 1).any())
    groups = leading_groups(table, directions, influences) if retrained else []
    stars = stars_of(groups, summary, directions)
    best = with_stars(with_intervals(summary, table), stars).iloc[lines]
    shown = columns_that_fit(console, best, wanted, labels, least=len(names) + 1)  # the first score always stays
    put(console, score_table(best, shown, labels))
    notes = [*_left_out(summary, labels, lines), *table_notes(best, shown, wanted, labels)]
    notes += [f"*: {stars.said}"] * any(best[name + STAR].any() for name in shown if name in directions)
    if busy := disturbed(table.to_dict("records")):
        notes.append(f"on a busy machine: {busy}")
    notes += [*_verdicts(summary, groups, labels), *_behind_teacher(summary, labels)]
    for line in [*notes, *_failures(table, labels), *_remarks(table, labels), *_empty_scores(table, labels)]:
        _say(console, line)


def _describing_columns(summary: pd.DataFrame, same: Sequence[str], seeds: Sequence[str]) -> list[str]:
    """Method, evaluations, and what else it takes to tell rows apart; `same` are columns of one value."""
    names = [name for name in ("dataset", "teacher") if name not in same] + ["method", "nfe"]
    for column in ("settings", "guidance", "budget", "protocol"):
        if summary[column].nunique(dropna=False) > 1 and summary.duplicated(names).any():
            names.append(column)
    return [*names, *seeds] + ["status"] * bool((summary["status"] != "ok").any())


def _left_out(summary: pd.DataFrame, labels: Labels, lines: list[int]) -> Iterator[str]:
    """Which rows are left out."""
    if len(lines) < len(summary):
        first = next((labels.label(name).short for name in labels.columns), "")
        best = f"the {len(lines)} best by {first}" if first else f"the first {len(lines)}"
        yield f"{best} of {len(summary):,} (all: summary.csv, distillbench show)"


def _failures(table: pd.DataFrame, labels: Labels) -> Iterator[str]:
    """Rows that are not ok, with their reasons."""
    from distillbench.reports.terminal_table import row_name

    bad = table[table["status"] != "ok"]
    records = bad[:MOST_LINES].to_dict("records")
    names = [row_name(row, "", labels) for row in records]
    for row, name in zip(records, names, strict=True):
        yield f"{row_name(row, labels=labels) if names.count(name) > 1 else name}: {_why(row)}"
    if len(bad) > MOST_LINES:
        yield _more(len(bad), "rows that are not ok (table.csv)")


def _remarks(table: pd.DataFrame, labels: Labels) -> Iterator[str]:
    """Notes on rows that are ok, each with its rows."""
    for note, rows in table[table["note"].fillna("") != ""].groupby("note", sort=False):
        methods = [(labels.method_label(row["method"]).short, row["nfe"]) for row in rows.to_dict("records")]
        named = dict.fromkeys(f"{method}, {nfe} NFE" for method, nfe in methods)
        yield f"note on {'; '.join(named)}: {note}"


def _empty_scores(table: pd.DataFrame, labels: Labels) -> Iterator[str]:
    """Why a score is empty in all rows."""
    for name in labels.columns:
        reasons = table.loc[table[name].isna() & (table["status"] == "ok"), "reason"]
        if table[name].isna().all() and len(reasons):
            yield f"{labels.label(name).short} is empty: {_reason_of(name, reasons.iloc[0])}"


def _reason_of(name: str, reasons: str) -> str:
    """Why the column `name` is empty, from a row's reasons."""
    parts = [part.partition(" empty: ") for part in reasons.split("; ")]
    return next((why for names, _, why in parts if name in names.split(", ")), reasons)


def _best_lines(summary: pd.DataFrame, directions: dict[str, str]) -> list[int]:
    """The places of the rows that are shown: all, or the MOST_LINES best by the first score."""
    if len(summary) <= MOST_LINES or not directions:
        return list(range(len(summary)))[:MOST_LINES]
    name, direction = next(iter(directions.items()))
    score = summary[name].astype("Float64").to_numpy(dtype=float, na_value=float("nan"))
    order = (-score if direction == "higher" else score).argsort(kind="stable")  # empty ones come last
    return order[:MOST_LINES].tolist()


def _verdicts(summary: pd.DataFrame, groups: Sequence[LeadingGroup], labels: Labels) -> Iterator[str]:
    """For each score and number of evaluations which methods lead; one line if all have one seed."""
    if not (summary["training_seeds"] > 1).any():
        if (summary["training_seeds"] > 0).sum() > 1:
            yield "one training seed: no method is marked as best (seed=0,1,2 trains three)"
        return
    for group in groups:
        if len(group.leaders) + len(group.trailing) + len(group.left_out) < 2:
            continue
        line = f"{labels.label(group.score).short}, {group.group['nfe']} NFE: {_verdict(group, labels)}"
        aside = [f"{labels.method_label(name).short} ({why})" for name, why in group.left_out.items()]
        line += f"; not compared: {first_of(aside, MOST_NAMED)}" if aside else ""
        yield line if len(line) <= LONGEST_VERDICT else f"{line[:LONGEST_VERDICT]} ..."


def _verdict(group: LeadingGroup, labels: Labels) -> str:
    from distillbench.reports.terminal_table import number

    def named(one: Standing) -> str:
        label = labels.method_label(one.row["method"]).short
        label += one.label.removeprefix(str(one.row["method"]))  # the settings that tell it from others
        return f"{label} {number(one.mean)}"

    if not group.leaders:
        return "no method can be compared"
    if group.rule == "none":
        best = "" if len(group.leaders) + len(group.left_out) < 2 else f"{named(group.best)} is best by its mean. "
        return best + group.said.removesuffix(".")
    if group.leads:
        seeds = " (one common training seed)" if group.training_seeds < 2 else ""
        return f"{named(group.best)} leads{seeds}"
    return f"{first_of([named(one) for one in group.leaders], MOST_NAMED)} cannot be told apart"


def _behind_teacher(summary: pd.DataFrame, labels: Labels) -> Iterator[str]:
    """For each score the students that are worse than the teacher's DDIM with as many evaluations."""
    from distillbench.records.statistics import COMPARABLE, TEACHER
    from distillbench.reports.terminal_table import number

    same = [column for column in COMPARABLE if column != "budget"]  # the teacher has none
    for name, direction in labels.directions.items():
        behind = []
        for _, group in summary.groupby(same, dropna=False, sort=False) if direction != "none" else []:
            ddim = group.loc[group["method"] == f"{TEACHER}ddim", name].dropna()
            if ddim.empty:
                continue
            for row in group[~group["method"].str.startswith(TEACHER)].dropna(subset=[name]).to_dict("records"):
                if row[name] > ddim.iloc[0] if direction == "lower" else row[name] < ddim.iloc[0]:
                    scores = f"{number(row[name])} against {number(ddim.iloc[0])}"
                    method = labels.method_label(row["method"]).short
                    behind.append(f"{method} at {row['nfe']} NFE ({scores})")
        if behind:
            what = f"{labels.label(name).short} worse than the teacher's own DDIM at as many evaluations"
            yield f"{what}: {first_of(behind, MOST_NAMED)}"


def print_tuning(console: Console, tuning: Tuning, evaluated: bool) -> None:
    """The levels that were tried with their scores, what they cost, and how to evaluate the best ones."""
    from distillbench.records.statistics import arrow
    from distillbench.reports.terminal_table import new_table, number, put

    heading = f"{tuning.metric} {arrow(tuning.direction)}".rstrip()
    table = new_table(["NFE", "levels", heading, "seconds", ""], [False, True, False, False, True])
    for one in sorted(tuning.tried, key=lambda one: (one.nfe, [-level for level in one.levels])):
        notes = ["now"] * (one.levels in tuning.present) + ["best"] * (one.levels in tuning.chosen)
        levels = ", ".join(f"{level:g}" for level in one.levels)
        score = "not finite" if one.score is None else number(one.score)
        table.add_row(str(one.nfe), levels, score, number(one.seconds), ", ".join(notes))
    put(console, table)
    evaluations = sum(one.evaluations for one in tuning.tried)
    seconds = sum(one.seconds for one in tuning.tried)
    recorded = len(tuning.tried) - tuning.fresh
    earlier = f"; {recorded:,} of them in an earlier search" if recorded else ""
    for line in (
        f"{tuning.label}: {len(tuning.tried):,} candidates of {tuning.images:,} images took {evaluations:,} network "
        f"evaluations and {seconds:,.0f} s{earlier}",
        f"these {tuning.metric} are of the search's own noise, and the best of several: do not report them",
    ):
        _say(console, line)
    for nfe in range(2, len(tuning.chosen) + 2):
        if not tuning.is_unimodal(nfe):
            _say(
                console, f"{nfe} evaluations: more than one minimum was seen, so the search may have missed the lowest"
            )
    if tuning.chosen == tuning.present:
        _say(console, "the levels of the run are the best that were tried")
    elif not evaluated:
        _say(
            console,
            f"to sample with the best: {shlex.quote(tuning.setting)} in the run's command, which trains nothing",
        )
        _say(console, "to add such rows to the run: the same command again with --evaluate")


def _scores(table: pd.DataFrame) -> list[str]:
    """The scores: the columns between those that describe a row and its costs."""
    from distillbench.records.table import FIRST, LAST

    return [name for name in table.columns if name not in FIRST and name not in LAST]


def _why(row: dict) -> str:
    return f"{row['status']}: {row['reason']}"
