"""Batches that several ranks compute in turns, and how an error in one of them reaches all."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distillbench.training.data_parallel import Ranks
from distillbench.training.failures import Failure, LostError, worst


def in_turns(
    count: int, make: Callable[[int], Tensor], ranks: Ranks, keep: Callable[[Tensor], None]
) -> Exception | None:
    """Batches 0, ..., count - 1, number i computed by rank i mod their count. Rank 0 keeps all, in order.

    Returns the error that a rank has raised, on all ranks; None without one.
    """
    for first in range(0, count, ranks.count):
        batch, error = tried(make, first + ranks.share.index, count)
        if (wrong := first_error(error, ranks)) is not None:
            return wrong
        for tensor in ranks.gather(batch):
            if tensor is not None:
                keep(tensor)
    return None


def tried(make: Callable[[int], Tensor], index: int, count: int) -> tuple[Tensor | None, Exception | None]:
    """``make(index)`` or its error; (None, None) if there is no batch `index`."""
    try:
        return (make(index) if index < count else None), None
    except LostError:
        raise
    except Exception as error:  # third-party code, and the other ranks must learn of it
        return None, error


def first_error(error: Exception | None, ranks: Ranks) -> Exception | None:
    """This rank's `error`, or else one of another rank; None if no rank has one."""
    mine = None if error is None else Failure.of(error, ranks.share.index)
    failures = [failure for failure in ranks.all_gather(mine) if failure is not None]
    if error is not None or not failures:
        return error
    return worst(failures).error()
