"""`distillbench compare`, `merge` and `show`; each returns its exit code. Bad input raises UserError: exit code 2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from distillbench.errors import UserError
from distillbench.reports.compare import compare
from distillbench.reports.compare_text import print_comparison
from distillbench.reports.merge import Keep, left_out, merge, write
from distillbench.reports.runs import TWICE, RunData, read_run
from distillbench.reports.show import Form, Rows, print_csv, print_json, print_rows, run_names, select
from distillbench.reports.terminal_table import plain, say


def compare_runs(a: str, b: str, tolerance: float, all_costs: bool, console: Console) -> int:
    """Print how run `b` differs from run `a`.

    0: nothing is significantly worse. 1: a score is significantly worse or has no value any more, a cost is worse by
    more than `tolerance` (0.1 is 10 %), or a row that was ok failed or is missing. 2: nothing can be compared.
    """
    if not tolerance >= 0:
        raise UserError(f"--tolerance must not be negative, got {tolerance:g}")
    runs = _read([a, b])
    found = compare(runs[0], runs[1], tolerance)
    print_comparison(console, found, all_costs)
    return found.code


def merge_runs(folders: Sequence[str], output: str, keep: Keep | None, console: Console) -> int:
    """Merge the runs into the new folder `output`; print what was kept and what was left out."""
    if len(folders) < 2:
        raise UserError(f"merge takes two runs or more, got {len(folders)}")
    runs = _read(folders)
    merged = merge(runs, keep)
    write(merged, Path(output))
    for line in [*merged.notes, *left_out(runs, Path(output))]:
        say(console, line)
    say(console, f"written: {output}, {len(merged.table):,} rows of {len(runs)} runs")
    return 0


def show_runs(
    folders: Sequence[str], columns: Sequence[str], sort: Sequence[str], where: Sequence[str], rows: Rows, form: Form,
    console: Console,
) -> int:  # fmt: skip
    """Print the rows of the runs. `columns` and `sort`: names, or some joined by commas; `where`: comparisons."""
    if not folders:
        raise UserError("show takes one run or more")
    runs = _read(folders)
    shown = select(runs, _split(columns), _split(sort), where, rows)
    if form == "csv":
        print_csv(console, shown)
    elif form == "json":
        print_json(console, shown)
    else:
        print_rows(console, shown, rows)
    return 0


def _read(folders: Sequence[str]) -> list[RunData]:
    """The runs; their problems are printed to stderr."""
    runs = [read_run(Path(folder)) for folder in folders]
    for run in runs:
        for problem in run.problems:
            if problem.startswith(TWICE):
                raise UserError(f"{plain(run.folder)}: {plain(problem)}")
    for run, name in zip(runs, run_names(runs), strict=True):
        for problem in [*run.problems, *run.notes]:
            click.echo(f"{plain(name)}: {plain(problem)}", err=True)
    return runs


def _split(names: Sequence[str]) -> list[str]:
    return [name.strip() for text in names for name in text.split(",") if name.strip()]
