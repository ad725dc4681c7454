"""The commands that reproduce a run, from its settings."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

ONLY_IN_FULL = re.compile(  # settings that the short command leaves out
    r"methods\.|teacher\.(?!path|kind)|evaluation\.(?!images|nfe|seeds|metrics)|results_dir|threads|energy|device"
)


def commands(configs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(short command, command with every setting) for the points of a grid; seeds of one point share a command."""
    groups: dict[str, tuple[dict[str, Any], list[Any]]] = {}
    for config in configs:
        rest = {name: value for name, value in config.items() if name != "seed"}
        key = json.dumps(rest, sort_keys=True, default=str)
        groups.setdefault(key, (rest, []))[1].append(config.get("seed"))
    found = []
    for config, seeds in groups.values():
        every = _overrides(config)
        if any(seed is not None for seed in seeds):
            every.append(f"seed={','.join(map(str, dict.fromkeys(seeds)))}")
        found.append((_command([word for word in every if not ONLY_IN_FULL.match(word)]), _command(every)))
    return found


def _command(settings: list[str]) -> str:
    return shlex.join(["distillbench", "run", *settings])


def _overrides(config: Mapping[str, Any]) -> list[str]:
    """Every setting as an override of Hydra: first the methods, dataset and teacher by name."""
    methods = config.get("methods") if isinstance(config.get("methods"), dict) else {}
    found = [f"methods=[{','.join(map(str, methods))}]"] if methods else []
    kinds = {part: config[part] for part in ("dataset", "teacher") if isinstance(config.get(part), dict)}
    found += [f"{part}={chosen['kind']}" for part, chosen in kinds.items() if chosen.get("kind")]
    for name, value in config.items():
        if name in kinds:
            value = {key: inner for key, inner in value.items() if key != "kind"}
        found += _settings(name, value)
    return [word for word in found if not re.match(r"methods\.[^.]+\.kind=", word)]


def _settings(name: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [word for key, inner in value.items() for word in _settings(f"{name}.{key}", inner)]
    return [f"{name}={_hydra(value)}"]


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_/][\w./:-]*", value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
