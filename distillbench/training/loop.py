"""The training loop of all methods, and of the teachers that the harness trains.

It decides what must be equal for a fair comparison: images, optimiser, averaging, and when training stops.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distillbench.datasets.augmentation import AugmentConfig
from distillbench.errors import DivergedError
from distillbench.metering.energy import Energy
from distillbench.metering.stopwatch import Account
from distillbench.system.dtensors import gather_full, load_full
from distillbench.system.progress import Step
from distillbench.system.signals import Interrupted
from distillbench.training.budget import Meter, TrainingCost
from distillbench.training.checkpoints import Checkpoint, Checkpoints, averaged_state
from distillbench.training.compute import ComputeConfig, grad_scaler, last_batch
from distillbench.training.data_parallel import SINGLE_RANK, Ranks
from distillbench.training.fsdp import Sharded, check_sharding
from distillbench.training.method import Batch, Method, Phase, Read
from distillbench.training.monitor import Monitor
from distillbench.training.optimizer_config import OptimizerConfig
from distillbench.training.optimizers import Average, Optimizers, learning_rate_factor
from distillbench.training.pairs import Workspace
from distillbench.training.resume import (
    Resume,
    Source,
    State,
    generators_state,
    restore_generators,
    restore_torch_generators,
    torch_generators_state,
)
from distillbench.training.share import parts_of
from distillbench.training.update_counts import UpdateCounts

STEPS_BETWEEN_CHECKS = 50  # between reads of the loss, each of which waits for the device
EXPLOSION = 1e6  # of the loss over its first value, or over 1: training has diverged


@dataclass(frozen=True)
class LossPoint:
    """A point of the training curve: the mean loss of the steps since the previous point."""

    images: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Trained:
    """The result of a training: cost, loss curve and checkpoints. The weights are in the method."""

    cost: TrainingCost
    curve: list[LossPoint]
    checkpoints: list[Checkpoint] = field(default_factory=list)
    counts: UpdateCounts = field(default_factory=UpdateCounts)


@dataclass(frozen=True)
class Loop:
    """How steps are computed, for every method."""

    batch_size: int  # images of a step, over all ranks
    microbatch: int = 0  # most images that a rank computes at once (gradient accumulation); 0: its whole share
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    ranks: Ranks = SINGLE_RANK
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # of real images, except flips: `read` flips them


def train(
    method: Method,
    config: OptimizerConfig,
    workspace: Workspace,
    read: Read | None,
    loop: Loop,
    step: Step,
    checkpoints: Checkpoints | None = None,
    resume: Resume | None = None,
    monitor: Monitor | None = None,
) -> Trained:
    """Train `method` until its meter says that the budget is used, and copy the averaged weights into its student.

    `read(n)` gives n real images and their labels; None for a method that may not see any. A checkpoint is written
    before the first step after its fraction of the budget is reached; if only the last step reaches it, there is none.
    `monitor` looks at samples along training, outside the budget.
    With `resume` states are saved, outside the budget, and training continues from the last one. Raises DivergedError
    if a loss is not finite or explodes, Interrupted after a signal.
    """
    try:
        return _Training(method, config, workspace, read, loop, step, checkpoints, resume, monitor).run()
    finally:
        workspace.meter.stop()


class TrialSteps:
    """Steps of a training that never is one: they cost what those of :func:`train` do, and leave the weights alone.

    The caller prepares the method before, begins its phases in order, and ends each.
    """

    def __init__(
        self, method: Method, config: OptimizerConfig, workspace: Workspace, read: Read | None, loop: Loop
    ) -> None:
        self._training = _Training(method, config, workspace, read, loop, Step(lambda *_: None), None, None, None)
        self._phases = method.phases()

    def begin(self, phase: int) -> None:
        """Begin phase number `phase`, with optimisers of its own."""
        self._training.meter.look_again()
        self._training.start(self._phases, phase)

    def take(self, steps: int, images: int) -> None:
        """The first `steps` of the phase, of `images` each, with a learning rate of 0."""
        training = self._training
        for step in range(steps):
            training.step = step
            training.take_step(images, 0.0)
            training.average.update(images)
        training.curve.losses.clear()

    def end(self, phase: int) -> None:
        """End phase number `phase`."""
        self._training.method.end_phase(phase, self._training.average.module)


class _Training:
    """The loop, and its state as it is saved."""

    def __init__(
        self,
        method: Method,
        config: OptimizerConfig,
        workspace: Workspace,
        read: Read | None,
        loop: Loop,
        step: Step,
        checkpoints: Checkpoints | None,
        resume: Resume | None,
        monitor: Monitor | None,
    ) -> None:
        self.method, self.config, self.workspace, self.read = method, config, workspace, read
        self.loop, self.checkpoints, self.resume, self.monitor = loop, checkpoints, resume, monitor
        self.meter, self.ranks, self.charging = workspace.meter, loop.ranks, workspace.meter.stopwatch.charging
        self.generator = torch.Generator(workspace.device).manual_seed(workspace.seed)
        self.curve = _Curve(self.meter, step, loop.ranks)
        self.written: list[Checkpoint] = []
        self.reached = 0  # number of checkpoints written
        self.phase = self.step = 0  # the index of the phase, and of the next step within it
        self.share = replace(loop.ranks.share, group=method.group_size)  # of this rank, in whole groups
        self.sharded: Sharded | None = None
        self.begin = self.finish = 0.0  # of the learning-rate schedule, as shares of the budget

    def run(self) -> Trained:
        method, meter, ranks = self.method, self.meter, self.ranks
        shard, device = self.loop.compute.shard, self.workspace.device
        check_sharding(self.loop.compute, ranks.count)
        if shard:
            method.teacher.denoiser.to(device)  # sharded only after prepare()
        if (texts := method.teacher.conditioning.texts) is not None:
            meter.charge(texts.seconds(method.teacher.conditioning.trained), 0)
        method.prepare(self.workspace)  # on all ranks at the same time; the next line waits for all
        if ranks.status(meter, due=False)[0] >= 1:
            raise RuntimeError(f"prepare() used up the budget of {meter.budget.amount:g} {meter.budget.limit}")
        if shard:
            self.sharded = Sharded(method, self.config.averaged, ranks, device)
        phases = method.phases()
        found = self._newest_state()
        if found is not None:
            self._restore(found)
        for index in range(self.phase, len(phases)):
            meter.look_again()
            if found is None:
                self.start(phases, index)
            found = None
            with nullcontext() if self.resume is None else self.resume.stop.patiently():
                self._train_until(_end_of_phase(phases, index), phases[index].label)
            method.end_phase(index, self.average.module)
        self.curve.log(phases[-1].label, last=True)
        method.student.load_state_dict(self.average.module.state_dict())
        self._look(1.0)
        return Trained(ranks.sum_cost(meter.cost()), self.curve.points, self.written, self.curve.counts)

    def _newest_state(self) -> State | None:
        """The last saved state, the same on all ranks; None without one."""
        if self.resume is None:
            return None
        with self.ranks.main_first():  # rank 0 renames damaged files
            return self.resume.states.newest()

    def start(self, phases: list[Phase], index: int) -> None:
        """Begin a phase."""
        self.phase, self.step = index, 0
        self.method.start_phase(index)
        self._prepare_phase(phases, index)
        if index == 0 or phases[index].fresh:
            self._make_optimizers()
            self.begin, self.finish = self.ranks.progress(self.meter), _end_of_schedule(phases, index)

    def _prepare_phase(self, phases: list[Phase], index: int) -> None:
        """Let the method prepare a phase, on all ranks at the same time. RuntimeError if no step of it is left then."""
        meter, ranks, end = self.meter, self.ranks, _end_of_phase(phases, index)
        evaluations, before = meter.evaluations, ranks.progress(meter)
        self.method.prepare_phase(index, self.workspace)
        after = ranks.progress(meter)
        if ranks.broadcast_flag(meter.evaluations > evaluations and before < end <= after):
            raise RuntimeError(
                f"prepare_phase() used up the budget of phase {phases[index].label!r}, which ends at {end:.0%} of "
                f"{meter.budget.in_words}"
            )

    def _make_optimizers(self) -> None:
        scaler, own = grad_scaler(self.loop.compute, self.workspace.device), self.method.settings_of
        self.optimizers = Optimizers(self.config, scaler, self.ranks, own, self.curve.counts)
        twin = None if self.sharded is None else self.sharded.average
        self.average = Average(self.method.student, self.config, twin)

    def _train_until(self, end: float, label: str) -> None:
        """Steps until the share `end` of the budget is used."""
        meter, curve = self.meter, self.curve
        progress = self.ranks.progress(meter)
        while progress < end:
            self._write_checkpoints(progress)
            self._look(progress)
            size = meter.next_batch(self.loop.batch_size)
            factor = learning_rate_factor(self.config, (progress - self.begin) / max(self.finish - self.begin, 1e-12))
            with nullcontext() if size == self.loop.batch_size else last_batch(self.loop.compute):
                self.take_step(size, factor)
            self.step += 1
            meter.images += size
            self.average.update(size)
            curve.log(label)
            progress, due = self.ranks.status(meter, self.resume is not None and self.resume.due())
            if due and self.resume is not None:
                self._save(self.resume)

    def take_step(self, size: int, factor: float) -> None:
        """One step of `size` images, and what the method does after it."""
        self._update(size, factor)
        self.method.after_step()

    def _update(self, size: int, factor: float) -> None:
        """The updates of a step. All parts reach an update before the network is updated."""
        workspace, teacher, optimizers = self.workspace, self.workspace.teacher, self.optimizers
        args = teacher.shape, self.generator, workspace.device, self.read, teacher.conditioning, self.share
        batch = Batch(size, *args, self.step, self.phase, self.loop.augment)
        parts = batch.parts(parts_of(size, self.loop.microbatch, self.ranks.count, self.share.group))
        updates = [iter(self.method.train_step(part)) for part in parts]
        while True:
            losses: list[Tensor] = []
            for update, part in zip(updates, parts, strict=True):
                if (item := next(update, None)) is None:
                    continue
                network, loss = item
                loss = loss if part.size == size else loss * (part.size / size)
                with self.charging(Account.student):
                    optimizers.differentiate(network, loss, first=not losses, last=part is parts[-1])
                losses.append(loss.detach())
            if not losses:
                return
            with self.charging(Account.student):
                optimizers.step(network, factor)
            self.curve.add(losses[0] if len(losses) == 1 else torch.stack(losses).sum())

    def _save(self, resume: Resume) -> None:
        """Save a state, outside the budget. Raises Interrupted if a signal has asked to stop."""
        cost, used = self._cost()
        with self.meter.pause():
            state = self._state(cost, used)
            resume.save(self.meter.images, State(gather_full(state.tensors, self.ranks.main), state.values))
            if self.ranks.broadcast_flag(resume.stop()):
                raise Interrupted(resume.stop.name)

    def _cost(self) -> tuple[TrainingCost, Energy]:
        """Cost and energy of all ranks until now."""
        return self.ranks.sum_cost(self.meter.cost()), self.ranks.sum_energy(self.meter.energy())

    def _write_checkpoints(self, progress: float) -> None:
        if self.checkpoints is None or not self.meter.images:
            return
        while progress >= next(iter(self.checkpoints.fractions[self.reached :]), 2.0):
            cost, used = self._cost()
            with self.meter.pause():
                tensors = gather_full(averaged_state(self.method, self.average.module), self.ranks.main)
                if self.ranks.main:
                    args = self.reached, self.method, tensors, self.phase, cost, used
                    self.written.append(self.checkpoints.write(*args))
            self.reached += 1

    def _look(self, progress: float) -> None:
        """Let the monitor look if it is due. Only rank 0 samples; the others wait, so that nothing is charged to them.

        A method may not draw from these generators when it samples; if it does, the training does not notice.
        """
        if self.monitor is None or not self.meter.images or not self.monitor.due(progress):
            return
        device = self.workspace.device
        own = {name: each for name, each in self._generators().items() if isinstance(each, torch.Generator)}
        with self.meter.pause():
            if self.ranks.main:
                before = generators_state(own, device)
                args = self.phase, progress, self.meter.images, self.meter.evaluations
                self.monitor.take(self.method, self.average.module, *args)
                restore_generators(before, own, device)
                self.curve.words = self.monitor.words
            self.ranks.broadcast_flag(True)

    def _state(self, cost: TrainingCost, used: Energy) -> State:
        """Everything that the rest of the training depends on, and what it has cost until now."""
        method = self.method
        state = State()
        state.add("method", State(method.state_dict()))
        state.add("average", self.average.state())
        state.add("optimizers", self.optimizers.state(method))
        state.add("curve", self.curve.state())
        state.add("generators", generators_state(self._generators(), self.workspace.device))
        of_ranks = enumerate(self.ranks.all_gather(torch_generators_state(self.workspace.device)))
        state.add("masks", State({f"{rank}/{name}": each for rank, masks in of_ranks for name, each in masks.items()}))
        plain: dict[str, Any] = {
            "phase": self.phase,
            "step": self.step,
            "schedule": [self.begin, self.finish],
            "cost": asdict(cost),
            "energy": asdict(used),
            "checkpoints": [asdict(checkpoint) for checkpoint in self.written],
            "looks": None if self.monitor is None else self.monitor.state(),
        }
        state.values.update(plain)
        return state

    def _restore(self, state: State) -> None:
        """Continue from `state`: start its phases again, then restore every tensor."""
        method, values = self.method, state.values
        for index in range(values["phase"] + 1):
            self.method.start_phase(index)
        self.phase, self.step = values["phase"], values.get("step", 0)  # older states lack it, and had no cycles
        self.begin, self.finish = values["schedule"]
        load_full(method, state.part("method").tensors)
        method.prepare_phase(self.phase, self.workspace)  # what it costs is dropped: the state's cost has it
        self._make_optimizers()
        self.average.restore(state.part("average"))
        self.optimizers.restore(state.part("optimizers"), method)
        self.curve.restore(state.part("curve"))
        self.written = [_checkpoint(plain) for plain in values["checkpoints"]]
        self.reached = len(self.written)
        if self.monitor is not None and (looks := values.get("looks")) is not None:
            self.monitor.restore(looks)
            self.curve.words = self.monitor.words
        self.meter.restart(*self.ranks.own_cost(TrainingCost.from_plain(values["cost"]), Energy(**values["energy"])))
        assert self.resume is not None
        self.resume.restore_peaks(state)
        restore_generators(state.part("generators"), self._generators(), self.workspace.device)
        mine = f"{self.ranks.share.index}/"
        masks = {n.removeprefix(mine): each for n, each in state.part("masks").tensors.items() if n.startswith(mine)}
        restore_torch_generators(masks, self.workspace.device)
        self.resume.states.progress.say(f"continuing after {self.meter.images:,} images")

    def _generators(self) -> dict[str, Source]:
        """All random generators of the training, including those that are attributes of the method."""
        own = {f"method/{name}": value for name, value in vars(self.method).items()}
        given = {} if self.resume is None else {f"data/{name}": g for name, g in self.resume.generators.items()}
        found: dict[str, Source] = {"training": self.generator} | given
        return found | {name: value for name, value in own.items() if isinstance(value, torch.Generator)}


def _checkpoint(plain: dict[str, Any]) -> Checkpoint:
    return Checkpoint(**plain | {"cost": TrainingCost.from_plain(plain["cost"]), "energy": Energy(**plain["energy"])})


def _end_of_phase(phases: list[Phase], index: int) -> float:
    """Progress at which phase `index` ends."""
    shares = [phase.share for phase in phases]
    return min(sum(shares[: index + 1]) / sum(shares), 1.0) - 1e-12


def _end_of_schedule(phases: list[Phase], index: int) -> float:
    """Progress at which the learning-rate schedule of phase `index` ends: where the next fresh phase begins."""
    last = index
    while last + 1 < len(phases) and not phases[last + 1].fresh:
        last += 1
    return sum(p.share for p in phases[: last + 1]) / sum(p.share for p in phases)


class _Curve:
    """The loss curve. Losses are collected on the device, read every STEPS_BETWEEN_CHECKS steps and checked."""

    def __init__(self, meter: Meter, step: Step, ranks: Ranks) -> None:
        self.meter, self.step, self.ranks = meter, step, ranks
        self.losses: list[Tensor] = []
        self.steps = 0
        self.points: list[LossPoint] = []
        self.counts = UpdateCounts()
        self.words = ""  # of the last look at samples, for the progress line

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())

    def state(self) -> State:
        losses = torch.stack(self.losses).double() if self.losses else torch.zeros(0)
        points = [asdict(point) for point in self.points]
        return State({"losses": losses}, {"steps": self.steps, "points": points, "counts": self.counts.state()})

    def restore(self, state: State) -> None:
        self.losses = list(state.tensors["losses"].to(self.meter.device))  # the device of the next steps' losses
        self.steps = state.values["steps"]
        self.points = [LossPoint(**plain) for plain in state.values["points"]]
        self.counts.restore(state.values.get("counts"))  # those of older versions lack it

    def log(self, label: str, last: bool = False) -> None:
        self.steps += 1
        if not self.losses or (self.steps % STEPS_BETWEEN_CHECKS and not last and self.steps > 1):
            return
        loss = torch.stack(self.losses).double().mean()
        own, *counts = torch.stack([loss, *self.counts.unread()]).tolist()  # one wait for all
        self.counts.note(counts)
        mean = self.ranks.all_reduce_number(own)  # each rank has the part of its rows
        self.losses.clear()
        if not math.isfinite(mean):
            why = (
                f"; {self.counts.nonfinite} updates had gradients that are not finite" if self.counts.nonfinite else ""
            )
            raise DivergedError(f"the loss is {mean} after {self.meter.images} images ({label}){why}")
        first = abs(self.points[0].loss) if self.points else abs(mean)
        if abs(mean) > EXPLOSION * max(first, 1.0):
            raise DivergedError(
                f"the loss exploded from {first:.3g} to {mean:.3g} after {self.meter.images} images ({label})"
            )
        self.points.append(LossPoint(self.meter.images, self.meter.cost().seconds, mean))
        self.step.advance(self.ranks.progress(self.meter), f"{label}, loss {mean:.4g}{self.words}")
