"""Substitutes for characters that the encoding of standard output lacks (ASCII, cp1252), which would raise an error.

Windows consoles and cron have such an encoding, and PYTHONIOENCODING can set any.
"""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

SUBSTITUTES = {"→": ">", "↑": "^", "↓": "v", "–": "-", "—": "-", "…": ".", "×": "x", "·": "."}  # tables stay aligned
PLUS_MINUS = "±"
HANDLER = "distillbench.substitute"
ASCII = "distillbench_ascii"  # click writes UTF-8 to a stream whose encoding is called ascii


def replace_unwritable() -> None:
    """Make standard output and error write a substitute for characters that their encoding lacks."""
    codecs.register_error(HANDLER, _substitute)
    codecs.register(_find_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_ascii = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding=ASCII if is_ascii else None, errors=HANDLER)


def _find_ascii(name: str) -> codecs.CodecInfo | None:
    if name != ASCII:
        return None
    known = codecs.lookup("ascii")
    parts = (known.streamreader, known.streamwriter, known.incrementalencoder, known.incrementaldecoder)
    return codecs.CodecInfo(known.encode, known.decode, *parts, name=ASCII)


def _substitute(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text, end = error.object, error.end
    substitute = "".join(map(_substitute_of, text[error.start : end]))
    if text[end - 1] == PLUS_MINUS and text[end : end + 1] == " ":  # "1 ± 2" and "1 +-2" are equally long
        end += 1
    return substitute, end


def _substitute_of(character: str) -> str:
    if character == PLUS_MINUS:
        return "+-"
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return SUBSTITUTES.get(character) or (plain if len(plain) == 1 else "?")
