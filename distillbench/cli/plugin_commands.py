"""The commands about plugins and what they bring: ``list``, ``describe``, ``check``, ``new-plugin``, ``plugins``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from distillbench.cli.command_options import (
    SOMETHING_FAILED,
    UserPath,
    load_plugins,
    origin,
    plugin_options,
    version,
    with_plugins,
)
from distillbench.cli.terminal import print_definitions, width
from distillbench.errors import UserError

if TYPE_CHECKING:
    from distillbench.registry import Entry, Plugin, Registry

KINDS = ("methods", "teachers", "datasets", "metrics")


@click.command("list")
@click.argument("kind", type=click.Choice(KINDS))
@with_plugins
def list_(registry: Registry, kind: str) -> None:
    """List the available methods, teachers, datasets or metrics.

    Methods are grouped by what they learn, each with its need of real images and its numbers of evaluations.
    """
    entries = sorted(registry.of_kind(kind).items())
    if kind == "methods":
        _list_methods(entries)
        return
    print_definitions((name, f"{_summary(entry.cls)} [{version(entry.plugin)}]") for name, entry in entries)


def _list_methods(entries: Iterable[tuple[str, Entry]]) -> None:
    from distillbench.testing import method_kinds

    groups: dict[str, list[tuple[str, str]]] = {learned: [] for learned in method_kinds.KINDS}
    for name, entry in entries:
        facts = method_kinds.facts_of(entry.cls)
        told = f"{'real images' if facts.reads_data else 'no real images'}; NFE {facts.nfe or 'unknown'}"
        groups[facts.kind].append((name, f"{_summary(entry.cls)} ({told}) [{version(entry.plugin)}]"))
    for learned, rows in groups.items():
        if rows:
            click.echo(f"{learned}: {method_kinds.KINDS[learned]}")
            print_definitions(rows)


@click.command()
@click.argument("name")
@with_plugins
def describe(registry: Registry, name: str) -> None:
    """Show what NAME is, its plugin, and its settings."""
    found = [kind for kind in KINDS if name in registry.of_kind(kind)]
    if not found:
        raise registry.no("method, teacher, dataset or metric", name, [n for k in KINDS for n in registry.of_kind(k)])
    for kind in found:
        _describe(registry, kind, name)


def _describe(registry: Registry, kind: str, name: str) -> None:
    from distillbench import registry as rules
    from distillbench.runs.config import describe_options

    entry = registry.get(kind, name)
    click.echo(f"{name}: {kind.removesuffix('s')} from plugin {origin(entry.plugin)}")
    click.echo(click.wrap_text(_documentation(entry.cls), width(), preserve_paragraphs=True))
    if kind == "metrics":
        print_definitions((fact, text or "none") for fact, text in entry.cls.describe().items())
        return
    facts = [(fact.replace("_", " "), getattr(entry.cls, fact)) for fact in rules.KINDS[kind].declares]
    facts = [(fact, value) for fact, value in facts if value != ""]
    print_definitions((fact, {True: "yes", False: "no"}.get(value, value)) for fact, value in facts)
    if rules.KINDS[kind].config is None:
        return
    prefix = f"methods.{name}" if kind == "methods" else kind.removesuffix("s")
    options = describe_options(entry.cls.Config)
    click.echo("\nsettings and their defaults:" if options else "\nno settings")
    print_definitions((f"{prefix}.{option}={default}", text) for option, default, text in options)


@click.command()
@click.argument("name")
@click.argument("settings", nargs=-1)
@click.option("--quick", is_flag=True, help="Skip the training on an exact teacher: seconds instead of a minute.")
@click.option("--thorough", is_flag=True, help="Train five times as long on the exact teacher.")
@click.option(
    "--network",
    type=click.Choice(["mlp", "unet", "dit", "edm"]),
    default="mlp",
    show_default=True,
    help="Check a method on a small network of this kind; all but mlp have attention.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
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
@click.option(
    "--kind", type=click.Choice(["method", "teacher", "dataset", "metric"]), default="method", show_default=True
)
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
    click.echo(f"written: {folder}. Its README.md explains how to install, check and run it")


@click.command()
@plugin_options
def plugins(folders: tuple[str, ...], debug: bool) -> None:
    """Show all plugins and what they register.

    For each its distribution and version, its hooks and what they register, its file, or why it is left out.

    DISTILLBENCH_PLUGINS selects the plugins or distributions to load, as patterns separated by commas.

    \b
    DISTILLBENCH_PLUGINS='distillbench,my_*' distillbench plugins --plugins-dir my_plugins
    """
    registry = load_plugins(folders)
    print_definitions((plugin.name, _describe_plugin(plugin)) for plugin in registry.plugins)
    for plugin in registry.broken if debug else []:
        click.echo(f"\n{plugin.name}:\n{plugin.traceback}", err=True)


def _describe_plugin(plugin: Plugin) -> str:
    if plugin.not_selected:
        return f"{version(plugin)}; not loaded: {plugin.not_selected}"
    if plugin.error:
        return f"{version(plugin)}; left out: {plugin.error}{plugin.origin and f' ({plugin.origin})'}"
    brings = [brought.partition(": ") for brought in plugin.brings]
    names = {hook: [name for kind, _, name in brings if hook == f"register_{kind}"] for hook in plugin.hooks}
    hooks = (f"{hook}: {', '.join(found) or 'nothing'}" for hook, found in names.items())
    return f"{version(plugin)}; {'; '.join(hooks)}; {plugin.origin}"


def _summary(cls: type) -> str:
    return _documentation(cls).split("\n")[0].removesuffix(".")


def _documentation(cls: type) -> str:
    """The first paragraph of the class's own docstring, of its base's in `scores`, or of its module's."""
    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("distillbench.evaluation.feature_metrics")]
    texts = (vars(base)["__doc__"] for base in (cls, *bases))
    text = next((text for text in texts if text), sys.modules[cls.__module__].__doc__ or "")
    return inspect.cleandoc(text).split("\n\n")[0]
