"""The command line. Everything heavy is imported inside the command that needs it, so that --help answers at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from distillbench import __version__

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from distillbench.registry import Registry
    from distillbench.run import Cell

BAD_INPUT, SOMETHING_FAILED, INTERRUPTED = 2, 1, 130
KINDS = ("methods", "teachers", "datasets", "metrics")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distillbench")
def cli() -> None:
    """Compare methods that distil diffusion models: one frozen teacher, one budget, one evaluator.

    \b
    distillbench run 'methods=[boot,cm,pd,direct]' dataset=digits
    distillbench list methods
    distillbench describe boot
    """


@cli.command()
@click.argument("settings", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan with its price, run nothing.")
@click.option("--show-config", is_flag=True, help="Print the settings as YAML, run nothing.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def run(settings: tuple[str, ...], dry_run: bool, show_config: bool, debug: bool) -> None:
    """Train, sample and score methods; print and keep the table.

    SETTINGS are Hydra overrides; comma sweeps make a grid. Quote brackets for your shell.

    \b
      methods=[boot,cm]        which methods        dataset=digits       on which images
      methods.boot.lr=3e-4     their settings       teacher=trained      from which teacher
      budget.images=400000     how long each        seed=0,1,2           one training a seed
      device=auto              cpu, cuda, cuda:N    results_dir=results  where results go
      experiment=smoke         a prepared set of settings (configs/experiment)
    """
    from distillbench.config import compose_runs, to_yaml
    from distillbench.progress import Progress
    from distillbench.run import plan
    from distillbench.run import run as run_cells

    console = _console()
    registry = _registry(debug)
    configs = compose_runs(list(settings), registry)
    if show_config:
        click.echo("---\n".join(to_yaml(config) for config in configs), nl=False)
        return
    progress = Progress(console)
    cells = plan(configs, registry)
    if dry_run:
        _print_plan(console, cells)
        return
    outcome = run_cells(cells, configs, progress, lambda rows: _print_rows(progress, rows))
    _print_table(console, outcome.table)
    progress.say(f"table, samples and weights: {outcome.folder}")
    if outcome.failed:
        progress.say(f"not ok: {', '.join(outcome.failed)}")
        raise SystemExit(SOMETHING_FAILED)


@cli.command("list")
@click.argument("kind", type=click.Choice(KINDS))
def list_(kind: str) -> None:
    """List what can be named: methods, teachers, datasets or metrics."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for heading in ("name", "what it is", "plugin"):
        table.add_column(heading, overflow="fold")
    for name, entry in sorted(_registry().of_kind(kind).items()):
        plugin = entry.plugin
        table.add_row(name, _summary(entry.cls), f"{plugin.name} ({plugin.distribution} {plugin.version})")
    _console().print(table)


@cli.command()
@click.argument("name")
def describe(name: str) -> None:
    """Show what NAME is, where it comes from and its settings with their defaults."""
    from rich.table import Table

    from distillbench.config import describe_options
    from distillbench.errors import unknown

    registry, console = _registry(), _console()
    found = [(kind, registry.of_kind(kind)[name]) for kind in KINDS if name in registry.of_kind(kind)]
    if not found:
        raise unknown("plugin class", name, [n for kind in KINDS for n in registry.of_kind(kind)])
    for kind, entry in found:
        cls, plugin = entry.cls, entry.plugin
        say = lambda text: console.print(text, markup=False, highlight=False)
        say(f"{name}: {kind.removesuffix('s')}, from plugin {plugin.name} ({plugin.distribution} {plugin.version})")
        say(_documentation(cls))
        for fact in ("paper", "needs_data", "licence", "unit", "direction", "protocol"):
            if fact in dir(cls):
                say(f"{fact.replace('_', ' ')}: {getattr(cls, fact)}")
        if kind == "metrics":
            continue
        prefix = f"methods.{name}." if kind == "methods" else f"{kind.removesuffix('s')}."
        table = Table(box=None, header_style="bold")
        for heading in ("setting", "type", "default", "meaning"):
            table.add_column(heading, overflow="fold")
        for option, kind_of_value, default, text in describe_options(cls.Config):
            table.add_row(prefix + option, kind_of_value, default, text)
        console.print(table)


@cli.command()
@click.option("--debug", is_flag=True, help="Show the traceback of a plugin that failed to load.")
def plugins(debug: bool) -> None:
    """Show every plugin: its distribution, what it brings, or why it was left out."""
    from rich.table import Table
    from rich.text import Text

    registry = _registry(report=False)
    table = Table(box=None, header_style="bold")
    for heading in ("plugin", "distribution", "brings"):
        table.add_column(heading, overflow="fold")
    for plugin in registry.plugins:
        brings = Text(f"left out: {plugin.error}", style="red") if plugin.error else Text(", ".join(plugin.brings))
        table.add_row(plugin.name, f"{plugin.distribution} {plugin.version}", brings)
    _console().print(table)
    for plugin in registry.broken if debug else []:
        click.echo(f"\n{plugin.name}:\n{plugin.traceback}", err=True)


