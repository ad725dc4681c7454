"""Kill a run at random times; the same command must always end with the same table.

    python benchmarks/kills.py [KILLS]

Each round starts in an empty folder: the run is killed (by SIGKILL, or by SIGTERM as from schedulers) after a random
time, often a second and a third time, then runs to its end. Its table, students and teacher must equal those of an
uninterrupted run, except for seconds and memory. Rounds continue until KILLS (200) runs were killed before their end.
The stages of the run in which signals arrived are counted.

A run is a process forked from this one, which has imported everything, so that a round takes seconds.
"""

from __future__ import annotations

import collections
import hashlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from distillbench.execution.run import run
from distillbench.records.table import LAST
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.storage.files import TEMPORARY
from distillbench.system.progress import Progress, Step
from distillbench.system.signals import Interrupted, stopping

torch.set_num_threads(1)  # before the fork: threads do not survive it
WORDS = [
    "methods=[cm,pd,direct]",
    "dataset=gmm",
    "teacher=gaussian",
    "teacher.fit_images=2000",  # something is made before the cells
    "teacher.width=16",
    "isolate=false",
    "batch_size=32",
    "budget.images=1600",
    "methods.direct.pairs=4096",
    "evaluation.images=64",
    "evaluation.metrics=[teacher_rmse,spread]",
    "evaluation.teacher_steps=[1,64]",
    "evaluation.checkpoints=2",
    "evaluation.timing=off",
    "states.seconds=0.02",
    "run_name=run",
    "device=cpu",
]
NEVER_EQUAL = ("seconds", "mib", "machine_load")
UNSTEADY = [name for name in LAST if any(part in name for part in NEVER_EQUAL)]
RULES = {"train_images", "train_teacher_nfe", "train_student_nfe", "train_tflops"}  # must be the same
MOST_KILLS = 3  # of one round
REGISTRY = load_registry()


class Diary(Progress):
    """Writes the current stage of the run to a file."""

    def __init__(self, file: Path) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.file = file

    @contextmanager
    def step(self, label: str) -> Iterator[Step]:
        self.note(label)
        yield Step(lambda fraction, note: None)
        self.note(f"after {label}")

    def note(self, label: str) -> None:
        self.file.write_text(label)


def go(folder: str, diary: str, kind: type[Diary] = Diary) -> None:
    """What a run's process does."""
    os.setpgrp()
    try:
        with stopping() as stop:
            configs = compose_runs([*WORDS, f'results_dir="{folder}"'], REGISTRY)
            run(plan(configs, REGISTRY), configs, kind(Path(diary)), lambda rows: None, stop=stop)
    except Interrupted:
        sys.exit(143)


def start(folder: Path) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(
        target=go, args=(str(folder / "results"), str(folder / "now"))
    )
    process.start()
    return process


def undisturbed(folder: Path) -> float:
    """Run to the end; returns the seconds."""
    begin = time.monotonic()
    process = start(folder)
    process.join()
    if process.exitcode:
        raise SystemExit(f"an uninterrupted run ended with exit code {process.exitcode}")
    return time.monotonic() - begin


def left(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, str]]:
    """The table and the one along training, without what no two runs share, and the hashes of all weights."""
    results = folder / "results"
    tables = [pd.read_parquet(results / "run" / f"{name}.parquet") for name in ("table", "along")]
    table, along = (frame.drop(columns=[name for name in UNSTEADY if name in frame]) for frame in tables)
    assert set(table) >= RULES
    found = [*results.glob("cells/*/*.safetensors"), *results.glob("cache/**/*.safetensors")]
    weights = [file for file in found if not file.name.startswith(TEMPORARY)]  # SIGKILL may leave one; it is never read
    hashes = {str(file.relative_to(results)): hashlib.sha256(file.read_bytes()).hexdigest() for file in weights}
    return table, along, hashes


def difference(found: tuple, expected: tuple) -> str:
    """A text on how they differ; empty if they do not."""
    for name, one, other in zip(("table", "along"), found[:2], expected[:2], strict=True):
        if not one.equals(other):
            return f"{name}: {one.compare(other) if one.shape == other.shape else (one.shape, other.shape)}"
    return "" if found[2] == expected[2] else f"files: {sorted(set(found[2].items()) ^ set(expected[2].items()))[:4]}"


def disturbed(folder: Path, seconds: float, draw: random.Random) -> list[str]:
    """Kill a run some times, then let it end. What was going on at each kill that came before the end."""
    killed = []
    for _ in range(draw.randint(1, MOST_KILLS)):
        process = start(folder)
        process.join(draw.uniform(0, seconds))
        how = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        if process.is_alive():
            os.kill(process.pid, how)
            now = folder / "now"
            killed.append(f"{now.read_text() if now.exists() else 'planning'}")
        process.join()
    undisturbed(folder)
    return killed


def kind(label: str) -> str:
    """A label without names: "boot (seed 0): training" is training."""
    return label.rpartition(": ")[2].split(" with ")[0].split(" at ")[-1].rstrip("0123456789 NFE%") or label


def main(kills: int, seed: int = 0) -> None:
    draw, counts, wrong, rounds = random.Random(seed), collections.Counter(), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        seconds = undisturbed(whole)
        expected = left(whole)
        print(f"undisturbed: {seconds:.1f} s, {len(expected[0])} rows, {len(expected[2])} files of weights")
        begin = time.monotonic()
        while counts.total() < kills:
            rounds += 1
            folder = Path(scratch) / str(rounds)
            folder.mkdir()
            counts.update(map(kind, disturbed(folder, seconds, draw)))
            differs = difference(left(folder), expected)
            wrong += [f"round {rounds}: {differs}"] if differs else []
            shutil.rmtree(folder)
    print(
        f"{counts.total()} kills in {rounds} rounds, {time.monotonic() - begin:.0f} s; rounds that differ: {len(wrong)}"
    )
    for label, count in counts.most_common():
        print(f"{count:6}  {label}")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
