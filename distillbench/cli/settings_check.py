"""Checks of a run's settings by the table of plugins, in a moment: torch and the plugins are not imported.

It finds wrong names and words where a number must be. All other checks follow when the plugins are loaded. What it
cannot decide, such as settings of an experiment's methods, it leaves to them. Messages are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hydra import initialize_config_dir
from hydra.core.override_parser.types import Override

from distillbench.cli.plugin_table import PluginTable, Setting
from distillbench.errors import UserError, quoted
from distillbench.runs.overrides import (
    CHOICES,
    GROUPS,
    NOTHING_REPLACED,
    below_value,
    config_folder,
    grid_points,
    no_dataset,
    no_method,
    no_setting,
    parse_override,
)

DEFAULT_TEACHER = "trained"  # of configs/config.yaml
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "y", "n", "t", "f", "1", "0")


def check_words(words: Sequence[str], table: PluginTable, need_methods: bool = True) -> None:
    """Raise the UserError for the first of `words` that names what does not exist, or has a word for a number."""
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        words = [word for word in words if word.partition("=")[0] != "executor"]  # its names are not in this folder
        points = grid_points([parse_override(word, table) for word in words], table)
    for point in points:
        given = {setting.key_or_group: setting for setting in point}
        chosen = {group: _names(given[group]) for group in GROUPS if group in given}
        if "experiment" not in given:
            if "dataset" not in chosen:
                raise no_dataset(table.of_kind("datasets"))
            chosen.setdefault("methods", [])
            if "teacher.download" not in given:  # with it, the dataset decides
                chosen.setdefault("teacher", [DEFAULT_TEACHER])
        for setting in point:
            if setting.key_or_group not in CHOICES:
                _check(setting, chosen, table)
        if need_methods and chosen.get("methods") == []:
            raise no_method(table.of_kind("methods"))


def _names(setting: Override) -> list[str]:
    value = setting.value()
    return [str(name) for name in (value if isinstance(value, list) else [value])]


def _check(setting: Override, chosen: dict[str, list[str]], table: PluginTable) -> None:
    """Check the name of a setting that is no choice, and its value."""
    path = setting.key_or_group
    first, _, rest = path.partition(".")
    if first not in CHOICES:
        tops = {one.name.partition(".")[0] for one in table.settings}
        if first not in tops:
            raise no_setting(path, first, "", tops, "")
        _check_below(setting, path, "", table.settings, "")
    elif first == "methods" and rest and "methods" in chosen:
        name, _, rest = rest.partition(".")
        if name not in chosen["methods"]:
            raise no_setting(path, name, "methods", chosen["methods"], "")
        if rest:
            method = table.kinds["methods"][name]
            _check_below(setting, rest, f"methods.{name}", method.settings, name, method.replaced)
    elif first in ("dataset", "teacher") and rest and first in chosen:
        (name,) = chosen[first]
        _check_below(setting, rest, first, table.kinds[GROUPS[first]][name].settings, name)


def _check_below(
    setting: Override, path: str, where: str, settings: Iterable[Setting], kind: str,
    replaced: Mapping[str, str] = NOTHING_REPLACED,
) -> None:  # fmt: skip
    """Check the setting `path` of the group `where`, which has these settings."""
    known = {one.name: one for one in settings}
    parts, whole = path.split("."), setting.key_or_group
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if above in known:
            raise below_value(whole, ".".join(filter(None, [where, above])))
        start = f"{above}." if above else ""
        level = {name.removeprefix(start).partition(".")[0] for name in known if name.startswith(start)}
        if part not in level and part != "kind":
            raise no_setting(
                whole, part, ".".join(filter(None, [where, above])), level, kind, {} if above else replaced
            )
    if path in known:
        _check_number(setting, known[path])


def _check_number(setting: Override, known: Setting) -> None:
    """Refuse a word where a number, or true or false, must be."""
    value = setting.value()
    if not known.kind or not isinstance(value, str) or "${" in value or value == "???":
        return
    if known.kind == "bool":
        wrong = value.lower() not in BOOLEANS
    else:
        try:
            float(value)
            wrong = False
        except ValueError:
            wrong = True
    if wrong:
        text = str(setting.input_line).partition("=")[2]
        raise UserError(f"{setting.key_or_group} must be {known.wanted}, got {quoted(text)}")
