"""The one training loop: every method, and every teacher that the harness trains, goes through it.

Fairness is this file: who gets how many images, which optimiser, which average, and when training stops.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distillbench.budget import Meter, Price
from distillbench.datasets import Dataset, to_float
from distillbench.energy import Energy
from distillbench.errors import DivergedError, UserError
from distillbench.files import sha256_file, write_atomically
from distillbench.method import Batch, Method, OptimizerConfig, Phase, Read
from distillbench.pairs import Workspace
from distillbench.progress import Step
from distillbench.resume import Resume, State, generators_state, restore_generators
from distillbench.stopwatch import Account

STEPS_BETWEEN_CHECKS = 50  # the loss is read, and with it the device waited for, this often
EXPLOSION = 1e6  # growth of the loss over its first value, or over 1, from which no training comes back


@dataclass(frozen=True)
class LossPoint:
    """A point of the training curve: the mean loss of the steps since the point before."""

    images: int
    seconds: float
    loss: float


class Average:
    """Exponential moving average of a network's weights, by half-life in images.

    At the start the half-life is at most 5 % of the images seen, so the initial weights are forgotten (Karras et al.
    2022, `ema_rampup_ratio`). With half-life 0 the average is the network itself.
    """

    def __init__(self, network: nn.Module, halflife_kimg: float) -> None:
        self.network, self.halflife = network, 1000 * halflife_kimg
        self.module = copy.deepcopy(network).eval().requires_grad_(False) if self.halflife else network
        self.mine, self.theirs = list(self.module.parameters()), list(network.parameters())
        self.buffers = list(zip(self.module.buffers(), network.buffers(), strict=True))
        self.images = 0

    def update(self, images: int) -> None:
        self.images += images
        if self.module is self.network:
            return
        halflife = min(self.halflife, 0.05 * self.images)
        weight = 1 - 0.5 ** (images / halflife)
        with torch.no_grad():
            torch._foreach_lerp_(self.mine, self.theirs, weight)
            for mine, theirs in self.buffers:
                mine.copy_(theirs)

    def state(self) -> State:
        own = self.module.state_dict() if self.module is not self.network else {}
        return State(own, {"images": self.images})

    def restore(self, state: State) -> None:
        self.images = state.values["images"]
        if self.module is not self.network:
            self.module.load_state_dict(state.tensors)


def learning_rate_factor(config: OptimizerConfig, progress: float) -> float:
    """Warm-up, then the decay, as a share of the peak learning rate; `progress` of the phase is in [0, 1]."""
    warmup = min(1.0, progress / config.lr_warmup) if config.lr_warmup else 1.0
    past = max(0.0, (progress - config.lr_warmup) / max(1 - config.lr_warmup, 1e-12))
    decay = {"constant": 1.0, "linear": 1 - past, "cosine": 0.5 * (1 + math.cos(math.pi * past))}
    return warmup * decay[config.lr_decay]


class Optimizers:
    """One Adam for each network that a method yields, all at the learning rate of the same schedule."""

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.by_network: dict[nn.Module, torch.optim.Optimizer] = {}

    def _make(self, network: nn.Module) -> torch.optim.Optimizer:
        betas, decay = (self.config.beta1, self.config.beta2), self.config.weight_decay
        return torch.optim.AdamW(network.parameters(), lr=self.config.lr, betas=betas, weight_decay=decay, fused=True)

    def update(self, network: nn.Module, loss: Tensor, factor: float) -> None:
        """One step down the gradient of `loss` in the weights of `network`."""
        self.differentiate(network, loss, first=True)
        self.step(network, factor)

    def differentiate(self, network: nn.Module, loss: Tensor, first: bool) -> None:
        """Add the gradient of `loss` to that of the parts before; with `first` there are none."""
        if network not in self.by_network:
            self.by_network[network] = self._make(network)
        if first:
            self.by_network[network].zero_grad()
        loss.backward()

    def step(self, network: nn.Module, factor: float) -> None:
        """One step down the gradient that is there."""
        optimizer = self.by_network[network]
        for group in optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.config.grad_clip, foreach=True)
        optimizer.step()

    def state(self, method: Method) -> State:
        """Adam's moments by the names that the networks have in `method`; RuntimeError for one that has none."""
        names = {module: name for name, module in method.named_modules()}
        tensors = {}
        for network, optimizer in self.by_network.items():
            if network not in names:
                kind = type(network).__name__
                raise RuntimeError(
                    f"train_step yields a {kind} that is no attribute of the method, so it cannot be kept"
                )
            for index, weight in enumerate(optimizer.param_groups[0]["params"]):
                for key, value in optimizer.state[weight].items():
                    tensors[f"{names[network]}/{index}/{key}"] = value
        return State(tensors, {"networks": [names[network] for network in self.by_network]})

    def restore(self, state: State, method: Method) -> None:
        networks = dict(method.named_modules())
        for name in state.values["networks"]:
            optimizer = self.by_network[networks[name]] = self._make(networks[name])
            for index, weight in enumerate(optimizer.param_groups[0]["params"]):
                found = {key.rpartition("/")[2]: key for key in state.tensors if key.startswith(f"{name}/{index}/")}
                if found:
                    moments = {key: state.tensors[full].to(weight.device) for key, full in found.items()}
                    optimizer.state[weight] = moments


