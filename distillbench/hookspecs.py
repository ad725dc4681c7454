"""The hooks with which a plugin registers methods, teachers, datasets and metrics.

A plugin is a module named by an entry point in the group ``distillbench``, or a file of a plugins folder. Each hook
receives ``register``, a function to be called once for every class of the plugin.

The contract between the core and its plugins has a version, and every hook names the version it was written for. The
version rises whenever a plugin that follows the contract would no longer work, or would compute something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluggy

API = 2  # version of the plugin contract
CHANGES: dict[int, str] = {  # version: what a plugin for the one before it must change
    1: "write @hookimpl(api=1) on every hook, and check its classes against the contract: distillbench check NAME",
    2: "import from distillbench, or from its packages datasets, diffusion, evaluation, networks, options and testing "
    "(the table is in docs/contract.md), and write @hookimpl(api=2) on every hook",
}

hookspec = pluggy.HookspecMarker("distillbench")
_marker = pluggy.HookimplMarker("distillbench")
_versions = "distillbench_api"  # attribute of a marked function


def hookimpl(hook: Callable[..., None] | None = None, *, api: int = 0) -> Any:
    """Mark a function as a hook of a plugin that was written for version `api` of the contract: ``@hookimpl(api=2)``.

    A plugin without a version is not loaded; the error says what to write.
    """

    def mark(hook: Callable[..., None]) -> Callable[..., None]:
        setattr(hook, _versions, api)
        return _marker(hook)

    return mark if hook is None else mark(hook)


def version_of(hook: Callable[..., None]) -> int:
    """The version of the contract that a marked function was written for; 0: none is given."""
    return getattr(hook, _versions, 0)


@hookspec
def register_methods(register: Callable[[type], None]) -> None:
    """Call ``register(cls)`` for each :class:`distillbench.Method` (a distillation method)."""


@hookspec
def register_teachers(register: Callable[[type], None]) -> None:
    """Call ``register(cls)`` for each :class:`distillbench.TeacherSource` (a family of teachers)."""


@hookspec
def register_datasets(register: Callable[[type], None]) -> None:
    """Call ``register(cls)`` for each :class:`distillbench.Dataset` (a source of real images)."""


@hookspec
def register_metrics(register: Callable[[type], None]) -> None:
    """Call ``register(cls)`` for each :class:`distillbench.Metric` (a score of generated images: one column)."""
