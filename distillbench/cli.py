"""The command line. Everything heavy is imported inside the command that needs it, so that --help answers at once."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import click

from distillbench import __version__
from distillbench.errors import DivergedError, Unavailable, UserError, unknown

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from rich.console import Console
    from rich.table import Table

    from distillbench.features import FeatureNetwork
    from distillbench.plan import Cell
    from distillbench.progress import Progress
    from distillbench.references import RealImages
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
    _run(settings, dry_run, show_config, debug)


@cli.command()
@click.argument("settings", nargs=-1)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, run nothing.")
@click.option("--show-config", is_flag=True, help="Print the settings as YAML, run nothing.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def score(settings: tuple[str, ...], dry_run: bool, show_config: bool, debug: bool) -> None:
    """Sample and score the teacher alone: a checkpoint, or a released student, as it is. Nothing is trained.

    SETTINGS are those of `distillbench run`, without methods.

    \b
    distillbench score dataset=digits 'evaluation.teacher_samplers=[ddim,heun,dpmpp_2m]'
    distillbench score dataset=imagenet64 dataset.path=FILES teacher=consistency teacher.path=FOLDER \\
      'evaluation.teacher_samplers=[ddim,renoise]' 'evaluation.teacher_steps=[1,2]' conditional=true
    """
    given = [word for word in settings if word.partition("=")[0].split(".")[0] == "methods"]
    if given:
        raise UserError(f"score takes no method, got {given[0]!r}. To train methods use: distillbench run")
    _run(settings, dry_run, show_config, debug, need_methods=False)


def _run(settings: Sequence[str], dry_run: bool, show_config: bool, debug: bool, need_methods: bool = True) -> None:
    from distillbench.config import compose_runs, to_yaml
    from distillbench.plan import plan
    from distillbench.progress import Progress
    from distillbench.run import run as run_cells

    registry = _registry(debug)
    configs = compose_runs(list(settings), registry, need_methods)
    if not need_methods:  # an experiment may name some
        configs = [dataclasses.replace(config, methods={}) for config in configs]
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
    directions = {name: told["direction"] for name, told in outcome.columns.items()}
    _print_table(console, outcome.table, outcome.summary, directions)
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
    if kind == "metrics":
        _print_definitions((fact, text or "none") for fact, text in entry.cls.describe().items())
        return
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


@cli.command()
@click.argument("network", required=False)
@click.option("--from", "source", type=click.Path(), help="Copy this file, or from this folder.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def fetch(network: str | None, source: str | None, debug: bool) -> None:
    """Fetch the weights of the feature network NETWORK, such as inception for FID. Without a name: list them.

    Nothing else in distillbench downloads. The file is checked by its SHA-256, wherever it comes from, and is kept in
    $DISTILLBENCH_WEIGHTS or the user's cache.

    \b
    distillbench fetch inception
    distillbench fetch inception --from weights-inception-2015-12-05-6726825d.pth
    """
    from pathlib import Path

    from distillbench.pretrained import fetch as fetch_weights
    from distillbench.pretrained import weights_folder

    networks = _networks(_registry(debug))
    folder = weights_folder()
    if network is None:
        click.echo(f"weights are kept in {folder}")
        _print_definitions((name, _weights_in_words(cls, folder)) for name, cls in sorted(networks.items()))
        return
    if network not in networks:
        raise unknown("feature network", network, networks)
    cls = networks[network]
    if not cls.weights.url and source is None:
        raise UserError(f"the weights of {network} come with an installed package: there is nothing to fetch")
    for weights in (cls.weights, *cls.also):
        path = fetch_weights(network, weights, folder, Path(source) if source is not None else None)
        click.echo(f"written: {path} ({weights.licence})")


@cli.group()
def data() -> None:
    """Datasets."""


@data.command("check")
@click.argument("settings", nargs=-1)
@click.option("--grid", type=click.Path(dir_okay=False), help="Write a picture of the first 64 images (.png).")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def check_data(settings: tuple[str, ...], grid: str | None, debug: bool) -> None:
    """Read every image of a dataset: what is there, counts, classes, hash, damaged and double images.

    The exit code is 1 if images are damaged.

    \b
    distillbench data check dataset=ffhq dataset.path=ffhq-64x64.zip --grid ffhq.png
    """
    from pathlib import Path

    from distillbench.data_check import command

    raise SystemExit(command(settings, _registry(debug), None if grid is None else Path(grid), _console()))


@cli.command()
@click.argument("run_folder", type=click.Path())
@click.option("--method", required=True, help="Which student of the run.")
@click.option("--seed", type=click.IntRange(min=0), help="Its training seed, where the run has several.")
@click.option("--output", "-o", required=True, type=click.Path(), help="Folder to write; must not be there yet.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def export(run_folder: str, method: str, seed: int | None, output: str, debug: bool) -> None:
    """Write a one-step student of RUN_FOLDER as a pipeline that diffusers loads without distillbench.

    \b
    distillbench run 'methods=[boot]' dataset=digits run_name=digits
    distillbench export results/digits --method boot --output boot-digits
    """
    from pathlib import Path

    from distillbench.export import export as write_pipeline
    from distillbench.progress import Progress

    write_pipeline(Path(run_folder), method, seed, Path(output), _registry(debug), Progress(_console()))


FORMS = ("html", "markdown", "latex", "csv", "figures")


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--as", "forms", multiple=True, type=click.Choice(FORMS), help="What to write; several allowed. [html]")
@click.option("--output", "-o", type=click.Path(file_okay=False), help="Folder to write to. [the first run's]")
@click.option("--columns", multiple=True, help="Of tables for papers: names, joined by commas.")
@click.option("--precision", multiple=True, help="Decimals of a column: NAME=DECIMALS. [as the interval allows]")
@click.option("--sort", help="Column to sort tables for papers by; with - before it, the other way round.")
@click.option("--watch", is_flag=True, help="Write anew whenever a run has changed, until interrupted.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def report(
    runs: tuple[str, ...], forms: tuple[str, ...], output: str | None, columns: tuple[str, ...],
    precision: tuple[str, ...], sort: str | None, watch: bool, debug: bool,
) -> None:  # fmt: skip
    """Make reports of RUNS from their records alone: one HTML file, or tables and figures for papers.

    \b
    distillbench report results/digits
    distillbench report results/digits --as latex --as figures -o paper --columns method,nfe,fid,train_seconds
    """
    from distillbench.reports.write import report_runs

    report_runs(runs, forms or ("html",), output, columns, precision, sort, watch, _console())


@cli.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--tolerance", default=0.1, show_default=True, help="Change of a cost that is still none, as a share.")
@click.option("--all-costs", is_flag=True, help="Show costs that changed less, too.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def compare(a: str, b: str, tolerance: float, all_costs: bool, debug: bool) -> None:
    """Say how run B differs from run A, and whether beyond noise. Exit code 1: something is worse.

    \b
    distillbench compare results/before results/after
    """
    from distillbench.reports.commands import compare_runs

    raise SystemExit(compare_runs(a, b, tolerance, all_costs, _console()))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--output", "-o", required=True, type=click.Path(), help="Folder to write; must not be there yet.")
@click.option("--keep", type=click.Choice(["first", "last"]), help="Which of rows that contradict each other.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def merge(runs: tuple[str, ...], output: str, keep: Literal["first", "last"] | None, debug: bool) -> None:
    """Put RUNS of several machines into one.

    \b
    distillbench merge machine1/results/mine machine2/results/mine --output results/all
    """
    from distillbench.reports.commands import merge_runs

    raise SystemExit(merge_runs(runs, output, keep, _console()))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path())
@click.option("--columns", multiple=True, help="Names, joined by commas.")
@click.option("--sort", multiple=True, help="Columns to sort by.")
@click.option("--where", multiple=True, help="Comparisons that rows must meet: 'nfe<=2', method=boot,cm.")
@click.option("--rows", type=click.Choice(["summary", "all"]), default="summary", help="Means over seeds, or each row.")
@click.option("--csv", is_flag=True, help="Print CSV.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def show(
    runs: tuple[str, ...], columns: tuple[str, ...], sort: tuple[str, ...], where: tuple[str, ...],
    rows: Literal["summary", "all"], csv: bool, debug: bool,
) -> None:  # fmt: skip
    """Show the table of RUNS, filtered and sorted.

    \b
    distillbench show results/digits --where 'nfe<=2' --sort fd_efficientnet_lite0
    """
    from distillbench.reports.commands import show_runs

    raise SystemExit(show_runs(runs, columns, sort, where, rows, csv, _console()))


@cli.group()
def reference() -> None:
    """Reference statistics (.npz with mu and sigma) of real images."""


@reference.command("export")
@click.argument("settings", nargs=-1)
@click.option("--network", required=True, help="Feature network, such as inception.")
@click.option("--output", "-o", required=True, type=click.Path(dir_okay=False), help="File to write (.npz).")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def export_reference(settings: tuple[str, ...], network: str, output: str, debug: bool) -> None:
    """Compute the statistics of a dataset and write them in the layout of pytorch-fid and EDM, with provenance.

    \b
    distillbench reference export dataset=digits --network efficientnet_lite0 -o digits.npz
    distillbench run 'methods=[boot]' dataset=digits 'evaluation.references=[digits.npz]'
    """
    from distillbench.references import provenance_of, write_reference

    real, cls = _real_images(settings, network, output, debug)
    write_reference(_npz(output), real.statistics(cls), provenance_of(real.dataset, cls.identity(real.networks.folder)))
    click.echo(f"written: {output}, {real.count} images of {real.dataset.name} through {network}")


@reference.command("import")
@click.argument("file", type=click.Path(dir_okay=False))
@click.argument("settings", nargs=-1)
@click.option("--network", required=True, help="The network and preprocessing that FILE was made with.")
@click.option("--images", required=True, type=click.IntRange(min=2), help="How many images FILE is of.")
@click.option("--output", "-o", required=True, type=click.Path(dir_okay=False), help="File to write (.npz).")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def import_reference(file: str, settings: tuple[str, ...], network: str, images: int, output: str, debug: bool) -> None:
    """Take statistics of another tool (pytorch-fid, EDM) and write down what they are of: that is your word.

    \b
    distillbench reference import cifar10-32x32.npz dataset=cifar10 --network inception --images 50000 -o cifar10.npz
    """
    from pathlib import Path

    from distillbench.references import declared, provenance_of, read_reference, write_reference

    real, cls = _real_images(settings, network, output, debug)
    wanted = provenance_of(real.dataset, cls.identity(real.networks.folder))
    statistics, provenance = declared(read_reference(Path(file)), wanted, cls.width, images)
    write_reference(_npz(output), statistics, provenance)
    click.echo(f"written: {output}, declared to be {images} images of {real.dataset.name} through {network}")


@reference.command("show")
@click.argument("file", type=click.Path(dir_okay=False))
def show_reference(file: str) -> None:
    """Show what a reference file says of itself."""
    from pathlib import Path

    from distillbench.references import read_reference

    found = read_reference(Path(file))
    click.echo(f"{found.path.name}: {len(found.statistics.mean)} features, sha256 {found.sha256}")
    _print_definitions((name, str(value)) for name, value in sorted(found.provenance.items()))
    if not found.provenance:
        click.echo("it does not say what it is of: see distillbench reference import --help")


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
    except (UserError, Unavailable, OSError, DivergedError) as error:
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
    above = [base for base in cls.__mro__[1:] if base.__module__.startswith("distillbench.scores")]
    texts = (vars(base)["__doc__"] for base in (cls, *above))
    text = next((text for text in texts if text), sys.modules[cls.__module__].__doc__ or "")
    return inspect.cleandoc(text).split("\n\n")[0]


# --- feature networks ------------------------------------------------------------------------------------------------


def _networks(registry: Registry) -> dict[str, type[FeatureNetwork]]:
    """The feature networks that some metric looks through, by name."""
    found = [entry.cls.network for entry in registry.metrics.values() if entry.cls.network is not None]
    return {cls.name: cls for cls in found}


def _weights_in_words(cls: type[FeatureNetwork], folder: Path) -> str:
    try:
        cls.locate(folder)
        state = "there"
    except Unavailable as reason:
        state = str(reason)
    source = cls.weights.url or "comes with an installed package"
    return f"{state}; {cls.weights.mib} MiB, {cls.weights.licence}, {source}"


def _npz(output: str) -> Path:
    from pathlib import Path

    from distillbench.plan import check_writable

    path = Path(output)
    if path.suffix != ".npz":
        raise UserError(f"--output must name a .npz file, got {output!r}")
    check_writable(path.parent)
    return path


def _real_images(
    settings: Sequence[str], network: str, output: str, debug: bool
) -> tuple[RealImages, type[FeatureNetwork]]:
    """The real images of the dataset in `settings`, and the network to see them through."""
    from pathlib import Path

    from distillbench.config import compose_runs
    from distillbench.features import Networks
    from distillbench.plan import choose_device
    from distillbench.pretrained import weights_folder
    from distillbench.references import RealImages

    registry = _registry(debug)
    networks = _networks(registry)
    if network not in networks:
        raise unknown("feature network", network, networks)
    _npz(output)
    configs = compose_runs(list(settings), registry, need_methods=False)
    if len(configs) > 1:
        raise UserError(f"a reference is of one dataset, the settings span {len(configs)}")
    dataset = registry.get("datasets", configs[0].dataset.kind).cls(configs[0].dataset)
    seen = Networks(weights_folder(), choose_device(configs[0].device))
    return RealImages(dataset, seen, Path(configs[0].results_dir) / "cache" / "references"), networks[network]


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
        for name, why in group[0].scene.missing().items():
            console.print(f"{name} would be empty: {why}", markup=False, soft_wrap=True)
        for cell in group:
            if cell.trouble:
                console.print(f"{cell.label} would fail: {cell.trouble}", markup=False, soft_wrap=True)
        budget = group[0].scene.config.budget
        if budget.limit == "seconds":
            console.print(f"Each method trains {budget.seconds:g} s; its images and evaluations are not foreseen.")
    console.print("dry run: nothing was run or written")


def _price(cell: Cell) -> tuple[int, int, int, int]:
    """Foreseen: images, teacher and student evaluations of training, evaluations of sampling."""
    evaluation = cell.scene.config.evaluation
    sampling = sum(cell.nfe) * evaluation.images * len(evaluation.seeds)
    return cell.price.images, cell.price.teacher_nfe, cell.price.student_nfe, sampling


def _print_rows(progress: Progress, rows: pd.DataFrame) -> None:
    """A line for each new row, as the table grows."""
    for row in rows.to_dict("records"):
        values = ", ".join(f"{name} {_number(row[name])}" for name in _scores(rows))
        progress.say(f"  {_row_name(row)}: {values if row['status'] == 'ok' else _why(row)}")


def _print_table(console: Console, table: pd.DataFrame, summary: pd.DataFrame, directions: dict[str, str]) -> None:
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
    unlimited = console.options.update(max_width=10_000)

    def fits(shown: list[str]) -> bool:
        return console.measure(_drawn(summary, shown, directions), options=unlimited).maximum <= console.width

    shown = names + optional
    while len(shown) > first + 1 and not fits(shown):  # the first score is always there
        shown.pop()
    console.print(_drawn(summary, shown, directions))
    cut = [name for name in directions if name not in shown]
    notes = [f"not shown: {', '.join(cut)} (summary.csv)"] if cut else []
    for source in ("training", "sampling"):
        if any(summary[f"{name}_{source}_low"].notna().any() for name in directions):
            notes.append(f"{source[0]}[...]: 95 % interval of the mean over {source} seeds")
    for line in notes:
        console.print(line, markup=False, soft_wrap=True)
    for line in _verdicts(summary, directions):
        console.print(line, markup=False, soft_wrap=True)
    for row in table[table["status"] != "ok"].to_dict("records"):
        console.print(f"{_row_name(row)}: {_why(row)}", markup=False, soft_wrap=True)
    for name in directions:
        reasons = table.loc[table[name].isna() & (table["status"] == "ok"), "reason"]
        if table[name].isna().all() and len(reasons):
            console.print(f"{name} is empty: {_reason_of(name, reasons.iloc[0])}", markup=False, soft_wrap=True)


def _reason_of(name: str, reasons: str) -> str:
    """Why the column `name` is empty, out of a row's reasons."""
    told = [part.partition(" empty: ") for part in reasons.split("; ")]
    return next((why for names, _, why in told if name in names.split(", ")), reasons)


