"""The command of a run with the settings that differ from their defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from distillbench.reports.reproduce import short_commands
from distillbench.runs.config import RunConfig

MOST_POINTS = 100  # of a grid
GROUPS = ("dataset", "teacher", "executor")  # settings whose defaults depend on what was chosen


def run_commands(configs: Sequence[RunConfig]) -> list[str]:
    """A command for each of the first MOST_POINTS points of a grid; points that differ in their seed share one."""
    shown = configs[:MOST_POINTS]
    return short_commands([dataclasses.asdict(config) for config in shown], [_usual(config) for config in shown])


def _usual(config: RunConfig) -> dict[str, Any]:
    """What the settings would be with nothing but methods, dataset, teacher and executor chosen."""
    found = _defaults(RunConfig)
    found |= {name: _of(value) for name in GROUPS if (value := getattr(config, name)) is not None}
    found["methods"] = {name: _of(value) for name, value in config.methods.items()}
    return found


def _of(chosen: Any) -> dict[str, Any]:
    return _defaults(type(chosen)) | {"kind": chosen.kind}


def _defaults(config: type) -> dict[str, Any]:
    """The defaults of a dataclass. It is not created, since checks may want what has none, such as a path."""
    found: dict[str, Any] = {}
    for one in dataclasses.fields(config):
        value: Any = None if one.default_factory is dataclasses.MISSING else one.default_factory()
        value = value if one.default is dataclasses.MISSING else one.default
        nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
        found[one.name] = dataclasses.asdict(value) if nested else value
    return found