@functools.cache
def warm_up(device: str) -> None:
    """Update one number: what torch loads for its first optimiser step, seconds of imports, is charged to nobody."""
    network = nn.ParameterList([torch.zeros(1, device=device)])
    Optimizers(OptimizerConfig()).update(network, network[0].square().sum(), 1.0)


class DataStream:
    """Random batches of a dataset, drawn with replacement by a generator of their own: the same order for all."""

    def __init__(self, dataset: Dataset, seed: int, device: str) -> None:
        self.dataset, self.device = dataset, device
        self.generator = torch.Generator().manual_seed(seed)

    def read(self, size: int) -> tuple[Tensor, Tensor | None]:
        """`size` images in [-1, 1] on the device, and their classes where the dataset has some."""
        indices = torch.randint(len(self.dataset), (size,), generator=self.generator)
        labels = self.dataset.labels(indices) if self.dataset.classes else None
        return to_float(self.dataset.read(indices).to(self.device)), labels


@dataclass(frozen=True)
class Checkpoint:
    """The method as it was on the way, with the averaged weights in its student."""

    fraction: float  # of the budget, that had just been reached
    images: int
    price: Price
    energy: Energy  # joules until then
    ready: list[int]  # numbers of evaluations that it could sample with
    file: str  # safetensors, in the folder of checkpoints
    sha256: str


@dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are to be written, and where. They cost the method nothing."""

    fractions: Sequence[float]  # of the budget, rising, each in (0, 1): the end is none of them
    folder: Path
    nfe: Sequence[int] = ()  # numbers of evaluations for which a checkpoint says whether it is ready

    def __post_init__(self) -> None:
        if not all(a < b for a, b in pairwise([0.0, *self.fractions, 1.0])):
            raise UserError(f"checkpoints must be rising shares of the budget between 0 and 1, got {self.fractions}")

    def write(self, number: int, method: Method, average: nn.Module, phase: int, meter: Meter) -> Checkpoint:
        """Checkpoint `number` = 0, 1, ... of `method`, which stays as it is; nothing of it is charged."""
        price, used = meter.price(), meter.energy()
        with meter.pause():
            return self._write(number, method, average, phase, price, used)

    def _write(
        self, number: int, method: Method, average: nn.Module, phase: int, price: Price, used: Energy
    ) -> Checkpoint:
        path = self.folder / f"checkpoint-{number + 1}.safetensors"
        write_atomically(path, lambda temporary: save_file(_averaged_state(method, average), temporary))
        ready = [n for n in self.nfe if method.ready(n, phase)]
        return Checkpoint(self.fractions[number], price.images, price, used, ready, path.name, sha256_file(path))


def _averaged_state(method: Method, average: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of `method`, with those of `average` wherever one of its student stands."""
    averaged = average.state_dict()
    students = {id(tensor): averaged[name] for name, tensor in method.student.state_dict(keep_vars=True).items()}
    state = method.state_dict(keep_vars=True)  # the tensors themselves: a student may stand there under two names
    tensors = {name: students.get(id(tensor), tensor) for name, tensor in state.items()}
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Trained:
    """What training left: its price, its curve and the way there. The weights are in the method."""

    price: Price
    curve: list[LossPoint]
    checkpoints: list[Checkpoint] = field(default_factory=list)


