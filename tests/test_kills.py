"""A short sample of ``benchmarks/kills.py``: a run that is killed at random instants ends with the same table."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).resolve().parent.parent / "benchmarks" / "kills.py"


@pytest.mark.slow
def test_killed_and_started_again_a_run_ends_with_the_same_table():
    """In a process of its own: it forks, which a process with threads should not."""
    done = subprocess.run([sys.executable, KILLS, "3"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, rounds, wrong = map(int, re.search(r"(\d+) kills in (\d+) rounds.* differ: (\d+)", done.stdout).groups())
    assert kills >= 3 and rounds and not wrong
