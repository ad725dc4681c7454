"""Sampling and feature extraction by several ranks: which rank makes which batch, and how rank 0 collects them.

The batches are those of a single process and each image has its own noise, so the results are equal to the bit. An
error on one rank ends the work of all ranks in the same round.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from distillbench.evaluation.features import FeatureNetwork, Networks, extract, in_blocks
from distillbench.training.data_parallel import Ranks
from distillbench.training.turns import first_error, tried


@dataclass(frozen=True)
class SampleOrder:
    """All ranks sample a row: of the method with `weights`, of the teacher, or the teacher's many-step samples."""

    task: Any  # CellTask
    weights: Path | None = None
    nfe: int = 0
    seed: int = 0
    teacher_samples: bool = False


class SharedNetworks(Networks):
    """Feature networks with a copy on every rank, which extracts the features of its share of the images.

    `order`: a dataclass with a field `network`; the other ranks receive it with the name of the network filled in.
    """

    def __init__(self, folder: Path, device: str, ranks: Ranks, order: Any) -> None:
        super().__init__(folder, device)
        self.ranks, self.order = ranks, order

    def extract(self, network: type[FeatureNetwork], images: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        mine = self.get(network)  # raises before the others are asked
        with self.ranks.lead(replace(self.order, network=network.name)):
            error: Exception | None = None
            blocks = in_blocks(images, network.batch)
            while error is None and (row := list(itertools.islice(blocks, self.ranks.count))):
                row += [None] * (self.ranks.count - len(row))  # type: ignore[list-item]
                found, error = self._round(mine, self.ranks.scatter([(True, block) for block in row])[1])
                try:
                    yield from found
                except GeneratorExit:  # the caller needs no more features, and the other ranks have to know
                    break
            if error is None:
                self.ranks.scatter([(False, None)] * self.ranks.count)
        if error is not None:
            raise error

    def follow_extraction(self, network: type[FeatureNetwork]) -> None:
        """What non-zero ranks do."""
        mine = self.get(network)
        error: Exception | None = None
        while error is None and (received := self.ranks.scatter([]))[0]:
            _, error = self._round(mine, received[1])

    def _round(self, network: FeatureNetwork, block: Tensor | None) -> tuple[list[Tensor], Exception | None]:
        """The features of one block for each rank."""
        blocks = [] if block is None else [block]
        seen, error = tried(lambda _: next(extract(network, blocks, self.device)).cpu(), 0, len(blocks))
        if (wrong := first_error(error, self.ranks)) is not None:
            return [], wrong
        return [features for features in self.ranks.gather(seen) if features is not None], None
