"""The layout of a results folder: where records, caches and runs are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CELLS, CACHE = "cells", "cache"  # folders beside those of runs


@dataclass(frozen=True)
class ResultsFolder:
    """The paths below ``results_dir``."""

    root: Path

    @staticmethod
    def of(results_dir: str) -> ResultsFolder:
        return ResultsFolder(Path(results_dir))

    @property
    def cells(self) -> Path:
        """The records of all cells, one folder for each."""
        return self.root / CELLS

    def cache(self, name: str) -> Path:
        """The folder of a kind of files that can be computed again: "teachers", "pairs", "latents", "answers", ..."""
        return self.root / CACHE / name
