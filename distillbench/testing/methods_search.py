"""The check of what a method declares for ``distillbench tune``: its search space.

A search sets these settings at random, so each value in them, and any of their combinations, must give a method that
is trained and scored like the default one.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distillbench.errors import UserError, unknown
from distillbench.options import (
    MOST_SEARCHED,
    Among,
    Between,
    Space,
    declares_search_space,
    search_space,
    setting_of,
    with_settings,
)
from distillbench.teachers.teacher import Teacher
from distillbench.testing.checks import Fault
from distillbench.testing.method_bench import USUAL_NFE, MethodBench, workspace_of
from distillbench.training.budget import BudgetConfig
from distillbench.training.method import Method
from distillbench.training.optimizer_config import OptimizerConfig

COMBINATIONS = 16  # of values of all settings, drawn at random
BUILT = 6  # of them


def search(bench: MethodBench) -> str:
    """The defaults lie in the search space, and all its values build methods with the same inputs and evaluations."""
    config = bench.cls.Config
    spaces = {"training": _space(config, sampling=False), "sampling": _space(config, sampling=True)}
    for used_by, space in spaces.items():
        if len(space) > MOST_SEARCHED:
            raise Fault(
                f"{len(space)} settings of {used_by} are searched, at most {MOST_SEARCHED} may be: {', '.join(space)}. "
                "Leave out those that matter least, or fix one with search=Among([DEFAULT])"
            )
        for name, entry in space.items():
            _check_default(config, name, entry)
        for name, value in _single(space):
            _configured(config, {name: value})
        for settings in _combinations(space):
            _configured(config, settings)
    _check_methods(bench, spaces["training"])
    return _in_words(config, spaces)


def _in_words(config: type, spaces: dict[str, Space]) -> str:
    names = ", ".join(spaces["training"])
    if not declares_search_space(config):
        return f"none is declared: {names} alone are searched, around their defaults"
    more = f", and in samples {', '.join(spaces['sampling'])}" if spaces["sampling"] else ""
    return f"{len(spaces['training'])} settings: {names}{more}"


def _space(config: type, sampling: bool) -> Space:
    """The search space; raises Fault for a setting of a setting that does not exist."""
    space = search_space(config, sampling)
    for name in space:
        outer, point, inner = name.partition(".")
        if not point:
            continue
        held = getattr(config(), outer)
        names = [f.name for f in dataclasses.fields(held)] if dataclasses.is_dataclass(held) else []
        if inner not in names:
            what = f"setting of {outer} (in its search)"
            raise Fault(str(unknown(what, inner, names)) if names else f"{outer} has no settings, so no {name} either")
    return space


def _check_default(config: type, name: str, entry: Between | Among) -> None:
    """Raise Fault unless the default of a setting lies in its search, among values of one type."""
    default = setting_of(config(), name)
    ends = (entry.low, entry.high) if isinstance(entry, Between) else entry.values
    ints = [value for value in ends if type(value) is int]
    if ints and (type(default) is float or any(type(value) is float for value in ends)):
        raise Fault(f"the search of {name} mixes ints and floats: write {float(ints[0])} for {ints[0]}, got {entry!r}")
    if default not in entry:
        raise Fault(f"the default of {name}, {default!r}, is not in its search ({entry}). Extend the search to it")


def _values(entry: Between | Among) -> tuple[Any, ...]:
    """The ends of a range, or all choices."""
    return (entry.low, entry.high) if isinstance(entry, Between) else entry.values


def _combinations(space: Space) -> Iterator[dict[str, Any]]:
    """Settings that have all their first, or all their last values, and such values mixed at random."""
    choose = random.Random(0).choice
    yield {name: _values(entry)[0] for name, entry in space.items()}
    yield {name: _values(entry)[-1] for name, entry in space.items()}
    for _ in range(COMBINATIONS):
        yield {name: choose(_values(entry)) for name, entry in space.items()}


def _single(space: Space) -> Iterator[tuple[str, Any]]:
    """Each value of each setting."""
    return ((name, value) for name, entry in space.items() for value in _values(entry))


def _configured(config: type, settings: dict[str, Any]) -> None:
    try:
        with_settings(config(), settings)
    except UserError as error:
        raise Fault(f"{_written(settings)} is in the search space, and the settings refuse it: {error}") from error


def _check_methods(bench: MethodBench, space: Space) -> None:
    """Build a method with each value of each setting that is the method's own, and compare it with the default one.

    Some combinations are built, too.
    """
    teacher = bench.teacher()
    default = _built(bench, teacher, {})
    of_optimizers = {f.name for f in dataclasses.fields(OptimizerConfig)}
    for name, value in _single(space):
        if name not in of_optimizers and "." not in name and value != setting_of(default.config, name):
            _check_same(default, _built(bench, teacher, {name: value}), f"{name}={value}")
    for settings in itertools.islice(_combinations(space), BUILT):
        _built(bench, teacher, settings)


def _built(bench: MethodBench, teacher: Teacher, settings: dict[str, Any]) -> Method:
    config = with_settings(bench.cls.Config(), settings)
    try:
        method = dataclasses.replace(bench, given=config).method(teacher)
        method.prepare(workspace_of(method, Path(), BudgetConfig(), dry=True, device=bench.device))
        return method
    except UserError as error:
        raise Fault(f"{_written(settings)} is in the search space, and the method refuses it: {error}") from error


def _check_same(default: Method, method: Method, settings: str) -> None:
    """Raise Fault if the method reads other data, follows another teacher, or loses a number of evaluations."""
    for what, of in (
        ("whether it reads real images", lambda method: bool(method.reads_data(method.config))),
        ("whether it uses the teacher", lambda method: bool(method.uses_teacher)),
    ):
        if of(method) != of(default):
            raise Fault(f"{settings} changes {what}, so it would be another comparison: do not search it")
    lost = [nfe for nfe in USUAL_NFE if default.supports(nfe) and not method.supports(nfe)]
    if lost:
        raise Fault(
            f"with {settings} it does not sample with NFE {', '.join(map(str, lost))}, as it does by "
            "default: a search must not change what can be scored"
        )


def _written(settings: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())
