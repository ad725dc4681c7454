"""What a check of ``distillbench doctor`` examines and what it gives: :class:`Installation` and :class:`Finding`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distillbench.registry import Registry
from distillbench.system.progress import Progress

Level = Literal["ok", "warning", "wrong"]
MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """One line of the report, and what to do about it."""

    level: Level
    line: str
    advice: str = ""


@dataclass(frozen=True)
class Installation:
    """What is examined. Without `thorough` large files are not read and slow packages not imported."""

    registry: Registry
    results_dir: Path
    weights: Path  # folder with the weights of feature networks
    thorough: bool = False
    progress: Progress = field(default_factory=lambda: Progress(None))


Check = Callable[[Installation], Iterator[Finding]]
