"""Errors of several processes: what one of them sends the others, and what a message that fails means."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distillbench.errors import DivergedError, UserError

CLOSED = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Socket closed", "failed to recv")
LATE = ("Timed out", "timed out", "timeout", "Timeout")


class LostError(UserError):
    """The processes cannot go on together. The run ends; what was kept is kept."""


class Failed(BaseException):
    """All processes leave what they do together, since one of them failed. No method can catch it by mistake."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error  # the same in all processes


@dataclass(frozen=True)
class Failure:
    """An error in one process, in words that the others can be sent."""

    kind: str  # diverged, refused (UserError), oom or failed
    text: str
    traceback: str
    rank: int

    @staticmethod
    def of(error: Exception, rank: int) -> Failure:
        kinds = {DivergedError: "diverged", UserError: "refused", torch.OutOfMemoryError: "oom", MemoryError: "oom"}
        kind = next((name for cls, name in kinds.items() if isinstance(error, cls)), "failed")
        text = str(error) if kind in ("diverged", "refused") else f"{type(error).__name__}: {error}"
        return Failure(kind, text, "".join(traceback.format_exception(error)), rank)

    def error(self) -> Exception:
        """The error as the other processes raise it, with the traceback of its own process as a note."""
        kinds = {"diverged": DivergedError, "refused": UserError, "oom": torch.OutOfMemoryError}
        where = "" if self.kind in ("diverged", "refused") else f"in process {self.rank}: "
        made = kinds.get(self.kind, RuntimeError)(f"{where}{self.text}")
        made.add_note(f"Traceback of process {self.rank}:\n{self.traceback}")
        return made


def worst(failures: Sequence[Failure]) -> Failure:
    """The failure that stands for all: memory that ran out, which fewer images at a time may help; else the first."""
    return next((failure for failure in failures if failure.kind == "oom"), failures[0])


def of_message(error: RuntimeError) -> Exception:
    """What an error of torch.distributed means: one of this process's own, or that the others cannot be reached.

    gloo has no types of error, only texts.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return error
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    again = "the same command goes on from what is kept"
    if any(words in text for words in CLOSED):
        return LostError(f"another of the processes has ended, and says why itself; {again}")
    if any(words in text for words in LATE):
        return LostError(f"another of the processes does not answer ({line}); {again}")
    return LostError(f"the processes cannot exchange messages: {type(error).__name__}: {line}; {again}")
