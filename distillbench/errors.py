"""Errors that a user can act on, and the words they are made of."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["DivergedError", "Unavailable", "UserError", "nearest", "quoted", "unknown"]

LONGEST_QUOTE = 60
LONGEST_REASON = 300  # characters of what a library says


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
    return UserError(f"no {kind} {quoted(got)}{where}.{nearest(got, names)} Possible: {listed}")


def unsupported(kind: str, got: str, possible: Iterable[str], where: str = "") -> UserError:
    """The same for a name that a file gives and that is no slip of a user's: the nearest match would mislead.

    >>> str(unsupported("scheduler", "LCMScheduler", ["PNDMScheduler", "DDIMScheduler"]))
    "no scheduler 'LCMScheduler'. Possible: DDIMScheduler, PNDMScheduler"
    """
    return UserError(f"no {kind} {quoted(got)}{where}. Possible: {', '.join(sorted(possible))}")


def nearest(got: str, possible: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of `possible`, upper or lower case, or nothing."""
    by_lower_case = {name.lower(): name for name in possible}
    near = get_close_matches(got[:LONGEST_QUOTE].lower(), by_lower_case, n=1)
    return f" Did you mean '{by_lower_case[near[0]]}'?" if near else ""


def printable(text: str) -> str:
    """`text` with what would move a terminal's cursor, or is no text at all, spelled out: names come from strangers."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def quoted(got: str) -> str:
    """What the user gave, in quotes, on one line and not too long for a message.

    >>> quoted("9" * 5000)
    "'999999999999999999999999999999999999999999999999999999999999...'"
    """
    return repr(got if len(got) <= LONGEST_QUOTE else got[:LONGEST_QUOTE] + "...")
