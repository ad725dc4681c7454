"""The cost of a training in network evaluations, measured on one step before the run."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import torch

from distillbench.errors import UserError
from distillbench.runs.shared_context import Cell, SharedContext, build
from distillbench.system.progress import Progress
from distillbench.teachers.latents import placeholder
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import Limit, Meter, Price
from distillbench.training.data_stream import DataStream
from distillbench.training.method import Batch, Method
from distillbench.training.pairs import Workspace

PRICED_IMAGES = 8  # in the step whose network evaluations are counted


class PriceCache:
    """Estimated costs of cells. They depend on the context and the method's settings, not on the seed."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Cell] = {}
        self.teachers: dict[int, Teacher] = {}  # by id of the context; untrained

    def fill_in(self, cell: Cell, settings: str) -> None:
        """Set the estimated cost of `cell` and the nfe of its rows. An error of the method becomes `price_error`.

        `settings`: the method's, as text.
        """
        same = id(cell.shared), cell.name, settings, tuple(cell.nfe)
        if same in self.known:
            known = self.known[same]
            cell.price, cell.nfe, cell.price_error = known.price, list(known.nfe), known.price_error
            return
        try:
            _price(cell, self._teacher(cell.shared))
        except UserError:
            raise
        except Exception as error:  # a third-party method may raise anything; the other cells run
            cell.price_error = " ".join(f"{type(error).__name__}: {error}".split())
        self.known[same] = cell

    def _teacher(self, shared: SharedContext) -> Teacher:
        if id(shared) not in self.teachers:
            teacher = shared.source.untrained().conditioned(shared.conditioning)
            self.teachers[id(shared)] = teacher.with_students(shared.students)
        return self.teachers[id(shared)]


def _price(cell: Cell, teacher: Teacher) -> None:
    """Build the method, take one training step of a few images in each phase, and scale the evaluations counted."""
    shared, config = cell.shared, cell.shared.config
    torch.set_num_threads(config.threads)
    meter = Meter(config.budget, teacher, shared.device)
    method = build(cell, teacher)
    wanted = cell.nfe
    cell.nfe = [n for n in wanted if method.supports(n)]
    if not cell.nfe:
        able = ", ".join(str(n) for n in range(1, 1025) if method.supports(n)) or "none up to 1024"
        raise UserError(f"{cell.name} cannot sample with evaluation.nfe={wanted}. Possible: {able}")
    workspace = Workspace(method.teacher, meter, Path(), shared.device, 0, Progress(None), dry=True)
    method.prepare(workspace)
    ahead = meter.teacher_nfe
    if config.budget.limit == Limit.nfe and ahead >= config.budget.nfe:
        raise UserError(
            f"{cell.name}: its preparation costs {ahead:,} evaluations, budget.nfe allows {config.budget.nfe:,}"
        )
    phases = method.phases()
    per_image = [0.0, 0.0, 0.0]  # of the teacher, of students, and as the budget counts them
    data = DataStream(placeholder(shared.dataset, teacher), 0, shared.device)
    for index, phase in enumerate(phases):
        method.start_phase(index)
        before = meter.teacher_nfe, meter.student_nfe, meter.evaluations
        for _ in method.train_step(_batch(cell, method, data)):
            pass
        share = phase.share / sum(p.share for p in phases)
        per_image[0] += share * (meter.teacher_nfe - before[0]) / PRICED_IMAGES
        per_image[1] += share * (meter.student_nfe - before[1]) / PRICED_IMAGES
        per_image[2] += share * (meter.evaluations - before[2]) / PRICED_IMAGES
        method.end_phase(index, method.student)
    images = config.budget.images if config.budget.limit == Limit.images else 0
    if config.budget.limit == Limit.nfe:
        images = int(max(0, config.budget.nfe - ahead) / per_image[2])
    cell.price = Price(images, 0.0, ahead + round(images * per_image[0]), round(images * per_image[1]))


def _batch(cell: Cell, method: Method, data: DataStream) -> Batch:
    read = data.read if method.needs_data else None
    teacher, generator = method.teacher, torch.Generator().manual_seed(0)
    return Batch(PRICED_IMAGES, teacher.shape, generator, cell.shared.device, read, teacher.conditioning)
