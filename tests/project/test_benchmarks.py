"""Each benchmark still runs: in a tiny form where that takes no seconds, and with ``--help``."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = {
    "loading": ["--scenes", "tiny", "--batches", "2", "--pairs", "2"],
    "memory": ["--scenes", "tiny", "--methods", "direct", "sid"],
    "sampling": ["--scenes", "tiny", "--pairs", "2"],
}


def output_of(name, words, monkeypatch, capsys) -> str:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    importlib.import_module(name).main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "launches",
        "loading",
        "memory",
        "overhead",
        "reading",
        "sampling",
        "scoring",
        "startup",
        "tables",
        "two_dimensions",
    ],
)
def test_a_benchmark_has_a_help_text(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        output_of(name, ["--help"], monkeypatch, capsys)
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_prints_ratios(name, monkeypatch, capsys):
    lines = [line for line in output_of(name, TINY[name], monkeypatch, capsys).splitlines() if line.startswith("|")]
    assert len(lines) >= 3 and any(word in lines[0] for word in ("ratio", "peak / sum"))


def test_the_peak_of_memory_is_what_training_must_hold(monkeypatch, tmp_path):
    """An average, Adam's moments and gradients of known sizes; temporaries of a tiny net are no more than as much."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    memory, measuring = (importlib.import_module(name) for name in ("memory", "measuring"))
    found = memory.measure(measuring.tiny_mlp(), "direct", "cpu", tmp_path)
    weights = found["gradients"]
    assert found["moments"] == 2 * weights and weights <= found["average"] <= 1.1 * weights
    total = sum(found.values()) - found["peak"]
    assert 0.9 * total <= found["peak"] <= 2 * total


def test_tables_of_many_rows_are_what_a_run_writes(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tables = importlib.import_module("tables")
    tables.table(tmp_path, 800)()
    summary = tables.summary(tmp_path, 800)()
    assert len(summary) == 8 and summary["fd_toy_training_interval"].eq("bootstrap").all()


def test_the_benchmark_of_hostile_inputs_finds_tests_support():
    """In a process of its own: in this one tests/support can be imported anyway."""
    done = subprocess.run([sys.executable, BENCHMARKS / "hostile.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr
