"""How the settings and environments of two runs differ, as lines of text, and the names of rows in them."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from distillbench.reports.labels import Labels
from distillbench.reports.merge import MERGED
from distillbench.reports.runs import RunData

IGNORED = ("results_dir", "run_name")  # settings that do not affect results
IGNORED_FACTS = ("run", "date")  # of an environment
MATCH = ["dataset", "teacher", "guidance", "method", "settings", "nfe", "images", "budget", "protocol"]
Row = tuple[Any, ...]  # the values of MATCH, None for empty ones


def settings_differences(a: RunData, b: RunData) -> list[str]:
    """The settings that differ, apart from IGNORED."""
    if not a.configs or not b.configs:
        return [f"settings of {', '.join('AB'[k] for k, run in enumerate((a, b)) if not run.configs)} are not known"]
    return _differences(_facts(a.configs, IGNORED), _facts(b.configs, IGNORED))


def environment_differences(a: RunData, b: RunData) -> list[str]:
    """The facts of environment.json that differ."""
    if not a.environment or not b.environment:
        lacking = ", ".join("AB"[k] for k, run in enumerate((a, b)) if not run.environment)
        return [f"the environment of {lacking} is not known"]
    return _differences(_facts(environments(a), IGNORED_FACTS), _facts(environments(b), IGNORED_FACTS))


def environments(run: RunData) -> list[dict[str, Any]]:
    merged = run.environment.get(MERGED)
    return [one for one in merged if isinstance(one, dict)] if isinstance(merged, list) else [run.environment]


def _facts(documents: Iterable[Mapping[str, Any]], ignored: Sequence[str]) -> dict[str, list[str]]:
    """The different values, as texts, of every dotted name in the documents."""
    found: dict[str, list[str]] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else str(name), inner)
            return
        values = found.setdefault(prefix, [])
        text = value_text(value)
        if text not in values:
            values.append(text)

    for document in documents:
        walk("", {name: value for name, value in document.items() if name not in ignored})
    return found


def _differences(a: Mapping[str, list[str]], b: Mapping[str, list[str]]) -> list[str]:
    """Texts on values that differ, and on the shortest names that only one run has."""
    lines: dict[str, None] = {}
    for name in dict.fromkeys([*a, *b]):
        if name in a and name in b:
            if set(a[name]) != set(b[name]):
                lines[f"{name}: {', '.join(a[name])} → {', '.join(b[name])}"] = None
            continue
        here, there, side = (a, b, "A") if name in a else (b, a, "B")
        parts = name.split(".")
        prefixes = [".".join(parts[:k]) for k in range(1, len(parts) + 1)]
        whole = next(p for p in prefixes if not any(other == p or other.startswith(f"{p}.") for other in there))
        value = f" ({', '.join(here[name])})" if whole == name else ""
        lines[f"{whole}: only in {side}{value}"] = None
    return list(lines)


def value_text(value: Any) -> str:
    """A setting, or a value of a row, as text."""
    if value is None:
        return "none"
    if isinstance(value, bool | list | dict):
        return json.dumps(value, default=str)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else "''"


def heading(letter: str, name: str, run: RunData) -> str:
    """The run's name, its versions of distillbench and its number of rows."""
    count = len(run.table)
    return ", ".join([f"{letter}: {name}", *versions(run), f"{count:,} row{'s' * (count != 1)}"])


def versions(run: RunData) -> list[str]:
    """The commits, or the versions, of distillbench that a run is of; several of merged runs."""
    found = []
    for one in environments(run):
        git = one.get("git")
        if isinstance(git, dict):
            found.append(f"commit {str(git.get('commit'))[:8]}" + (" and changes" if git.get("dirty") else ""))
        elif one.get("distillbench"):
            found.append(f"distillbench {one['distillbench']}")
    return list(dict.fromkeys(found))


class RowNamer:
    """Names rows by method, evaluations, and the columns of MATCH that it takes to tell `rows` apart."""

    def __init__(self, rows: Sequence[Row], labels: Labels) -> None:
        self.labels = labels
        self.columns: list[str] = []
        told = {(row[MATCH.index("method")], row[MATCH.index("nfe")]) for row in rows}
        for column in ("settings", "dataset", "guidance", "budget", "images", "teacher", "protocol"):
            places = [MATCH.index(name) for name in ("method", "nfe", *self.columns, column)]
            finer = {tuple(row[k] for k in places) for row in rows}
            if len(finer) > len(told):
                self.columns.append(column)
                told = finer

    def __call__(self, row: Row, without: Container[str] = ()) -> str:
        told = dict(zip(MATCH, row, strict=True))
        more = [
            f"{column} {value_text(told[column])}"
            for column in self.columns
            if told[column] is not None and column not in without
        ]
        return ", ".join([self.labels.method_label(str(told["method"])).short, f"{value_text(told['nfe'])} NFE", *more])

    def what(self, column: str) -> str:
        """A score with its arrow; a cost with its unit, too."""
        label = self.labels.label(column)
        return label.heading if column not in self.labels.columns else f"{label.short} {label.arrow}".rstrip()
