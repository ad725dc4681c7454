"""Points of a grid that differ in values alone, made from one that was composed: thousands of them in seconds.

Where no setting refers to another, what a value becomes depends on its own setting only. So each value is read once, by
OmegaConf, and each point is made by the constructors of its dataclasses, as OmegaConf makes it, with all their checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

FRESH = "methods"  # made anew for each point, for plugins are handed them; what else does not differ is shared

Value = tuple[str, str, Any]  # the setting's full name, the word that it came from, and its value


class Alone(Exception):
    """A point that cannot be made from another: compose it."""


@dataclass
class Recipe:
    """A dataclass, or a dict, and what it is made from."""

    make: Callable[..., Any]
    parts: dict[str, Any]  # values, and recipes of groups
    made: list[Any] = field(default_factory=list)  # once it is, where nothing differs

    def __call__(self, changes: dict[str, Any], fresh: bool) -> Any:
        if self.made and not changes and not fresh:
            return self.made[0]
        given = {name: self._part(name, part, changes, fresh) for name, part in self.parts.items()}
        if unknown := changes.keys() - given.keys():
            raise Alone(f"not of this group: {unknown}")
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


class Neighbours:
    """Makes the neighbours of a point: `node` is what was composed there, `run` what it became."""

    def __init__(self, node: DictConfig, run: Any) -> None:
        self.node = node
        self.usable = "${" not in OmegaConf.to_yaml(node)
        self.read: dict[tuple[str, str], Any] = {}
        if self.usable:
            try:
                self.recipe = recipe_of(node)
                self.usable = self.recipe({}, fresh=False) == run
            except Alone:
                self.usable = False

    def at(self, values: Iterable[Value], check: Callable[[str, Any], None]) -> Any:
        """The point with these values. Each is checked once. Raises Alone, or what its dataclasses raise."""
        if not self.usable:
            raise Alone("settings refer to each other")
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
                raise Alone(f"{name} is no value by itself")
            OmegaConf.update(self.node, name, value)
            found = OmegaConf.select(self.node, name)
            found = OmegaConf.to_object(found) if isinstance(found, ListConfig) else found
            if isinstance(found, list) and not all(isinstance(item, int | float | str | None) for item in found):
                raise Alone(f"{name} is a list of groups")
            check(name, found)
            self.read[name, word] = found
        return self.read[name, word]


def recipe_of(node: DictConfig) -> Recipe:
    """What OmegaConf would make `node` from. Raises Alone where that is not by its constructor alone."""
    parts: dict[str, Any] = {}
    for name in map(str, node):
        if OmegaConf.is_missing(node, name):
            raise Alone(f"{name} is missing")
        value = node[name]
        if isinstance(value, DictConfig) and not value._is_none():
            parts[name] = recipe_of(value)
        else:
            parts[name] = OmegaConf.to_object(value) if isinstance(value, ListConfig) else value
    cls: Any = OmegaConf.get_type(node)
    if cls is dict:
        return Recipe(dict, parts)
    if parts.keys() != {f.name for f in dataclasses.fields(cls) if f.init}:
        raise Alone(f"{cls} is not made by its constructor alone")
    return Recipe(cls, parts)
