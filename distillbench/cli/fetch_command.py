"""``distillbench fetch``: download datasets, teachers and weights by name, or everything that an experiment needs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from distillbench.cli.terminal import new_console
from distillbench.errors import Unavailable, UserError, unknown
from distillbench.evaluation.features import FeatureNetwork
from distillbench.evaluation.pretrained_weights import weights_folder
from distillbench.registry import Registry
from distillbench.runs.config import compose_runs
from distillbench.runs.distances import Lpips
from distillbench.runs.run_downloads import (
    Downloads,
    Network,
    describe_network,
    describe_source,
    fetch_network,
    lacking,
    needs_of,
)
from distillbench.storage.downloads import adopt, downloads_folder, is_intact, located, offered
from distillbench.storage.sources import Source, in_megabytes, known, size_in_words
from distillbench.system.progress import Progress

INDENT = " " * 26


def networks_of(registry: Registry) -> dict[str, type[FeatureNetwork]]:
    """The feature networks of all metrics, by name."""
    found = [entry.cls.network for entry in registry.metrics.values() if entry.cls.network is not None]
    return {cls.name: cls for cls in found}


def weighted_networks(registry: Registry) -> dict[str, Network]:
    """Everything that has files of weights, by name: feature networks, and the distance LPIPS."""
    return {**networks_of(registry), Lpips.name: Lpips}


def list_everything(registry: Registry) -> None:
    """Print all that can be fetched: what is there, sizes, licences, origins."""
    click.echo(f"datasets and teachers, in {downloads_folder()}:")
    for source in known().values():
        state = "present" if located(source) is not None else "missing"
        _print_entry(source.name, state, size_in_words(source), f"{source.part}={source.plugin}, {source.title}")
        click.echo(f"{INDENT}{source.licence}; {source.origin}, by {source.publisher}")
    click.echo(f"weights of feature networks and of the distance LPIPS, in {weights_folder()}:")
    for name, cls in sorted(weighted_networks(registry).items()):
        _print_entry(name, _state(cls), f"{cls.weights.mib} MiB", cls.weights.file)
        click.echo(f"{INDENT}{cls.weights.licence}; {cls.weights.url or 'comes with an installed package'}")


def _print_entry(name: str, state: str, size: str, what: str) -> None:
    click.echo(f"  {name:<22}  {state}, {size}: {what}")


def _state(cls: Network) -> str:
    try:
        cls.locate(weights_folder())
    except Unavailable as reason:
        return str(reason) if (weights_folder() / cls.weights.file).exists() else "missing"
    return "present"


def fetch_named(registry: Registry, words: Sequence[str], given: Path | None, yes: bool) -> None:
    """Fetch what `words` name, from `given` or by download. Networks that are named are not asked about."""
    sources, networks = _wanted(registry, words)
    progress = Progress(new_console())
    if given is not None:
        if len(sources) + len(networks) != 1:
            raise UserError("--from takes one name: a dataset, a teacher or a network")
        for source in sources:
            click.echo(f"written: {adopt(source, given, progress)} ({source.licence})")
    else:
        for cls in networks:
            _check_fetchable(cls)
        only_networks = not sources and not any("=" in word for word in words)
        _download(sources, networks, progress, yes or only_networks)
    for cls in networks:
        for path, licence in fetch_network(cls, given, progress):
            click.echo(f"written: {path} ({licence})")


def _wanted(registry: Registry, words: Sequence[str]) -> tuple[list[Source], list[Network]]:
    """The sources and networks that the names and settings ask for."""
    sources, networks = known(), weighted_networks(registry)
    chosen: dict[str, Source] = {}
    nets: dict[str, Network] = {}  # by their file, which two may share
    for name in (word for word in words if "=" not in word):
        if name in sources:
            chosen[name] = sources[name]
        elif name in networks:
            nets[networks[name].weights.file] = networks[name]
        else:
            raise unknown("dataset, teacher or network", name, [*sources, *networks])
    if settings := [word for word in words if "=" in word]:
        for config in compose_runs(settings, registry, need_methods=False):
            needs = needs_of(config, registry)
            for line in needs.by_hand:
                click.echo(line)
            chosen |= {source.name: source for source in needs.sources}
            nets |= {cls.weights.file: cls for cls in needs.networks if cls.weights.url and lacking(cls)}
    return list(chosen.values()), list(nets.values())


def _check_fetchable(cls: Network) -> None:
    if not cls.weights.url:
        raise UserError(f"the weights of {cls.name} come with an installed package: there is nothing to fetch")


def _download(sources: Sequence[Source], networks: Sequence[Network], progress: Progress, agreed: bool) -> None:
    """Say what would be downloaded, ask, and download the sources. The networks are only named and counted here."""
    missing = []
    for source in sources:
        if is_intact(source):
            progress.say(f"already there, and checked: {source.name}, {located(source)}")
        else:
            missing.append(source)
    if not agreed and (missing or networks) and not sys.stdin.isatty():  # at once: no server is asked about sizes
        for line in _lines(missing, networks):
            progress.say(line)
        raise UserError("there is no terminal to ask at whether to download this: add --yes")
    downloads = Downloads(tuple(offered(source) for source in missing), tuple(networks))
    for line in downloads.lines():
        progress.say(line)
    sizes = downloads.sizes
    if not sizes:
        if not sources:
            progress.say("nothing to download")
        return
    unknown_sizes = f", and {sizes.count(None)} of unknown size" if None in sizes else ""
    total = f"{in_megabytes(sum(size or 0 for size in sizes))}{unknown_sizes}"
    if not agreed and not click.confirm(f"Download {total} to {downloads_folder()}?"):
        raise UserError("nothing was downloaded")
    Downloads(downloads.offers).fetch(progress)


def _lines(sources: Sequence[Source], networks: Sequence[Network]) -> list[str]:
    """What a download would be, as far as it is known without its server."""
    found = [line for source in sources for line in describe_source(source)]
    return found + [line for cls in networks for line in describe_network(cls)]
