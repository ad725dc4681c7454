"""The cost of a training in network evaluations, measured before the run on the steps of one cycle of each phase."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from distillbench.errors import UserError
from distillbench.evaluation.timing import timer_of
from distillbench.runs.distances import Distances, compared
from distillbench.runs.shared_context import Cell, PlanSpeed, SharedContext, build
from distillbench.system.progress import Progress
from distillbench.teachers.latents import placeholder
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import Limit, Meter, TrainingCost
from distillbench.training.data_stream import DataStream
from distillbench.training.method import Batch, Method, Phase
from distillbench.training.multistep import MultistepMethod
from distillbench.training.pairs import Workspace
from distillbench.training.share import Share

COST_IMAGES = 8  # at least, in a step whose network evaluations are counted


class CostCache:
    """Estimated costs of cells. They depend on the context and the method's settings, not on the seed."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Cell] = {}
        self.teachers: dict[int, Teacher] = {}  # by id of the context; untrained

    def fill_in(self, cell: Cell, settings: str) -> None:
        """Set the estimated cost of `cell` and the nfe of its rows. An error of the method becomes `cost_error`.

        `settings`: the method's, as text.
        """
        same = id(cell.shared), cell.name, settings, tuple(cell.nfe)
        if same in self.known:
            known = self.known[same]
            cell.cost, cell.nfe, cell.cost_error = known.cost, list(known.nfe), known.cost_error
            cell.cost_varies, cell.group_size, cell.compared = known.cost_varies, known.group_size, known.compared
            cell.plan_speed = known.plan_speed
            return
        try:
            _estimate(cell, self._teacher(cell.shared))
        except UserError:
            raise
        except Exception as error:  # a third-party method may raise anything; the other cells run
            cell.cost_error = " ".join(f"{type(error).__name__}: {error}".split())
        self.known[same] = cell

    def _teacher(self, shared: SharedContext) -> Teacher:
        if id(shared) not in self.teachers:
            teacher = shared.source.untrained().conditioned(shared.conditioning)
            self.teachers[id(shared)] = teacher.with_students(shared.students)
        return self.teachers[id(shared)]


def _estimate(cell: Cell, teacher: Teacher) -> None:
    """Build the method, take the steps of a cycle of each phase, of a few images, and scale the evaluations counted."""
    shared, config = cell.shared, cell.shared.config
    torch.set_num_threads(config.threads)
    meter = Meter(config.budget, teacher, shared.device)
    method = build(cell, teacher)
    method.distances = Distances(teacher, meter, shared.weights, shared.device, dry=True)
    wanted = cell.nfe
    cell.nfe = [n for n in wanted if method.supports(n)]
    if not cell.nfe:
        able = ", ".join(str(n) for n in range(1, 1025) if method.supports(n)) or "none up to 1024"
        raise UserError(f"{cell.name} cannot sample with evaluation.nfe={wanted}. Possible: {able}")
    if isinstance(method, MultistepMethod):
        method.check_levels()
    _check_groups(cell, method.group_size)
    _check_augmentation(cell, method, teacher)
    given = method.teacher, meter, Path(), shared.device, 0, Progress(None)
    workspace = Workspace(*given, dry=True, shard=config.compute.shard)
    method.prepare(workspace)
    ahead = meter.teacher_nfe
    if config.budget.limit == Limit.nfe and ahead >= config.budget.nfe:
        raise UserError(
            f"{cell.name}: its preparation costs {ahead:,} evaluations, budget.nfe allows {config.budget.nfe:,}"
        )
    batches = _Batches(cell, method, teacher)
    stages = [_stage(method, workspace, batches, index) for index in range(len(method.phases()))]
    total = sum(stage.phase.share for stage in stages)
    mean = partial(_mean, stages)
    cell.cost_varies = any(stage.phase.cost_varies for stage in stages)
    evaluations = max(1.0, mean("teacher") + mean("student"))
    prepared = sum(stage.before.teacher_nfe + stage.before.student_nfe for stage in stages)
    cell.plan_speed = PlanSpeed(mean("seconds"), mean("seconds") / evaluations, ahead + prepared)
    cell.compared = mean("compared")
    images = [0.0] * len(stages)
    if config.budget.limit == Limit.images:
        images = [config.budget.images * stage.phase.share / total for stage in stages]
    if config.budget.limit == Limit.nfe:
        images = [*map(float, _affordable(cell, stages, ahead, config.budget.nfe))]
    trained = list(zip(images, stages, strict=True))
    once = [cost for stage in stages for cost in (stage.before, stage.after)]
    teacher_nfe = sum(cost.teacher_nfe for cost in once) + round(sum(n * one.teacher for n, one in trained))
    student_nfe = sum(cost.student_nfe for cost in once) + round(sum(n * one.student for n, one in trained))
    cell.cost = TrainingCost(round(sum(images)), 0.0, ahead + teacher_nfe, student_nfe)


@dataclass(frozen=True)
class _Stage:
    """What a phase costs: before its first step, after its last one, and evaluations and seconds of an image."""

    phase: Phase
    before: TrainingCost
    after: TrainingCost
    teacher: float
    student: float
    counted: float  # of both, as the budget counts them
    compared: float  # of LPIPS
    seconds: float


