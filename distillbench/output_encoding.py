"""Standard output and error in encodings without our characters (ASCII, cp1252): replaced, so that nothing dies of it.

Windows consoles have such an encoding, cron has one, and PYTHONIOENCODING sets any.
"""

from __future__ import annotations

import codecs
import io
import sys

SUBSTITUTES = str.maketrans({"→": ">", "↑": "^", "↓": "v", "–": "-", "…": "."})  # one for one: tables stay aligned
HANDLER = "distillbench.substitute"


def replace_unwritable() -> None:
    """From now on standard output and error write a substitute for a character that their encoding does not have."""
    codecs.register_error(HANDLER, _substitute)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)


def _substitute(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(SUBSTITUTES)
    return "".join(character if character.isascii() else "?" for character in text), error.end
