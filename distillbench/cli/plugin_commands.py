"""The commands about plugins and what they bring: ``list``, ``describe``, ``check``, ``new-plugin``, ``plugins``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from distillbench.cli.command_options import SOMETHING_FAILED, Choice, UserPath, plugin_options, waiting, with_plugins
from distillbench.cli.plugin_table import KINDS, Described, Found, PluginTable, kept_table, new_table, plugin_table
from distillbench.cli.terminal import print_definitions, width
from distillbench.errors import UserError

if TYPE_CHECKING:
    from distillbench.registry import Registry

LISTED = (*KINDS, "experiments", "samplers", "schedules")


def as_json(command: Callable[..., None]) -> Callable[..., None]:
    """The option of a command that can print JSON."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def print_json(value: object) -> None:
    """Print JSON, and nothing else on stdout."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def table_for(folders: Sequence[str], debug: bool) -> PluginTable:
    """The table of the plugins; warns about plugins that failed to load."""
    kept = None if debug else kept_table(folders)
    if kept is None:
        with waiting("loading torch and the plugins, once after every change of theirs ..."):
            kept = new_table(folders, debug)
    for line in kept.warnings:
        click.echo(f"warning: {line}", err=True)
    for traceback in kept.tracebacks.values():
        click.echo(traceback, err=True)
    return kept


@click.command("list")
@click.argument("kind", required=False, type=Choice(LISTED), metavar="[KIND]")
@as_json
@plugin_options
def list_(kind: str | None, as_json: bool, folders: tuple[str, ...], debug: bool) -> None:
    """List the available methods, teachers, datasets, metrics, experiments, samplers or schedules.

    KIND is one of these words; without it, all are listed.

    Methods are grouped by what they learn, each with its need of real images and its numbers of evaluations.
    """
    table = table_for(folders, debug)
    kinds = [kind] if kind else list(LISTED)
    if as_json:
        found = {one: _plain(one, table) for one in kinds}
        print_json(found[kind] if kind else found)
        return
    for one in kinds:
        if kind is None:
            click.echo(f"{one}:")
        _list(one, table)


def _list(kind: str, table: PluginTable) -> None:
    if kind not in KINDS:
        print_definitions((row["name"], row["summary"]) for row in _plain(kind, table))
        return
    entries = table.kinds[kind].values()
    if kind != "methods":
        print_definitions((one.name, f"{one.summary} [{one.version}]") for one in entries)
        return
    for learned, meaning in table.learned.items():
        rows = [one for one in entries if one.learned == learned]
        if rows:
            click.echo(f"{learned}: {meaning}")
            print_definitions((one.name, f"{one.summary} ({_told(one)}) [{one.version}]") for one in rows)


def _told(method: Described) -> str:
    images = "real images" if method.facts["reads_data"] == "yes" else "no real images"
    return f"{images}; NFE {method.facts['nfe']}"


def _plain(kind: str, table: PluginTable) -> list[dict[str, Any]]:
    """The things of a kind as plain values."""
    if kind == "experiments":
        return [{"name": name, "summary": summary} for name, summary in experiment_summaries().items()]
    if kind in KINDS:
        return [
            {"name": one.name, "summary": one.summary, "plugin": one.version, **one.facts}
            | ({"learns": one.learned} if one.learned else {})
            for one in table.kinds[kind].values()
        ]
    return [{"name": name, "summary": text} for name, text in getattr(table, kind).items()]


def experiment_summaries() -> dict[str, str]:
    """The first line of the comment on top of each prepared experiment."""
    from distillbench.runs.overrides import config_folder, experiments

    found = {}
    for name in experiments():
        lines = (config_folder() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        comments = [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
        found[name] = next((line for line in comments if not line.startswith("@")), "").removesuffix(".")
    return found


def complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of methods, teachers, datasets and metrics that begin like `incomplete`."""
    folders = ctx.params.get("folders") or ()
    return [name for name in plugin_table(folders).names if name.startswith(incomplete)]


@click.command()
@click.argument("name", shell_complete=complete_name)
@as_json
@plugin_options
def describe(name: str, as_json: bool, folders: tuple[str, ...], debug: bool) -> None:
    """Show what NAME is, its plugin, and its settings."""
    table = table_for(folders, debug)
    found = {kind: table.kinds[kind][name] for kind in KINDS if name in table.kinds[kind]}
    if not found:
        raise table.no("method, teacher, dataset or metric", name, table.names)
    if as_json:
        print_json([{"kind": kind.removesuffix("s"), **asdict(one)} for kind, one in found.items()])
        return
    for kind, one in found.items():
        _describe(kind, one)


def _describe(kind: str, one: Described) -> None:
    click.echo(f"{one.name}: {kind.removesuffix('s')} from plugin {one.plugin}")
    click.echo(click.wrap_text(one.documentation, width(), preserve_paragraphs=True))
    print_definitions((fact.replace("_", " "), text) for fact, text in one.facts.items())
    if kind == "metrics":
        return
    prefix = f"methods.{one.name}" if kind == "methods" else kind.removesuffix("s")
    click.echo("\nsettings and their defaults:" if one.settings else "\nno settings")
    print_definitions((f"{prefix}.{setting.name}={setting.default}", setting.help) for setting in one.settings)
    if kind == "methods":
        _describe_search(one, prefix)


