"""The time that a run of thousands of cells takes without training: seconds of each stage, on one core.

    python benchmarks/many_cells.py [SEEDS] [SETTINGS]

SEEDS x SETTINGS cells (100 x 100). One of them is trained, on a few images. The records of the others are
copies of its records with other keys, written by the same code as real ones; then the run is repeated and finds all.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from distillbench.cli.terminal import print_plan, print_rows, print_table
from distillbench.execution.run import run
from distillbench.execution.run_folder import RunTable, labels_of
from distillbench.execution.workers import InProcessWorker, Scan
from distillbench.records.records import EvaluationRecord, TrainRecord, load_record, write_record
from distillbench.registry import Registry, load_registry
from distillbench.reports.write import report_runs
from distillbench.runs.cell import AS_IS, run_cell
from distillbench.runs.cell_keys import evaluation_inputs
from distillbench.runs.cell_result import CellDescription
from distillbench.runs.cell_training import STUDENT, TRAIN
from distillbench.runs.config import RunConfig, compose_runs
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import Cell
from distillbench.storage.files import key_of
from distillbench.storage.hash_cache import HashCache
from distillbench.storage.locks import try_lock
from distillbench.system.progress import Progress
from distillbench.system.signals import Stop

WORDS = ["methods=[boot]", "dataset=digits", "isolate=false", "budget.images=256", "run_name=many", "device=cpu"]
WORDS += ["evaluation.images=16", "evaluation.nfe=[1]", "evaluation.teacher_steps=[1]", "evaluation.timing=off"]
WORDS += ["evaluation.metrics=[teacher_rmse]"]


class Clock:
    """Prints the wall-clock and CPU seconds of each stage."""

    def __init__(self, cells: int) -> None:
        self.cells = cells

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin, computed = time.perf_counter(), time.process_time()
        yield
        seconds, computed = time.perf_counter() - begin, time.process_time() - computed
        print(f"| {name} | {seconds:.1f} | {computed:.1f} | {1000 * computed / self.cells:.2f} |", flush=True)


def words(seeds: int, settings: int, results: Path) -> list[str]:
    """Of the command line: a grid of seeds and learning rates."""
    rates = ",".join(f"{1e-4 * (1 + k / settings):.6g}" for k in range(settings))
    return [*WORDS, f"seed=range(0,{seeds})", f"methods.boot.lr={rates}", f'results_dir="{results}"']


def train_one(
    cells: Sequence[Cell], descriptions: Sequence[CellDescription]
) -> tuple[TrainRecord, EvaluationRecord, Path]:
    """The records of the first student and their folder; the teacher is scored, too."""
    for cell, description in zip(cells[:2], descriptions[:2], strict=True):
        run_cell(cell, description, Progress(None), AS_IS, Stop())
    folder = descriptions[1].folder
    (evaluation,) = folder.glob("evaluation-*.json")
    return load_record(folder / TRAIN, TrainRecord), load_record(evaluation, EvaluationRecord), folder


def fabricate(
    cell: Cell,
    description: CellDescription,
    files: HashCache,
    training: TrainRecord,
    evaluation: EvaluationRecord,
    source: Path,
) -> None:
    """The records that training and evaluation of `cell` would write."""
    inputs, folder = description.train_inputs, description.folder
    folder.mkdir(parents=True, exist_ok=True)
    key = key_of(inputs)
    os.link(source / STUDENT, folder / STUDENT)
    files.note(folder / STUDENT, training.weights_sha256)
    write_record(folder / TRAIN, training.model_copy(update={"key": key, "inputs": inputs}))
    inputs = evaluation_inputs(cell, key)
    path = folder / f"evaluation-{key_of(inputs)}.json"
    shown = source / f"evaluation-{evaluation.key}.safetensors"
    shutil.copyfile(shown, path.with_suffix(".safetensors"))
    write_record(path, evaluation.model_copy(update={"key": key_of(inputs), "inputs": inputs}))


def main(seeds: int, settings: int) -> None:
    torch.set_num_threads(1)
    count = seeds * settings
    clock, registry, progress = Clock(count), load_registry(), Progress(None)
    warm_up(registry)
    print(f"{count:,} cells: {seeds} seeds of {settings} settings\n")
    print("| stage | s | s of the CPU | ms a cell |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        given = words(seeds, settings, Path(scratch) / "results")
        with clock.stage("compose the settings"):
            configs = compose_runs(given, registry)
        with clock.stage("plan, with costs"):
            cells = plan(configs, registry)
        with clock.stage("show the plan"):
            print_plan(Console(file=io.StringIO(), width=120), cells)
        worker = InProcessWorker(progress, Stop())
        with clock.stage("look at what is there: nothing"):
            descriptions = worker.scan(cells, AS_IS).descriptions
        with clock.stage("claim each, one after the other"):
            for description in descriptions:
                with try_lock(description.folder) as mine:
                    assert mine
        records = train_one(cells, descriptions)
        files = HashCache(Path(configs[0].results_dir) / "cells")
        with clock.stage("write the records of each"):
            for cell, description in zip(cells[2:], descriptions[2:], strict=True):
                fabricate(cell, description, files, *records)
            files.keep()
        with clock.stage("look at what is there: everything"):
            found = worker.scan(cells, AS_IS)
        assert all(result is not None for result in found.results)
        shown = Progress(Console(file=io.StringIO(), width=120))
        with clock.stage("the whole run again, to its end"):
            labels = labels_of(cells)
            outcome = run(cells, configs, shown, lambda rows: print_rows(shown, rows, labels))
        with clock.stage("show the table"):
            print_table(Console(file=io.StringIO(), width=120), outcome.table, outcome.summary, outcome.labels)
        with clock.stage("report"):
            report_runs([str(outcome.folder)], ("html",), None, (), (), None, False, Console(file=io.StringIO()))
        trickle(cells, configs, found, shown, clock)


def trickle(cells: list[Cell], configs: list[RunConfig], scan: Scan, shown: Progress, clock: Clock) -> None:
    """Add the rows one by one, as if trainings took no time."""
    folder = Path(configs[0].results_dir) / "one-by-one"
    table = RunTable(folder, cells, configs, scan, lambda rows: print_rows(shown, rows, labels_of(cells)), {})
    write, written = table.writer.write, []
    table.writer.write = lambda: (written.append(time.perf_counter()), write())
    with clock.stage("rows that come in one by one, to the end"):
        for index, result in enumerate(scan.results):
            assert result is not None
            table.add({index: result})
        table.finish("skipped", "")
    print(f"\nThe folder was written {len(written)} times meanwhile.")


def warm_up(registry: Registry) -> None:
    """Do what happens only once per process: imports, and torch's initialisation."""
    with tempfile.TemporaryDirectory() as scratch:
        plan(compose_runs(words(1, 1, Path(scratch)), registry), registry)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:3]) if len(sys.argv) > 2 else (100, 100))
