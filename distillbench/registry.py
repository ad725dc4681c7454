"""Finds and loads plugins: entry points of the group ``distillbench``, and the files of plugins folders.

A plugin is broken if its import fails, if it was written for another version of the contract, if it implements a hook
that does not exist, or if a class that it registers is incomplete or has the name of another one. Broken plugins are
reported and not used; all others work. ``DISTILLBENCH_PLUGINS`` limits which plugins are loaded, by patterns.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distillbench import hookspecs
from distillbench._version import __version__
from distillbench.datasets.dataset import Dataset, DatasetConfig
from distillbench.errors import UserError, nearest, quoted, unknown
from distillbench.evaluation.features import FeatureNetwork
from distillbench.evaluation.metric import DIRECTIONS, Metric, Need
from distillbench.records.table import FIRST, LAST
from distillbench.teachers.teacher import TeacherConfig, TeacherSource
from distillbench.training.method import Method, MethodConfig

GROUP = "distillbench"
FILE = "file"  # the distribution of a plugin that is one file
LARGEST_FILE = 2**24  # bytes of a plugin
ONLY = "DISTILLBENCH_PLUGINS"  # patterns of the plugins to load, separated by commas
NAME = re.compile(r"[a-z][a-z0-9_]*")

RESERVED = ("null", "true", "false", "inf", "nan")  # words that the command line reads as values


@dataclass(frozen=True)
class Kind:
    """The requirements for a class to be registered."""

    base: type
    config: type | None  # base of its Config
    declares: dict[str, type]  # class attributes beside `name`


NAMED = {"label": str, "title": str}

KINDS = {
    "methods": Kind(Method, MethodConfig, {**NAMED, "paper": str, "needs_data": bool}),
    "teachers": Kind(TeacherSource, TeacherConfig, {}),
    "datasets": Kind(Dataset, DatasetConfig, {"licence": str}),
    "metrics": Kind(Metric, None, {**NAMED, "unit": str, "direction": str, "protocol": str}),
}


@dataclass(frozen=True)
class Source:
    """An entry point or a file that may hold a plugin."""

    name: str
    distribution: str
    version: str
    load: Callable[[], ModuleType]
    helpers: tuple[Path, ...] = ()  # files next to its module that belong to it


@dataclass
class Plugin:
    """A plugin that was found: what it registered, or why it is not used."""

    name: str
    distribution: str
    version: str
    hooks: list[str] = field(default_factory=list)  # "register_methods"
    brings: list[str] = field(default_factory=list)  # "methods: boot"
    origin: str = ""  # the file of its module
    helpers: tuple[Path, ...] = ()
    not_selected: str = ""  # why it was not loaded, although it is not broken
    error: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class Entry:
    """A registered class and the plugin that it came from."""

    cls: Any  # a subclass of its kind's base
    plugin: Plugin

    def identity(self) -> dict[str, str]:
        """Name, version and hash of the source. They are part of the cache keys."""
        return {
            "name": self.cls.name,
            "distribution": self.plugin.distribution,
            "version": self.plugin.version,
            "source_sha256": self.source_sha256,
        }

    @functools.cached_property
    def source_sha256(self) -> str:
        """SHA-256 of the plugin's source files when it was loaded."""
        return _source_sha256(self.cls, self.plugin.helpers)


def _source_sha256(cls: type, helpers: Sequence[Path]) -> str:
    """SHA-256 of the source of `cls`.

    Hashed are the file of the class and of each base class outside the core; for a package all its modules; for a file
    in a plugins folder also its `helpers`.
    """
    package = cls.__module__.split(".")[0]
    foreign = {GROUP, "torch", *sys.stdlib_module_names}
    bases = [base for base in cls.__mro__[1:] if base.__module__.split(".")[0] not in foreign]
    files = dict.fromkeys(Path(inspect.getfile(each)) for each in (cls, *bases))
    home = Path(sys.modules[package].__file__ or "")
    if package != GROUP and home.name == "__init__.py":
        files |= dict.fromkeys(sorted(home.parent.rglob("*.py")))
    contents = [file.read_bytes() for file in (*files, *helpers)]
    if len(contents) > 1:
        contents = [hashlib.sha256(content).digest() for content in contents]
    return hashlib.sha256(b"".join(contents)).hexdigest()


@dataclass(frozen=True)
class Selection:
    """Which plugins to load, as plain values, so that other processes load the same ones."""

    folders: tuple[Path, ...] = ()
    only: tuple[str, ...] = ()

    def load(self) -> Registry:
        """The plugins of this environment and of the folders, as far as the patterns match them."""
        registry = load_registry([*installed(), *in_folders(self.folders)], self.only)
        registry.selection = self
        return registry


@dataclass
class Registry:
    """All registered classes, by kind and name."""

    methods: dict[str, Entry] = field(default_factory=dict)
    teachers: dict[str, Entry] = field(default_factory=dict)
    datasets: dict[str, Entry] = field(default_factory=dict)
    metrics: dict[str, Entry] = field(default_factory=dict)
    plugins: list[Plugin] = field(default_factory=list)
    selection: Selection = Selection()

    def of_kind(self, kind: str) -> dict[str, Entry]:
        """The entries of "methods", "teachers", "datasets" or "metrics"."""
        return getattr(self, kind)

    def get(self, kind: str, name: str) -> Entry:
        """The entry called `name`; raises UserError with the nearest match."""
        entries = self.of_kind(kind)
        if name not in entries:
            raise self.no(kind.removesuffix("s"), name, entries)
        return entries[name]

    def no(self, kind: str, name: str, possible: Iterable[str], where: str = "") -> UserError:
        """The error for an unknown name, with the error of its plugin if that is broken, or else the nearest match."""
        for plugin in self.plugins:
            if name in (plugin.name, plugin.name.removeprefix("distillbench_")) and (
                plugin.error or plugin.not_selected
            ):
                why = plugin.error or plugin.not_selected
                return UserError(f"no {kind} {quoted(name)}{where}: plugin {plugin.name} is left out: {why}")
        return unknown(kind, name, possible, where)

    @property
    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.error]


