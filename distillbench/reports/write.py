"""`distillbench report`: read runs and write their reports, with --watch again whenever a run has changed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from distillbench.errors import UserError
from distillbench.reports.paper_style import PaperStyle
from distillbench.reports.runs import RunData, read_run
from distillbench.storage.files import check_writable, write_text

TABLES: dict[str, tuple[str, Literal["markdown", "latex", "csv"]]] = {
    "markdown": ("table.md", "markdown"),
    "latex": ("table.tex", "latex"),
    "csv": ("paper.csv", "csv"),  # table.csv is the run's own
}
WATCH_SECONDS = 5.0
SETTING = re.compile(r"(\w+)=(\d+)")


def report_runs(
    folders: Sequence[str], forms: Sequence[str], output: str | None, columns: Sequence[str],
    precision: Sequence[str], sort: str | None, style: PaperStyle, watch: bool, console: Console,
) -> None:  # fmt: skip
    """Write reports of the runs in `folders` to `output`, or to the folder of the first run.

    `forms` are some of html, markdown, latex, csv and figures. Raises UserError for folders that are not runs and for
    unknown columns.
    """
    target = Path(output) if output is not None else Path(folders[0])
    if output is not None:
        check_writable(target)
    names = [name.strip() for text in columns for name in text.split(",") if name.strip()] or None
    decimals = _decimals(precision)

    def write() -> None:
        runs = [read_run(Path(folder)) for folder in folders]
        for run in runs:
            for problem in [*run.problems, *run.notes]:
                click.echo(f"{run.name}: {problem}", err=True)
        for path in _write(runs, forms, target, names, decimals, sort, style):
            console.print(f"written: {path}", markup=False, soft_wrap=True)

    write()
    if watch:
        _watch([Path(folder) for folder in folders], write)


def _write(
    runs: Sequence[RunData], forms: Sequence[str], target: Path, columns: Sequence[str] | None,
    precision: dict[str, int], sort: str | None, style: PaperStyle,
) -> list[Path]:  # fmt: skip
    written: list[Path] = []
    for form in dict.fromkeys(forms):
        if form == "html":
            from distillbench.reports.html import write_html

            write_html(runs, target / "report.html")
            written.append(target / "report.html")
        elif form == "figures":
            from distillbench.reports.figures import write_figures

            written += write_figures(runs, target / "figures", style=style)
        else:
            from distillbench.reports.papers import paper_table

            file, kind = TABLES[form]
            text = paper_table(runs, columns, precision, sort, kind, style)
            write_text(target / file, text)
            written.append(target / file)
    return written


def _decimals(words: Sequence[str]) -> dict[str, int]:
    found = {}
    for word in words:
        match = SETTING.fullmatch(word)
        if match is None:
            raise UserError(f"--precision reads NAME=DECIMALS, such as fid=2, got {word!r}")
        found[match[1]] = int(match[2])
    return found


def _watch(folders: Sequence[Path], write: Callable[[], None]) -> None:
    """Call `write` whenever a run's files have changed, until interrupted."""
    before = _state(folders)
    while True:
        time.sleep(WATCH_SECONDS)
        now = _state(folders)
        if now != before:
            write()
            before = now


def _state(folders: Sequence[Path]) -> list[tuple[str, int]]:
    """The modification times of the files that reports read."""
    names = ("table.parquet", "along.parquet", "columns.json", "config.yaml", "environment.json")
    files = [folder / name for folder in folders for name in names]
    return [(str(file), file.stat().st_mtime_ns) for file in files if file.is_file()]
