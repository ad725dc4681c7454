"""The job that measures the sampling cost of a cell."""

from __future__ import annotations

from pathlib import Path

from distillbench.evaluation.sampling_speed import LazyDataset, Measurement, SpeedJob, TorchSettings
from distillbench.runs.shared_context import Cell


def speed_job(cell: Cell, weights: Path | None, nfe: list[int]) -> SpeedJob:
    """The job of a cell: its student with `weights`, or the teacher itself. `nfe`: of its rows that are ok."""
    shared, config = cell.shared, cell.shared.config
    evaluation = config.evaluation
    measurement = Measurement(
        tuple(nfe),
        shared.device,
        evaluation.batch_size,
        evaluation.largest_timed_batch,
        evaluation.timing_seconds,
        evaluation.sampling,
    )
    return SpeedJob(
        measurement,
        TorchSettings.now(config.threads),
        LazyDataset(shared.dataset, config.dataset),
        type(shared.source),
        config.teacher,
        shared.conditioning,
        shared.source.cache,
        cell.solver.name if cell.solver is not None else "",
        cell.entry.cls if cell.entry is not None else None,
        cell.method_config,
        cell.seed or 0,
        weights,
        shared.students,
    )