def _describe_search(one: Described, prefix: str) -> None:
    """What ``distillbench tune`` searches."""
    click.echo("\nsettings that distillbench tune searches:")
    if not one.declares_search:
        none = "The plugin declares none: learning rate and average alone are searched, around their defaults."
        click.echo(click.wrap_text(none, width()))
    print_definitions((f"{prefix}.{name}", search) for name, search in one.searched.items())
    if one.searched_after:
        click.echo("\nsettings of sampling, searched with finished students (tune.after):")
        print_definitions((f"{prefix}.{name}", search) for name, search in one.searched_after.items())


@click.command()
@click.argument("name", shell_complete=complete_name)
@click.argument("settings", nargs=-1)
@click.option("--quick", is_flag=True, help="Skip the training on an exact teacher: seconds instead of a minute.")
@click.option("--thorough", is_flag=True, help="Train five times as long on the exact teacher.")
@click.option(
    "--network",
    type=Choice(["mlp", "unet", "dit", "edm"]),
    default="mlp",
    show_default=True,
    help="Check a method on a small network of this kind; all but mlp have attention.",
)
@click.option(
    "--precision",
    type=Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Train that network as with compute.precision.",
)
@click.option("--recompute", is_flag=True, help="Train that network as with compute.recompute=true.")
@with_plugins
def check(
    registry: Registry,
    name: str,
    settings: tuple[str, ...],
    quick: bool,
    thorough: bool,
    network: str,
    precision: str,
    recompute: bool,
) -> None:
    """Run conformance checks on NAME.

    Prints one line for each check. The exit code is 1 if a check fails. A line that begins with `look` is fine if what
    it says is what you intended.

    SETTINGS are those of the method, dataset or teacher; a teacher also takes the dataset that it is checked on.

    \b
    distillbench check boot methods.boot.steps=4
    distillbench check boot --quick --network unet --precision bf16
    distillbench check trained dataset=digits
    """
    from distillbench.cli.check import check_name
    from distillbench.testing.bench_networks import Computed
    from distillbench.testing.conformance import DISTRIBUTION_IMAGES

    if quick and thorough:
        raise UserError("--quick and --thorough exclude each other")
    images = 0 if quick else DISTRIBUTION_IMAGES * (5 if thorough else 1)
    computed = Computed(network, precision, recompute)
    raise SystemExit(0 if check_name(registry, name, settings, images, computed) else SOMETHING_FAILED)


@click.command("new-plugin")
@click.argument("name")
@click.option("--kind", type=Choice(["method", "teacher", "dataset", "metric"]), default="method", show_default=True)
@click.option("--output", "-o", type=UserPath(), help="Folder to write. [distillbench-NAME]")
@with_plugins
def new_plugin(registry: Registry, name: str, kind: str, output: str | None) -> None:
    """Create a plugin package for NAME.

    It holds a small working module, its tests and its entry point.

    \b
    distillbench new-plugin my_method
    uv pip install -e distillbench-my-method
    distillbench check my_method
    """
    from pathlib import Path

    from distillbench.cli.new_plugin import new_plugin as write_package

    folder = write_package(name, kind, Path(output) if output else None, registry.of_kind(f"{kind}s"))
    click.echo(f"written: {folder}. Its README.md explains how to install, check and run it. Next:")
    click.echo(f"  uv pip install -e {shlex.quote(str(folder))}\n  distillbench check {name}")


@click.command()
@as_json
@plugin_options
def plugins(as_json: bool, folders: tuple[str, ...], debug: bool) -> None:
    """Show all plugins and what they register.

    For each its distribution and version, its hooks and what they register, its file, or why it is left out.

    DISTILLBENCH_PLUGINS selects the plugins or distributions to load, as patterns separated by commas.

    \b
    DISTILLBENCH_PLUGINS='distillbench,my_*' distillbench plugins --plugins-dir my_plugins
    """
    kept = None if debug else kept_table(folders)
    table = kept or new_table(folders, debug)
    if as_json:
        print_json([asdict(plugin) for plugin in table.plugins])
    else:
        print_definitions((plugin.name, _describe_plugin(plugin)) for plugin in table.plugins)
    for name, traceback in table.tracebacks.items():
        click.echo(f"\n{name}:\n{traceback}", err=True)


def _describe_plugin(plugin: Found) -> str:
    if plugin.not_selected:
        return f"{plugin.version}; not loaded: {plugin.not_selected}"
    if plugin.error:
        return f"{plugin.version}; left out: {plugin.error}{plugin.origin and f' ({plugin.origin})'}"
    hooks = (f"{hook}: {', '.join(found) or 'nothing'}" for hook, found in plugin.hooks.items())
    return f"{plugin.version}; {'; '.join(hooks)}; {plugin.origin}"
