"""Sampling and feature extraction by several processes: who does which batch, and how the main one gets them all.

Batches, and blocks of feature networks, are those of one process alone, and an image's noise is its own: so what comes
out is the same to the bit. An error in one process ends the work of all of them, in the same round.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distillbench.features import FeatureNetwork, Networks, blocks_of, look
from distillbench.ranks import Ranks
from distillbench.turns import first_error, tried

if TYPE_CHECKING:
    from distillbench.config import RunConfig
    from distillbench.registry import Selection


@dataclass(frozen=True)
class SampleOrder:
    """A row that all sample: of the method with these weights, of the teacher, or the teacher's many-step answers."""

    task: Any  # the cell
    weights: Path | None = None
    nfe: int = 0
    seed: int = 0
    answers: bool = False


@dataclass(frozen=True)
class FeatureOrder:
    """Images that all look at through a feature network, by its name."""

    config: RunConfig
    selection: Selection
    network: str = ""


class SharedNetworks(Networks):
    """The same, of which every process has a copy that looks at its share of the images."""

    def __init__(self, folder: Path, device: str, ranks: Ranks, order: FeatureOrder) -> None:
        super().__init__(folder, device)
        self.ranks, self.order = ranks, order

    def look(self, network: type[FeatureNetwork], images: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        mine = self.get(network)  # raises before the others are asked
        with self.ranks.lead(replace(self.order, network=network.name)):
            error: Exception | None = None
            blocks = blocks_of(images, network.batch)
            while error is None and (row := list(itertools.islice(blocks, self.ranks.count))):
                row += [None] * (self.ranks.count - len(row))  # type: ignore[list-item]
                found, error = self._round(mine, self.ranks.scatter([(True, block) for block in row])[1])
                try:
                    yield from found
                except GeneratorExit:  # the features are not wanted any longer, and the others must hear of it
                    break
            if error is None:
                self.ranks.scatter([(False, None)] * self.ranks.count)
        if error is not None:
            raise error

    def look_along(self, network: type[FeatureNetwork]) -> None:
        """A follower's share."""
        mine = self.get(network)
        error: Exception | None = None
        while error is None and (told := self.ranks.scatter([]))[0]:
            _, error = self._round(mine, told[1])

    def _round(self, network: FeatureNetwork, block: Tensor | None) -> tuple[list[Tensor], Exception | None]:
        """The features of one block for each process."""
        blocks = [] if block is None else [block]
        seen, error = tried(lambda _: next(look(network, blocks, self.device)).cpu(), 0, len(blocks))
        if (wrong := first_error(error, self.ranks)) is not None:
            return [], wrong
        return [features for features in self.ranks.gather(seen) if features is not None], None