def _drawn(summary: pd.DataFrame, names: list[str], directions: dict[str, str]) -> Table:
    from rich.markup import escape

    from distillbench.statistics import arrow, leaders

    headings = [f"{name}_{arrow(directions[name])}".rstrip("_") if name in directions else name for name in names]
    texts = ("dataset", "teacher", "method", "settings", "budget", "protocol", "status")
    drawn = _new_table(headings, text=texts)
    best = {name: leaders(summary, name, directions[name]).tolist() for name in names if name in directions}
    for index, row in enumerate(summary.to_dict("records")):
        cells = (_cell(row, name, best.get(name, {}) and best[name][index]) for name in names)
        drawn.add_row(*map(escape, cells))
    return drawn


def _cell(row: dict, name: str, best: bool) -> str:
    """A value; of a score with its interval, and a star where it leads beyond doubt."""
    import pandas as pd

    text = _number(row[name])
    for source in ("training", "sampling"):
        low, high = row.get(f"{name}_{source}_low"), row.get(f"{name}_{source}_high")
        if low is not None and not pd.isna(low):
            return f"{text} {source[0]}[{_number(low)}, {_number(high)}]{'*' if best else ''}"
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
    from distillbench.results import FIRST, LAST

    return [name for name in table.columns if name not in FIRST and name not in LAST]


def _row_name(row: dict) -> str:
    seed = _number(row["training_seed"])
    return f"{row['method']}{'' if seed == '-' else f' seed {seed}'}, {row['nfe']} NFE, noise {row['sampling_seed']}"


def _why(row: dict) -> str:
    return f"{row['status']}: {row['reason']}"


def _number(value: object) -> str:
    import pandas as pd

    if pd.isna(value):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
