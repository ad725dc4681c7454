"""The commands about results: ``show``, ``report``, ``compare``, ``merge``, ``export``, ``doctor``, ``clean``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import click

from distillbench.cli.command_options import (
    SOMETHING_FAILED,
    Choice,
    UserPath,
    debuggable,
    plugin_options,
    with_plugins,
)
from distillbench.cli.loading import load_plugins
from distillbench.cli.terminal import new_console
from distillbench.errors import UserError

if TYPE_CHECKING:
    from distillbench.registry import Registry

FORMS = ("html", "markdown", "latex", "csv", "figures")


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath())
@click.option("--columns", multiple=True, help="Columns to show, separated by commas.")
@click.option("--sort", multiple=True, help="Columns to sort by.")
@click.option("--where", multiple=True, help="Conditions on rows: 'nfe<=2', method=boot,cm.")
@click.option("--rows", type=Choice(["summary", "all"]), default="summary", help="Means over seeds, or all rows.")
@click.option("--csv", is_flag=True, help="Print CSV.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: labels of columns and methods, and the rows.")
@debuggable
def show(
    runs: tuple[str, ...], columns: tuple[str, ...], sort: tuple[str, ...], where: tuple[str, ...],
    rows: Literal["summary", "all"], csv: bool, as_json: bool,
) -> None:  # fmt: skip
    """Print the table of RUNS, filtered and sorted.

    \b
    distillbench show results/digits --where 'nfe<=2' --sort fd_efficientnet_lite0
    """
    from distillbench.reports.commands import show_runs

    if csv and as_json:
        raise UserError("--csv and --json exclude each other")
    form: Literal["table", "csv", "json"] = "csv" if csv else "json" if as_json else "table"
    raise SystemExit(show_runs(runs, columns, sort, where, rows, form, new_console()))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath())
@click.option("--as", "forms", multiple=True, type=Choice(FORMS), help="Format; can be repeated. [html]")
@click.option("--output", "-o", type=UserPath(), help="File (.html, .md, .tex, .csv) or folder. [the first run's]")
@click.option("--columns", multiple=True, help="Columns of tables for papers, separated by commas.")
@click.option("--precision", multiple=True, help="Decimals of a column: NAME=DECIMALS. [as the interval allows]")
@click.option("--sort", help="Column to sort tables for papers by; a leading - reverses the order.")
@click.option(
    "--style",
    type=Choice(["neurips", "icml"]),
    default="neurips",
    show_default=True,
    help="Column widths of LaTeX tables and figures.",
)
@click.option("--watch", is_flag=True, help="Write again whenever a run has changed, until interrupted.")
@debuggable
def report(
    runs: tuple[str, ...], forms: tuple[str, ...], output: str | None, columns: tuple[str, ...],
    precision: tuple[str, ...], sort: str | None, style: Literal["neurips", "icml"], watch: bool,
) -> None:  # fmt: skip
    """Write reports of RUNS: HTML, or tables and figures.

    Only records are read. HTML is one file; tables (Markdown, LaTeX, CSV) and figures are for papers.

    \b
    distillbench report results/digits
    distillbench report results/digits -o digits.html
    distillbench report results/digits --as latex --as figures -o paper --columns method,nfe,fid,train_seconds
    """
    from distillbench.reports.write import report_runs

    report_runs(runs, forms, output, columns, precision, sort, style, watch, new_console())


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath(), metavar="RESULTS...")
@click.option("--output", "-o", required=True, type=UserPath(file_okay=False), help="Folder of the site.")
@debuggable
def leaderboard(runs: tuple[str, ...], output: str) -> None:
    """Write a site that compares the runs in RESULTS.

    RESULTS are runs, or folders of runs. The site is static: it works offline and on any web server.

    \b
    distillbench leaderboard results/reference results/mine -o site
    """
    from distillbench.reports.leaderboard import leaderboard as write

    write(runs, output, new_console())


@click.command()
@click.argument("a", type=UserPath())
@click.argument("b", type=UserPath())
@click.option("--tolerance", default=0.1, show_default=True, help="Relative change of a cost that is ignored.")
@click.option("--all-costs", is_flag=True, help="Show costs that changed less, too.")
@debuggable
def compare(a: str, b: str, tolerance: float, all_costs: bool) -> None:
    """Compare run B with run A (statistical tests). The exit code is 1 if something is worse.

    \b
    distillbench compare results/before results/after
    """
    from distillbench.reports.commands import compare_runs

    raise SystemExit(compare_runs(a, b, tolerance, all_costs, new_console()))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath())
@click.option("--output", "-o", required=True, type=UserPath(), help="Folder to write; it must not exist.")
@click.option("--keep", type=Choice(["first", "last"]), help="Which of contradicting rows to keep.")
@debuggable
def merge(runs: tuple[str, ...], output: str, keep: Literal["first", "last"] | None) -> None:
    """Merge RUNS, such as those of several machines, into one.

    \b
    distillbench merge machine1/results/mine machine2/results/mine --output results/all
    """
    from distillbench.reports.commands import merge_runs

    raise SystemExit(merge_runs(runs, output, keep, new_console()))


@click.command()
@click.argument("run_folder", type=UserPath())
@click.option("--method", required=True, help="Method of the student.")
@click.option("--seed", type=click.IntRange(min=0), help="Its training seed, if the run has several.")
@click.option("--output", "-o", required=True, type=UserPath(), help="Folder to write; it must not exist.")
@with_plugins
def export(registry: Registry, run_folder: str, method: str, seed: int | None, output: str) -> None:
    """Export a one-step student as a diffusers pipeline.

    The student is one of the run in RUN_FOLDER. diffusers loads the pipeline without distillbench.

    \b
    distillbench run 'methods=[boot]' dataset=digits run_name=digits
    distillbench export results/digits --method boot --output boot-digits
    """
    from pathlib import Path

    from distillbench.export.write import export as write_pipeline
    from distillbench.system.progress import Progress

    write_pipeline(Path(run_folder), method, seed, Path(output), registry, Progress(new_console()))


@click.command()
@click.option("--results-dir", default="results", show_default=True, type=UserPath(), help="Results folder to check.")
@click.option("--thorough", is_flag=True, help="Hash all weights, import all packages.")
@plugin_options
def doctor(results_dir: str, thorough: bool, folders: tuple[str, ...], debug: bool) -> None:
    """Diagnose the installation and a results folder.

    Checks packages, device, disk, plugins, weights, caches and records. The exit code is 1 if something is wrong.
    """
    from pathlib import Path

    from distillbench.cli.doctor import examine

    in_order = examine(load_plugins(folders), Path(results_dir), new_console(), thorough)
    raise SystemExit(0 if in_order else SOMETHING_FAILED)


@click.command()
@click.option("--results-dir", default="results", show_default=True, type=UserPath(), help="Results folder to clean.")
@click.option("--downloads", is_flag=True, help="Clean what `fetch` stores, not a results folder.")
@click.option("--what", multiple=True, help="Kind of files, or a download; can be repeated. [temporary, states]")
@click.option("--older-than", type=click.FloatRange(min=0), help="Only files older than this many days.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@debuggable
def clean(results_dir: str, downloads: bool, what: tuple[str, ...], older_than: float | None, yes: bool) -> None:
    """Delete unneeded files of a results folder, or of downloads (lists them, asks).

    \b
    distillbench clean                       # files of killed processes; states of finished trainings
    distillbench clean --what pairs --yes    # noise-image pairs, which are recomputed when needed
    distillbench clean --downloads           # parts of interrupted downloads, refused files; lists what is stored
    """
    from pathlib import Path

    from distillbench.cli.clean import clean as remove
    from distillbench.cli.clean_downloads import clean_downloads

    def confirm(text: str) -> bool:
        return sys.stdin.isatty() and click.confirm(text)

    if downloads:
        raise SystemExit(clean_downloads(what, older_than, yes, new_console(), confirm))
    raise SystemExit(remove(Path(results_dir), what, older_than, yes, new_console(), confirm))
