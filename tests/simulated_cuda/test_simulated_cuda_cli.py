"""The command line on simulated GPUs: two runs in one results folder, and worker processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "experiment=smoke",
    "threads=1",
    "budget.images=200",
    "evaluation.images=32",
    "evaluation.batch_size=16",
    "evaluation.timing_seconds=0.01",
    "evaluation.largest_timed_batch=2",
]


def run_on_gpus(folder: Path, *words: str, gpus: int = 1) -> tuple[str, pd.DataFrame]:
    """The output of a run, and its table."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
    before = set(folder.glob("*/table.csv"))
    done = subprocess.run(
        [sys.executable, "-m", "distillbench.simulated_cuda", "run", *SMALL, f"results_dir={folder}", *words],
        env=os.environ | {"PYTHONPATH": paths, "DISTILLBENCH_SIMULATED_GPUS": str(gpus)},
        capture_output=True,
        text=True,
        timeout=900,
        cwd=folder,
    )
    said = done.stdout + done.stderr
    assert not done.returncode, said[-3000:]
    (table,) = set(folder.glob("*/table.csv")) - before
    return said, pd.read_csv(table)


@pytest.mark.nightly
def test_a_second_run_reads_the_caches_of_the_first(tmp_path):
    """Caches of the teacher, its samples and the statistics of real images; the first run uses a worker process."""
    words = ["dataset=digits", "device=cuda"]
    said, first = run_on_gpus(tmp_path, *words, "methods=[boot]", "isolate=true", "evaluation.timing=off")
    assert "device cuda (Simulated GPU)" in said
    _, second = run_on_gpus(tmp_path, *words, "methods=[ct]", "evaluation.timing=inline")
    for table in (first, second):
        assert set(table["status"]) == {"ok"}, table[["method", "status", "reason"]]
        assert table["fd_efficientnet_lite0"].notna().all()
    teachers = [table[table["method"].str.startswith("teacher")] for table in (first, second)]
    assert len(teachers[0]) == 2
    assert list(teachers[0]["fd_efficientnet_lite0"]) == list(teachers[1]["fd_efficientnet_lite0"])


@pytest.mark.nightly
def test_two_workers_on_two_gpus_make_one_table(tmp_path):
    """An operator with tensors of both GPUs would fail its cell."""
    words = ["dataset=gmm", "teacher=gmm", "methods=[boot,ct]", "isolate=true", "evaluation.timing=off"]
    _, table = run_on_gpus(tmp_path, *words, "executor.workers=2", "executor.devices=[cuda:0,cuda:1]", gpus=2)
    assert {"boot", "ct"} <= set(table["method"])
    assert set(table["status"]) == {"ok"}, table[["method", "status", "reason"]]
