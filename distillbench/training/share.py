"""The rows of a batch that one of several ranks, or one part of a step, computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Every `count`-th row of a batch, from row `index` on; with `group` > 1 every `count`-th group of so many rows.

    The rows are interleaved: the first quarters of all shares together are the first quarter of the batch, so a method
    may treat the first rows of a batch in another way than the rest. With groups, the number of rows of the batch must
    be a multiple of `group`.
    """

    index: int = 0
    count: int = 1
    group: int = 1

    def of(self, rows: Tensor) -> Tensor:
        """The rows of the share."""
        return rows if self.count == 1 else self.view(rows).contiguous()

    def view(self, rows: Tensor) -> Tensor:
        """The same rows, in the memory of `rows` if there are no groups."""
        if self.group == 1:
            return rows[self._numbers]
        return rows.unflatten(0, (len(rows) // self.group, self.group))[self._numbers].flatten(0, 1)

    def size(self, batch: int) -> int:
        """How many rows of a batch it has."""
        return self.group * len(range(batch // self.group)[self._numbers])

    @property
    def _numbers(self) -> slice:
        """Of its rows, or of its groups."""
        return slice(self.index, None, self.count)


def parts_of(size: int, microbatch: int, count: int = 1, group: int = 1) -> int:
    """In how many parts each of `count` ranks computes its share of a batch of `size` images; `microbatch` 0: in one.

    A part has at most `microbatch` images, in whole groups. All ranks need the same number of parts: if one of them has
    fewer groups than that, its number of groups.
    """
    groups = size // group
    if not microbatch:
        return 1
    largest, at_once = -(-groups // count), max(1, microbatch // group)
    return max(1, min(-(-largest // at_once), groups // count))


WHOLE = Share()