def train(
    method: Method,
    config: OptimizerConfig,
    workspace: Workspace,
    read: Read | None,
    batch_size: int,
    step: Step,
    checkpoints: Checkpoints | None = None,
    resume: Resume | None = None,
    accumulate: int = 1,
) -> Trained:
    """Train `method` until its meter says that the budget is used, and put the averaged weights into its student.

    `read(n)` gives n real images and their labels; None for a method that may not see any. A checkpoint is written
    before the first step after its fraction is reached; a fraction that only the last step reaches is the end, and has
    none. A step is computed in `accumulate` parts, one after the other. With `resume` states are kept, outside the
    budget, and training goes on from the last of them. Raises DivergedError when a loss is not finite or explodes,
    Interrupted when it is told to stop.
    """
    try:
        return _Training(method, config, workspace, read, batch_size, step, checkpoints, resume, accumulate).run()
    finally:
        workspace.meter.stop()


class _Training:
    """The loop, and what of it a state holds."""

    def __init__(
        self, method: Method, config: OptimizerConfig, workspace: Workspace, read: Read | None, batch_size: int,
        step: Step, checkpoints: Checkpoints | None, resume: Resume | None, accumulate: int,
    ) -> None:  # fmt: skip
        self.method, self.config, self.workspace, self.read = method, config, workspace, read
        self.batch_size, self.checkpoints, self.resume, self.accumulate = batch_size, checkpoints, resume, accumulate
        self.meter = workspace.meter
        self.generator = torch.Generator().manual_seed(workspace.seed)
        self.curve = _Curve(self.meter, step)
        self.written: list[Checkpoint] = []
        self.phase = 0
        self.begin = self.finish = 0.0  # of the learning rate's schedule, as shares of the budget

    def run(self) -> Trained:
        method, meter = self.method, self.meter
        method.prepare(self.workspace)
        if meter.progress() >= 1:
            raise RuntimeError(f"what is made ahead used up the budget of {meter.budget.amount:g} {meter.budget.limit}")
        phases = method.phases()
        shares = [phase.share for phase in phases]
        found = self.resume.states.newest() if self.resume is not None else None
        if found is not None:
            self._restore(found)
        for index in range(self.phase, len(phases)):
            if found is None:
                self._start(phases, index)
            found = None
            with nullcontext() if self.resume is None else self.resume.stop.patiently():
                self._train_until(min(sum(shares[: index + 1]) / sum(shares), 1.0) - 1e-12, phases[index].label)
            method.end_phase(index, self.average.module)
        self.curve.log(phases[-1].label, last=True)
        method.student.load_state_dict(self.average.module.state_dict())
        return Trained(meter.price(), self.curve.points, self.written)

    def _start(self, phases: list[Phase], index: int) -> None:
        self.phase = index
        self.method.start_phase(index)
        if index == 0 or phases[index].fresh:
            self._make_optimizers()
            self.begin, self.finish = self.meter.progress(), _end_of_schedule(phases, index)

    def _make_optimizers(self) -> None:
        self.optimizers = Optimizers(self.config)
        self.average = Average(self.method.student, self.config.ema_halflife_kimg)

    def _train_until(self, end: float, label: str) -> None:
        """Steps until the share `end` of the budget is used."""
        method, meter, curve = self.method, self.meter, self.curve
        while (progress := meter.progress()) < end:
            self._write_checkpoints(progress)
            size = meter.next_batch(self.batch_size)
            factor = learning_rate_factor(self.config, (progress - self.begin) / max(self.finish - self.begin, 1e-12))
            self._step(size, factor)
            method.after_step()
            meter.images += size
            self.average.update(size)
            curve.log(label)
            if self.resume is not None and self.resume.due():
                price, used = meter.price(), meter.energy()
                with meter.pause():
                    self.resume.save(meter.images, self._state(price, used))

    def _step(self, size: int, factor: float) -> None:
        """One step of `size` images. Its parts go side by side from update to update, each of which is of all parts."""
        teacher, charging = self.workspace.teacher, self.meter.stopwatch.charging
        about = teacher.shape, self.generator, self.workspace.device, self.read, teacher.conditioning
        sizes = [part for part in _split(size, self.accumulate) if part]
        steps = [iter(self.method.train_step(Batch(part, *about))) for part in sizes]
        ended = object()
        while True:
            losses = []
            for step, part in zip(steps, sizes, strict=True):
                if (item := next(step, ended)) is ended:
                    return
                network, loss = item
                loss = loss if part == size else loss * (part / size)
                with charging(Account.student):
                    self.optimizers.differentiate(network, loss, first=not losses)
                losses.append(loss.detach())
            with charging(Account.student):
                self.optimizers.step(network, factor)
            self.curve.add(sum(losses[1:], losses[0]))

    def _write_checkpoints(self, progress: float) -> None:
        if self.checkpoints is None or not self.meter.images:
            return
        while progress >= next(iter(self.checkpoints.fractions[len(self.written) :]), 2.0):
            parts = len(self.written), self.method, self.average.module, self.phase, self.meter
            self.written.append(self.checkpoints.write(*parts))

    def _state(self, price: Price, used: Energy) -> State:
        """Everything that decides what comes, and what it has cost until now."""
        method = self.method
        state = State()
        state.add("method", State(method.state_dict()))
        state.add("average", self.average.state())
        state.add("optimizers", self.optimizers.state(method))
        state.add("curve", self.curve.state())
        state.add("generators", generators_state(self._generators(), self.workspace.device))
        plain: dict[str, Any] = {
            "phase": self.phase,
            "schedule": [self.begin, self.finish],
            "price": asdict(price),
            "energy": asdict(used),
            "checkpoints": [asdict(checkpoint) for checkpoint in self.written],
        }
        state.values.update(plain)
        return state

    def _restore(self, state: State) -> None:
        """Go on from `state`: phases are entered as before, then every tensor is as it was."""
        method, values = self.method, state.values
        for index in range(values["phase"] + 1):
            self.method.start_phase(index)
        self.phase = values["phase"]
        self.begin, self.finish = values["schedule"]
        method.load_state_dict(state.part("method").tensors)
        self._make_optimizers()
        self.average.restore(state.part("average"))
        self.optimizers.restore(state.part("optimizers"), method)
        self.curve.restore(state.part("curve"))
        self.written = [_checkpoint(plain) for plain in values["checkpoints"]]
        self.meter.restart(Price(**values["price"]), Energy(**values["energy"]))
        assert self.resume is not None
        self.resume.restore_peaks(state)
        restore_generators(state.part("generators"), self._generators(), self.workspace.device)
        self.resume.states.progress.say(f"going on after {self.meter.images:,} images")

    def _generators(self) -> dict[str, torch.Generator]:
        """Every generator that training draws from, those that the method holds included."""
        own = {f"method/{name}": value for name, value in vars(self.method).items()}
        given = {} if self.resume is None else {f"data/{name}": g for name, g in self.resume.generators.items()}
        found = {"training": self.generator} | given
        return found | {name: value for name, value in own.items() if isinstance(value, torch.Generator)}


