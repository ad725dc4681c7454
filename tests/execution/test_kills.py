"""Short runs of ``benchmarks/kills.py`` (killed at random times) and ``together.py`` (several processes at once)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def output_of(script: str, count: int) -> str:
    """Its output. It forks, so it runs in a process without threads."""
    command = [sys.executable, BENCHMARKS / script, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_killed_and_restarted_run_ends_with_the_same_table():
    found = re.search(r"(\d+) kills in (\d+) .* differ: (\d+)", output_of("kills.py", 3))
    kills, rounds, wrong = map(int, found.groups())
    assert kills >= 3 and rounds and not wrong


@pytest.mark.nightly
def test_several_processes_compute_each_cell_once():
    assert re.search(r"^4 processes, \d+ s; exit codes \[0\]; 4 trainings$", output_of("together.py", 4), re.MULTILINE)
