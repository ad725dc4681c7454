"""What tells the cells of a run apart in progress lines: the settings that differ among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from distillbench.runs.shared_context import CELL_SETTINGS, TEACHER_SETTINGS, Cell

UNNAMED = ("device", "executor", "isolate", "cell_seconds", "states", "results_dir")  # they change no number of a cell


def name_differences(cells: Sequence[Cell]) -> None:
    """Set `differs` of each cell: the settings that are not the same in all cells of its method, as "name=value ...".

    The seed is not among them, since every label has it.
    """
    by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        by_name.setdefault(cell.name, []).append(cell)
    for group in by_name.values():
        names = CELL_SETTINGS if group[0].entry is not None else TEACHER_SETTINGS
        shared = [name for name in names if name not in UNNAMED]
        runs = _differences({id(c.shared): {n: getattr(c.shared.config, n) for n in shared} for c in group})
        own = _differences({id(c): {"": c.method_config} for c in group})
        for cell in group:
            cell.differs = " ".join([*runs[id(cell.shared)], *own[id(cell)]])


def _differences(settings: dict[int, dict[str, Any]]) -> dict[int, list[str]]:
    """By the same keys: the settings that differ, as "name=value", without those that some do not have.

    Those belong to one kind of dataset or teacher, and the kind says enough.
    """
    flat = {key: {name: _text(value) for name, value in _flat("", groups)} for key, groups in settings.items()}
    first, *others = flat.values()
    common = [name for name in first if all(name in values for values in others)]
    differing = [name for name in common if any(values[name] != first[name] for values in others)]
    return {key: [f"{name}={values[name]}" for name in differing] for key, values in flat.items()}


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(full name, value) of the settings below `value`; the kind of a group has the name of the group."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif not isinstance(value, dict):
        yield path, value
        return
    for name, inner in value.items():
        below = path if name == "kind" else f"{path}.{name}" if path else name
        yield from _flat(below, inner)


def _text(value: Any) -> str:
    """A value as on the command line, without spaces."""
    return str(value).replace(", ", ",")
