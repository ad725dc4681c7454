"""Short samples of ``benchmarks/kills.py`` and ``together.py``: killed at random instants; done by several at once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def told(script: str, count: int) -> str:
    """What it prints. In a process of its own: it forks, which a process with threads should not."""
    command = [sys.executable, BENCHMARKS / script, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_killed_and_restarted_run_ends_with_the_same_table():
    kills, rounds, wrong = map(int, re.search(r"(\d+) kills in (\d+) .* differ: (\d+)", told("kills.py", 3)).groups())
    assert kills >= 3 and rounds and not wrong


@pytest.mark.slow
def test_several_processes_compute_each_cell_once():
    assert re.search(r"^4 processes, \d+ s; exit codes \[0\]; 4 trainings$", told("together.py", 4), re.MULTILINE)
