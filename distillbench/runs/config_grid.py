"""Builds thousands of grid points in seconds from one that Hydra composed, where they differ only in values.

If no setting refers to another one, each value can be converted on its own. So OmegaConf converts each value once, and
each point is built by the constructors of its dataclasses, as OmegaConf would do, with all their checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

FRESH = "methods"  # built anew for each point, since plugins receive them; other equal groups are shared

Value = tuple[str, str, Any]  # (full name of the setting, the argument, the value)


class NotBuildable(Exception):
    """The point has to be composed by Hydra."""


@dataclass
class Recipe:
    """A dataclass or dict, and the arguments of its constructor."""

    make: Callable[..., Any]
    parts: dict[str, Any]  # values, and recipes of nested groups
    made: list[Any] = field(default_factory=list)  # [the object without changes], once it is made

    def __call__(self, changes: dict[str, Any], fresh: bool) -> Any:
        if self.made and not changes and not fresh:
            return self.made[0]
        given = {name: self._part(name, part, changes, fresh) for name, part in self.parts.items()}
        if unknown := changes.keys() - given.keys():
            raise NotBuildable(f"not of this group: {unknown}")
        made = self.make(**given)
        if not changes and not fresh:
            self.made.append(made)
        return made

    def _part(self, name: str, part: Any, changes: dict[str, Any], fresh: bool) -> Any:
        change = changes.get(name)
        if isinstance(part, Recipe):
            return part(change or {}, fresh or name == FRESH)
        value = part if name not in changes else change
        return list(value) if isinstance(value, list) else value


class PointBuilder:
    """Builds other points from a composed one. `node`: as composed; `run`: the same, instantiated."""

    def __init__(self, node: DictConfig, run: Any) -> None:
        self.node = node
        self.usable = "${" not in OmegaConf.to_yaml(node)
        self.read: dict[tuple[str, str], Any] = {}
        if self.usable:
            try:
                self.recipe = recipe_of(node)
                self.usable = self.recipe({}, fresh=False) == run
            except NotBuildable:
                self.usable = False

    def build(self, values: Iterable[Value], check: Callable[[str, Any], None]) -> Any:
        """The point with these values. Each value is checked once. Raises NotBuildable, and dataclass errors."""
        if not self.usable:
            raise NotBuildable("settings refer to each other")
        changes: dict[str, Any] = {}
        for name, word, value in values:
            *groups, last = name.split(".")
            group = changes
            for part in groups:
                group = group.setdefault(part, {})
            group[last] = self._read(name, word, value, check)
        return self.recipe(changes, fresh=False)

    def _read(self, name: str, word: str, value: Any, check: Callable[[str, Any], None]) -> Any:
        if (name, word) not in self.read:
            there = OmegaConf.select(self.node, name)
            if "${" in word or isinstance(value, dict) or isinstance(there, DictConfig) or name.endswith("kind"):
                raise NotBuildable(f"{name} cannot be converted on its own")
            OmegaConf.update(self.node, name, value)
            found = OmegaConf.select(self.node, name)
            found = OmegaConf.to_object(found) if isinstance(found, ListConfig) else found
            if isinstance(found, list) and not all(isinstance(item, int | float | str | None) for item in found):
                raise NotBuildable(f"{name} is a list of groups")
            check(name, found)
            self.read[name, word] = found
        return self.read[name, word]


def recipe_of(node: DictConfig) -> Recipe:
    """The recipe of `node`. Raises NotBuildable if OmegaConf would do more than call its constructor."""
    parts: dict[str, Any] = {}
    for name in map(str, node):
        if OmegaConf.is_missing(node, name):
            raise NotBuildable(f"{name} is missing")
        value = node[name]
        if isinstance(value, DictConfig) and not value._is_none():
            parts[name] = recipe_of(value)
        else:
            parts[name] = OmegaConf.to_object(value) if isinstance(value, ListConfig) else value
    cls: Any = OmegaConf.get_type(node)
    if cls is dict:
        return Recipe(dict, parts)
    if parts.keys() != {f.name for f in dataclasses.fields(cls) if f.init}:
        raise NotBuildable(f"{cls} has fields that its constructor does not take")
    return Recipe(cls, parts)
