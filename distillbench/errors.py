"""Errors that a user can act on, and helpers for their messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = ["DivergedError", "Unavailable", "UserError", "nearest", "quoted", "unknown"]

MOST_LISTED = 20  # names in a message
LONGEST_QUOTE = 60
LONGEST_REASON = 300  # characters of a library's message


class UserError(Exception):
    """Something the user gave cannot be used. Shown as one message, without a traceback; exit code 2."""


class DivergedError(Exception):
    """A loss, a weight or a sample is not finite. The cell gets status ``diverged``; other cells run."""


class Unavailable(Exception):
    """A value cannot be measured here. The message is shown as the reason for the empty value."""


def unknown(kind: str, got: str, possible: Iterable[str], where: str = "") -> UserError:
    """A :class:`UserError` for a name that does not exist: what was given, the nearest match, what is possible.

    At most MOST_LISTED names are listed.

    >>> str(unknown("method", "bot", ["boot", "cm"]))
    "no method 'bot'. Did you mean 'boot'? Possible: boot, cm"
    """
    names = sorted(possible)
    listed = first_of(names, MOST_LISTED) if names else "none is installed"
    return UserError(f"no {kind} {quoted(got)}{where}.{nearest(got, names)} Possible: {listed}")


def unsupported(kind: str, got: str, possible: Iterable[str], where: str = "") -> UserError:
    """Like :func:`unknown`, for a name from a file, which is no typing error: the nearest match would mislead.

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
    """`text` with control characters escaped: names in third-party files must not move the terminal's cursor."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def quoted(got: str) -> str:
    """The user's input in quotes, on one line and shortened.

    >>> quoted("9" * 5000)
    "'999999999999999999999999999999999999999999999999999999999999...'"
    """
    return repr(got if len(got) <= LONGEST_QUOTE else got[:LONGEST_QUOTE] + "...")


def counted(count: int, one: str, many: str = "") -> str:
    """`count` with its noun, which takes an s or is `many` if there is not one.

    >>> counted(1200, "file"), counted(1, "entry", "entries")
    ('1,200 files', '1 entry')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def first_of(names: Sequence[str], most: int = 3) -> str:
    """A text with the first `most` of `names`, and how many more there are.

    >>> first_of(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
