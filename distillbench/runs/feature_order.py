"""The order from rank 0 to the other ranks to extract features."""

from __future__ import annotations

from dataclasses import dataclass

from distillbench.registry import Selection
from distillbench.runs.config import RunConfig


@dataclass(frozen=True)
class FeatureOrder:
    """All ranks extract features with `network`, by its name. The settings rebuild the same networks on each rank."""

    config: RunConfig
    selection: Selection
    network: str = ""