def _stage(method: Method, workspace: Workspace, batches: _Batches, index: int) -> _Stage:
    """The cost of phase `index`, from the steps of a cycle without updates."""
    phase, meter = method.phases()[index], workspace.meter

    def counts() -> list[int]:
        return [meter.teacher_nfe, meter.student_nfe, meter.evaluations, compared(meter.cost().networks)]

    def spent(earlier: list[int], later: list[int]) -> TrainingCost:
        return TrainingCost(teacher_nfe=later[0] - earlier[0], student_nfe=later[1] - earlier[1])

    began = counts()
    method.start_phase(index)
    method.prepare_phase(index, workspace)
    prepared = counts()
    seconds = timer_of(workspace.device).seconds(partial(_steps, method, batches, index, phase.cost_steps))
    images, trained = phase.cost_steps * batches.size, counts()
    method.end_phase(index, method.student)
    teacher, student, counted, lpips = ((b - a) / images for a, b in zip(prepared, trained, strict=True))
    once = spent(began, prepared), spent(trained, counts())
    return _Stage(phase, *once, teacher, student, counted, lpips, seconds / images)


def _mean(stages: Sequence[_Stage], name: str) -> float:
    """The mean of a field over phases, weighted with their shares of the budget."""
    return sum(s.phase.share * getattr(s, name) for s in stages) / sum(s.phase.share for s in stages)


def _affordable(cell: Cell, stages: Sequence[_Stage], ahead: int, budget: int) -> list[int]:
    """The training images of each phase that a budget in evaluations allows, after `ahead` of them."""
    images: list[int] = []
    spent, total, share = float(ahead), sum(stage.phase.share for stage in stages), 0.0
    for stage in stages:
        share += stage.phase.share / total
        before = stage.before.teacher_nfe + stage.before.student_nfe
        if before and spent + before >= share * budget:
            raise UserError(
                f"{cell.name}: the preparation of phase {stage.phase.label!r} costs {before:,} evaluations, and until "
                f"its end budget.nfe={budget:,} allows {max(0, round(share * budget - spent)):,} more"
            )
        images.append(int(max(0.0, share * budget - spent - before) / stage.counted))
        spent += before + images[-1] * stage.counted + stage.after.teacher_nfe + stage.after.student_nfe
    return images


def _steps(method: Method, batches: _Batches, phase: int, count: int) -> None:
    """The first `count` steps of a phase, without updates."""
    for step in range(count):
        for _ in method.train_step(batches.of_step(step, phase)):
            pass


def _check_groups(cell: Cell, group: int) -> None:
    """Note the method's `group` size; UserError for one with which a batch cannot be cut into whole groups."""
    config, cell.group_size = cell.shared.config, group
    if group < 1:
        raise UserError(f"{cell.name}: group_size is a number of images, at least 1, got {group}")
    amounts = {"batch_size": config.batch_size}
    if config.budget.limit == Limit.images:
        amounts["budget.images"] = config.budget.images
    if wrong := [f"{name}={amount}" for name, amount in amounts.items() if amount % group]:
        raise UserError(
            f"{cell.name} compares images in groups of {group}: {' and '.join(wrong)} must be divisible by {group}"
        )
    if 0 < config.microbatch < group:
        raise UserError(
            f"{cell.name} compares images in groups of {group}: microbatch must be at least {group}, or 0 for the "
            f"whole batch, got {config.microbatch}"
        )


def _check_augmentation(cell: Cell, method: Method, teacher: Teacher) -> None:
    """Raise UserError if the real images of `cell` cannot be augmented as the settings say."""
    asked = cell.augmentation
    if asked and teacher.to_latents is not None:
        raise UserError(
            f"augment.{next(iter(asked))} changes images, and teacher={teacher.name} trains students on latents, each "
            "encoded once from an image as it is. Possible: augment.flip=false augment.probability=0"
        )
    if "probability" in asked and method.inputs != "data":
        raise UserError(
            f"augment.probability: {cell.name} compares generated images with real ones, which must not be augmented "
            "alone. Possible: augment.probability=0; augment.flip=true"
        )


class _Batches:
    """The batches of the steps that are counted, of `size` images each."""

    def __init__(self, cell: Cell, method: Method, teacher: Teacher) -> None:
        self.teacher, self.device = method.teacher, cell.shared.device
        self.size = method.group_size * -(-COST_IMAGES // method.group_size)
        self.augment = cell.shared.config.augment
        self.share = Share(group=method.group_size)
        self.generator = torch.Generator().manual_seed(0)
        data = DataStream(placeholder(cell.shared.dataset, teacher), 0, self.device)
        self.read = data.read if method.reads_data(method.config) else None

    def of_step(self, step: int, phase: int) -> Batch:
        """The batch of a step of phase number `phase`."""
        about = self.teacher.shape, self.generator, self.device, self.read, self.teacher.conditioning
        return Batch(self.size, *about, self.share, step, phase, self.augment)