@cli.group()
def teacher() -> None:
    """Teachers that the harness trains itself."""


@teacher.command("train")
@click.argument("settings", nargs=-1)
@click.option("--output", "-o", type=click.Path(dir_okay=False), help="File to write; default: the results' cache.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def train_teacher(settings: tuple[str, ...], output: str | None, debug: bool) -> None:
    """Train the teacher of a dataset anew and write its weights (safetensors).

    \b
    distillbench teacher train dataset=digits --output digits-teacher.safetensors
    distillbench run 'methods=[boot]' dataset=digits teacher.path=digits-teacher.safetensors
    """
    from pathlib import Path

    from distillbench.errors import UserError
    from distillbench.progress import Progress
    from distillbench.run import check_writable, train_teacher_of

    progress = Progress(_console())
    registry = _registry(debug)
    from distillbench.config import compose_runs

    for config in compose_runs(list(settings), registry, need_methods=False):
        if output is not None and len(settings) and Path(output).suffix != ".safetensors":
            raise UserError(f"--output must end in .safetensors, got {output!r}")
        check_writable(Path(output).parent if output else Path(config.results_dir))
        progress.say(f"written: {train_teacher_of(config, registry, Path(output) if output else None, progress)}")


def main() -> None:
    """Entry point: errors of the user become one message and exit code 2."""
    from distillbench.errors import UserError

    debug = "--debug" in sys.argv
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        raise SystemExit(INTERRUPTED) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except UserError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt:
        click.echo("interrupted; finished cells are kept, the same command goes on", err=True)
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        raise SystemExit(BAD_INPUT) from None


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=200, soft_wrap=True)


def _registry(debug: bool = False, report: bool = True) -> Registry:
    from distillbench.registry import load_registry

    registry = load_registry()
    for plugin in registry.broken if report else []:
        click.echo(f"warning: plugin {plugin.name} ({plugin.distribution}) is left out: {plugin.error}", err=True)
        if debug:
            click.echo(plugin.traceback, err=True)
    return registry


def _summary(cls: type) -> str:
    return _documentation(cls).split("\n")[0].removesuffix(".")


def _documentation(cls: type) -> str:
    """The class's own docstring, or the first paragraph of its module's."""
    import inspect

    own = cls.__doc__ if "__doc__" in vars(cls) else None
    text = own or sys.modules[cls.__module__].__doc__ or ""
    return inspect.cleandoc(text).split("\n\n")[0]


def _print_plan(console: Console, cells: list[Cell]) -> None:
    from rich.table import Table

    from distillbench.run import teacher_plan

    for dataset, name, origin in teacher_plan(cells):
        price = f", {origin.images:,} images" if origin.images else ""
        console.print(f"dataset {dataset}, teacher {name}: {origin.origin}{price}", markup=False, highlight=False)
    table = Table(box=None, header_style="bold")
    for heading in ("cell", "rows at NFE", "train images", "train teacher NFE", "train student NFE", "sampling NFE"):
        table.add_column(heading, justify="left" if heading in ("cell", "rows at NFE") else "right")
    for cell in cells:
        sampling = sum(cell.nfe) * cell.scene.config.evaluation.images
        price = cell.price
        by_time = cell.scene.config.budget.limit == "seconds" and cell.entry is not None
        seconds = f"{cell.scene.config.budget.seconds:g} s"
        training = [seconds] * 3 if by_time else [f"{n:,}" for n in (price.images, price.teacher_nfe, price.student_nfe)]
        table.add_row(cell.label, ", ".join(map(str, cell.nfe)), *training, f"{sampling:,}")
    console.print(table)
    console.print("dry run: nothing was run or written", markup=False)


def _print_rows(progress, rows: pd.DataFrame) -> None:
    """A line for each new row, as the table grows."""
    for row in rows.to_dict("records"):
        scores = [f"{name} {_number(row[name])}" for name in rows.columns[7:] if name in rows.columns[7 : _scores_end(rows)]]
        seed = "" if row["seed"] is None or row["seed"] != row["seed"] else f" seed {row['seed']}"
        state = "" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
        progress.say(f"  {row['method']}{seed}, {row['nfe']} NFE: {state or ', '.join(scores)}")


def _scores_end(table: pd.DataFrame) -> int:
    return list(table.columns).index("train_seconds")


def _print_table(console: Console, table: pd.DataFrame) -> None:
    from rich.table import Table

    shown = Table(header_style="bold", title=f"dataset {', '.join(table['dataset'].unique())}")
    names = ["method", "seed", "nfe", "status", *table.columns[7 : _scores_end(table)], "train_seconds", "train_images"]
    names += ["train_teacher_nfe", "train_student_nfe", "sample_latency_ms", "sample_images_per_second"]
    for name in names:
        shown.add_column(name.replace("_", " "), justify="left" if name in ("method", "status") else "right")
    for row in table.to_dict("records"):
        shown.add_row(*(_number(row[name]) for name in names))
    console.print(shown)


def _number(value: object) -> str:
    import pandas as pd

    if value is None or value is pd.NA or value != value:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
