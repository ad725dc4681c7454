"""How many updates of a training were clipped, or had gradients that were not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class UpdateCounts:
    """Updates of all networks of a training together.

    Norms of gradients stay on the device until the loss is read, so that no step waits for them.
    """

    def __init__(self) -> None:
        self.updates = 0
        self.nonfinite = 0  # updates whose gradients were not finite; in fp16 the loss scaler skips them
        self.clipped: int | None = None  # updates that the network's grad_clip has limited; None: none has one
        self.complete = True  # False: a part of the training was done by a version that did not count
        self._norms: dict[float, list[Tensor]] = {}  # not read yet, by grad_clip

    def add(self, norm: Tensor, largest: float) -> None:
        """Count an update whose gradients have this norm, or largest element, (), clipped to `largest`; 0: not."""
        self.updates += 1
        self._norms.setdefault(largest, []).append(norm)

    def unread(self) -> list[Tensor]:
        """Two float64 numbers on the device, for :meth:`note`: clipped and not finite since the last read; or []."""
        if not self._norms:
            return []
        of_all = {largest: torch.stack(norms).double() for largest, norms in self._norms.items()}
        self._norms.clear()
        clipped = [(norms.isfinite() & (norms > largest)).sum() for largest, norms in of_all.items() if largest]
        if clipped:
            self.clipped = self.clipped or 0
        nonfinite = torch.stack([(~norms.isfinite()).sum() for norms in of_all.values()]).sum()
        total = torch.stack(clipped).sum() if clipped else torch.zeros_like(nonfinite)
        return [total.double(), nonfinite.double()]

    def note(self, counts: list[float]) -> None:
        """Add the numbers of :meth:`unread`, read from the device."""
        if counts:
            clipped, nonfinite = counts
            self.clipped = None if self.clipped is None else self.clipped + int(clipped)
            self.nonfinite += int(nonfinite)

    def state(self) -> dict[str, Any]:
        """The counts until now, as plain values; waits for the device."""
        self.note([number.item() for number in self.unread()])
        return {
            "updates": self.updates,
            "clipped": self.clipped,
            "nonfinite": self.nonfinite,
            "complete": self.complete,
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Continue from the result of :meth:`state`; None: from a version that did not count."""
        if state is None:
            self.complete = False
            return
        self.updates, self.nonfinite, self.clipped = state["updates"], state["nonfinite"], state["clipped"]
        self.complete = state["complete"]
