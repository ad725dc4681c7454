"""Finding plugins: each entry point of the group ``distillbench`` is loaded by itself, and one that is broken is left out.

A plugin is broken if its import fails, if it implements a hook that does not exist, or if what it registers is
incomplete or has a name that another plugin has. It is reported by name, and everything else works.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import inspect
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from distillbench import hookspecs
from distillbench.datasets import Dataset, DatasetConfig
from distillbench.errors import nearest, unknown
from distillbench.method import Method, MethodConfig
from distillbench.metrics import Metric
from distillbench.teachers import TeacherConfig, TeacherSource

GROUP = "distillbench"
NAME = re.compile(r"[a-z][a-z0-9_]*")

KINDS: dict[str, tuple[type, type | None, tuple[str, ...]]] = {  # base, base of its Config, what it must declare
    "methods": (Method, MethodConfig, ("name", "paper", "needs_data")),
    "teachers": (TeacherSource, TeacherConfig, ("name",)),
    "datasets": (Dataset, DatasetConfig, ("name", "licence")),
    "metrics": (Metric, None, ("name", "unit", "direction", "protocol")),
}


@dataclass(frozen=True)
class Source:
    """Where a plugin may come from: an entry point, reduced to what is needed."""

    name: str
    distribution: str
    version: str
    load: Callable[[], ModuleType]


@dataclass
class Plugin:
    """A plugin that was found: what it brought, or why it was left out."""

    name: str
    distribution: str
    version: str
    brings: list[str] = field(default_factory=list)  # "methods: boot"
    error: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class Entry:
    """A registered class and the plugin that it came from."""

    cls: type
    plugin: Plugin

    def identity(self) -> dict[str, str]:
        """Name, version and hash of the source: what makes results of another version of the plugin other results."""
        source = Path(inspect.getfile(self.cls)).read_bytes()
        return {
            "name": self.cls.name,
            "distribution": self.plugin.distribution,
            "version": self.plugin.version,
            "source_sha256": hashlib.sha256(source).hexdigest(),
        }


@dataclass
class Registry:
    """Everything that can be named on the command line, by kind and name."""

    methods: dict[str, Entry] = field(default_factory=dict)
    teachers: dict[str, Entry] = field(default_factory=dict)
    datasets: dict[str, Entry] = field(default_factory=dict)
    metrics: dict[str, Entry] = field(default_factory=dict)
    plugins: list[Plugin] = field(default_factory=list)

    def of_kind(self, kind: str) -> dict[str, Entry]:
        """The entries of "methods", "teachers", "datasets" or "metrics"."""
        return getattr(self, kind)

    def get(self, kind: str, name: str) -> Entry:
        """The entry called `name`; raises UserError with the nearest match."""
        entries = self.of_kind(kind)
        if name not in entries:
            raise unknown(kind.removesuffix("s"), name, entries)
        return entries[name]

    @property
    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.error]


def installed() -> list[Source]:
    """The entry points of this environment: distillbench's own first, then by distribution and name."""
    found = []
    for point in importlib.metadata.entry_points(group=GROUP):
        distribution = point.dist.metadata["Name"] if point.dist else "?"
        version = point.dist.version if point.dist else "?"
        found.append(Source(point.name, distribution, version, point.load))
    return sorted(set(found), key=lambda s: (s.distribution != "distillbench", s.distribution, s.name))


def load_registry(sources: Iterable[Source] | None = None) -> Registry:
    """Load every plugin (of `sources`, or of this environment)."""
    registry = Registry()
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    for source in installed() if sources is None else sources:
        plugin = Plugin(source.name, source.distribution, source.version)
        registry.plugins.append(plugin)
        try:
            _add(registry, manager, plugin, source.load())
        except Exception as error:  # a stranger's code may fail in any way
            plugin.error = f"{type(error).__name__}: {error}" if not isinstance(error, PluginError) else str(error)
            plugin.traceback = traceback.format_exc()
    return registry


class PluginError(Exception):
    """What a plugin registers cannot be used."""


def _add(registry: Registry, manager: pluggy.PluginManager, plugin: Plugin, module: ModuleType) -> None:
    known = [name for name, _ in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("register_")]
    for name, _function in _hooks_of(manager, module):
        if name not in known:
            raise PluginError(f"there is no hook '{name}'.{nearest(name, known)} Possible: {', '.join(sorted(known))}")
    manager.register(module, name=f"{plugin.distribution}:{plugin.name}")
    try:
        brought: list[tuple[str, type]] = []
        for kind in KINDS:
            others = [other for other in manager.get_plugins() if other is not module]
            caller = manager.subset_hook_caller(f"register_{kind}", others)
            caller(register=lambda cls, kind=kind: brought.append((kind, cls)))
        for kind, cls in brought:
            _check(registry, kind, cls)
    except Exception:
        manager.unregister(module)
        raise
    for kind, cls in brought:
        registry.of_kind(kind)[cls.name] = Entry(cls, plugin)
        plugin.brings.append(f"{kind}: {cls.name}")


def _hooks_of(manager: pluggy.PluginManager, module: ModuleType) -> list[tuple[str, Any]]:
    return [(name, f) for name, f in inspect.getmembers(module) if manager.parse_hookimpl_opts(module, name)]


def _check(registry: Registry, kind: str, cls: Any) -> None:
    base, config_base, declared = KINDS[kind]
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"register_{kind} takes subclasses of {base.__name__}, got {cls!r}")
    missing = [name for name in declared if not hasattr(cls, name)]
    if missing:
        raise PluginError(f"{cls.__name__} does not declare {', '.join(missing)}")
    if not NAME.fullmatch(cls.name):
        raise PluginError(f"{cls.__name__}.name must be lower-case letters, digits and underscores, got {cls.name!r}")
    if inspect.isabstract(cls):
        raise PluginError(f"{cls.__name__} does not define {', '.join(sorted(cls.__abstractmethods__))}")
    if config_base is not None:
        config = getattr(cls, "Config", None)
        if not (isinstance(config, type) and issubclass(config, config_base) and dataclasses.is_dataclass(config)):
            raise PluginError(f"{cls.__name__}.Config must be a dataclass derived from {config_base.__name__}")
    if kind == "metrics" and cls.direction not in ("lower", "higher"):
        raise PluginError(f"{cls.__name__}.direction must be 'lower' or 'higher', got {cls.direction!r}")
    taken = registry.of_kind(kind).get(cls.name)
    if taken is not None:
        owner = f"{taken.plugin.name} ({taken.plugin.distribution})"
        raise PluginError(f"the name '{cls.name}' of {kind} is taken by plugin {owner}")
