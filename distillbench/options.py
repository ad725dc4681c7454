"""Settings: dataclass fields with a help text, and checks whose errors name the setting.

A check names the field of the dataclass (``lr``); :mod:`distillbench.runs.config` prepends its path
(``methods.boot.lr must be positive, got -1.0``).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from distillbench.errors import UserError, nearest

__all__ = ["option", "require_between", "require_fraction", "require_one_of", "require_positive"]


def option(default: Any, help: str, path: bool = False, sampling: bool = False) -> Any:
    """A dataclass field with a default and the sentence that ``distillbench describe`` prints for it.

    `path`: the value is a path or a list of paths, in which a leading ``~`` is the user's home. `sampling`: the setting
    of a method is used by its ``sample`` only. Trainings see its default, so another value trains nothing anew.
    """
    metadata = {"help": help, "path": path, "sampling": sampling}
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require_positive(config: Any, *names: str) -> None:
    """Raise :class:`UserError` unless each named setting is a positive, finite number."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise UserError(f"{name} must be positive, got {value}")


def require_between(config: Any, low: float, high: float, *names: str) -> None:
    """Raise :class:`UserError` unless each named setting lies in [low, high]."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            wanted = f"be at least {low}" if high == math.inf else f"lie between {low} and {high}"
            raise UserError(f"{name} must {wanted}, got {value}")


def require_fraction(config: Any, *names: str) -> None:
    """Raise :class:`UserError` unless each named setting lies in [0, 1): a decay rate, for example."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise UserError(f"{name} must be at least 0 and below 1, got {value}")


def require_one_of(config: Any, name: str, possible: Iterable[Any]) -> None:
    """Raise :class:`UserError` unless the named setting is one of `possible`."""
    value, possible = getattr(config, name), list(possible)
    if value not in possible:
        names = [str(p) for p in possible]
        near = nearest(str(value), names)
        raise UserError(f"{name} must be one of {', '.join(names)}, got {value!r}{near and '.'}{near}")
