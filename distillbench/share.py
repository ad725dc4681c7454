"""The rows of a batch that one of several ranks, or one part of a step, computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Every `count`-th row of a batch, from row `index` on: what one of several processes, or one part of a step, does.

    So the first images of a share are among the first of the batch, and a loss on the first quarter of each share is
    one on the first quarter of the batch.
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
