"""config.yaml of a run: one YAML document for each grid point.

With more than FULL points, the documents after the first list only the settings that differ from it:

    like_the_first_but: {"seed": 3, "methods.boot.lr": 0.0002}
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import Any

import yaml

FULL = 100  # points up to which every document has every setting
BUT = "like_the_first_but"
LARGEST = 10**8  # characters of the expanded documents
SEPARATOR = re.compile(r"^---\n", re.MULTILINE)


class OtherSettings(Exception):
    """Two points have different settings, and not only different values."""


def write_settings(points: Sequence[Any], whole: Callable[[Any], str]) -> str:
    """The documents of `points` (settings dataclasses or dicts). `whole` writes one with every setting."""
    if len(points) <= FULL:
        return "---\n".join(map(whole, points))
    first = points[0]
    return "---\n".join([whole(first), *(_but(first, point) or whole(point) for point in points[1:])])


def read_settings(text: str, load: Callable[[str], Sequence[Any]]) -> list[Any]:
    """The documents in `text`, each expanded to every setting. `load` reads YAML. Raises YAMLError."""
    if f"\n{BUT}: " not in text:
        return list(load(text))
    documents: list[Any] = []
    size = 0
    for part in SEPARATOR.split(text):
        changes = _changes(part)
        if changes is None or not documents or not isinstance(documents[0], dict):
            documents += load(part)
            continue
        size = size or len(part) + len(json.dumps(documents[0], default=str))
        if size * len(documents) > LARGEST:
            raise yaml.YAMLError(f"it expands to more than {LARGEST:,} characters")
        try:
            documents.append(_changed(documents[0], changes))
        except (LookupError, TypeError, ValueError) as error:
            raise yaml.YAMLError(f"a point changes settings that the first one does not have: {part[:100]}") from error
    return documents


def differences(first: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(full name, value in `other`) of the settings that differ. Raises OtherSettings."""
    if first is other:
        return
    parts, others = _parts(first), _parts(other)
    if parts is None or others is None:
        if parts is not None or others is not None:
            raise OtherSettings(path)
        if type(first) is not type(other) or first != other:
            yield path, other.name if isinstance(other, Enum) else other
        return
    if parts.keys() != others.keys() or type(first) is not type(other) or any("." in str(name) for name in parts):
        raise OtherSettings(path)
    for name, part in parts.items():
        yield from differences(part, others[name], f"{path}.{name}" if path else str(name))


def _parts(value: Any) -> dict[str, Any] | None:
    if dataclasses.is_dataclass(value):
        return vars(value)
    return value if isinstance(value, dict) else None


def _but(first: Any, point: Any) -> str | None:
    """A document with the differences, or None if it needs every setting."""
    try:
        changed = [f"{json.dumps(name)}: {_as_json(value)}" for name, value in differences(first, point)]
    except (OtherSettings, TypeError):
        return None
    return f"{BUT}: {{{', '.join(changed)}}}\n"


def _as_json(value: Any) -> str:
    """JSON that YAML reads as the same value."""
    if isinstance(value, list):
        return f"[{', '.join(map(_as_json, value))}]"
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text.replace("e", ".0e", 1) if isinstance(value, float) and "." not in text else text


def _changes(part: str) -> dict[str, Any] | None:
    """The differences that a document lists; None if it is an ordinary one."""
    if not part.startswith(f"{BUT}: "):
        return None
    try:
        changes = json.loads(part.removeprefix(f"{BUT}: "))
    except ValueError:
        return None
    return changes if isinstance(changes, dict) else None


def _changed(first: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`first` with changes; equal groups are shared."""
    made = dict(first)
    fresh = {""}
    for name, value in changes.items():
        *groups, last = name.split(".")
        node, path = made, ""
        for group in groups:
            path += f".{group}"
            if path not in fresh:
                node[group] = dict(node[group])
                fresh.add(path)
            node = node[group]
        node[last] = value
    return made
