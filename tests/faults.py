"""Classes with one fault each, collected by a decorator with the check that finds it and the message."""

from __future__ import annotations

from collections.abc import Callable

Fault = tuple[type, str, str]  # class, check, part of its message


def gatherer() -> tuple[list[Fault], Callable[[str, str], Callable[[type], type]]]:
    """A list, and ``fault(check, message)``, a decorator that adds its class to it."""
    faults: list[Fault] = []

    def fault(check: str, message: str) -> Callable[[type], type]:
        def add(cls: type) -> type:
            faults.append((cls, check, message))
            return cls

        return add

    return faults, fault
