"""The cost of a training in network evaluations, measured on one step before the run."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import torch

from distillbench.budget import Limit, Meter, Price
from distillbench.data_stream import DataStream
from distillbench.errors import UserError
from distillbench.latents import placeholder
from distillbench.method import Batch, Method
from distillbench.pairs import Workspace
from distillbench.progress import Progress
from distillbench.shared_context import Cell, Scene, build
from distillbench.teachers import Teacher

PRICED_IMAGES = 8  # of the step that tells the price


class Foresight:
    """Prices of cells. What decides one are the scene and the method's settings: not the seed, and so not each cell."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Cell] = {}
        self.teachers: dict[int, Teacher] = {}  # of scenes, untrained

    def foresee(self, cell: Cell, settings: str) -> None:
        """Find the cell's rows and its price; an error of the method itself is left for its row to tell.

        `settings`: the method's, as text.
        """
        same = id(cell.scene), cell.name, settings, tuple(cell.nfe)
        if same in self.known:
            known = self.known[same]
            cell.price, cell.nfe, cell.trouble = known.price, list(known.nfe), known.trouble
            return
        try:
            _price(cell, self._teacher(cell.scene))
        except UserError:
            raise
        except Exception as error:  # a method is a stranger's code; the other cells go on
            cell.trouble = " ".join(f"{type(error).__name__}: {error}".split())
        self.known[same] = cell

    def _teacher(self, scene: Scene) -> Teacher:
        if id(scene) not in self.teachers:
            self.teachers[id(scene)] = scene.source.untrained().asked(scene.conditioning)
        return self.teachers[id(scene)]


def _price(cell: Cell, teacher: Teacher) -> None:
    """Build the method and let it take one step of a few images in each phase: what it counts is the price."""
    scene, config = cell.scene, cell.scene.config
    torch.set_num_threads(config.threads)
    meter = Meter(config.budget, teacher, scene.device)
    method = build(cell, teacher)
    wanted = cell.nfe
    cell.nfe = [n for n in wanted if method.supports(n)]
    if not cell.nfe:
        able = ", ".join(str(n) for n in range(1, 1025) if method.supports(n)) or "none up to 1024"
        raise UserError(f"{cell.name} cannot sample with evaluation.nfe={wanted}. Possible: {able}")
    workspace = Workspace(method.teacher, meter, Path(), scene.device, 0, Progress(None), dry=True)
    method.prepare(workspace)
    ahead = meter.teacher_nfe
    if config.budget.limit == Limit.nfe and ahead >= config.budget.nfe:
        raise UserError(
            f"{cell.name}: what it makes ahead costs {ahead:,} evaluations, budget.nfe allows {config.budget.nfe:,}"
        )
    phases = method.phases()
    per_image = [0.0, 0.0]
    data = DataStream(placeholder(scene.dataset, teacher), 0, scene.device)
    for index, phase in enumerate(phases):
        method.start_phase(index)
        before = meter.teacher_nfe, meter.student_nfe
        for _ in method.train_step(_batch(cell, method, data)):
            pass
        share = phase.share / sum(p.share for p in phases)
        per_image[0] += share * (meter.teacher_nfe - before[0]) / PRICED_IMAGES
        per_image[1] += share * (meter.student_nfe - before[1]) / PRICED_IMAGES
        method.end_phase(index, method.student)
    images = config.budget.images if config.budget.limit == Limit.images else 0
    if config.budget.limit == Limit.nfe:
        images = int(max(0, config.budget.nfe - ahead) / sum(per_image))
    cell.price = Price(images, 0.0, ahead + round(images * per_image[0]), round(images * per_image[1]))


def _batch(cell: Cell, method: Method, data: DataStream) -> Batch:
    read = data.read if method.needs_data else None
    teacher, generator = method.teacher, torch.Generator().manual_seed(0)
    return Batch(PRICED_IMAGES, teacher.shape, generator, cell.scene.device, read, teacher.conditioning)
