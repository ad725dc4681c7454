"""Text settings as the user wrote them: Hydra reads ``2024_01_01`` as a number and refuses an unquoted ``~``."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import types
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from distillbench.errors import UserError, quoted

HOME = re.compile(r"(?<=[=,\[(])(\s*)(~[^,\[\]{}()'\"]*)")
OPENING, CLOSING, QUOTES = "[{(", ")}]", "'\""


def quote_home(word: str) -> str:
    """Put quotes around values that begin with ``~``, as in ``name=~/folder``, so that Hydra accepts them."""
    return HOME.sub(r'\1"\2"', word)


def split_values(text: str) -> list[str]:
    """The comma-separated values in `text`. Commas in brackets and quotes do not separate."""
    values, depth, quote = [""], 0, ""
    escaped = False
    for character in text:
        if quote:
            quote = "" if character == quote and not escaped else quote
        elif character in QUOTES:
            quote = character
        elif character in OPENING:
            depth += 1
        elif character in CLOSING:
            depth -= 1
        elif character == "," and not depth:
            values.append("")
            continue
        escaped = character == "\\" and not escaped
        values[-1] += character
    return [value.strip() for value in values]


def written_value(setting: Override, node: DictConfig) -> Any:
    """The value of `setting`; for a setting of type str in `node`, the text as it was written.

    Raises UserError for what OmegaConf would take: a number that is neither 0 nor 1 as true, a list in a list of names
    or numbers.
    """
    value, hint = setting.value(), _hint(node, setting.key_or_group)
    text = str(setting.input_line).partition("=")[2].strip()
    is_flat = typing.get_origin(hint) is list and typing.get_args(hint)[0] in (str, int, float)
    nested = is_flat and isinstance(value, list) and any(isinstance(item, list | dict) for item in value)
    if nested or (hint is bool and isinstance(value, int | float) and value not in (0, 1)):
        raise UserError(f"{setting.key_or_group} must be {type_in_words(hint)}, got {quoted(text)}")
    if hint is str:
        return _as_text(value, text)
    if typing.get_origin(hint) is list and typing.get_args(hint) == (str,) and isinstance(value, list):
        items = split_values(text[1:-1])
        if len(items) == len(value):
            return [_as_text(*pair) for pair in zip(value, items, strict=True)]
    return value


def _as_text(value: Any, text: str) -> Any:
    return text if isinstance(value, bool | int | float) else value


def _hint(node: DictConfig, name: str) -> Any:
    """The type of the setting `name`; None if it is not a field of a dataclass."""
    parent, _, last = name.rpartition(".")
    group = OmegaConf.select(node, parent) if parent else node
    kind = OmegaConf.get_type(group) if isinstance(group, DictConfig) else None
    return _hints(kind).get(last) if dataclasses.is_dataclass(kind) and isinstance(kind, type) else None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return {name: _without_none(hint) for name, hint in typing.get_type_hints(kind).items()}


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    (first, *others) = [part for part in typing.get_args(hint) if part is not type(None)]
    return hint if others else first


def expand_home(config: Any) -> None:
    """Replace a leading ``~`` in every setting of the dataclass `config` that is declared as a path, in place."""
    for group in _groups(config):
        for field in dataclasses.fields(group):
            if field.metadata.get("path"):
                given = getattr(group, field.name)
                paths = [_expanded(path) for path in given] if isinstance(given, list) else _expanded(given)
                object.__setattr__(group, field.name, paths)  # the dataclass of a plugin may be frozen


def _expanded(path: Any) -> Any:
    return os.path.expanduser(path) if isinstance(path, str) else path


def _groups(config: Any) -> Iterator[Any]:
    """`config` and every dataclass within it."""
    yield config
    for value in vars(config).values():
        for inner in value.values() if isinstance(value, dict) else [value]:
            if dataclasses.is_dataclass(inner) and not isinstance(inner, type):
                yield from _groups(inner)


def type_in_words(hint: Any) -> str:
    """A type as text, such as "a whole number", "a list of numbers" or "one of images, seconds, nfe"."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    plural = {int: "whole numbers", float: "numbers", str: "names", Any: "values"}
    if is_enum(hint):
        return f"one of {', '.join(member.name for member in hint)}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_in_words(part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return f"a list of {plural.get(item, item)}"
    return words.get(hint, str(hint))


def is_enum(hint: Any) -> bool:
    """Whether a type is an Enum."""
    return isinstance(hint, type) and issubclass(hint, Enum)
