"""Errors on several ranks: what a rank sends to the others, and what an error of torch.distributed means."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distillbench.errors import DivergedError, UserError

CLOSED = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Socket closed", "failed to recv")
TIMED_OUT = ("Timed out", "timed out", "timeout", "Timeout")


class LostError(UserError):
    """The ranks cannot continue. The run ends; states that were saved stay."""


class Failed(BaseException):
    """All ranks leave a joint block because one of them failed. A BaseException, so that no method catches it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error  # the same on all ranks


@dataclass(frozen=True)
class Failure:
    """An error on one rank, as plain text that can be sent to the others."""

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
        """The error as other ranks raise it, with the traceback of its rank as a note."""
        kinds = {"diverged": DivergedError, "refused": UserError, "oom": torch.OutOfMemoryError}
        where = "" if self.kind in ("diverged", "refused") else f"on rank {self.rank}: "
        made = kinds.get(self.kind, RuntimeError)(f"{where}{self.text}")
        made.add_note(f"Traceback of rank {self.rank}:\n{self.traceback}")
        return made


def worst(failures: Sequence[Failure]) -> Failure:
    """The failure that all ranks raise: out of memory if there is one (smaller batches may help), else the first."""
    return next((failure for failure in failures if failure.kind == "oom"), failures[0])


def translated(error: RuntimeError) -> Exception:
    """The error that one of torch.distributed means: this rank is out of memory, or it cannot reach another rank.

    gloo has no classes of errors, only texts.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return error
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    again = "the same command continues from the last saved state"
    if any(words in text for words in CLOSED):
        return LostError(f"another rank has ended; its own output says why; {again}")
    if any(words in text for words in TIMED_OUT):
        return LostError(f"another rank does not answer ({line}); {again}")
    return LostError(f"the ranks cannot exchange messages: {type(error).__name__}: {line}; {again}")
