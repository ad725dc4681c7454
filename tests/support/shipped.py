"""The methods that ship, read from pyproject.toml and not through the registry that tests check."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["distillbench"]
METHODS = tuple(sorted(name for name, module in _POINTS.items() if module == f"distillbench_{name}"))
