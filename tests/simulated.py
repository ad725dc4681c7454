"""Tests on simulated GPUs: a script's checks, run in one fresh process, and their results as JSON.

torch is changed for good by the simulation, so no test of this process may have it. A script has functions decorated
with ``@check``, and ends with ``main()``; the test module asks :func:`results_of` for what all of them returned.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKS: dict[str, Callable[[], Any]] = {}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    """Register a function whose return value, as JSON, is a result."""
    CHECKS[function.__name__] = function
    return function


def main() -> None:
    """Run the checks of the script, or those that are named on the command line; print or write what they return."""
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
    """What the checks returned; looking one up that failed fails with its traceback."""

    def __getitem__(self, name: str) -> Any:
        result = super().__getitem__(name)
        if isinstance(result, dict) and "failed" in result:
            raise AssertionError(f"{name} failed on the simulated GPU:\n{result['failed']}")
        return result


def results_of(script: str, seconds: float = 600) -> Results:
    """The results of tests/`script`, run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        paths = [str(HERE), str(HERE.parent), str(HERE.parent / "plugins")]
        code = f"import sys, runpy; sys.path[:0] = {paths!r}; sys.argv = ['x', {str(out)!r}]; "
        code += f"runpy.run_path({str(HERE / script)!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds)
        if not out.is_file():
            raise AssertionError(f"{script} ended without results:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        return Results(json.loads(out.read_text()))
