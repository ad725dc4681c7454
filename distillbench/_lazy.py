"""Public names that load on first use, so that importing distillbench does not import torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def load(package: str, homes: Mapping[str, str], name: str) -> Any:
    """The public object `name` of `package`; `homes` gives the module that defines each.

    Raises:
        AttributeError: if the package has no such public name.
    """
    if name not in homes:
        raise AttributeError(f"module '{package}' has no attribute '{name}'")
    return getattr(importlib.import_module(homes[name]), name)
