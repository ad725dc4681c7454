"""Settings: dataclass fields with a help text, and checks whose errors name the setting.

A check names the field of the dataclass (``lr``); :mod:`distillbench.runs.config` prepends its path
(``methods.boot.lr must be positive, got -1.0``).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from distillbench.errors import UserError, nearest

__all__ = ["Among", "Between", "option", "require_between", "require_fraction", "require_one_of", "require_positive"]

MOST_SEARCHED = 8  # settings of a method in its search space


# --- what a search may set a setting to -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Between:
    """A range of numbers from `low` to `high`, both included, for :func:`option`'s `search`.

    Two ints are a range of ints. `log`: uniform in the logarithm. `step`: the distance of the values that are tried.

    Raises UserError for ends that are no finite numbers, an empty range, a range in the logarithm that is not positive
    or has steps, and steps that do not end at `high`.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def __post_init__(self) -> None:
        numbers = [self.low, self.high] if self.step is None else [self.low, self.high, self.step]
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise UserError(f"{self!r} must have finite numbers only")
        if not self.low < self.high:
            raise UserError(f"{self!r} is empty: low must be below high")
        if self.log and not self.low > 0:
            raise UserError(f"{self!r} has a logarithm: low must be positive")
        if self.step is None:
            return
        if self.log:
            raise UserError(f"{self!r} has steps and a logarithm: name one of them, or the values: Among")
        steps = (self.high - self.low) / self.step
        if steps < 1 or abs(steps - round(steps)) > 1e-6:
            raise UserError(f"{self!r} must have a positive step, whole steps of which lead from low to high")

    @property
    def whole(self) -> bool:
        """Whether its values are ints."""
        return all(type(number) is int for number in (self.low, self.high, self.step or 1))

    def __contains__(self, value: Any) -> bool:
        if type(value) is not (int if self.whole else float) or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return abs(steps - round(steps)) < 1e-6

    def __str__(self) -> str:
        kind = ", in the logarithm" if self.log else "" if self.step is None else f", in steps of {self.step:g}"
        return f"{self.low:g} to {self.high:g}{kind}{', whole numbers' if self.whole else ''}"


@dataclass(frozen=True)
class Among:
    """A choice of `values`, in no order, for :func:`option`'s `search`: any values that JSON has. One: not searched.

    Raises UserError for none, for a value twice, and for a value that JSON lacks.
    """

    values: tuple[Any, ...]

    def __init__(self, values: Iterable[Any]) -> None:
        object.__setattr__(self, "values", tuple(values))
        try:
            texts = [json.dumps(value, allow_nan=False) for value in self.values]
        except (TypeError, ValueError) as error:
            raise UserError(f"{self!r} must have values that JSON has: {error}") from error
        if not texts or len(set(texts)) < len(texts):
            raise UserError(f"{self!r} must have different values, at least one")

    def __contains__(self, value: Any) -> bool:
        return any(type(value) is type(own) and value == own for own in self.values)

    def __str__(self) -> str:
        return ", ".join(json.dumps(value).strip('"') for value in self.values)


@dataclass(frozen=True)
class Around:
    """The range of a setting that every method has: its default, divided and multiplied by `factor`.

    `of_zero` is the search where the default is 0, which has no such range.
    """

    factor: float
    of_zero: Among

    def range_of(self, default: float) -> Between | Among:
        """The range around the default of one method."""
        low, high = (float(f"{end:.4g}") for end in (default / self.factor, default * self.factor))
        return Between(low, high, log=True) if default else self.of_zero


# --- settings ---------------------------------------------------------------------------------------------------------

Space = dict[str, Between | Among]
Search = Between | Among | Around | Space


def option(default: Any, help: str, path: bool = False, sampling: bool = False, search: Search | None = None) -> Any:
    """A dataclass field with a default and the sentence that ``distillbench describe`` prints for it.

    `path`: the value is a path or a list of paths, in which a leading ``~`` is the user's home. `sampling`: the setting
    of a method is used by its ``sample`` only. Trainings see its default, so another value trains nothing anew.
    `search`: what ``distillbench tune`` may set a setting of a method to, a range (:class:`Between`) or choices
    (:class:`Among`), with the default in it; for a NetworkConfig by the names of its settings: ``{"lr": Among(...)}``.
    """
    return _field(default, {"help": help, "path": path, "sampling": sampling, "search": search})


def added_option(default: Any, help: str) -> Any:
    """The same for a setting that is newer than results of its class. Their keys lack it, so its default is left out.

    A plugin needs none: its source is part of the keys.
    """
    return _field(default, {"help": help, "path": False, "added": True})


def _field(default: Any, metadata: dict[str, Any]) -> Any:
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# --- the search space of a method -------------------------------------------------------------------------------------


def search_space(config_class: type, sampling: bool = False) -> Space:
    """What a search may set the settings of a Config to, in the order of its fields; with `sampling` those of sampling.

    A method that overrides a setting of a base class without a search of its own keeps that of the base class. So each
    method's learning rate and average are searched, around its own defaults, unless it declares otherwise. A setting of
    a setting has a point in its name: ``fake.lr``. A choice of one value is left out.
    """
    space: Space = {}
    for field in dataclasses.fields(config_class):
        if field.metadata.get("sampling", False) == sampling and (entry := _declared(config_class, field.name)):
            if isinstance(entry, Around):
                entry = entry.range_of(_default(field))
            own = entry if isinstance(entry, dict) else {"": entry}
            space |= {f"{field.name}.{name}".strip("."): search for name, search in own.items()}
    return {name: search for name, search in space.items() if isinstance(search, Between) or len(search.values) > 1}


def declares_search_space(config_class: type) -> bool:
    """Whether a method declares what a search tries; if not, its learning rate and average alone are searched."""
    fields = (field for field in dataclasses.fields(config_class) if not field.metadata.get("sampling", False))
    entries = (_declared(config_class, field.name) for field in fields)
    return any(entry is not None and not isinstance(entry, Around) for entry in entries)


def _declared(config_class: type, name: str) -> Search | None:
    """The search of a setting, of the first class in the order of inheritance that declares one."""
    fields = (vars(cls).get("__dataclass_fields__", {}).get(name) for cls in config_class.__mro__)
    return next((found for field in fields if field and (found := field.metadata.get("search")) is not None), None)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def setting_of(config: Any, name: str) -> Any:
    """The value of a setting by its name in a search space, such as ``lr`` or ``fake.lr``."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def with_settings(config: Any, settings: Mapping[str, Any]) -> Any:
    """A copy of a settings dataclass with other values, by their names in a search space.

    Raises UserError if the settings refuse these values.
    """
    outer = {name: value for name, value in settings.items() if "." not in name}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        first, point, rest = name.partition(".")
        if point:
            inner.setdefault(first, {})[rest] = value
    outer |= {name: with_settings(getattr(config, name), values) for name, values in inner.items()}
    return dataclasses.replace(config, **outer)


# --- values and checks ------------------------------------------------------------------------------------------------


def plain_settings(value: Any) -> Any:
    """A settings dataclass as values that JSON has, as they are part of keys."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if dataclasses.is_dataclass(value):
        named = {f: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {f.name: plain_settings(own) for f, own in named.items() if not (_added(f) and own == f.default)}
    if type(value) is list:
        return [plain_settings(item) for item in value]
    if type(value) is dict and all(type(name) is str for name in value):
        return {name: plain_settings(item) for name, item in value.items()}
    return json.loads(json.dumps(value))


def _added(field: dataclasses.Field[Any]) -> bool:
    return bool(field.metadata.get("added", False))


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
