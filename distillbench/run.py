"""The straight line: settings -> plan of cells -> teacher -> method -> train -> sample -> measure -> rows -> table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from distillbench.cell import Finished, evaluation_inputs, protocol_key, run_cell, train_inputs
from distillbench.config import RunConfig, to_yaml
from distillbench.environment import environment
from distillbench.files import key_of, write_atomically
from distillbench.plan import Cell, changed_settings, choose_device, make_source
from distillbench.progress import Progress
from distillbench.registry import Registry
from distillbench.results import (
    CheckpointScores,
    cost_columns,
    link_or_copy,
    make_along,
    make_table,
    sample_grid,
    table_row,
    write_table,
)
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
    cells: list[Cell], configs: list[RunConfig], progress: Progress, on_rows: Callable[[pd.DataFrame], None]
) -> Outcome:
    """Run every cell, write the run's folder anew after each, and give each cell's rows to `on_rows` as they come."""
    columns = {name: cls.describe() for cell in cells for name, cls in cell.scene.metrics.items()}
    directions = {name: told["direction"] for name, told in columns.items()}
    folder = _run_folder(cells, configs[0], progress)
    finished: list[Finished] = []
    for cell in cells:
        done = run_cell(cell, progress)
        finished.append(done)
        on_rows(make_table(_table_rows(done, list(columns)), list(columns)))
        table = make_table([row for one in finished for row in _table_rows(one, list(columns))], list(columns))
        summary = summarise(table, directions)
        _write_run(folder, configs, finished, table, summary, columns)
    failed = [done.cell.label for done in finished if done.failed]
    return Outcome(folder, table, summary, columns, failed)


def _names(done: Finished) -> dict[str, Any]:
    """What a cell's rows are rows of."""
    cell, config, teacher = done.cell, done.cell.scene.config, done.cell.scene.teacher
    assert teacher is not None
    settings = changed_settings(cell.method_config)
    if cell.entry is not None and config.guidance_range:
        settings = ", ".join(filter(None, (f"guidance_range={config.guidance_range}", settings)))
    return {
        "dataset": cell.scene.dataset.name,
        "teacher": teacher.label,
        "guidance": config.guidance if config.conditional else None,
        "method": cell.name,
        "training_seed": cell.seed,
        "images": config.evaluation.images,
        "budget": f"{config.budget.in_words}, batch {config.batch_size}" if cell.entry is not None else "",
        "protocol": protocol_key(cell.scene, teacher),
        "settings": settings,
    }


def _table_rows(done: Finished, metrics: list[str]) -> list[dict[str, Any]]:
    record = done.evaluation
    real = ", ".join(f"{network}: {words}" for network, words in record.references.items())
    names = _names(done) | {"reference": real, "device": record.device, "key": record.key}
    return [table_row(names, row, done.training, done.speed, metrics) for row in record.rows]


def _along_rows(done: Finished) -> list[dict[str, Any]]:
    """The scores along training, the last of them those of the finished student."""
    if done.training is None or not done.evaluation.along:
        return []
    costs = {checkpoint.fraction: checkpoint.cost for checkpoint in done.training.checkpoints}
    if done.training.cost is not None:
        costs[1.0] = done.training.cost
    ends = [CheckpointScores(fraction=1.0, **dict(row)) for row in done.evaluation.rows]
    rows = []
    for row in [*done.evaluation.along, *ends]:
        told = {"nfe": row.nfe, "sampling_seed": row.sampling_seed, "fraction": row.fraction}
        told |= {"status": row.status, "reason": row.reason}
        rows.append(_names(done) | told | row.scores | cost_columns(costs[row.fraction]))
    return rows


def _run_folder(cells: list[Cell], config: RunConfig, progress: Progress) -> Path:
    """The folder of a run: its given name, or one made from what decides the table, so that it is found again."""
    name = config.run_name
    if not name:
        train_keys = [key_of(train_inputs(cell, cell.scene.loaded(progress))) for cell in cells]
        keys = [key_of(evaluation_inputs(cell, key)) for cell, key in zip(cells, train_keys, strict=True)]
        name = f"{config.dataset.kind}-{key_of(sorted(keys))[:8]}"
    return Path(config.results_dir) / name


def _write_run(
    folder: Path, configs: list[RunConfig], finished: list[Finished], table: pd.DataFrame, summary: pd.DataFrame,
    columns: dict[str, dict[str, str]],
) -> None:  # fmt: skip
    write_table(table, folder)
    write_table(summary, folder, "summary")
    along = [row for done in finished for row in _along_rows(done)]
    if along:
        write_table(make_along(along, list(columns)), folder, "along")
    device, threads = finished[0].cell.scene.device, configs[0].threads
    texts = {
        "config.yaml": "---\n".join(to_yaml(config) for config in configs),
        "columns.json": json.dumps(columns, indent=2) + "\n",
        "environment.json": json.dumps(environment(device, threads), indent=2) + "\n",
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda path, text=text: Path(path).write_text(text))
    for done in finished:
        if done.training is not None and done.training.status == "ok":
            target = folder / "weights" / f"{done.cell.name}-seed{done.cell.seed}-{done.training.key}.safetensors"
            link_or_copy(done.folder / "student.safetensors", target)
    _write_grids(folder, finished)


def _write_grids(folder: Path, finished: list[Finished]) -> None:
    """samples.png: every row of the first sampling seed that is ok, from the same noise."""
    lines = []
    for done in finished:
        config = done.cell.scene.config
        first = config.evaluation.seeds[0]
        good = [row for row in done.evaluation.rows if row.status == "ok" and row.sampling_seed == first]
        for row, images in zip(good, done.shown, strict=True):
            guidance = f", w = {config.guidance:g}" if config.conditional else ""
            lines.append((f"{done.cell.label}{guidance}, {row.nfe} NFE", images))
    write_atomically(folder / "samples.png", lambda path: sample_grid(lines).save(path, format="png"))


def train_teacher_of(config: RunConfig, registry: Registry, output: Path | None, progress: Progress) -> Path:
    """Train the teacher of `config` anew; write it to `output`, or to where a run looks for it. Returns the file."""
    torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    _, source, _ = make_source(config, registry, device)
    return source.train(output, progress)
