"""Trials of a method and of the training of a teacher: seconds of a step, a preparation and a network evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.evaluation.evaluator import Sampler
from distillbench.evaluation.timing import Timer
from distillbench.runs.distances import Distances
from distillbench.runs.shared_context import Cell, SharedContext, build
from distillbench.runs.training_cost import COST_IMAGES
from distillbench.runs.trials import Line, fit
from distillbench.storage.files import canonical_json
from distillbench.system.progress import Progress
from distillbench.teachers.latents import placeholder
from distillbench.teachers.teacher import Teacher, TeacherPlan
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.compute import ComputeConfig, Sampling, applied, sampling
from distillbench.training.data_stream import DataStream
from distillbench.training.loop import Loop, TrialSteps
from distillbench.training.method import Batch, Method, OptimizerConfig
from distillbench.training.optimizer_config import optimizers_of
from distillbench.training.optimizers import warm_up
from distillbench.training.pairs import PairStore, Solve, Workspace, recipe_of

WITH_GRADIENTS = 3.0  # time of a step over that of its forward passes alone, where no step with gradients is affordable


@dataclass(frozen=True)
class MethodTimes:
    """Seconds of a training step, and of a network evaluation of n images where the student is sampled from.

    `pairs`: the name and the evaluations of noise-image pairs that are not cached. `timed`: images of the
    largest step that was timed; 0: none, the plan's forward passes are scaled.
    """

    step: float
    evaluation: Line
    pairs: tuple[tuple[str, int], ...]
    timed: int


def times_of_method(cell: Cell, teacher: Teacher, timer: Timer, seconds: float) -> MethodTimes:
    """The times of the method of `cell`, from trials that take about `seconds`."""
    assert cell.method_config is not None
    config = cell.shared.config
    batch, image = config.batch_size, WITH_GRADIENTS * cell.plan_speed.image
    first = min(batch, cell.group_size * -(-COST_IMAGES // cell.group_size))
    if 2 * image * first > seconds:  # images of a large network: a step of few is not much faster for each
        first = cell.group_size
    if image * first > seconds:
        return times_by_plan(cell)
    for optimizer in sorted(set(optimizers_of(cell.method_config).values())):
        warm_up(cell.shared.device, optimizer)
    with ExitStack() as stack:
        meter = Meter(config.budget, teacher, cell.shared.device)
        stack.callback(meter.stop)
        method = build(cell, teacher)
        stack.enter_context(applied(_timed(config.compute), method, cell.shared.device))
        method.distances = Distances(teacher, meter, cell.shared.weights, cell.shared.device)
        workspace = _CountingWorkspace(method.teacher, meter, cell)
        method.prepare(workspace)
        images, flip = placeholder(cell.shared.dataset, teacher), config.augment.flip
        read = DataStream(images, 0, cell.shared.device, flip=flip).read if cell.reads_data else None
        loop = Loop(batch, config.microbatch, _timed(config.compute), augment=config.augment)
        steps = TrialSteps(method, cell.method_config, workspace, read, loop)
        step, timed = _step(method, steps, first, batch, timer, 0.75 * seconds)
    evaluation = times_of_sampling(method.eval().sample, min(cell.nfe), cell.shared, method.teacher, timer, seconds / 4)
    return MethodTimes(step, evaluation, tuple(workspace.missing), timed)


def times_by_plan(cell: Cell) -> MethodTimes:
    """The times of the method of `cell`, as far as the steps of its plan show them."""
    rough = cell.plan_speed
    step = WITH_GRADIENTS * rough.image * cell.shared.config.batch_size
    pairs = ((f"{cell.name} {cell.differs}", rough.pair_evaluations),)
    return MethodTimes(step, Line(0.0, rough.evaluation), pairs, 0)


def _timed(compute: ComputeConfig) -> ComputeConfig:
    """The settings of trials: without the compiler and FSDP."""
    return dataclasses.replace(compute, compile="off", shard=False)


def _step(method: Method, steps: TrialSteps, first: int, batch: int, timer: Timer, seconds: float) -> tuple[float, int]:
    """Seconds of a step of `batch` images, the mean over phases, and the fewest images timed in one of them.

    Of many phases the first, the middle and the last are timed.
    """
    phases = method.phases()
    chosen = {0, len(phases) // 2, len(phases) - 1}
    total, shares, timed = 0.0, 0.0, batch
    for index, phase in enumerate(phases):
        steps.begin(index)
        if index in chosen:
            line = fit(partial(steps.take, phase.cost_steps), first, batch, timer, seconds / len(chosen))
            total += phase.share * line(batch) / phase.cost_steps
            shares, timed = shares + phase.share, min(timed, line.timed)
        steps.end(index)
    return total / shares, timed


def times_of_sampling(
    sampler: Sampler, nfe: int, shared: SharedContext, teacher: Teacher, timer: Timer, seconds: float
) -> Line:
    """Seconds of one network evaluation of n images, from samples with `nfe` evaluations."""
    device, config = shared.device, shared.config.evaluation

    def sample(images: int) -> None:
        noise = Noise(stream_key("timing", 0), range(images), teacher.shape, device)
        teacher.to_images(sampler(noise, nfe, teacher.conditioning.of_images(range(images), device)))

    plain = Sampling(config.precision)  # CUDA graphs would be captured for each size
    with torch.no_grad(), sampling(plain, teacher, device):
        return fit(sample, 1, config.batch_size, timer, seconds).over(nfe)


class _CountingWorkspace(Workspace):
    """Counts the evaluations of the pairs that are not cached, and computes two of them."""

    def __init__(self, teacher: Teacher, meter: Meter, cell: Cell) -> None:
        shared = cell.shared
        given = teacher, meter, shared.folder.cache("pairs"), shared.device, cell.seed or 0, Progress(None)
        super().__init__(*given, dry=True)
        self.label = f"{cell.name} {cell.differs}"
        self.missing: list[tuple[str, int]] = []

    def pairs(
        self,
        solve: Solve,
        count: int,
        recipe: dict[str, Any],
        network: nn.Module | None = None,
        held_out: bool = False,
    ) -> PairStore:
        before = self.meter.evaluations
        store = super().pairs(solve, count, recipe, network, held_out)
        recipe = recipe_of(recipe, held_out)
        if network is not None:  # after its training the network will be another one
            self.missing.append((f"{self.label}, {canonical_json(recipe)}", self.meter.evaluations - before))
        elif not self.has_pairs(count, recipe):
            _, folder = self._place(count, recipe)
            self.missing.append((folder.name, self.meter.evaluations - before))
        return store


class _Regression(Method):
    """What the training of a teacher costs: one pass of its network over noisy images, forward and backward."""

    student: Denoiser
    name, Config, paper, needs_data = "regression", OptimizerConfig, "", True  # type: ignore[assignment]

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        schedule = self.teacher.schedule
        x_0, t = batch.x_0, batch.uniform(schedule.t_min, schedule.t_max)
        x_t = schedule.alpha(t) * x_0 + schedule.sigma(t) * batch.noise()
        yield self.student, (self.student.output(x_t, t, batch.c) - x_0).square().mean()

    def sample(self, noise: Any, nfe: int, c: Any) -> Tensor:
        raise NotImplementedError


def seconds_of_teacher_training(
    shared: SharedContext, plan: TeacherPlan, teacher: Teacher, timer: Timer, seconds: float
) -> tuple[float, int]:
    """Seconds of the training that `plan` describes, and the images of the largest step that was timed."""
    if plan.seconds is not None:
        return plan.seconds, plan.batch_size
    warm_up(shared.device)
    config = OptimizerConfig()
    with ExitStack() as stack:
        meter = Meter(BudgetConfig(), teacher, shared.device)
        stack.callback(meter.stop)
        method = _Regression(config, teacher).to(shared.device)
        stack.enter_context(applied(ComputeConfig(), method, shared.device))
        workspace = Workspace(teacher, meter, Path(), shared.device, 0, Progress(None), dry=True)
        read = DataStream(shared.dataset, 0, shared.device).read
        steps = TrialSteps(method, config, workspace, read, Loop(plan.batch_size))
        steps.begin(0)
        line = fit(partial(steps.take, 1), 1, plan.batch_size, timer, seconds)
    return line(plan.batch_size) * plan.images / plan.batch_size, line.timed
