"""A run: settings -> plan of cells -> scan of earlier results -> run unfinished cells -> rows -> table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch

from distillbench.errors import printable
from distillbench.execution.announcement import announce
from distillbench.execution.cell_times import CellTimes
from distillbench.execution.executors import Executor, executor_of
from distillbench.execution.run_folder import Outcome, RunTable
from distillbench.execution.workers import Scan
from distillbench.metering.memory import release_memory
from distillbench.registry import Registry
from distillbench.runs.cell import AS_IS, Policy
from distillbench.runs.cell_result import CellDescription
from distillbench.runs.config import RunConfig
from distillbench.runs.plan import notes_of, teacher_plan
from distillbench.runs.remains import NOTHING, Remains, remains_of, untouched
from distillbench.runs.shared_context import Cell, choose_device, make_source
from distillbench.runs.time_plan import TimePlan
from distillbench.storage.files import key_of
from distillbench.system.progress import Progress
from distillbench.system.signals import Interrupted, Stop

NONE_TUNED: Mapping[str, Mapping[str, Any]] = MappingProxyType({})


def run(
    cells: list[Cell],
    configs: list[RunConfig],
    progress: Progress,
    on_rows: Callable[[pd.DataFrame], None],
    policy: Policy = AS_IS,
    stop: Stop | None = None,
    show_found: bool = True,
    tuning: Mapping[str, Mapping[str, Any]] = NONE_TUNED,
) -> Outcome:
    """Run every cell. After each, update the run's folder and give the cell's rows to `on_rows`.

    Rows that an earlier run left are given, too, unless `show_found` is False.
    On a request to stop it writes what there is, with rows for the cells that are missing, and raises Interrupted.
    `tuning`: by method, values of the columns of its rows that say how its settings were searched, and a `reason`.
    """
    config, stop = configs[0], stop or Stop()
    for note in notes_of(cells):
        progress.say(note)
    release_memory()  # of the plan: worker processes need the GPU
    to_be_trained = any(plan.images for _, _, plan in teacher_plan(cells))
    if to_be_trained:  # at once: no record of a new teacher exists
        times = announce(cells, [untouched(cell) for cell in cells], Path(config.results_dir), progress)
    with closing(executor_of(config, progress, stop)) as executor:
        with progress.step("looking for earlier results"):
            scan = executor.scan(cells, policy)
        folder = _run_folder(scan.descriptions, config)
        if not to_be_trained:
            times = announce(cells, _remains(cells, scan, policy), folder, progress)
        table = RunTable(folder, cells, configs, scan, on_rows, tuning)
        table.add({index: result for index, result in enumerate(scan.results) if result is not None}, show_found)
        if table.failed:
            advice = "--retry-failed runs what failed, or ran out of memory or time, again"
            progress.say(f"not ok in an earlier run: {', '.join(table.failed)} ({advice})")
        unfinished = [cells[index].shared for index in table.unfinished()]
        for shared in {id(shared): shared for shared in unfinished}.values():
            shared.check_room()
        try:
            _run_all(cells, scan.descriptions, executor, policy, progress, table, times)
        except Interrupted as interrupted:
            table.finish("interrupted", f"{interrupted.name}: the same command resumes it")
            raise
        return table.finish("skipped", "--fail-fast, and an earlier cell is not ok")


def _remains(cells: Sequence[Cell], scan: Scan, policy: Policy) -> list[Remains]:
    """What is left of each cell after a scan."""
    return [
        NOTHING if result is not None else remains_of(cell, description, policy)
        for cell, description, result in zip(cells, scan.descriptions, scan.results, strict=True)
    ]


def _run_all(
    cells: Sequence[Cell], descriptions: Sequence[CellDescription], executor: Executor, policy: Policy,
    progress: Progress, table: RunTable, plan: TimePlan | None,
) -> None:  # fmt: skip
    """Run every unfinished cell, or wait for the other process that runs it."""
    reported: set[int] = set()
    if not table.unfinished():
        return
    times = CellTimes(table.unfinished(), plan, executor.at_once)
    with progress.overall(len(cells), len(table.results), times) as show:
        while unfinished := table.unfinished():
            if policy.fail_fast and table.failed:
                return
            show(*_place(cells, table, executor))
            todo = {index: (cells[index], descriptions[index]) for index in unfinished}
            with closing(executor.run(todo, policy)) as results:
                for index, result in results:
                    if result is not None:
                        times.finish(index)
                        table.add_fresh({index: result})
                        if table.unfinished():
                            show(*_place(cells, table, executor))
                    elif index not in reported:
                        reported.add(index)
                        progress.say(f"{cells[index].label}: another process is running it")
            if len(table.unfinished()) == len(unfinished):
                time.sleep(executor.poll_seconds)


def _place(cells: Sequence[Cell], table: RunTable, executor: Executor) -> tuple[int, str]:
    """How many cells are done, and the same in words."""
    done = len(table.results)
    if executor.at_once > 1:
        return done, f"{done:,} of {len(cells):,} cells done"
    return done, f"cell {done + 1:,} of {len(cells):,}: {cells[table.unfinished()[0]].label}"


def _run_folder(descriptions: Sequence[CellDescription], config: RunConfig) -> Path:
    """The folder of a run: the name in the settings, or one made from the cache keys, so that it is found again."""
    keys = sorted(description.evaluation_key for description in descriptions)
    return Path(config.results_dir) / (config.run_name or f"{config.dataset.kind}-{key_of(keys)[:8]}")


def train_teacher_of(config: RunConfig, registry: Registry, output: Path | None, progress: Progress) -> Path:
    """Train the teacher of `config` again. Writes it to `output`, or to the cache that runs use. Returns the file."""
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    dataset, source, _ = make_source(config, registry, device)
    for note in dataset.notes:
        progress.say(printable(f"dataset {dataset.name}: {note}"))
    return source.train(output, progress)
