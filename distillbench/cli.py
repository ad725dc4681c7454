"""The command line. Everything heavy is imported inside the command that needs it, so that --help answers at once."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

from distillbench import __version__
from distillbench.errors import DivergedError, UserError, unknown

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from distillbench.plan import Cell
    from distillbench.progress import Progress
    from distillbench.registry import Plugin, Registry

BAD_INPUT, SOMETHING_FAILED, INTERRUPTED = 2, 1, 130
KINDS = ("methods", "teachers", "datasets", "metrics")
WIDEST_TEXT = 120


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
      'methods=[boot,cm]'      which methods        dataset=digits       on which images
      methods.boot.lr=3e-4     their settings       teacher=trained      from which teacher
      budget.images=400000     how long each        seed=0,1,2           one training a seed
      device=auto              cpu, cuda, cuda:N    results_dir=results  where results go
      experiment=smoke         a prepared set of settings (configs/experiment)
    """
    from distillbench.config import compose_runs, to_yaml
    from distillbench.plan import plan
    from distillbench.progress import Progress
    from distillbench.run import run as run_cells

    registry = _registry(debug)
    configs = compose_runs(list(settings), registry)
    if show_config:
        click.echo("---\n".join(to_yaml(config) for config in configs), nl=False)
        return
    console = _console()
    cells = plan(configs, registry)
    if dry_run:
        _print_plan(console, cells)
        raise SystemExit(SOMETHING_FAILED if any(cell.trouble for cell in cells) else 0)
    progress = Progress(console)
    outcome = run_cells(cells, configs, progress, lambda rows: _print_rows(progress, rows))
    _print_table(console, outcome.table)
    progress.say(f"every column, samples and weights: {outcome.folder}")
    if outcome.failed:
        progress.say(f"not ok: {', '.join(outcome.failed)}")
        raise SystemExit(SOMETHING_FAILED)


@cli.command("list")
@click.argument("kind", type=click.Choice(KINDS))
def list_(kind: str) -> None:
    """List what can be named: methods, teachers, datasets or metrics."""
    entries = sorted(_registry().of_kind(kind).items())
    _print_definitions((name, f"{_summary(entry.cls)} [{_version(entry.plugin)}]") for name, entry in entries)


@cli.command()
@click.argument("name")
def describe(name: str) -> None:
    """Show what NAME is, where it comes from and its settings with their defaults."""
    registry = _registry()
    found = [kind for kind in KINDS if name in registry.of_kind(kind)]
    if not found:
        raise unknown("method, teacher, dataset or metric", name, [n for k in KINDS for n in registry.of_kind(k)])
    for kind in found:
        _describe(registry, kind, name)


def _describe(registry: Registry, kind: str, name: str) -> None:
    from distillbench import registry as rules
    from distillbench.config import describe_options

    entry = registry.get(kind, name)
    click.echo(f"{name}: {kind.removesuffix('s')} from plugin {_origin(entry.plugin)}")
    click.echo(click.wrap_text(_documentation(entry.cls), _width(), preserve_paragraphs=True))
    facts = [(fact.replace("_", " "), getattr(entry.cls, fact)) for fact in rules.KINDS[kind].declares]
    _print_definitions((fact, {True: "yes", False: "no"}.get(value, value)) for fact, value in facts)
    if rules.KINDS[kind].config is None:
        return
    prefix = f"methods.{name}" if kind == "methods" else kind.removesuffix("s")
    options = describe_options(entry.cls.Config)
    click.echo("\nsettings and their defaults:" if options else "\nno settings")
    _print_definitions((f"{prefix}.{option}={default}", text) for option, default, text in options)


