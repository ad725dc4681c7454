"""The command line within the process of a test."""

from __future__ import annotations

from distillbench.cli import commands


def exit_code(*words: str) -> int | str | None:
    """What ``distillbench WORDS`` exits with."""
    try:
        commands.main(words)
    except SystemExit as done:
        return done.code
    return 0
