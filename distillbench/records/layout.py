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
        """What can be made again, by kind: "teachers", "pairs", "latents", "references", "answers", "jobs", ..."""
        return self.root / CACHE / name
