"""Completion of a run's settings in shells: methods, datasets, teachers, experiments and the names of settings.

The names come from the table of plugins, so the first completion after a change of a plugin takes the seconds in which
torch is imported, and others a moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click
from click.shell_completion import BashComplete, FishComplete, ZshComplete, add_completion_class

from distillbench.cli.plugin_table import PluginTable, plugin_table

GROUPS = {"methods": "methods", "dataset": "datasets", "teacher": "teachers"}
OPENED = "COMPREPLY+=($value)"
WITHOUT_BLANK = "[[ $value == *[=[,] ]] && compopt -o nospace; COMPREPLY+=($value)"


ZSH_ALL = "compadd -U -V unsorted -a completions"
ZSH_WITHOUT_BLANK = """local -a begun=(${(M)completions:#*[=,[]}) whole=(${completions:#*[=,[]})
        compadd -U -S '' -V unsorted -a begun
        compadd -U -V unsorted -a whole"""
FISH_SPLIT = 'string split "," $completion'
FISH_SPLIT_ONCE = 'string split -m 1 "," $completion'


class BashWithoutBlank(BashComplete):
    """Bash's completion by click, but without a blank after ``dataset=``, where the value follows."""

    source_template = BashComplete.source_template.replace(OPENED, WITHOUT_BLANK)


class ZshWithoutBlank(ZshComplete):
    """Zsh's completion by click, but without a blank after ``dataset=``, where the value follows."""

    source_template = ZshComplete.source_template.replace(ZSH_ALL, ZSH_WITHOUT_BLANK)


class FishWithCommas(FishComplete):
    """fish's completion by click, which cuts words such as ``methods=[boot,cm]`` at their first comma."""

    source_template = FishComplete.source_template.replace(FISH_SPLIT, FISH_SPLIT_ONCE)


def install() -> None:
    """Let click use them."""
    add_completion_class(BashWithoutBlank, "bash")
    add_completion_class(ZshWithoutBlank, "zsh")
    add_completion_class(FishWithCommas, "fish")


def complete_setting(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """What a setting that begins with `incomplete` can be."""
    table = plugin_table(ctx.params.get("folders") or ())
    return completions(table, ctx.params.get(param.name or "") or (), incomplete)


def completions(table: PluginTable, before: Sequence[str], incomplete: str) -> list[str]:
    """The words that continue `incomplete`; `before` are the settings to the left.

    Bash splits words at "=" and gives the parts one by one; then only the value is returned, which Bash replaces.
    """
    words = _joined(before)
    if words and words[-1].endswith("="):  # the name is complete, and Bash has split it off
        return _values(table, words[-1][:-1], incomplete)
    if incomplete == "" and words and "=" not in words[-1] and words[-1] in _names(table, words):
        return _values(table, words[-1], "")
    name, equals, value = incomplete.partition("=")
    if equals:
        return [f"{name}={one}" for one in _values(table, name, value)]
    lists = ("methods",)
    names = [f"{one}=[" if one in lists else f"{one}=" for one in _names(table, words)]
    return [one for one in names if one.startswith(incomplete)]


def _joined(before: Iterable[str]) -> list[str]:
    """The settings, whole also where Bash has split them: name, =, value."""
    words: list[str] = []
    for part in before:
        if words and (part == "=" or words[-1].endswith("=")):
            words[-1] += part
        else:
            words.append(part)
    return words


def _names(table: PluginTable, words: Sequence[str]) -> list[str]:
    """The names of settings, with those of the methods, the dataset and the teacher that were chosen."""
    given = dict(word.partition("=")[::2] for word in words)
    names = ["methods", "dataset", "teacher", "experiment", "executor"]
    names += [one.name for one in table.settings if one.name not in names]
    for group, kind in GROUPS.items():
        for name in given.get(group, "trained" if group == "teacher" else "").strip("[]").split(","):
            if name in table.kinds[kind]:
                prefix = f"methods.{name}" if group == "methods" else group
                names += [f"{prefix}.{one.name}" for one in table.kinds[kind][name].settings]
    executor = given.get("executor", "local")
    return names + [f"executor.{one.name}" for one in table.executors.get(executor, [])]


def _values(table: PluginTable, name: str, value: str) -> list[str]:
    """The values of the setting `name` that begin with `value`; lists are completed at their last item."""
    possible = _possible(table, name)
    start = value.rfind(",") + 1 or len(value) - len(value.lstrip("["))
    head, last = value[:start], value[start:]
    if name == "methods" and not head.startswith("["):
        head = "[" + head
    taken = head.strip("[").split(",")
    closing = "]" if head.startswith("[") else ""
    return [f"{head}{one}{closing}" for one in possible if one.startswith(last) and one not in taken]


def _possible(table: PluginTable, name: str) -> list[str]:
    from distillbench.runs.overrides import experiments

    if name in GROUPS:
        return list(table.of_kind(GROUPS[name]))
    if name == "experiment":
        return experiments()
    if name == "executor":
        return list(table.executors)
    if name == "evaluation.metrics":
        return list(table.of_kind("metrics"))
    if name == "evaluation.teacher_samplers":
        return list(table.samplers)
    if name.rpartition(".")[2] == "schedule":
        return list(table.schedules)
    kinds = {one.name: one.kind for one in table.settings}
    return ["true", "false"] if kinds.get(name) == "bool" else []
