"""Tests on simulated GPUs: a script's checks, run in one fresh process, with results as JSON.

The simulation patches torch for the rest of the process, so it must not run in the process of the tests. A script has
functions decorated with ``@check`` and ends with ``main()``; test modules get the return values by :func:`results_of`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHECKS: dict[str, Callable[[], Any]] = {}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register a function; its return value, as JSON, is a result."""
    CHECKS[function.__name__] = function
    return function


def main() -> None:
    """Run all checks of the script, or those named on the command line, and print or write their results."""
    out, *names = sys.argv[1:] or ["-"]
    results = {}
    for name in names or CHECKS:
        try:
            results[name] = CHECKS[name]()
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
    text = json.dumps(results, indent=1)
    if out == "-":
        print(text)
    else:
        Path(out).write_text(text)


class Results(dict):
    """Results of checks. Looking up one that raised an error fails with its traceback."""

    def __getitem__(self, name: str) -> Any:
        result = super().__getitem__(name)
        if isinstance(result, dict) and "failed" in result:
            raise AssertionError(f"{name} failed on the simulated GPU:\n{result['failed']}")
        return result


def results_of(script: str, *checks: str, seconds: float = 600, **environment: str) -> Results:
    """The results of `checks` (all by default) of tests/support/`script`, run in a separate process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        paths = [str(HERE), str(ROOT), str(ROOT / "plugins")]
        code = f"import sys, runpy; sys.path[:0] = {paths!r}; sys.argv = {['x', str(out), *checks]!r}; "
        code += f"runpy.run_path({str(HERE / script)!r}, run_name='__main__')"
        command, environ = [sys.executable, "-c", code], os.environ | environment
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environ)
        if not out.is_file():
            raise AssertionError(f"{script} ended without results:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return Results(json.loads(out.read_text()))
