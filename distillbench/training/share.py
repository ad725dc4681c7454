"""The rows of a batch that one of several ranks, or one part of a step, computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Every `count`-th row of a batch, from row `index` on.

    The rows are interleaved: the first quarters of all shares together are the first quarter of the batch, so a method
    may treat the first rows of a batch in another way than the rest.
    """

    index: int = 0
    count: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """The rows of the share."""
        return rows if self.count == 1 else rows[self.rows].contiguous()

    def size(self, batch: int) -> int:
        """How many rows of a batch it has."""
        return len(range(batch)[self.rows])

    @property
    def rows(self) -> slice:
        return slice(self.index, None, self.count)


WHOLE = Share()