def _checkpoint(plain: dict[str, Any]) -> Checkpoint:
    return Checkpoint(**plain | {"price": Price(**plain["price"]), "energy": Energy(**plain["energy"])})


def _split(size: int, parts: int) -> list[int]:
    """Sizes of `parts` nearly equal parts, the larger ones first."""
    return [size // parts + (index < size % parts) for index in range(parts)]


def _end_of_schedule(phases: list[Phase], index: int) -> float:
    """Progress at which the learning-rate schedule that starts with phase `index` ends: before the next fresh one."""
    last = index
    while last + 1 < len(phases) and not phases[last + 1].fresh:
        last += 1
    return sum(p.share for p in phases[: last + 1]) / sum(p.share for p in phases)


class _Curve:
    """Gathers losses without waiting for the device, reads them every so many steps, and stops at a NaN."""

    def __init__(self, meter: Meter, step: Step) -> None:
        self.meter, self.step = meter, step
        self.losses: list[Tensor] = []
        self.steps = 0
        self.points: list[LossPoint] = []

    def add(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())

    def state(self) -> State:
        losses = torch.stack(self.losses).double() if self.losses else torch.zeros(0)
        return State({"losses": losses}, {"steps": self.steps, "points": [asdict(point) for point in self.points]})

    def restore(self, state: State) -> None:
        self.losses = list(state.tensors["losses"])
        self.steps = state.values["steps"]
        self.points = [LossPoint(**plain) for plain in state.values["points"]]

    def log(self, label: str, last: bool = False) -> None:
        self.steps += 1
        if not self.losses or (self.steps % STEPS_BETWEEN_CHECKS and not last and self.steps > 1):
            return
        mean = torch.stack(self.losses).double().mean().item()
        self.losses.clear()
        if not math.isfinite(mean):
            raise DivergedError(f"the loss is {mean} after {self.meter.images} images ({label})")
        first = abs(self.points[0].loss) if self.points else abs(mean)
        if abs(mean) > EXPLOSION * max(first, 1.0):
            raise DivergedError(
                f"the loss exploded from {first:.3g} to {mean:.3g} after {self.meter.images} images ({label})"
            )
        self.points.append(LossPoint(self.meter.images, self.meter.price().seconds, mean))
        self.step.advance(self.meter.progress(), f"{label}, loss {mean:.4g}")
