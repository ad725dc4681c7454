"""What plugins bring, as plain values, kept in the user's cache: ``list``, ``describe`` and completion need no torch.

Importing plugins imports torch, which takes seconds. So what they declare is written down once, with the state of the
files that it depends on, and is read for as long as none of these has changed. A table is not kept while a plugin is
broken, so that a repair is seen at once.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench._version import __version__
from distillbench.cli.loading import load_plugins, origin, version
from distillbench.cli.plugin_state import PATH, depends_on, state_of
from distillbench.errors import UserError, unknown

if TYPE_CHECKING:
    from distillbench.registry import Entry, Plugin, Registry

KINDS = ("methods", "teachers", "datasets", "metrics")
FORMAT = 3  # of the file
GRANULARITY_SECONDS = 2.0  # of times of files; the coarsest file system that is in use
KEPT_SECONDS = 30 * 86400.0  # after which a table is deleted when another one is written


@dataclass(frozen=True)
class Setting:
    """A setting of a run or of what a plugin brings. `kind`: int, float, bool, or "" for any other type."""

    name: str
    default: str
    help: str
    kind: str
    wanted: str  # its type in words


@dataclass(frozen=True)
class Described:
    """A method, teacher, dataset or metric."""

    name: str
    plugin: str  # its plugin's name, distribution and version
    version: str  # its plugin's distribution and version
    summary: str
    documentation: str
    facts: dict[str, str]
    settings: list[Setting] = field(default_factory=list)
    learned: str = ""  # of a method: a key of method_kinds.KINDS
    replaced: dict[str, str] = field(default_factory=dict)  # of a method: settings of earlier versions
    searched: dict[str, str] = field(default_factory=dict)  # of a method: its search space, by setting
    searched_after: dict[str, str] = field(default_factory=dict)  # settings of sampling
    declares_search: bool = True


@dataclass(frozen=True)
class Found:
    """A plugin. `left_out`: why it is not used; `origin`: the file of its module."""

    name: str
    version: str
    hooks: dict[str, list[str]]
    origin: str
    not_selected: str = ""
    error: str = ""


@dataclass(frozen=True)
class PluginTable:
    """What all plugins bring."""

    kinds: dict[str, dict[str, Described]]
    plugins: list[Found]
    settings: list[Setting]  # of a run
    executors: dict[str, list[Setting]]
    samplers: dict[str, str]  # their summaries
    schedules: dict[str, str]
    learned: dict[str, str]  # what each group of methods learns
    warnings: list[str] = field(default_factory=list)  # of broken plugins
    tracebacks: dict[str, str] = field(default_factory=dict)

    def of_kind(self, kind: str) -> Collection[str]:
        """The names of a kind."""
        return self.kinds[kind]

    def no(self, kind: str, name: str, possible: Iterable[str], where: str = "") -> UserError:
        """The error for an unknown name, as of a registry."""
        for plugin in self.plugins:
            why = plugin.error or plugin.not_selected
            if why and name in (plugin.name, plugin.name.removeprefix("distillbench_")):
                return UserError(f"no {kind} {name!r}{where}: plugin {plugin.name} is left out: {why}")
        return unknown(kind, name, possible, where)

    @property
    def names(self) -> list[str]:
        """All names, each once."""
        return sorted({name for kind in self.kinds.values() for name in kind})


# --- read or made ----------------------------------------------------------------------------------------------------


def plugin_table(folders: Sequence[str] = (), debug: bool = False) -> PluginTable:
    """The table of the plugins of this environment and of `folders`: the one in the cache, or a new one."""
    return kept_table(folders) or new_table(folders, debug)


def kept_table(folders: Sequence[str] = ()) -> PluginTable | None:
    """The table in the cache, if it is up to date. None in a process that has loaded plugins: they may be others."""
    from distillbench.storage.files import signed

    if "distillbench.registry" in sys.modules:
        return None
    file = _file(folders)
    try:
        kept = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
        if kept and kept == signed(kept) and kept["state"] == state_of(kept["depends_on"])[0]:
            return _from_plain(kept["table"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass  # missing, damaged, or written by another version
    return None


def new_table(folders: Sequence[str] = (), debug: bool = False) -> PluginTable:
    """A table from all plugins, which are loaded. It is kept, unless a plugin is broken."""
    fresh, began = "distillbench.registry" not in sys.modules, time.time()
    registry = load_plugins(folders)
    table = table_of(registry, debug)
    if fresh:
        keep(table, registry, began)
    return table


def keep(table: PluginTable, registry: Registry, began: float) -> None:
    """Write the table of `registry` into the cache, unless a plugin is broken or something may have changed since.

    `began`: when the plugins began to load, in seconds since the epoch. A file that was changed later, or so shortly
    before that a further change may have the same time, may differ from what was loaded.
    """
    from distillbench.storage.files import signed, write_text

    file = _file(registry.selection.folders)
    if registry.broken or file is None:
        return
    paths = depends_on(registry)
    state, latest = state_of(paths)
    if latest / 1e9 >= began - GRANULARITY_SECONDS:
        return
    with suppress(OSError):  # a cache that cannot be written only costs time
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(signed({"depends_on": paths, "state": state, "table": asdict(table)})))
        for other in file.parent.glob("*.json"):  # of environments that are gone
            if time.time() - other.stat().st_mtime > KEPT_SECONDS:
                other.unlink()


def _file(folders: Sequence[str | Path]) -> Path | None:
    """The file for these folders, in this environment; None for a user without a home."""
    import hashlib

    from distillbench.storage.user_cache import user_cache

    points = sorted((point.name, point.value) for point in importlib.metadata.entry_points(group="distillbench"))
    chosen = os.environ.get("DISTILLBENCH_PLUGINS", ""), [str(Path(folder).resolve()) for folder in folders]
    known = [FORMAT, __version__, sys.version, PATH, points, chosen]
    key = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    try:
        return user_cache() / "plugins" / f"{key}.json"
    except UserError:
        return None


def _from_plain(plain: dict[str, Any]) -> PluginTable:
    def settings(rows: list[dict[str, Any]]) -> list[Setting]:
        return [Setting(**row) for row in rows]

    kinds = {
        kind: {name: Described(**row | {"settings": settings(row["settings"])}) for name, row in rows.items()}
        for kind, rows in plain.pop("kinds").items()
    }
    executors = {name: settings(rows) for name, rows in plain.pop("executors").items()}
    plugins = [Found(**row) for row in plain.pop("plugins")]
    return PluginTable(kinds, plugins, settings(plain.pop("settings")), executors, **plain)


# --- a registry as plain values --------------------------------------------------------------------------------------


def table_of(registry: Registry, debug: bool = False) -> PluginTable:
    """The table of loaded plugins."""
    from distillbench.diffusion.samplers import SAMPLERS
    from distillbench.diffusion.schedules import SCHEDULES
    from distillbench.runs.config import RunConfig
    from distillbench.runs.executor_config import EXECUTORS
    from distillbench.testing import method_kinds

    samplers = {name: one.label for name, one in SAMPLERS.items()}
    schedules = {name: _first_line(getattr(one, "func", one).__doc__ or "") for name, one in SCHEDULES.items()}
    broken = registry.broken
    return PluginTable(
        {
            kind: {name: _described(kind, entry) for name, entry in sorted(registry.of_kind(kind).items())}
            for kind in KINDS
        },
        [_found(plugin) for plugin in registry.plugins],
        _settings(RunConfig),
        {name: _settings(config) for name, config in EXECUTORS.items()},
        samplers,
        schedules,
        dict(method_kinds.KINDS),
        [f"plugin {origin(plugin)} is left out: {plugin.error}" for plugin in broken],
        {plugin.name: plugin.traceback for plugin in broken if debug},
    )


def _found(plugin: Plugin) -> Found:
    brings = [brought.partition(": ") for brought in plugin.brings]
    hooks = {hook: [name for kind, _, name in brings if hook == f"register_{kind}"] for hook in plugin.hooks}
    return Found(plugin.name, version(plugin), hooks, plugin.origin, plugin.not_selected, plugin.error)


def _described(kind: str, entry: Entry) -> Described:
    from distillbench import registry as rules

    cls = entry.cls
    settings, learned = [] if rules.KINDS[kind].config is None else _settings(cls.Config), ""
    if kind == "metrics":
        facts = {fact: text or "none" for fact, text in cls.describe().items()}
    else:
        declared = {fact: getattr(cls, fact) for fact in rules.KINDS[kind].declares if fact not in rules.NAMED}
        facts = {fact: {True: "yes", False: "no"}.get(value, value) for fact, value in declared.items()}
    if kind == "methods":
        from distillbench.testing import method_kinds

        found = method_kinds.facts_of(cls)
        learned = found.kind
        facts = {"label": cls.names()[0], "title": cls.names()[1], **facts}
        facts |= {"reads_data": "yes" if found.reads_data else "no", "nfe": found.nfe or "unknown"}
    documentation = _documentation(cls)
    return Described(
        cls.name,
        origin(entry.plugin),
        version(entry.plugin),
        _first_line(documentation),
        documentation,
        facts,
        settings,
        learned,
        dict(cls.Config.replaced) if kind == "methods" else {},
        **(_search(cls.Config) if kind == "methods" else {}),
    )


def _search(config: type) -> dict[str, Any]:
    """What ``distillbench tune`` searches of a method."""
    from distillbench.options import declares_search_space, search_space

    training, sampling = (
        {name: str(search) for name, search in search_space(config, sampling).items()} for sampling in (False, True)
    )
    return {"searched": training, "searched_after": sampling, "declares_search": declares_search_space(config)}


def _settings(config: type) -> list[Setting]:
    from distillbench.runs.config import described_types

    return [Setting(*row) for row in described_types(config)]


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].removesuffix(".")


def _documentation(cls: type) -> str:
    """The first paragraph of the class's own docstring, of its base's in `scores`, or of its module's."""
    import inspect

    bases = [base for base in cls.__mro__[1:] if base.__module__.startswith("distillbench.evaluation.feature_metrics")]
    texts = (vars(base)["__doc__"] for base in (cls, *bases))
    text = next((text for text in texts if text), sys.modules[cls.__module__].__doc__ or "")
    return inspect.cleandoc(text).split("\n\n")[0]
