"""The straight line: settings -> plan of cells -> teacher -> method -> train -> sample -> measure -> rows -> table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pandas as pd
import torch

from distillbench.cell import AS_IS, Policy
from distillbench.config import RunConfig
from distillbench.errors import printable
from distillbench.executors import Executor, executor_of
from distillbench.files import key_of
from distillbench.hands import Seen
from distillbench.memory import release_memory
from distillbench.plan import notes_of
from distillbench.progress import Progress
from distillbench.registry import Registry
from distillbench.run_table import Outcome, RunTable
from distillbench.shared_context import Cell, choose_device, make_source
from distillbench.signals import Interrupted, Stop


def run(
    cells: list[Cell],
    configs: list[RunConfig],
    progress: Progress,
    on_rows: Callable[[pd.DataFrame], None],
    policy: Policy = AS_IS,
    stop: Stop | None = None,
) -> Outcome:
    """Run every cell, write the run's folder anew after each, and give each cell's rows to `on_rows` as they come.

    Told to stop, it keeps what there is, with rows for what is missing, and raises Interrupted.
    """
    config, stop = configs[0], stop or Stop()
    for note in notes_of(cells):
        progress.say(note)
    release_memory()  # that planning took: others are to work on the GPU
    with closing(executor_of(config, progress, stop)) as executor:
        looked = executor.look(cells, policy)
        table = RunTable(_run_folder(looked.seen, config), cells, configs, looked, on_rows)
        return _run(cells, looked.seen, executor, policy, progress, table)


def _run(
    cells: Sequence[Cell], seen: Sequence[Seen], executor: Executor, policy: Policy, progress: Progress, table: RunTable
) -> Outcome:
    table.add({index: one.done for index, one in enumerate(seen) if one.done is not None})
    if table.failed:
        told = "--retry-failed tries again what failed, or ran out of memory or time"
        progress.say(f"not ok in an earlier run: {', '.join(table.failed)} ({told})")
    try:
        _work(cells, seen, executor, policy, progress, table)
    except Interrupted as interrupted:
        table.finish("interrupted", f"{interrupted.name}: the same command goes on from there")
        raise
    return table.finish("skipped", "--fail-fast, and a cell before is not ok")


def _work(
    cells: Sequence[Cell], seen: Sequence[Seen], executor: Executor, policy: Policy, progress: Progress, table: RunTable
) -> None:
    """Do every cell that is not done, or wait for another process that does it."""
    told: set[int] = set()
    while todo := table.missing():
        if policy.fail_fast and table.failed:
            return
        with closing(executor.work({index: (cells[index], seen[index]) for index in todo}, policy)) as came:
            for index, done in came:
                if done is not None:
                    table.add({index: done})
                elif index not in told:
                    told.add(index)
                    progress.say(f"{cells[index].label}: another process has it")
        if len(table.missing()) == len(todo):
            time.sleep(executor.patience)


def _run_folder(seen: Sequence[Seen], config: RunConfig) -> Path:
    """The folder of a run: its given name, or one made from what decides the table, so that it is found again."""
    keys = sorted(one.about.evaluation_key for one in seen)
    return Path(config.results_dir) / (config.run_name or f"{config.dataset.kind}-{key_of(keys)[:8]}")


def train_teacher_of(config: RunConfig, registry: Registry, output: Path | None, progress: Progress) -> Path:
    """Train the teacher of `config` anew; write it to `output`, or to where a run looks for it. Returns the file."""
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    dataset, source, _ = make_source(config, registry, device)
    for note in dataset.notes:
        progress.say(printable(f"dataset {dataset.name}: {note}"))
    return source.train(output, progress)
