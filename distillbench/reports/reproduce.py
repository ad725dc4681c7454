"""The commands that reproduce a run, from its settings."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

COMMAND = "command.txt"  # in a run's folder: the command of each point of its grid, with what differs from defaults
CHOICES = re.compile(r"(methods|dataset|teacher)=")  # always written
ELSEWHERE = re.compile(r"(results_dir|run_name|executor)[.=]")  # where cells run and results go does not change them


def commands(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The command with every setting for the points of a grid; seeds of one point share a command."""
    return [_command(words) for words, _ in _points(configs, configs)]


def short_commands(configs: Sequence[dict[str, Any]], defaults: Sequence[dict[str, Any]]) -> list[str]:
    """The commands with the settings of each of `configs` that differ from those in `defaults`, of as many points."""
    found = []
    for words, usual in _points(configs, defaults):
        known = {word for word in usual if not CHOICES.match(word) and not word.startswith("seed=")}
        found.append(_command([word for word in words if word not in known and not ELSEWHERE.match(word)]))
    return found


def _points(configs: Sequence[dict[str, Any]], defaults: Sequence[dict[str, Any]]) -> list[tuple[list[str], list[str]]]:
    """The settings as words, and those of the defaults, for points that differ in more than their seed."""
    groups: dict[str, tuple[dict[str, Any], dict[str, Any], list[Any]]] = {}
    for config, default in zip(configs, defaults, strict=True):
        rest = {name: value for name, value in config.items() if name != "seed"}
        key = json.dumps(rest, sort_keys=True, default=str)
        groups.setdefault(key, (rest, default, []))[2].append(config.get("seed"))
    found = []
    for config, default, seeds in groups.values():
        words = _overrides(config)
        if any(seed is not None for seed in seeds):
            words.append(f"seed={','.join(map(str, dict.fromkeys(seeds)))}")
        found.append((words, _overrides(default)))
    return found


def _command(settings: list[str]) -> str:
    return shlex.join(["distillbench", "run", *settings])


def _overrides(config: Mapping[str, Any]) -> list[str]:
    """Every setting as an override of Hydra: first the methods, dataset, teacher and executor by name."""
    methods = config.get("methods") if isinstance(config.get("methods"), dict) else {}
    found = [f"methods=[{','.join(map(str, methods))}]"] if methods else []
    kinds = {part: config[part] for part in ("dataset", "teacher", "executor") if isinstance(config.get(part), dict)}
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
