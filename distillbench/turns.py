"""Batches that several ranks compute in turns, and how an error in one of them reaches all."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distillbench.failures import Failure, LostError, worst
from distillbench.ranks import Ranks


def in_turns(count: int, make: Callable[[int], Tensor], ranks: Ranks) -> tuple[list[Tensor], Exception | None]:
    """Batches 0, ..., count - 1, number i made by process i mod their number; in the main one all of them, in order.

    With what went wrong in some process, where something did.
    """
    made: list[Tensor] = []
    for first in range(0, count, ranks.count):
        batch, error = tried(make, first + ranks.share.index, count)
        if (wrong := first_error(error, ranks)) is not None:
            return made, wrong
        made += [tensor for tensor in ranks.gather(batch) if tensor is not None]
    return made, None


def tried(make: Callable[[int], Tensor], index: int, count: int) -> tuple[Tensor | None, Exception | None]:
    try:
        return (make(index) if index < count else None), None
    except LostError:
        raise
    except Exception as error:  # a method is a stranger's code, and the others must hear of it
        return None, error


def first_error(error: Exception | None, ranks: Ranks) -> Exception | None:
    mine = None if error is None else Failure.of(error, ranks.share.index)
    failures = [failure for failure in ranks.all_gather(mine) if failure is not None]
    if error is not None or not failures:
        return error
    return worst(failures).error()