def installed() -> list[Source]:
    """The entry points of this environment: distillbench's own first, then sorted by distribution and name."""
    found = []
    for point in importlib.metadata.entry_points(group=GROUP):
        distribution = point.dist.metadata["Name"] if point.dist else "?"
        version = point.dist.version if point.dist else "?"
        found.append(Source(point.name, distribution, version, point.load))
    return sorted(set(found), key=lambda s: (s.distribution != "distillbench", s.distribution, s.name))


def in_folders(folders: Iterable[Path]) -> list[Source]:
    """One plugin for each file in `folders`; files whose names start with an underscore are their helpers."""
    found = []
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        if not folder.is_dir():
            raise UserError(f"the plugins folder {quoted(str(folder))} is not a folder")
        files = sorted(file for file in folder.glob("*.py") if file.is_file())
        for file in files:
            if file.stat().st_size > LARGEST_FILE:
                raise UserError(f"{quoted(str(file))} is too large for a plugin: at most {LARGEST_FILE >> 20} MiB")
        helpers = tuple(file for file in files if file.name.startswith("_"))
        if len(files) == len(helpers):
            raise UserError(f"the plugins folder {quoted(str(folder))} holds no plugin, a file NAME.py")
        for file in files:
            if file not in helpers:
                version = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
                found.append(Source(file.stem, FILE, version, functools.partial(_load_file, file), helpers))
    return found


def _load_file(file: Path) -> ModuleType:
    """Import the file by its module name, so that subprocesses can import it, too."""
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
        importlib.invalidate_caches()
    module = importlib.import_module(file.stem)
    if not module.__file__ or Path(module.__file__).resolve() != file:
        other = module.__file__ or module.__name__
        raise PluginError(f"{file.name} has the name of another module, {other}: rename it")
    return module


def load_registry(sources: Iterable[Source] | None = None, only: Sequence[str] = ()) -> Registry:
    """Load the plugins of `sources` (default: of this environment) that match one of the patterns `only`.

    A pattern, such as ``my_*``, is matched with the names of a plugin and of its distribution. No pattern: all plugins.
    """
    registry = Registry()
    found = installed() if sources is None else list(sources)
    _check_patterns(only, found)
    for source in found:
        plugin = Plugin(source.name, source.distribution, source.version, helpers=source.helpers)
        registry.plugins.append(plugin)
        if only and not any(_named_by(pattern, source) for pattern in only):
            plugin.not_selected = f"{ONLY}={','.join(only)}"
            continue
        try:
            for kind, entry in _brought(plugin, source.load(), registry):
                registry.of_kind(kind)[entry.cls.name] = entry
                plugin.brings.append(f"{kind}: {entry.cls.name}")
        except (Exception, SystemExit) as error:  # a third-party module may raise anything
            name = "" if isinstance(error, PluginError) else f"{type(error).__name__}: "
            plugin.error = " ".join(f"{name}{error}".split())
            plugin.traceback = traceback.format_exc()
    return registry


def _named_by(pattern: str, source: Source) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (source.name, source.distribution))


def _check_patterns(only: Sequence[str], sources: Sequence[Source]) -> None:
    for pattern in only:
        if not any(_named_by(pattern, source) for source in sources):
            names = {name for source in sources for name in (source.name, source.distribution)}
            raise unknown("plugin or distribution", pattern, names, f" ({ONLY})")


class PluginError(Exception):
    """A plugin cannot be used."""


def _brought(plugin: Plugin, module: ModuleType, registry: Registry) -> list[tuple[str, Entry]]:
    """(kind, entry) of each class that the hooks of `module` register, checked. Does not change the registry."""
    manager = pluggy.PluginManager(GROUP)  # a new one, so that a broken plugin leaves nothing behind
    manager.add_hookspecs(hookspecs)
    plugin.origin = module.__file__ or ""
    plugin.hooks = _hooks(manager, module)
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


def _hooks(manager: pluggy.PluginManager, module: ModuleType) -> list[str]:
    """The names of the module's hooks. Raises PluginError for unknown hooks and other versions of the contract."""
    known = [f"register_{kind}" for kind in KINDS]
    hooks = {name: f for name, f in inspect.getmembers(module) if manager.parse_hookimpl_opts(module, name) is not None}
    for name, hook in hooks.items():
        _check_version(name, hookspecs.version_of(hook))
        if name not in known:
            raise PluginError(f"there is no hook '{name}'.{nearest(name, known)} Possible: {', '.join(known)}")
    if not hooks:
        mark = f"@hookimpl(api={hookspecs.API})"
        raise PluginError(f"no function is marked with {mark}. Possible: {', '.join(known)}")
    return list(hooks)


def _check_version(hook: str, version: int) -> None:
    here = hookspecs.API
    if version > here:
        raise PluginError(
            f"{hook} was written for version {version} of the plugin contract, distillbench {__version__} has version "
            f"{here}: install a newer distillbench"
        )
    if version < here:
        written = f"for version {version}" if version else "without a version"
        changes = "; ".join(hookspecs.CHANGES[later] for later in range(version + 1, here + 1))
        written += f" of the plugin contract, this is version {here}"
        raise PluginError(f"{hook} was written {written}. To do: {changes}")


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
