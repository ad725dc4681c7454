"""The straight line: settings -> plan of cells -> teacher -> method -> train -> sample -> measure -> rows -> table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from distillbench.cell import AS_IS, Policy
from distillbench.config import RunConfig, to_yaml
from distillbench.done import About, Done
from distillbench.engines import Looked
from distillbench.executors import Executor, executor_of
from distillbench.files import key_of, write_atomically
from distillbench.hands import Seen
from distillbench.plan import Cell, choose_device, make_source
from distillbench.progress import Progress
from distillbench.registry import Registry
from distillbench.results import link_or_copy, make_along, make_table, sample_grid, write_table
from distillbench.signals import Interrupted, Stop
from distillbench.statistics import summarise


@dataclass
class Outcome:
    """A finished run."""

    folder: Path
    table: pd.DataFrame
    summary: pd.DataFrame
    columns: dict[str, dict[str, str]]  # what each score declares
    failed: list[str]  # labels of the cells that are not ok


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
    with closing(executor_of(config, progress, stop)) as executor:
        looked = executor.look(cells, policy)
        table = _Table(_run_folder(looked.seen, config), cells, configs, looked, on_rows)
        return _run(cells, looked.seen, executor, policy, progress, table)


def _run(
    cells: Sequence[Cell], seen: Sequence[Seen], executor: Executor, policy: Policy, progress: Progress, table: _Table
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
    cells: Sequence[Cell], seen: Sequence[Seen], executor: Executor, policy: Policy, progress: Progress, table: _Table
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


class _Table:
    """The rows that there are, in the order of the cells, and the run's folder."""

    def __init__(
        self, folder: Path, cells: list[Cell], configs: list[RunConfig], looked: Looked,
        on_rows: Callable[[pd.DataFrame], None],
    ) -> None:  # fmt: skip
        self.folder, self.configs, self.on_rows = folder, configs, on_rows
        self.abouts: list[About] = [one.about for one in looked.seen]
        self.environment = looked.environment
        self.columns = {name: cls.describe() for cell in cells for name, cls in cell.scene.metrics.items()}
        self.done: dict[int, Done] = {}

    @property
    def failed(self) -> list[str]:
        """Labels of the cells that are not ok."""
        return [done.about.label for _, done in sorted(self.done.items()) if not done.ok]

    def missing(self) -> list[int]:
        """The cells that are not done yet."""
        return [index for index in range(len(self.abouts)) if index not in self.done]

    def add(self, cells: dict[int, Done]) -> None:
        """Show the rows of `cells`, by their index, and write the folder anew."""
        self.done.update(cells)
        for done in cells.values():
            self.on_rows(make_table(done.rows, list(self.columns)))
        if cells:
            self.written = self._write()

    def finish(self, status: str, reason: str) -> Outcome:
        """The run as it is; cells that are missing have rows with nothing but a status."""
        abouts = {index: self.abouts[index] for index in self.missing()}
        self.add({index: Done(about, about.without_scores(status, reason)) for index, about in abouts.items()})
        return Outcome(self.folder, *self.written, self.columns, self.failed)

    def _write(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The run's folder as it is now; the table and its summary."""
        done = [one for _, one in sorted(self.done.items())]
        table = make_table([row for one in done for row in one.rows], list(self.columns))
        summary = summarise(table, {name: told["direction"] for name, told in self.columns.items()})
        write_table(table, self.folder)
        write_table(summary, self.folder, "summary")
        along = [row for one in done for row in one.along]
        if along:
            write_table(make_along(along, list(self.columns)), self.folder, "along")
        texts = {
            "config.yaml": "---\n".join(to_yaml(config) for config in self.configs),
            "columns.json": json.dumps(self.columns, indent=2) + "\n",
            "environment.json": json.dumps(self.environment, indent=2) + "\n",
        }
        for name, text in texts.items():
            write_atomically(self.folder / name, lambda path, text=text: Path(path).write_text(text))
        for one in done:
            if one.weights is not None:
                link_or_copy(one.weights[0], self.folder / "weights" / one.weights[1])
        lines = [line for one in done for line in one.shown]
        write_atomically(self.folder / "samples.png", lambda path: sample_grid(lines).save(path, format="png"))
        return table, summary


def _run_folder(seen: Sequence[Seen], config: RunConfig) -> Path:
    """The folder of a run: its given name, or one made from what decides the table, so that it is found again."""
    keys = sorted(one.about.evaluation_key for one in seen)
    return Path(config.results_dir) / (config.run_name or f"{config.dataset.kind}-{key_of(keys)[:8]}")


def train_teacher_of(config: RunConfig, registry: Registry, output: Path | None, progress: Progress) -> Path:
    """Train the teacher of `config` anew; write it to `output`, or to where a run looks for it. Returns the file."""
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    _, source, _ = make_source(config, registry, device)
    return source.train(output, progress)
