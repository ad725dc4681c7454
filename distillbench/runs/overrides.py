"""Command-line arguments as Hydra overrides, and the grid points that they span.

Torch is not imported here, so that the command line can refuse a wrong name at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep, ValueType
from hydra.errors import HydraException

from distillbench.errors import UserError, nearest, quoted
from distillbench.runs.executor_config import kinds_with
from distillbench.runs.written_values import quote_home, split_values

GROUPS = {"methods": "methods", "dataset": "datasets", "teacher": "teachers"}  # config group: kind in the registry
CHOICES = (*GROUPS, "executor", "experiment")
NAME = re.compile(r"[A-Za-z_][\w/]*(\.\w+)*", re.ASCII)
MOST_RUNS = 100_000  # points of a grid
LONGEST_NAME = 200  # bytes; file systems allow 255, and temporary files have longer names
REPLACED = {  # settings of earlier versions
    "accumulate": "write microbatch=N, the most images that a process computes at once, instead of a number of parts"
}
HERE = Path(__file__).resolve().parents[1]
LONGEST_WORD = 10_000  # characters of a setting; Hydra's parser takes seconds for more


NOTHING_REPLACED: Mapping[str, str] = {}


class Names(Protocol):
    """What is registered: a Registry, or the table of one."""

    def of_kind(self, kind: str) -> Collection[str]:
        """The names of "methods", "teachers", "datasets" or "metrics"."""

    def no(self, kind: str, name: str, possible: Iterable[str], where: str = "") -> UserError:
        """The error for an unknown name."""


def config_folder() -> Path:
    """The folder of YAML files: in the package (wheel) or next to it (checkout)."""
    for folder in (HERE / "configs", HERE.parent / "configs"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UserError(f"no config.yaml in {HERE / 'configs'}: distillbench is not completely installed")


def experiments() -> list[str]:
    """The names of the prepared experiments."""
    return sorted(file.stem for file in (config_folder() / "experiment").glob("*.yaml"))


def parse_override(word: str, registry: Names) -> Override:
    """One command-line argument as Hydra's Override. Raises UserError if it is not of the form name=value."""
    if not word.strip():
        raise UserError("an empty setting. A setting reads name=value")
    if word[0] in "+~":
        raise UserError(f"cannot use {quoted(word)}: settings are changed with name=value, none is added or deleted")
    if "=" not in word:
        raise UserError(f"{quoted(word)} is not a setting. A setting reads name=value{_meant(word, registry)}")
    if (name := word.partition("=")[0]) in REPLACED:
        raise UserError(f"no setting {quoted(name)}: {REPLACED[name]}")
    if len(name) > LONGEST_NAME:  # Hydra looks for a file with this name
        raise UserError(f"no setting {quoted(name)}: its name has {len(name):,} characters")
    if len(word) > LONGEST_WORD:
        raise UserError(f"{quoted(word)} has {len(word):,} characters, a setting has at most {LONGEST_WORD:,}")
    try:
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        (setting,) = parser.parse_overrides([quote_home(word)])
    except HydraException as error:
        raise UserError(f"cannot read the setting {quoted(word)}: {_advice(word)}") from error
    except (ValueError, RecursionError) as error:  # more digits or nesting than Python can read
        raise UserError(f"cannot read the setting {quoted(word)}: {first_line(error)}") from error
    if setting.package is not None:
        raise UserError(f"no setting {quoted(word.partition('=')[0])}: '@' has no meaning here")
    return setting


def _meant(word: str, registry: Names) -> str:
    for group, kind in GROUPS.items():
        if word in registry.of_kind(kind):
            return f". Did you mean {group}={f'[{word}]' if group == 'methods' else word}?"
    return ", such as budget.images=400000"


def _advice(word: str) -> str:
    """How to write an argument that Hydra's grammar cannot read."""
    name, _, value = word.partition("=")
    for opening, closing in ("[]", "{}", "()"):
        if value.count(opening) != value.count(closing):
            return f"{opening} and {closing} do not match. Quote what the shell would split: 'methods=[NAME,NAME]'"
    if not NAME.fullmatch(name):
        return "a setting reads name=value, such as budget.images=400000"
    return f"a value with unusual characters needs quotes inside the shell's quotes: '{name}=\"VALUE\"'"


