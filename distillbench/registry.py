"""Finding plugins: each entry point of the group ``distillbench`` is loaded by itself.

A plugin is broken if its import fails, if it implements a hook that does not exist, or if what it registers is
incomplete or has a name that another plugin has. It is left out and reported by name, and everything else works.
"""

from __future__ import annotations

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
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distillbench import hookspecs
from distillbench.datasets import Dataset, DatasetConfig
from distillbench.errors import nearest, unknown
from distillbench.features import FeatureNetwork
from distillbench.method import Method, MethodConfig
from distillbench.metrics import DIRECTIONS, Metric, Need
from distillbench.results import FIRST, LAST
from distillbench.teachers import TeacherConfig, TeacherSource

GROUP = "distillbench"
NAME = re.compile(r"[a-z][a-z0-9_]*")

RESERVED = ("null", "true", "false", "inf", "nan")  # words that the command line reads as values


@dataclass(frozen=True)
class Kind:
    """What a class must be to be registered."""

    base: type
    config: type | None  # base of its Config
    declares: dict[str, type]  # class attributes beside `name`


KINDS = {
    "methods": Kind(Method, MethodConfig, {"paper": str, "needs_data": bool}),
    "teachers": Kind(TeacherSource, TeacherConfig, {}),
    "datasets": Kind(Dataset, DatasetConfig, {"licence": str}),
    "metrics": Kind(Metric, None, {"unit": str, "direction": str, "protocol": str}),
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

    cls: Any  # a subclass of its kind's base
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
    for source in installed() if sources is None else sources:
        plugin = Plugin(source.name, source.distribution, source.version)
        registry.plugins.append(plugin)
        try:
            for kind, entry in _brought(plugin, source.load(), registry):
                registry.of_kind(kind)[entry.cls.name] = entry
                plugin.brings.append(f"{kind}: {entry.cls.name}")
        except (Exception, SystemExit) as error:  # a stranger's code may fail in any way
            name = "" if isinstance(error, PluginError) else f"{type(error).__name__}: "
            plugin.error = " ".join(f"{name}{error}".split())
            plugin.traceback = traceback.format_exc()
    return registry


class PluginError(Exception):
    """What a plugin registers cannot be used."""


def _brought(plugin: Plugin, module: ModuleType, registry: Registry) -> list[tuple[str, Entry]]:
    """(kind, entry) of all that the hooks of `module` register, checked; the registry is not changed."""
    manager = pluggy.PluginManager(GROUP)  # of its own, so that a broken plugin leaves nothing behind
    manager.add_hookspecs(hookspecs)
    _check_hooks(manager, module)
    manager.register(module, name=plugin.name)
    brought: list[tuple[str, Any]] = []
    for kind in KINDS:
        getattr(manager.hook, f"register_{kind}")(register=lambda cls, kind=kind: brought.append((kind, cls)))
    owners = {(kind, name): entry.plugin for kind in KINDS for name, entry in registry.of_kind(kind).items()}
    for kind, cls in brought:
        check_class(kind, cls)
        if (kind, cls.name) in owners:
            owner = owners[kind, cls.name]
            raise PluginError(f"the name '{cls.name}' of {kind} is taken by plugin {owner.name} ({owner.distribution})")
        owners[kind, cls.name] = plugin
    entries = [(kind, Entry(cls, plugin)) for kind, cls in brought]
    for _, entry in entries:
        entry.identity()  # raises if there is no source file
    return entries


def _check_hooks(manager: pluggy.PluginManager, module: ModuleType) -> None:
    known = [f"register_{kind}" for kind in KINDS]
    hooks = [name for name, _ in inspect.getmembers(module) if manager.parse_hookimpl_opts(module, name) is not None]
    for name in hooks:
        if name not in known:
            raise PluginError(f"there is no hook '{name}'.{nearest(name, known)} Possible: {', '.join(known)}")
    if not hooks:
        raise PluginError(f"no function is marked with @hookimpl. Possible: {', '.join(known)}")


def check_class(kind: str, cls: Any) -> None:
    """Raise PluginError unless `cls` is complete."""
    base = KINDS[kind].base
    is_subclass = isinstance(cls, type) and issubclass(cls, base)
    if not is_subclass:
        raise PluginError(f"register_{kind} takes subclasses of {base.__name__}, got {cls!r}")
    for name, type_ in {"name": str, **KINDS[kind].declares}.items():
        if not isinstance(getattr(cls, name, None), type_):
            raise PluginError(f"{cls.__name__} does not declare {name} ({type_.__name__})")
    if not NAME.fullmatch(cls.name) or cls.name in RESERVED:
        raise PluginError(f"{cls.__name__}.name must be lower-case letters, digits and underscores, got {cls.name!r}")
    if inspect.isabstract(cls):
        raise PluginError(f"{cls.__name__} does not define {', '.join(sorted(cls.__abstractmethods__))}")
    config = KINDS[kind].config
    if config is not None:
        _check_config(cls, config)
    if kind == "metrics":
        _check_metric(cls)


def _check_config(cls: Any, base: type) -> None:
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, base) and "__dataclass_fields__" in vars(config)):
        raise PluginError(f"{cls.__name__}.Config must be a @dataclass derived from {base.__name__}")
    try:
        OmegaConf.structured(config)
    except (OmegaConfBaseException, TypeError) as error:
        why = str(error).splitlines()[0]
        raise PluginError(f"{cls.__name__}.Config has a setting that cannot be read from text: {why}") from error


def _check_metric(cls: Any) -> None:
    if cls.direction not in DIRECTIONS:
        raise PluginError(f"{cls.__name__}.direction must be one of {', '.join(DIRECTIONS)}, got {cls.direction!r}")
    if cls.name in (*FIRST, *LAST, "fraction"):
        raise PluginError(f"the name '{cls.name}' of metrics is taken by a column of every table")
    if cls.network is not None and not (isinstance(cls.network, type) and issubclass(cls.network, FeatureNetwork)):
        raise PluginError(f"{cls.__name__}.network must be a subclass of FeatureNetwork or None, got {cls.network!r}")
    unknown_needs = sorted(str(need) for need in cls.needs if need not in list(Need))
    if unknown_needs:
        raise PluginError(f"{cls.__name__}.needs: no need {unknown_needs[0]!r}. Possible: {', '.join(Need)}")
