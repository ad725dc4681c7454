"""The straight line: settings -> plan of cells -> teacher -> method -> train -> sample -> measure -> rows -> table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from distillbench.cell import Finished, evaluation_inputs, run_cell, train_inputs
from distillbench.config import RunConfig, to_yaml
from distillbench.environment import environment
from distillbench.files import key_of, write_atomically
from distillbench.plan import Cell, changed_settings, choose_device, make_source
from distillbench.progress import Progress
from distillbench.registry import Registry
from distillbench.results import link_or_copy, make_table, sample_grid, table_row, write_table


@dataclass
class Outcome:
    """A finished run."""

    folder: Path
    table: pd.DataFrame
    failed: list[str]  # labels of the cells that are not ok


def run(
    cells: list[Cell], configs: list[RunConfig], progress: Progress, on_rows: Callable[[pd.DataFrame], None]
) -> Outcome:
    """Run every cell, write the run's folder anew after each, and give each cell's rows to `on_rows` as they come."""
    finished: list[Finished] = []
    metrics = list(dict.fromkeys(name for config in configs for name in config.evaluation.metrics))
    folder = _run_folder(cells, configs[0], progress)
    rows: list[dict[str, Any]] = []
    for cell in cells:
        done = run_cell(cell, progress)
        finished.append(done)
        new = _table_rows(done, metrics)
        rows += new
        on_rows(make_table(new, metrics))
        _write_run(folder, configs, finished, make_table(rows, metrics))
    failed = [done.cell.label for done in finished if done.failed]
    return Outcome(folder, make_table(rows, metrics), failed)


def _table_rows(done: Finished, metrics: list[str]) -> list[dict[str, Any]]:
    cell, teacher = done.cell, done.cell.scene.teacher
    assert teacher is not None
    names = {"dataset": cell.scene.dataset.name, "teacher": teacher.label, "method": cell.name, "seed": cell.seed}
    names["guidance"] = cell.scene.config.guidance if cell.scene.config.conditional else None
    names["settings"] = changed_settings(cell.method_config)
    if cell.entry is not None and cell.scene.config.guidance_range:
        drawn = f"guidance_range={cell.scene.config.guidance_range}"
        names["settings"] = ", ".join(filter(None, (drawn, names["settings"])))
    count = sum(p.numel() for p in teacher.denoiser.parameters())
    parameters = count if done.training is None else done.training.parameters
    key, device = done.evaluation.key, done.evaluation.device
    return [table_row(names, row, done.training, key, device, metrics, parameters) for row in done.evaluation.rows]


def _run_folder(cells: list[Cell], config: RunConfig, progress: Progress) -> Path:
    """The folder of a run: its given name, or one made from what decides the table, so that it is found again."""
    name = config.run_name
    if not name:
        train_keys = [key_of(train_inputs(cell, cell.scene.loaded(progress))) for cell in cells]
        keys = [key_of(evaluation_inputs(cell, key)) for cell, key in zip(cells, train_keys, strict=True)]
        name = f"{config.dataset.kind}-{key_of(sorted(keys))[:8]}"
    return Path(config.results_dir) / name


def _write_run(folder: Path, configs: list[RunConfig], finished: list[Finished], table: pd.DataFrame) -> None:
    write_table(table, folder)
    texts = {
        "config.yaml": "---\n".join(to_yaml(config) for config in configs),
        "environment.json": json.dumps(environment(finished[0].cell.scene.device, configs[0].threads), indent=2) + "\n",
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: Path(path).write_text(text))
    for done in finished:
        if done.training is not None and done.training.status == "ok":
            target = folder / "weights" / f"{done.cell.name}-seed{done.cell.seed}-{done.training.key}.safetensors"
            link_or_copy(done.folder / "student.safetensors", target)
    _write_grids(folder, finished)


def _write_grids(folder: Path, finished: list[Finished]) -> None:
    """samples.png: every row of the table that is ok, from the same noise."""
    lines = []
    for done in finished:
        good = [row for row in done.evaluation.rows if row.status == "ok"]
        for row, images in zip(good, done.shown, strict=True):
            config = done.cell.scene.config
            guidance = f", w = {config.guidance:g}" if config.conditional else ""
            lines.append((f"{done.cell.label}{guidance}, {row.nfe} NFE", images))
    write_atomically(folder / "samples.png", lambda path: sample_grid(lines).save(path, format="png"))


def train_teacher_of(config: RunConfig, registry: Registry, output: Path | None, progress: Progress) -> Path:
    """Train the teacher of `config` anew; write it to `output`, or to where a run looks for it. Returns the file."""
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    _, source, _ = make_source(config, registry, device)
    return source.train(output, progress)
