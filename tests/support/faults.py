"""Classes with one fault each, and how they are checked: a decorator names the check that finds the fault."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from distillbench.testing.checks import Check, Finding, examine
from distillbench.testing.conformance import SUITES

Fault = tuple[type, str, str]  # the class, the check, a part of its message


def gatherer() -> tuple[list[Fault], Callable[[str, str], Callable[[type], type]]]:
    """A list of faults, and ``fault(check, message)``: a decorator that adds its class to the list."""
    faults: list[Fault] = []

    def fault(check: str, message: str) -> Callable[[type], type]:
        def add(cls: type) -> type:
            faults.append((cls, check, message))
            return cls

        return add

    return faults, fault


def failed(found: list[Finding]) -> dict[str, str]:
    """The messages of the failed checks, by check."""
    return {finding.check: finding.message for finding in found if finding.ok is False}


def found_in(kind: str, cls: type, check: str, all_checks: bool = False) -> list[Finding]:
    """The findings of `check` on all its benches, and before it of the checks that it needs, on their first bench.

    With `all_checks` every other one runs too. `device`, which starts a process for each class, runs only if it is the
    check in question.
    """
    suite = SUITES[kind]
    once = {c.name: dataclasses.replace(c, benches="first") for c in suite.checks if c.benches == "every"}
    names = {c.name for c in suite.checks} - {"device"} if all_checks else needed(suite.checks, check)
    checks = [c if c.name == check else once.get(c.name, c) for c in suite.checks if c.name in names | {check}]
    with suite.benches(cls, None, 0, None) as benches:
        return list(examine(checks, benches))


def needed(checks: Sequence[Check], name: str) -> set[str]:
    """The names of the checks that the check `name` needs, and that these need."""
    (direct,) = (check.needs for check in checks if check.name == name)
    return set(direct).union(*(needed(checks, each) for each in direct))
