"""What the command line prints: definitions, the plan of a run with its cost, and the table of a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from distillbench.errors import first_of

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from distillbench.runs.level_tuning import Tuning
    from distillbench.runs.shared_context import Cell
    from distillbench.runs.time_plan import Part, TimePlan
    from distillbench.system.progress import Progress

WIDEST_TEXT = 120
LONGEST_VERDICT = 1000  # characters
TIME = "time_about"  # column of a plan
MOST_LINES = 50  # of a plan or a table
MOST_NAMED = 8  # rows in one line of text


def new_console() -> Console:
    """A console as wide as the terminal; without one $COLUMNS wide, or 80."""
    from rich.console import Console

    return Console(highlight=False)


def width() -> int:
    """The width of text in the terminal, as click has it for --help."""
    return click.HelpFormatter(max_width=WIDEST_TEXT).width


def print_definitions(rows: Iterable[tuple[str, str]]) -> None:
    """Print names with their meanings beside them, as --help prints options."""
    lines = [(name, " ".join(meaning.split())) for name, meaning in rows]
    formatter = click.HelpFormatter(max_width=WIDEST_TEXT)
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
    from distillbench.reports.terminal_table import fits, number
    from distillbench.runs.time_plan import about

    columns = ["cell", "rows at NFE", "train_images", "train_teacher_NFE", "train_student_NFE", "sampling_NFE"]
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
        console.print(table)
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


def print_rows(progress: Progress, rows: pd.DataFrame) -> None:
    """Print a line for each new row; one line for all if there are many, as those of a resumed run.

    The index of `rows` are the settings that differ among the cells of the run.
    """
    from distillbench.reports.terminal_table import number, row_name

    if len(rows) > MOST_LINES:
        counts = rows["status"].value_counts()
        progress.say(f"  {len(rows):,} rows: {', '.join(f'{count:,} {status}' for status, count in counts.items())}")
        return
    for differs, row in zip(rows.index, rows.to_dict("records"), strict=True):
        values = ", ".join(f"{name} {number(row[name])}" for name in _scores(rows))
        name = row_name(row, differs if isinstance(differs, str) else "")
        progress.say(f"  {name}: {values if row['status'] == 'ok' else _why(row)}")


def print_table(console: Console, table: pd.DataFrame, summary: pd.DataFrame, directions: dict[str, str]) -> None:
    """Means over seeds with their intervals, in as many columns as fit, and what must be known about the rows.

    `summary` is that of `table`, `directions` those of the scores. All columns are in table.csv and summary.csv.
    """
    from distillbench.records.statistics import KEYS
    from distillbench.reports.terminal_table import COSTS, columns_that_fit, score_table, with_stars

    same = [name for name in ("dataset", "teacher", "budget", "device") if table[name].nunique() == 1]
    shared = {name: table[name].dropna().iloc[0] for name in same}
    _say(console, ", ".join(f"{name} {value}" for name, value in shared.items() if value))
    summary = table[KEYS].drop_duplicates().merge(summary, on=KEYS, how="left")  # in the order of the run
    lines = _best_lines(summary, directions)
    names = _describing_columns(summary, same)
    wanted = [*names, *directions, *(name for name in COSTS if summary[name].notna().any())]
    best = with_stars(summary, directions).iloc[lines]
    shown = columns_that_fit(console, best, wanted, directions, least=len(names) + 1)  # the first score always stays
    console.print(score_table(best, shown, directions))
    notes = [*_notes(summary, shown, directions, lines), *_verdicts(summary, directions)]
    notes += _behind_teacher(summary, directions)
    for line in [*notes, *_failures(table), *_remarks(table), *_empty_scores(table, directions)]:
        _say(console, line)


def _describing_columns(summary: pd.DataFrame, same: Sequence[str]) -> list[str]:
    """Method, evaluations, and what else it takes to tell rows apart; `same` are columns of one value."""
    names = [name for name in ("dataset", "teacher") if name not in same] + ["method", "nfe"]
    for column in ("settings", "guidance", "budget", "protocol"):
        if summary[column].nunique(dropna=False) > 1 and summary.duplicated(names).any():
            names.append(column)
    names += [name for name in ("training_seeds", "sampling_seeds") if (summary[name] > 1).any()]
    return names + ["status"] * bool((summary["status"] != "ok").any())


def _notes(summary: pd.DataFrame, shown: Sequence[str], directions: dict[str, str], lines: list[int]) -> Iterator[str]:
    """Which rows and scores are left out, and what the intervals are."""
    if len(lines) < len(summary):
        best = f"the {len(lines)} best by {next(iter(directions))}" if directions else f"the first {len(lines)}"
        yield f"{best} of {len(summary):,} (all: summary.csv, distillbench show)"
    if cut := [name for name in directions if name not in shown]:
        yield f"not shown: {', '.join(cut)} (summary.csv)"
    for source in ("training", "sampling"):
        if any(summary[f"{name}_{source}_low"].notna().any() for name in directions):
            yield f"{source[0]}[...]: 95 % interval of the mean over {source} seeds"


def _failures(table: pd.DataFrame) -> Iterator[str]:
    """Rows that are not ok, with their reasons."""
    from distillbench.reports.terminal_table import row_name

    bad = table[table["status"] != "ok"]
    records = bad[:MOST_LINES].to_dict("records")
    names = [row_name(row, "") for row in records]
    for row, name in zip(records, names, strict=True):
        yield f"{row_name(row) if names.count(name) > 1 else name}: {_why(row)}"
    if len(bad) > MOST_LINES:
        yield _more(len(bad), "rows that are not ok (table.csv)")


def _remarks(table: pd.DataFrame) -> Iterator[str]:
    """Notes on rows that are ok, each with its rows."""
    for note, rows in table[table["note"].fillna("") != ""].groupby("note", sort=False):
        named = dict.fromkeys(f"{row['method']}, {row['nfe']} NFE" for row in rows.to_dict("records"))
        yield f"note on {'; '.join(named)}: {note}"


def _empty_scores(table: pd.DataFrame, names: Iterable[str]) -> Iterator[str]:
    """Why a score is empty in all rows."""
    for name in names:
        reasons = table.loc[table[name].isna() & (table["status"] == "ok"), "reason"]
        if table[name].isna().all() and len(reasons):
            yield f"{name} is empty: {_reason_of(name, reasons.iloc[0])}"


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


def _verdicts(summary: pd.DataFrame, directions: dict[str, str]) -> list[str]:
    """For each score and number of evaluations which method leads, or why none does; one line if all have one seed."""
    from distillbench.records.statistics import COMPARABLE, verdict

    if not (summary["training_seeds"] > 1).any():
        students = summary[summary["training_seeds"] > 0]
        return ["one training seed: no method is marked as best (seed=0,1,2 trains three)"] if len(students) > 1 else []
    lines = []
    students = summary[~summary["method"].str.startswith("teacher:")]
    for name, direction in directions.items():
        for _, group in students.groupby(COMPARABLE, dropna=False, sort=False) if direction != "none" else []:
            if len(group) > 1:
                line = f"{name}, {group['nfe'].iloc[0]} NFE: {verdict(group, name, direction)}"
                lines.append(line if len(line) <= LONGEST_VERDICT else f"{line[:LONGEST_VERDICT]} ...")
    return lines


def _behind_teacher(summary: pd.DataFrame, directions: dict[str, str]) -> Iterator[str]:
    """For each score the students that are worse than the teacher's DDIM with as many evaluations."""
    from distillbench.records.statistics import COMPARABLE, TEACHER
    from distillbench.reports.terminal_table import number

    same = [column for column in COMPARABLE if column != "budget"]  # the teacher has none
    for name, direction in directions.items():
        behind = []
        for _, group in summary.groupby(same, dropna=False, sort=False) if direction != "none" else []:
            ddim = group.loc[group["method"] == f"{TEACHER}ddim", name].dropna()
            if ddim.empty:
                continue
            for row in group[~group["method"].str.startswith(TEACHER)].dropna(subset=[name]).to_dict("records"):
                if row[name] > ddim.iloc[0] if direction == "lower" else row[name] < ddim.iloc[0]:
                    scores = f"{number(row[name])} against {number(ddim.iloc[0])}"
                    behind.append(f"{row['method']} at {row['nfe']} NFE ({scores})")
        if behind:
            yield f"{name} worse than the teacher's own DDIM at as many evaluations: {first_of(behind, MOST_NAMED)}"


def print_tuning(console: Console, tuning: Tuning, evaluated: bool) -> None:
    """The levels that were tried with their scores, what they cost, and how to evaluate the best ones."""
    from distillbench.records.statistics import arrow
    from distillbench.reports.terminal_table import new_table, number

    heading = f"{tuning.metric}_{arrow(tuning.direction)}"
    table = new_table(["NFE", "levels", heading, "seconds", ""], [False, True, False, False, True])
    for one in sorted(tuning.tried, key=lambda one: (one.nfe, [-level for level in one.levels])):
        notes = ["now"] * (one.levels in tuning.present) + ["best"] * (one.levels in tuning.chosen)
        levels = ", ".join(f"{level:g}" for level in one.levels)
        score = "not finite" if one.score is None else number(one.score)
        table.add_row(str(one.nfe), levels, score, number(one.seconds), ", ".join(notes))
    console.print(table)
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
