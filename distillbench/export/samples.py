"""``distillbench samples export``: the samples of a row of a run, sampled again from the evaluation's noise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from distillbench.errors import UserError
from distillbench.evaluation.evaluator import Evaluator, Sampler, teacher_sampler
from distillbench.evaluation.features import Networks
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.evaluation.sample_files import CHANNELS, writing
from distillbench.export.run_export import TEACHER, find_student, find_teacher
from distillbench.registry import Registry
from distillbench.runs.shared_context import Cell
from distillbench.storage.files import check_room, write_atomically
from distillbench.system.progress import Progress
from distillbench.teachers.teacher import Teacher
from distillbench.training.compute import check_sampling


@dataclasses.dataclass(frozen=True)
class Row:
    """Which samples: of a method (or "teacher:SAMPLER") and its training seed, by `nfe` evaluations."""

    method: str
    nfe: int
    seed: int | None = None  # of the training; None: the only one
    sampling_seed: int | None = None  # None: the run's first
    images: int | None = None  # None: as many as the run


def export_samples(run_folder: Path, row: Row, output: Path, registry: Registry, progress: Progress) -> int:
    """Write the samples of `row` of the run at `run_folder` to `output`; returns their number.

    Raises UserError if the row cannot be sampled, and writes nothing then.
    """
    cell, teacher, sampler = _found(run_folder, row, registry, progress)
    shared, given = cell.shared, cell.shared.config.evaluation
    check_sampling(given.sampling, shared.device)
    torch.set_num_threads(shared.config.threads)
    config = dataclasses.replace(given, images=row.images or given.images)
    channels, height, width = teacher.image_shape
    if channels not in (1, CHANNELS):
        raise UserError(f"a file of samples holds images of 1 or {CHANNELS} channels, the run's have {channels}")
    size = CHANNELS * config.images * height * width
    check_room(output.parent, size, f"a file of {config.images:,} samples", "fewer --images or another --output")
    nothing = RealImages(shared.dataset, Networks(Path(), shared.device), Path())  # no metric reads it
    evaluator = Evaluator(config, {}, nothing, teacher, progress)
    seed = given.seeds[0] if row.sampling_seed is None else row.sampling_seed
    conditioning = teacher.conditioning
    labels = conditioning.labels_of_images(range(config.images)) if conditioning.classes else None

    def write(temporary: str) -> None:
        with writing(temporary, config.images, (height, width), labels) as add:
            evaluator.sample(sampler, row.nfe, seed, cell.label, add)

    write_atomically(output, write)
    return config.images


def _found(run_folder: Path, row: Row, registry: Registry, progress: Progress) -> tuple[Cell, Teacher, Sampler]:
    if not row.method.startswith(TEACHER):
        student = find_student(run_folder, row.method, row.seed, registry, progress, row.nfe, device="")
        return student.cell, student.teacher, student.method.sample
    cell, teacher = find_teacher(run_folder, row.method, registry, progress)
    solver, each = cell.sampler(), teacher.conditioning.evaluations
    if row.nfe % each or solver.steps(row.nfe // each) is None:
        raise UserError(f"{row.method} cannot use exactly {row.nfe} evaluations, {each} for each denoising")
    return cell, teacher, teacher_sampler(teacher, solver)