def grid_points(settings: list[Override], registry: Names) -> list[list[Override]]:
    """Every combination of the values that the settings are swept over."""
    axes = [_values(setting, registry) for setting in settings]
    if math.prod(map(len, axes)) > MOST_RUNS:
        raise _too_many()
    points = [list(point) for point in itertools.product(*axes)]
    for setting in itertools.chain.from_iterable(axes):
        _check_choice(setting, registry)
    return points


def _too_many() -> UserError:
    return UserError(f"the sweeps span more than {MOST_RUNS:,} runs")


def _values(setting: Override, registry: Names) -> list[Override]:
    word = str(setting.input_line)
    if not setting.is_sweep_override():
        return [setting]
    try:
        values = list(itertools.islice(setting.sweep_string_iterator(), MOST_RUNS + 1))
    except HydraException as error:
        raise UserError(f"cannot sweep {quoted(word)}. List the values, or use range(START,STOP)") from error
    if not values:
        raise UserError(f"{quoted(word)} spans no value")
    if len(values) > MOST_RUNS:
        raise _too_many()
    given = setting.value()
    if isinstance(given, RangeSweep) and setting.key_or_group not in CHOICES and not given.shuffle:
        return [_at(setting, value) for value in setting.sweep_iterator()]  # thousands of numbers need no parsing
    written = split_values(word.partition("=")[2])
    if isinstance(given, ChoiceSweep) and given.simple_form and len(written) == len(values):
        values = written  # Hydra gives the values that it parsed: 20240101 for 2024_01_01
    return [parse_override(f"{setting.get_key_element()}={value}", registry) for value in values]


def _at(setting: Override, value: Any) -> Override:
    """The override with one number of its range."""
    word = f"{setting.get_key_element()}={value}"
    return dataclasses.replace(setting, value_type=ValueType.ELEMENT, _value=value, input_line=word)


def _check_choice(setting: Override, registry: Names) -> None:
    key = setting.key_or_group
    if key not in CHOICES:
        return
    value = setting.value()
    names = value if isinstance(value, list) else [value]
    if key in GROUPS:  # configs/teacher has variants for experiments alone
        possible = sorted(registry.of_kind(GROUPS[key]))
    else:
        possible = GlobalHydra.instance().config_loader().get_group_options(key)
    for name in names:
        if name not in possible:
            raise registry.no(key.removesuffix("s"), "null" if name is None else str(name), possible)
    if key != "methods" and len(names) != 1:
        every = ",".join(map(str, names))
        raise UserError(f"{key} takes one name, got [{every}]. To sweep over several write {key}={every or 'NAME'}")


def no_setting(
    path: str, part: str, where: str, names: Iterable[str], kind: str, replaced: Mapping[str, str] = NOTHING_REPLACED
) -> UserError:  # fmt: skip
    """The error for a setting `path` whose `part` is none of `names`, the settings below `where`.

    `kind` is the choice that these settings belong to, such as the name of the dataset. `replaced`: what came in the
    place of settings of earlier versions.
    """
    names = sorted(name for name in names if name != "kind") + ([] if where else ["experiment"])
    near, possible = nearest(part, names), f"Possible: {', '.join(names) or 'none'}"
    if where == "methods":
        chosen = f"methods=[{','.join(names)}]"
        return UserError(f"no setting {quoted(path)}: {quoted(part)} is not among {chosen}{near and '.'}{near}")
    level = f" in '{where}'{f' ({where}={kind})' if where in CHOICES else ''}" if where else ""
    if part in replaced:
        near = f" It was replaced by {replaced[part]}."
    if where == "executor" and (kinds := kinds_with(part)):
        near = f" It is one of executor={' and '.join(kinds)}."
    return UserError(f"no setting {quoted(part)}{level}.{near} {possible}")


def below_value(path: str, where: str) -> UserError:
    """The error for a setting `path` below the value `where`."""
    return UserError(f"no setting {quoted(path)}: '{where}' is a value, it has no settings below it")


def no_dataset(possible: Iterable[str]) -> UserError:
    """The error for settings without a dataset."""
    return UserError(f"no dataset given. Write dataset=NAME; possible: {', '.join(sorted(possible))}")


def no_method(possible: Iterable[str]) -> UserError:
    """The error for settings without a method."""
    return UserError(f"no method given. Write methods=[NAME,...]; possible: {', '.join(sorted(possible))}")


def first_line(error: BaseException, count: int = 1) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) if lines else type(error).__name__
