"""Errors that a user can act on, and the words they are made of."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Something the user gave cannot be used. Shown as one message, without a traceback; exit code 2."""


class DivergedError(Exception):
    """Training left the finite numbers. The cell gets status ``diverged``, the others go on."""


class Unavailable(Exception):
    """A value cannot be measured here; the message is the reason that stands in for it."""


def unknown(kind: str, got: str, possible: Iterable[str], where: str = "") -> UserError:
    """A :class:`UserError` for a name that does not exist: what was got, the nearest match, what is possible.

    >>> str(unknown("method", "bot", ["boot", "cm"]))
    "no method 'bot'. Did you mean 'boot'? Possible: boot, cm"
    """
    names = sorted(possible)
    listed = ", ".join(names) if names else "none is installed"
    return UserError(f"no {kind} '{got}'{where}.{nearest(got, names)} Possible: {listed}")


def nearest(got: str, possible: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of `possible`, or nothing."""
    near = get_close_matches(got, list(possible), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
