"""The order by which rank 0 has the other ranks extract features."""

from __future__ import annotations

from dataclasses import dataclass

from distillbench.config import RunConfig
from distillbench.registry import Selection


@dataclass(frozen=True)
class FeatureOrder:
    """Images that all look at through a feature network, by its name."""

    config: RunConfig
    selection: Selection
    network: str = ""