@cli.command()
@click.argument("name")
@click.argument("settings", nargs=-1)
@click.option("--quick", is_flag=True, help="Leave out the training on an exact teacher: seconds instead of a minute.")
@click.option("--thorough", is_flag=True, help="Train five times as long on the exact teacher.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def check(name: str, settings: tuple[str, ...], quick: bool, thorough: bool, debug: bool) -> None:
    """Hold method NAME against the contract of a method, one line for each check.

    SETTINGS are of the method only. The exit code is 1 if a check fails.

    \b
    distillbench check boot methods.boot.steps=4
    """
    from distillbench.config import compose_runs
    from distillbench.testing import LAW_IMAGES, findings

    if quick and thorough:
        raise UserError("--quick and --thorough exclude each other")
    registry = _registry(debug)
    entry = registry.get("methods", name)
    foreign = [word for word in settings if not word.startswith(f"methods.{name}.")]
    if foreign:
        raise UserError(f"check takes settings of the method only, methods.{name}.SETTING=VALUE, got {foreign[0]!r}")
    configs = compose_runs([f"methods=[{name}]", "dataset=gmm", "teacher=gmm", *settings], registry)
    if len(configs) > 1:
        raise UserError(f"check takes one value of each setting, the settings span {len(configs)}")
    counts = {True: 0, False: 0, None: 0}
    for finding in findings(entry.cls, configs[0].methods[name], 0 if quick else LAW_IMAGES * (5 if thorough else 1)):
        counts[finding.ok] += 1
        word = {True: "ok", False: "FAIL", None: "-"}[finding.ok]
        heading = f"{word:<4}  {finding.check:<17}  "
        click.echo(click.wrap_text(finding.message, _width(), heading, " " * len(heading)))
    click.echo(f"{name}: {counts[True]} ok, {counts[False]} failed, {counts[None]} not applicable")
    if counts[False]:
        raise SystemExit(SOMETHING_FAILED)


@cli.command()
@click.option("--debug", is_flag=True, help="Show the traceback of a plugin that failed to load.")
def plugins(debug: bool) -> None:
    """Show every plugin: its distribution, what it brings, or why it was left out."""
    registry = _registry(report=False)
    _print_definitions(
        (_origin(plugin), f"left out: {plugin.error}" if plugin.error else ", ".join(plugin.brings) or "nothing")
        for plugin in registry.plugins
    )
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

    from distillbench.config import compose_runs
    from distillbench.plan import check_writable
    from distillbench.progress import Progress
    from distillbench.run import train_teacher_of

    registry = _registry(debug)
    configs = compose_runs(list(settings), registry, need_methods=False)
    file = Path(output) if output is not None else None
    if file is not None and file.suffix != ".safetensors":
        raise UserError(f"--output must name a .safetensors file, got {output!r}")
    if file is not None and len(configs) > 1:
        raise UserError(f"--output takes one teacher, the settings span {len(configs)}")
    for config in configs:
        check_writable(file.parent if file is not None else Path(config.results_dir))
    progress = Progress(_console())
    for config in configs:
        progress.say(f"written: {train_teacher_of(config, registry, file, progress)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: what the user can mend becomes one message and exit code 2."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        cli.main(words, prog_name="distillbench", standalone_mode=False)
    except click.Abort:
        click.echo("interrupted. Finished cells are kept: the same command goes on from there", err=True)
        raise SystemExit(INTERRUPTED) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (UserError, OSError, DivergedError) as error:
        if "--debug" in words:
            sys.excepthook(*sys.exc_info())
        click.echo(f"error: {error}", err=True)
        raise SystemExit(SOMETHING_FAILED if isinstance(error, DivergedError) else BAD_INPUT) from None


# --- plugins ---------------------------------------------------------------------------------------------------------


def _registry(debug: bool = False, report: bool = True) -> Registry:
    from distillbench.registry import load_registry

    registry = load_registry()
    for plugin in registry.broken if report else []:
        click.echo(f"warning: plugin {_origin(plugin)} is left out: {plugin.error}", err=True)
        if debug:
            click.echo(plugin.traceback, err=True)
    return registry


def _origin(plugin: Plugin) -> str:
    return f"{plugin.name} ({_version(plugin)})"


def _version(plugin: Plugin) -> str:
    return f"{plugin.distribution} {plugin.version}"


def _summary(cls: type) -> str:
    return _documentation(cls).split("\n")[0].removesuffix(".")


def _documentation(cls: type) -> str:
    """The first paragraph of the class's own docstring, or of its module's."""
    text = vars(cls)["__doc__"] or sys.modules[cls.__module__].__doc__ or ""
    return inspect.cleandoc(text).split("\n\n")[0]


# --- what is printed -------------------------------------------------------------------------------------------------


def _console() -> Console:
    """As wide as the terminal; elsewhere COLUMNS wide, or 80."""
    from rich.console import Console

    return Console(highlight=False)


def _width() -> int:
    return click.HelpFormatter(max_width=WIDEST_TEXT).width


def _print_definitions(rows: Iterable[tuple[str, str]]) -> None:
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


def _print_plan(console: Console, cells: list[Cell]) -> None:
    """What would be run: for each dataset and teacher its cells with their prices, and the sum."""
    from distillbench.plan import teacher_plan

    by_scene: dict[int, list[Cell]] = {}
    for cell in cells:
        by_scene.setdefault(id(cell.scene), []).append(cell)
    for group, (dataset, name, origin) in zip(by_scene.values(), teacher_plan(cells), strict=True):
        price = f", {origin.images:,} images" if origin.images else ""
        console.print(f"dataset {dataset}, teacher {name}: {origin.origin}{price}", markup=False, soft_wrap=True)
        columns = ["cell", "rows at NFE", "train_images", "train_teacher_NFE", "train_student_NFE", "sampling_NFE"]
        prices = [_price(cell) for cell in group]
        footer = ["sum", "", *(_number(sum(column)) for column in zip(*prices, strict=True))]
        table = _new_table(columns, text=columns[:2], footer=footer)
        for cell, numbers in zip(group, prices, strict=True):
            table.add_row(cell.label, ", ".join(map(str, cell.nfe)), *map(_number, numbers))
        console.print(table)
        for cell in group:
            if cell.trouble:
                console.print(f"{cell.label} would fail: {cell.trouble}", markup=False, soft_wrap=True)
        budget = group[0].scene.config.budget
        if budget.limit == "seconds":
            console.print(f"Each method trains {budget.seconds:g} s; its images and evaluations are not foreseen.")
    console.print("dry run: nothing was run or written")


def _price(cell: Cell) -> tuple[int, int, int, int]:
    """Foreseen: images, teacher and student evaluations of training, evaluations of sampling."""
    sampling = sum(cell.nfe) * cell.scene.config.evaluation.images
    return cell.price.images, cell.price.teacher_nfe, cell.price.student_nfe, sampling


def _print_rows(progress: Progress, rows: pd.DataFrame) -> None:
    """A line for each new row, as the table grows."""
    for row in rows.to_dict("records"):
        values = ", ".join(f"{name} {_number(row[name])}" for name in _scores(rows))
        progress.say(f"  {_row_name(row)}: {values if row['status'] == 'ok' else _why(row)}")


def _print_table(console: Console, table: pd.DataFrame) -> None:
    """The table, with as many columns as fit; every column is in table.csv."""
    same = [name for name in ("dataset", "teacher", "device") if table[name].nunique() == 1]
    console.print(", ".join(f"{name} {table[name].iloc[0]}" for name in same), markup=False, soft_wrap=True)
    names = [name for name in ("dataset", "teacher") if name not in same]
    names += ["method", "seed", "nfe"]
    for telling_apart in ("settings", "key"):
        names += [telling_apart] if table.duplicated(names).any() else []
    names += ["status"] if (table["status"] != "ok").any() else []
    names += _scores(table)
    optional = ["sample_latency_ms", "train_seconds", "sample_images_per_second"]
    optional += ["train_teacher_nfe", "train_student_nfe", "train_images"]
    unlimited = console.options.update(max_width=10_000)
    while optional and console.measure(_drawn(table, names + optional), options=unlimited).maximum > console.width:
        optional.pop()
    console.print(_drawn(table, names + optional))
    for row in table[table["status"] != "ok"].to_dict("records"):
        console.print(f"{_row_name(row)}: {_why(row)}", markup=False, soft_wrap=True)


def _drawn(table: pd.DataFrame, names: list[str]) -> Table:
    drawn = _new_table(names, text=("dataset", "teacher", "method", "settings", "key", "status"))
    for row in table.to_dict("records"):
        drawn.add_row(*(_number(row[name]) for name in names))
    return drawn


def _scores(table: pd.DataFrame) -> list[str]:
    """The columns between those that name a row and those that say what it cost."""
    from distillbench.results import FIRST, LAST

    return [name for name in table.columns if name not in FIRST and name not in LAST]


def _row_name(row: dict) -> str:
    seed = _number(row["seed"])
    return f"{row['method']}{'' if seed == '-' else f' seed {seed}'}, {row['nfe']} NFE"


def _why(row: dict) -> str:
    return f"{row['status']}: {row['reason']}"


def _number(value: object) -> str:
    import pandas as pd

    if pd.isna(value):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
