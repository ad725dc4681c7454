"""`distillbench report`: read runs and write their reports, with --watch again whenever a run has changed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import click
from rich.console import Console

from distillbench.errors import UserError, quoted
from distillbench.reports.paper_style import PaperStyle
from distillbench.reports.runs import RunData, read_run
from distillbench.storage.files import check_writable, write_text

TABLES: dict[str, tuple[str, Literal["markdown", "latex", "csv"]]] = {
    "markdown": ("table.md", "markdown"),
    "latex": ("table.tex", "latex"),
    "csv": ("paper.csv", "csv"),  # table.csv is the run's own
}
ENDINGS = {".html": "html", ".md": "markdown", ".tex": "latex", ".csv": "csv"}  # of files that --output can name
WATCH_SECONDS = 5.0
SETTING = re.compile(r"(\w+)=(\d+)")


def report_runs(
    folders: Sequence[str], forms: Sequence[str], output: str | None, columns: Sequence[str],
    precision: Sequence[str], sort: str | None, style: PaperStyle, watch: bool, console: Console,
) -> None:  # fmt: skip
    """Write reports of the runs in `folders` to `output`, a folder or a file, or to the folder of the first run.

    `forms` are some of html, markdown, latex, csv and figures; without any, the ending of a file chooses. Raises
    UserError for folders that are not runs, for unknown columns, and for an `output` that is no place for `forms`.
    """
    forms, target, file = _place(forms, output, Path(folders[0]))
    if output is not None:
        check_writable(target, "--output")
    names = [name.strip() for text in columns for name in text.split(",") if name.strip()] or None
    decimals = _decimals(precision)

    def write() -> None:
        runs = [read_run(Path(folder)) for folder in folders]
        for run in runs:
            for problem in [*run.problems, *run.notes]:
                click.echo(f"{run.name}: {problem}", err=True)
        for path in _write(runs, forms, target, file, names, decimals, sort, style):
            console.print(f"written: {path}", markup=False, soft_wrap=True)

    write()
    if watch:
        _watch([Path(folder) for folder in folders], write)


def _place(forms: Sequence[str], output: str | None, run: Path) -> tuple[Sequence[str], Path, str]:
    """The forms, the folder, and the name of the file if `output` is one. Its ending must be that of its only form."""
    if output is None:
        return forms or ["html"], run, ""
    path = Path(output)
    if path.is_dir() or output.endswith(("/", os.sep)) or not re.fullmatch(r"\.[A-Za-z]+", path.suffix):
        return forms or ["html"], path, ""
    form = ENDINGS.get(path.suffix.lower())
    if form is None:
        raise UserError(
            f"--output {quoted(output)} ends in {path.suffix}. Possible: a file that ends in {', '.join(ENDINGS)}, "
            "or a folder (with / at its end)"
        )
    if forms and set(forms) != {form}:
        raise UserError(
            f"--output {quoted(output)} is one file, of --as {form}, got --as {' --as '.join(forms)}: name a folder"
        )
    return [form], path.parent, path.name


def _write(
    runs: Sequence[RunData], forms: Sequence[str], target: Path, file: str, columns: Sequence[str] | None,
    precision: dict[str, int], sort: str | None, style: PaperStyle,
) -> list[Path]:  # fmt: skip
    """Write the forms into the folder `target`; `file` is the name of the only one, or ""."""
    written: list[Path] = []
    for form in dict.fromkeys(forms):
        if form == "html":
            from distillbench.reports.html import write_html

            path = target / (file or "report.html")
            write_html(runs, path)
            written.append(path)
        elif form == "figures":
            from distillbench.reports.figures import write_figures

            written += write_figures(runs, target / "figures", style=style)
        else:
            from distillbench.reports.papers import paper_table

            usual, kind = TABLES[form]
            path = target / (file or usual)
            write_text(path, paper_table(runs, columns, precision, sort, kind, style))
            written.append(path)
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
