"""The command line. Everything heavy is imported inside the command that needs it, so that --help answers at once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from distillbench import __version__
from distillbench.errors import DivergedError, Unavailable, UserError, unknown
from distillbench.output_encoding import replace_unwritable
from distillbench.signals import Interrupted, stopping
from distillbench.terminal import new_console, print_definitions, print_plan, print_rows, print_table, width

if TYPE_CHECKING:
    from pathlib import Path

    from distillbench.features import FeatureNetwork
    from distillbench.references import RealImages
    from distillbench.registry import Plugin, Registry

BAD_INPUT, SOMETHING_FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
KINDS = ("methods", "teachers", "datasets", "metrics")


class UserPath(click.Path):
    """A path in which a leading ``~`` is the user's home: shells leave it alone after ``--output=``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


def plugin_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that loads plugins."""
    folders = click.option(
        "--plugins-dir", "folders", multiple=True, type=UserPath(file_okay=False), envvar="DISTILLBENCH_PLUGINS_DIR",
        help="Folder whose files are plugins too; several allowed. [$DISTILLBENCH_PLUGINS_DIR]",
    )  # fmt: skip
    return folders(click.option("--debug", is_flag=True, help="Show tracebacks.")(command))


def with_plugins(command: Callable[..., None]) -> Callable[..., None]:
    """Load the plugins and hand the registry to `command` as ``registry``; what failed to load is a warning."""

    @plugin_options
    @functools.wraps(command)
    def loaded(*arguments: Any, folders: Sequence[str], debug: bool, **options: Any) -> None:
        registry = _registry(folders)
        for plugin in registry.broken:
            click.echo(f"warning: plugin {_origin(plugin)} is left out: {plugin.error}", err=True)
            if debug:
                click.echo(plugin.traceback, err=True)
        command(*arguments, registry=registry, **options)

    return loaded


debuggable = click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distillbench")
def cli() -> None:
    """Compare methods that distil diffusion models: one frozen teacher, one budget, one evaluator.

    \b
    distillbench run 'methods=[boot,cm,pd,direct]' dataset=digits
    distillbench list methods
    distillbench describe boot
    """


def run_options(command: Callable[..., None]) -> Callable[..., None]:
    """What `run` and `score` share; the flags of the work come as ``flags``."""

    @click.argument("settings", nargs=-1)
    @click.option("--dry-run", is_flag=True, help="Check everything, print the plan with its price, run nothing.")
    @click.option("--show-config", is_flag=True, help="Print the settings as YAML, run nothing.")
    @click.option("--retry-failed", is_flag=True, help="Try again what failed, or ran out of memory or time, before.")
    @click.option("--force", is_flag=True, help="Do everything again, finished or not.")
    @click.option("--fail-fast", is_flag=True, help="Leave out what comes after a cell that is not ok.")
    @with_plugins
    @functools.wraps(command)
    def wrapped(registry: Registry, settings: Sequence[str], dry_run: bool, show_config: bool, **flags: bool) -> None:
        command(registry, settings, Asked(dry_run, show_config, **flags))

    return wrapped


@dataclasses.dataclass(frozen=True)
class Asked:
    """The flags of `run` and `score`."""

    dry_run: bool
    show_config: bool
    retry_failed: bool
    force: bool
    fail_fast: bool


@cli.command()
@run_options
def run(registry: Registry, settings: Sequence[str], asked: Asked) -> None:
    """Train, sample and score methods; print and keep the table.

    SETTINGS are Hydra overrides; comma sweeps make a grid. Quote brackets for your shell.

    \b
      'methods=[boot,cm]'      which methods        dataset=digits       on which images
      methods.boot.lr=3e-4     their settings       teacher=trained      from which teacher
      budget.images=400000     how long each        seed=0,1,2           one training a seed
      device=auto              cpu, cuda, cuda:N    results_dir=results  where results go
      experiment=smoke         a prepared set of settings (configs/experiment)

    Killed or interrupted, the same command goes on: what is finished is not touched.
    """
    _run(registry, settings, asked)


@cli.command()
@run_options
def score(registry: Registry, settings: Sequence[str], asked: Asked) -> None:
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
    _run(registry, settings, asked, need_methods=False)


def _run(registry: Registry, settings: Sequence[str], asked: Asked, need_methods: bool = True) -> None:
    from distillbench.cell import Policy
    from distillbench.config import compose_runs, to_yaml
    from distillbench.following import follow, in_these_processes
    from distillbench.fully_sharded import check_shared
    from distillbench.launchers import follows
    from distillbench.plan import plan
    from distillbench.progress import Progress
    from distillbench.ranks import joined
    from distillbench.run import run as run_cells

    try:
        configs = compose_runs(list(settings), registry, need_methods)
    except UserError:
        if follows():  # the first of several processes says it
            raise SystemExit(BAD_INPUT) from None
        raise
    if not need_methods:  # an experiment may name some
        configs = [dataclasses.replace(config, methods={}) for config in configs]
    if asked.show_config and follows():
        return
    if asked.show_config:
        click.echo("---\n".join(to_yaml(config) for config in configs), nl=False)
        return
    console = new_console()
    progress = Progress(console)
    policy = Policy(asked.retry_failed, asked.force, asked.fail_fast)
    with stopping() as stop, joined(configs[0].device) as ranks:
        if not ranks.main:
            follow(ranks, stop)
            return
        cells = plan(configs, registry)
        if asked.dry_run:
            print_plan(console, cells)
            raise SystemExit(SOMETHING_FAILED if any(cell.trouble for cell in cells) else 0)
        for config in configs:
            check_shared(config.compute, ranks.count)
        if ranks.count > 1:
            configs = in_these_processes(cells, configs, ranks, progress)
        outcome = run_cells(cells, configs, progress, lambda rows: print_rows(progress, rows), policy, stop)
    directions = {name: told["direction"] for name, told in outcome.columns.items()}
    print_table(console, outcome.table, outcome.summary, directions)
    progress.say(f"every column, samples and weights: {outcome.folder}")
    if outcome.failed:
        progress.say(f"not ok: {', '.join(outcome.failed)}")
        raise SystemExit(SOMETHING_FAILED)


@cli.command("list")
@click.argument("kind", type=click.Choice(KINDS))
@with_plugins
def list_(registry: Registry, kind: str) -> None:
    """List what can be named: methods, teachers, datasets or metrics."""
    entries = sorted(registry.of_kind(kind).items())
    print_definitions((name, f"{_summary(entry.cls)} [{_version(entry.plugin)}]") for name, entry in entries)


@cli.command()
@click.argument("name")
@with_plugins
def describe(registry: Registry, name: str) -> None:
    """Show what NAME is, where it comes from and its settings with their defaults."""
    found = [kind for kind in KINDS if name in registry.of_kind(kind)]
    if not found:
        raise registry.no("method, teacher, dataset or metric", name, [n for k in KINDS for n in registry.of_kind(k)])
    for kind in found:
        _describe(registry, kind, name)


def _describe(registry: Registry, kind: str, name: str) -> None:
    from distillbench import registry as rules
    from distillbench.config import describe_options

    entry = registry.get(kind, name)
    click.echo(f"{name}: {kind.removesuffix('s')} from plugin {_origin(entry.plugin)}")
    click.echo(click.wrap_text(_documentation(entry.cls), width(), preserve_paragraphs=True))
    if kind == "metrics":
        print_definitions((fact, text or "none") for fact, text in entry.cls.describe().items())
        return
    facts = [(fact.replace("_", " "), getattr(entry.cls, fact)) for fact in rules.KINDS[kind].declares]
    print_definitions((fact, {True: "yes", False: "no"}.get(value, value)) for fact, value in facts)
    if rules.KINDS[kind].config is None:
        return
    prefix = f"methods.{name}" if kind == "methods" else kind.removesuffix("s")
    options = describe_options(entry.cls.Config)
    click.echo("\nsettings and their defaults:" if options else "\nno settings")
    print_definitions((f"{prefix}.{option}={default}", text) for option, default, text in options)


@cli.command()
@click.argument("name")
@click.argument("settings", nargs=-1)
@click.option("--quick", is_flag=True, help="Leave out the training on an exact teacher: seconds instead of a minute.")
@click.option("--thorough", is_flag=True, help="Train five times as long on the exact teacher.")
@with_plugins
def check(registry: Registry, name: str, settings: tuple[str, ...], quick: bool, thorough: bool) -> None:
    """Hold what is called NAME against its contract, one line for each check. The exit code is 1 if a check fails.

    A line that begins with `look` is ok if you meant what it says.

    SETTINGS are those of the method, dataset or teacher; a teacher also takes the dataset that it is checked on.

    \b
    distillbench check boot methods.boot.steps=4
    distillbench check trained dataset=digits
    """
    from distillbench.check_command import check_name
    from distillbench.testing import LAW_IMAGES

    if quick and thorough:
        raise UserError("--quick and --thorough exclude each other")
    law_images = 0 if quick else LAW_IMAGES * (5 if thorough else 1)
    raise SystemExit(0 if check_name(registry, name, settings, law_images) else SOMETHING_FAILED)


@cli.command("new-plugin")
@click.argument("name")
@click.option(
    "--kind", type=click.Choice(["method", "teacher", "dataset", "metric"]), default="method", show_default=True
)
@click.option("--output", "-o", type=UserPath(), help="Folder to write. [distillbench-NAME]")
@with_plugins
def new_plugin(registry: Registry, name: str, kind: str, output: str | None) -> None:
    """Write a small package that brings NAME: a module that works, its tests, its entry point.

    \b
    distillbench new-plugin my_method
    uv pip install -e distillbench-my-method
    distillbench check my_method
    """
    from pathlib import Path

    from distillbench.new_plugin import new_plugin as write_package

    folder = write_package(name, kind, Path(output) if output else None, registry.of_kind(f"{kind}s"))
    click.echo(f"written: {folder}. Its README.md says how to install, check and run it")


@cli.command()
@plugin_options
def plugins(folders: tuple[str, ...], debug: bool) -> None:
    """Show every plugin: its distribution and version, its hooks and what they bring, its file, or why it is left out.

    DISTILLBENCH_PLUGINS limits what loads to the plugins or distributions that its patterns name, separated by commas.

    \b
    DISTILLBENCH_PLUGINS='distillbench,my_*' distillbench plugins --plugins-dir my_plugins
    """
    registry = _registry(folders)
    print_definitions((plugin.name, _plugin_in_words(plugin)) for plugin in registry.plugins)
    for plugin in registry.broken if debug else []:
        click.echo(f"\n{plugin.name}:\n{plugin.traceback}", err=True)


@cli.command()
@click.option("--results-dir", default="results", show_default=True, type=UserPath(), help="Where results go.")
@click.option("--thorough", is_flag=True, help="Check the hash of every student's weights.")
@plugin_options
def doctor(results_dir: str, thorough: bool, folders: tuple[str, ...], debug: bool) -> None:
    """Examine packages, device, disk, caches, records, plugins, weights. The exit code is 1 if something is wrong."""
    from pathlib import Path

    from distillbench.doctor import examine

    found = examine(_registry(folders), Path(results_dir), new_console(), thorough)
    raise SystemExit(0 if found else SOMETHING_FAILED)


@cli.command()
@click.option("--results-dir", default="results", show_default=True, type=UserPath(), help="What to clean.")
@click.option("--what", multiple=True, help="Kinds of files; several allowed. [temporary, states]")
@click.option("--older-than", type=click.FloatRange(min=0), help="Only what is older than so many days.")
@click.option("--yes", is_flag=True, help="Remove without asking.")
@debuggable
def clean(results_dir: str, what: tuple[str, ...], older_than: float | None, yes: bool) -> None:
    """Remove what is safe to remove from a results folder; tells first, and asks.

    \b
    distillbench clean                       # left by killed processes; states of finished trainings
    distillbench clean --what pairs --yes    # noise-image pairs, which would be made again
    """
    from pathlib import Path

    from distillbench.clean import clean as remove

    def confirm(text: str) -> bool:
        return sys.stdin.isatty() and click.confirm(text)

    raise SystemExit(remove(Path(results_dir), what, older_than, yes, new_console(), confirm))


@cli.group()
def teacher() -> None:
    """Teachers that the harness trains itself."""


@teacher.command("train")
@click.argument("settings", nargs=-1)
@click.option("--output", "-o", type=UserPath(dir_okay=False), help="File to write; default: the results' cache.")
@with_plugins
def train_teacher(registry: Registry, settings: tuple[str, ...], output: str | None) -> None:
    """Train the teacher of a dataset anew and write its weights (safetensors).

    \b
    distillbench teacher train dataset=digits --output digits-teacher.safetensors
    distillbench run 'methods=[boot]' dataset=digits teacher.path=digits-teacher.safetensors
    """
    from pathlib import Path

    from distillbench.config import compose_runs
    from distillbench.files import check_writable
    from distillbench.progress import Progress
    from distillbench.run import train_teacher_of

    configs = compose_runs(list(settings), registry, need_methods=False)
    file = Path(output) if output is not None else None
    if file is not None and file.suffix != ".safetensors":
        raise UserError(f"--output must name a .safetensors file, got {output!r}")
    if file is not None and len(configs) > 1:
        raise UserError(f"--output takes one teacher, the settings span {len(configs)}")
    for config in configs:
        check_writable(file.parent if file is not None else Path(config.results_dir))
    progress = Progress(new_console())
    for config in configs:
        progress.say(f"written: {train_teacher_of(config, registry, file, progress)}")


@cli.command()
@click.argument("network", required=False)
@click.option("--from", "source", type=UserPath(), help="Copy this file, or from this folder.")
@with_plugins
def fetch(registry: Registry, network: str | None, source: str | None) -> None:
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

    networks = _networks(registry)
    folder = weights_folder()
    if network is None:
        click.echo(f"weights are kept in {folder}")
        print_definitions((name, _weights_in_words(cls, folder)) for name, cls in sorted(networks.items()))
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
@click.option("--grid", type=UserPath(dir_okay=False), help="Write a picture of the first 64 images (.png).")
@with_plugins
def check_data(registry: Registry, settings: tuple[str, ...], grid: str | None) -> None:
    """Read every image of a dataset: what is there, counts, classes, hash, damaged and double images.

    The exit code is 1 if images are damaged.

    \b
    distillbench data check dataset=ffhq dataset.path=ffhq-64x64.zip --grid ffhq.png
    """
    from pathlib import Path

    from distillbench.data_check import command

    raise SystemExit(command(settings, registry, None if grid is None else Path(grid), new_console()))


@cli.command()
@click.argument("run_folder", type=UserPath())
@click.option("--method", required=True, help="Which student of the run.")
@click.option("--seed", type=click.IntRange(min=0), help="Its training seed, where the run has several.")
@click.option("--output", "-o", required=True, type=UserPath(), help="Folder to write; must not be there yet.")
@with_plugins
def export(registry: Registry, run_folder: str, method: str, seed: int | None, output: str) -> None:
    """Write a one-step student of RUN_FOLDER as a pipeline that diffusers loads without distillbench.

    \b
    distillbench run 'methods=[boot]' dataset=digits run_name=digits
    distillbench export results/digits --method boot --output boot-digits
    """
    from pathlib import Path

    from distillbench.export import export as write_pipeline
    from distillbench.progress import Progress

    write_pipeline(Path(run_folder), method, seed, Path(output), registry, Progress(new_console()))


FORMS = ("html", "markdown", "latex", "csv", "figures")


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath())
@click.option("--as", "forms", multiple=True, type=click.Choice(FORMS), help="What to write; several allowed. [html]")
@click.option("--output", "-o", type=UserPath(file_okay=False), help="Folder to write to. [the first run's]")
@click.option("--columns", multiple=True, help="Of tables for papers: names, joined by commas.")
@click.option("--precision", multiple=True, help="Decimals of a column: NAME=DECIMALS. [as the interval allows]")
@click.option("--sort", help="Column to sort tables for papers by; with - before it, the other way round.")
@click.option("--watch", is_flag=True, help="Write anew whenever a run has changed, until interrupted.")
@debuggable
def report(
    runs: tuple[str, ...], forms: tuple[str, ...], output: str | None, columns: tuple[str, ...],
    precision: tuple[str, ...], sort: str | None, watch: bool,
) -> None:  # fmt: skip
    """Make reports of RUNS from their records alone: one HTML file, or tables and figures for papers.

    \b
    distillbench report results/digits
    distillbench report results/digits --as latex --as figures -o paper --columns method,nfe,fid,train_seconds
    """
    from distillbench.reports.write import report_runs

    report_runs(runs, forms or ("html",), output, columns, precision, sort, watch, new_console())


@cli.command()
@click.argument("a", type=UserPath())
@click.argument("b", type=UserPath())
@click.option("--tolerance", default=0.1, show_default=True, help="Change of a cost that is still none, as a share.")
@click.option("--all-costs", is_flag=True, help="Show costs that changed less, too.")
@debuggable
def compare(a: str, b: str, tolerance: float, all_costs: bool) -> None:
    """Say how run B differs from run A, and whether beyond noise. Exit code 1: something is worse.

    \b
    distillbench compare results/before results/after
    """
    from distillbench.reports.commands import compare_runs

    raise SystemExit(compare_runs(a, b, tolerance, all_costs, new_console()))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath())
@click.option("--output", "-o", required=True, type=UserPath(), help="Folder to write; must not be there yet.")
@click.option("--keep", type=click.Choice(["first", "last"]), help="Which of rows that contradict each other.")
@debuggable
def merge(runs: tuple[str, ...], output: str, keep: Literal["first", "last"] | None) -> None:
    """Put RUNS of several machines into one.

    \b
    distillbench merge machine1/results/mine machine2/results/mine --output results/all
    """
    from distillbench.reports.commands import merge_runs

    raise SystemExit(merge_runs(runs, output, keep, new_console()))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=UserPath())
@click.option("--columns", multiple=True, help="Names, joined by commas.")
@click.option("--sort", multiple=True, help="Columns to sort by.")
@click.option("--where", multiple=True, help="Comparisons that rows must meet: 'nfe<=2', method=boot,cm.")
@click.option("--rows", type=click.Choice(["summary", "all"]), default="summary", help="Means over seeds, or each row.")
@click.option("--csv", is_flag=True, help="Print CSV.")
@debuggable
def show(
    runs: tuple[str, ...], columns: tuple[str, ...], sort: tuple[str, ...], where: tuple[str, ...],
    rows: Literal["summary", "all"], csv: bool,
) -> None:  # fmt: skip
    """Show the table of RUNS, filtered and sorted.

    \b
    distillbench show results/digits --where 'nfe<=2' --sort fd_efficientnet_lite0
    """
    from distillbench.reports.commands import show_runs

    raise SystemExit(show_runs(runs, columns, sort, where, rows, csv, new_console()))


@cli.group()
def reference() -> None:
    """Reference statistics (.npz with mu and sigma) of real images."""


@reference.command("export")
@click.argument("settings", nargs=-1)
@click.option("--network", required=True, help="Feature network, such as inception.")
@click.option("--output", "-o", required=True, type=UserPath(dir_okay=False), help="File to write (.npz).")
@with_plugins
def export_reference(registry: Registry, settings: tuple[str, ...], network: str, output: str) -> None:
    """Compute the statistics of a dataset and write them in the layout of pytorch-fid and EDM, with provenance.

    \b
    distillbench reference export dataset=digits --network efficientnet_lite0 -o digits.npz
    distillbench run 'methods=[boot]' dataset=digits 'evaluation.references=[digits.npz]'
    """
    from distillbench.references import provenance_of, write_reference

    real, cls = _real_images(registry, settings, network, output)
    write_reference(_npz(output), real.statistics(cls), provenance_of(real.dataset, cls.identity(real.networks.folder)))
    click.echo(f"written: {output}, {real.count} images of {real.dataset.name} through {network}")


@reference.command("import")
@click.argument("file", type=UserPath(dir_okay=False))
@click.argument("settings", nargs=-1)
@click.option("--network", required=True, help="The network and preprocessing that FILE was made with.")
@click.option("--images", required=True, type=click.IntRange(min=2), help="How many images FILE is of.")
@click.option("--output", "-o", required=True, type=UserPath(dir_okay=False), help="File to write (.npz).")
@with_plugins
def import_reference(
    registry: Registry, file: str, settings: tuple[str, ...], network: str, images: int, output: str
) -> None:
    """Take statistics of another tool (pytorch-fid, EDM) and write down what they are of: that is your word.

    \b
    distillbench reference import cifar10-32x32.npz dataset=cifar10 --network inception --images 50000 -o cifar10.npz
    """
    from pathlib import Path

    from distillbench.references import declared, provenance_of, read_reference, write_reference

    real, cls = _real_images(registry, settings, network, output)
    wanted = provenance_of(real.dataset, cls.identity(real.networks.folder))
    statistics, provenance = declared(read_reference(Path(file)), wanted, cls.width, images)
    write_reference(_npz(output), statistics, provenance)
    click.echo(f"written: {output}, declared to be {images} images of {real.dataset.name} through {network}")


@reference.command("show")
@click.argument("file", type=UserPath(dir_okay=False))
def show_reference(file: str) -> None:
    """Show what a reference file says of itself."""
    from pathlib import Path

    from distillbench.references import read_reference

    found = read_reference(Path(file))
    click.echo(f"{found.path.name}: {len(found.statistics.mean)} features, sha256 {found.sha256}")
    print_definitions((name, str(value)) for name, value in sorted(found.provenance.items()))
    if not found.provenance:
        click.echo("it does not say what it is of: see distillbench reference import --help")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: what the user can mend becomes one message and exit code 2."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend, handed on to its processes, is refused by matplotlib
    replace_unwritable()
    try:
        cli.main(words, prog_name="distillbench", standalone_mode=False)
    except (click.Abort, Interrupted) as interrupted:
        if "RANK" not in os.environ or os.environ["RANK"] == "0":  # the first of several processes says it
            click.echo("interrupted. What was reached is kept: the same command goes on from there", err=True)
        terminated = isinstance(interrupted, Interrupted) and interrupted.name == "SIGTERM"
        raise SystemExit(TERMINATED if terminated else INTERRUPTED) from None
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (UserError, Unavailable, OSError, DivergedError) as error:
        if "--debug" in words:
            sys.excepthook(*sys.exc_info())
        click.echo(f"error: {error}", err=True)
        raise SystemExit(SOMETHING_FAILED if isinstance(error, DivergedError) else BAD_INPUT) from None


# --- plugins ---------------------------------------------------------------------------------------------------------


def _registry(folders: Iterable[str]) -> Registry:
    from pathlib import Path

    from distillbench.registry import ONLY, Selection

    patterns = [pattern.strip() for pattern in os.environ.get(ONLY, "").split(",")]
    return Selection(tuple(Path(folder).resolve() for folder in folders), tuple(filter(None, patterns))).load()


def _plugin_in_words(plugin: Plugin) -> str:
    if plugin.not_asked:
        return f"{_version(plugin)}; not loaded: {plugin.not_asked}"
    if plugin.error:
        return f"{_version(plugin)}; left out: {plugin.error}{plugin.origin and f' ({plugin.origin})'}"
    brings = [brought.partition(": ") for brought in plugin.brings]
    names = {hook: [name for kind, _, name in brings if hook == f"register_{kind}"] for hook in plugin.hooks}
    hooks = (f"{hook}: {', '.join(found) or 'nothing'}" for hook, found in names.items())
    return f"{_version(plugin)}; {'; '.join(hooks)}; {plugin.origin}"


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

    from distillbench.files import check_writable

    path = Path(output)
    if path.suffix != ".npz":
        raise UserError(f"--output must name a .npz file, got {output!r}")
    check_writable(path.parent)
    return path


def _real_images(
    registry: Registry, settings: Sequence[str], network: str, output: str
) -> tuple[RealImages, type[FeatureNetwork]]:
    """The real images of the dataset in `settings`, and the network to see them through."""
    from pathlib import Path

    from distillbench.config import compose_runs
    from distillbench.features import Networks
    from distillbench.pretrained import weights_folder
    from distillbench.references import RealImages
    from distillbench.shared_context import choose_device

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
