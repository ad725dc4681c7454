"""The hooks through which a plugin brings methods, teachers, datasets and metrics.

A plugin is a module named by an entry point in the group ``distillbench``. Each hook receives ``register``, a function
to be called once for every class that the plugin brings.
"""

from __future__ import annotations

from collections.abc import Callable

import pluggy

hookspec = pluggy.HookspecMarker("distillbench")
hookimpl = pluggy.HookimplMarker("distillbench")


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
