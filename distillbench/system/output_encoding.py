"""Substitutes for characters that the encoding of standard output lacks (ASCII, cp1252), which would raise an error.

Windows consoles and cron have such an encoding, and PYTHONIOENCODING can set any.
"""

from __future__ import annotations

import codecs
import io
import sys

SUBSTITUTES = str.maketrans({"→": ">", "↑": "^", "↓": "v", "–": "-", "…": "."})  # tables stay aligned
HANDLER = "distillbench.substitute"


def replace_unwritable() -> None:
    """Make standard output and error write a substitute for characters that their encoding lacks."""
    codecs.register_error(HANDLER, _substitute)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


def _substitute(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(SUBSTITUTES)
    return "".join(character if character.isascii() else "?" for character in text), error.end
