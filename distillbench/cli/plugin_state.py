"""The state of the files that plugins depend on: it tells whether a kept table of plugins is up to date."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.machinery import all_suffixes
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distillbench.registry import Registry

PATH = tuple(sys.path)  # before plugins are loaded, which can change it
INSTALLED = (".dist-info", ".egg-info")  # suffixes of folders about installed packages
IMPORTABLE = (*all_suffixes(), ".pth", ".egg-link")
INSIDE = "__init__.py"


def depends_on(registry: Registry) -> list[tuple[str, bool]]:
    """(file or folder, whether its data files count) of all that a table of `registry` depends on.

    These are the modules that were imported and the plugins with their helpers, each with the folder or the whole
    package that it is in, and the folders of Python's path. Data files count where plugins are. Modules of installed
    packages that bring no plugin are not looked at: installing, removing or updating a package changes its
    ``.dist-info``. Folders that are missing are looked at, too: they may appear.
    """
    import sysconfig

    packages = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib")]
    imported = [Path(found) for module in list(sys.modules.values()) if (found := getattr(module, "__file__", None))]
    own = [file for file in imported if file.is_absolute() and not any(folder in file.parents for folder in packages)]
    plugins = [Path(plugin.origin) for plugin in registry.plugins if plugin.origin]
    plugins += [helper for plugin in registry.plugins for helper in plugin.helpers]
    homes = dict.fromkeys(_home(file) for file in plugins)
    others = dict.fromkeys([*map(Path, filter(None, PATH)), *map(_home, own), *own, *plugins])
    found = {home: home not in packages for home in homes}
    return [(str(path), whole) for path, whole in ({path: False for path in others} | found).items()]


def _home(file: Path) -> Path:
    """The outermost package that a module is in, or else its folder."""
    folder = file.parent
    while (folder.parent / INSIDE).is_file():
        folder = folder.parent
    return folder


def state_of(paths: Iterable[tuple[str, bool]]) -> tuple[str, int]:
    """SHA-256 of the names, sizes and times of all files in `paths`, and the time of the latest change in ns."""
    digest, latest = hashlib.sha256(), 0
    for path, whole in paths:
        for name, facts in _files(path, whole):
            times = () if facts is None else (facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size, facts.st_ino)
            digest.update(repr((name, times)).encode(errors="surrogateescape"))
            latest = max(latest, times[1]) if times else latest
    return digest.hexdigest(), latest


def _files(path: str, whole: bool) -> Iterator[tuple[str, os.stat_result | None]]:
    """The file, or the files in the folder that count: what can be imported, what is installed, if `whole` all.

    Subfolders are looked at in packages. Hidden files and ``__pycache__`` never count.
    """
    if not os.path.isdir(path):
        yield path, _facts(path)
        return
    yield path, None
    is_package = os.path.isfile(os.path.join(path, INSIDE))
    for name in _listed(path):
        inner = os.path.join(path, name)
        if name.startswith(".") or name == "__pycache__":
            continue
        if name.endswith(INSTALLED) and os.path.isdir(inner):
            yield from ((part, _facts(part)) for part in (os.path.join(inner, one) for one in _listed(inner)))
        elif os.path.isdir(inner):
            if is_package:
                yield from _files(inner, whole)
            elif os.path.isfile(os.path.join(inner, INSIDE)):
                yield inner, None
        elif whole or name.endswith(IMPORTABLE):
            yield inner, _facts(inner)


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _facts(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
