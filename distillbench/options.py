"""Settings: dataclass fields that carry their own help text, and checks that name the setting at fault."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

from distillbench.errors import UserError


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the sentence that ``distillbench describe`` prints for it."""
    metadata = {"help": help}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
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
            raise UserError(f"{name} must lie between {low} and {high}, got {value}")


def require_one_of(config: Any, name: str, possible: Any) -> None:
    """Raise :class:`UserError` unless the named setting is one of `possible`."""
    from distillbench.errors import unknown

    value = getattr(config, name)
    if value not in possible:
        raise unknown(name, str(value), [str(p) for p in possible])
