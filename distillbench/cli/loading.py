"""Loading the plugins that the command line asks for, and what they are called."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distillbench.registry import Plugin, Registry


def load_plugins(folders: Iterable[str]) -> Registry:
    """The plugins of installed packages and of `folders`, as far as $DISTILLBENCH_PLUGINS selects them."""
    from pathlib import Path

    from distillbench.registry import ONLY, Selection

    patterns = [pattern.strip() for pattern in os.environ.get(ONLY, "").split(",")]
    return Selection(tuple(Path(folder).resolve() for folder in folders), tuple(filter(None, patterns))).load()


def origin(plugin: Plugin) -> str:
    """The plugin's name, distribution and version."""
    return f"{plugin.name} ({version(plugin)})"


def version(plugin: Plugin) -> str:
    """The plugin's distribution and its version."""
    return f"{plugin.distribution} {plugin.version}"
