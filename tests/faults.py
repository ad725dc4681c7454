"""Classes with one fault each, gathered by a decorator that says which check finds it, and in which words."""

from __future__ import annotations

from collections.abc import Callable

Fault = tuple[type, str, str]  # the class, the check, a part of its message


def gatherer() -> tuple[list[Fault], Callable[[str, str], Callable[[type], type]]]:
    """A list, and ``fault(check, message)``: a decorator that puts its class there."""
    faults: list[Fault] = []

    def fault(check: str, message: str) -> Callable[[type], type]:
        def add(cls: type) -> type:
            faults.append((cls, check, message))
            return cls

        return add

    return faults, fault
