"""What methods are checked on: small teachers with random weights.

A bench is one way of conditioning. Its networks (:mod:`distillbench.testing.bench_networks`) log every evaluation, and
its batches record whether real images were read; the checks of methods (:mod:`distillbench.testing.methods`) use both.

| symbol | meaning                           | shape                |
|--------|-----------------------------------|----------------------|
| x_0    | images                            | (B,C,H,W) in [-1, 1] |
| c      | condition: class and guidance     | of a batch           |
| n      | network evaluations for one image | int                  |
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.denoiser import Denoiser, NetworkCall
from distillbench.diffusion.distances import DISTANCES, LPIPS
from distillbench.diffusion.losses import mean_square
from distillbench.diffusion.noise import FixedNoise, Noise, stream_key
from distillbench.diffusion.schedules import VPCosine
from distillbench.errors import first_of
from distillbench.networks.calls import ConfiguredCall
from distillbench.system.progress import Progress, Step
from distillbench.system.signals import Interrupted, Stop
from distillbench.teachers.teacher import Teacher
from distillbench.testing.bench_networks import (
    ARCHITECTURES,
    RECOMPUTED_BLOCKS,
    USUALLY_COMPUTED,
    Computed,
    Log,
    LoggedNetwork,
    new_network,
)
from distillbench.testing.bench_records import Learning
from distillbench.testing.checks import Fault, differ, global_generators, seed_global_generators
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.build import build_method
from distillbench.training.compute import Sampling, device_type, sampling
from distillbench.training.loop import Loop, train
from distillbench.training.method import Batch, Method, MethodConfig, Read
from distillbench.training.optimizers import Optimizers
from distillbench.training.pairs import Workspace
from distillbench.training.resume import Resume, States
from distillbench.training.share import Share

CLASSES, GUIDANCE, GUIDANCE_RANGE = 3, 2.0, (1.0, 3.0)
IMAGES = 8  # of a sample, and at least of a step
STEPS = 16  # of a training
WALKED_PHASES = 6  # phases at most of which a walk takes a step
USUAL_NFE, MOST_NFE = (*range(1, 9), 16), 1024  # checked; if none is supported, the first up to MOST_NFE is
SILENT = Step(lambda fraction, note: None)

CONDITIONINGS = {
    "unconditional": WITHOUT_CLASSES,
    "classes": Conditioning(CLASSES),
    "guided": Conditioning(CLASSES, GUIDANCE),
    "guidance drawn": Conditioning(CLASSES, GUIDANCE, GUIDANCE_RANGE),
}


# --- batches and noise that record their use --------------------------------------------------------------------------


class WatchedBatch(Batch):
    """A batch that records whether its real images were read."""

    used = False

    @functools.cached_property
    def _data(self) -> tuple[Tensor, Tensor | None]:
        self.used = True
        return super()._data


class WatchedNoise(FixedNoise):
    """Fixed noise that records which of its draws were used."""

    def __init__(self, draws: list[Tensor]) -> None:
        super().__init__(draws)
        self.used: set[int] = set()

    def __call__(self, k: int) -> Tensor:
        if not 0 <= k < len(self.draws):
            raise Fault(f"sample calls noise({k}); only noise(0) to noise(NFE - 1 = {len(self.draws) - 1}) exist")
        self.used.add(k)
        return super().__call__(k)


# --- the bench -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A point of a walk. `what` is one of:

    "begin": before train_step; "yielded": it has yielded `item`; "updated": the network of `item` is updated;
    "stepped": train_step has ended; "ended": after_step has too, and after the last step of a phase end_phase.
    """

    what: str
    phase: int
    method: Method
    batch: WatchedBatch
    item: Any = None


@dataclass(frozen=True)
class Run:
    """A finished training."""

    method: Method
    images: int
    averages: list[list[dict[str, Tensor]]]  # by phase: the averaged weights of each network at its end
    evaluations: int  # of teacher and students, in images
    disturbed: list[str]  # global random generators that training has drawn from
    learning: Learning


class StopAfter(Stop):
    """Requests a stop from the n-th step on."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


@dataclass(frozen=True)
class MethodBench:
    """One way of conditioning, and all that is needed to check a method with it. Methods return new objects."""

    label: str
    cls: type[Method]
    given: MethodConfig | None
    conditioning: Conditioning
    distribution_images: int  # images of the training on the exact teacher; 0: none
    dropout: float = 0.0  # share of pixels that networks drop in training mode
    device: str = "cpu"
    computed: Computed = USUALLY_COMPUTED

    @property
    def shape(self) -> tuple[int, int, int]:
        """C,H,W of the images."""
        return ARCHITECTURES[self.computed.network].shape

    @property
    def reads_data(self) -> bool:
        """Whether the method declares to read real images, with its settings."""
        return bool(self.cls.reads_data(self.config()))

    @property
    def conditional(self) -> bool:
        return self.conditioning.classes > 0

    @functools.cached_property
    def share(self) -> Share:
        """All rows of a batch, in the method's groups."""
        return Share(group=self.method().group_size)

    @property
    def images(self) -> int:
        """Of a step: at least IMAGES, and two groups."""
        return self.share.group * max(2, -(-IMAGES // self.share.group))

    def config(self) -> MethodConfig:
        return self.cls.Config() if self.given is None else copy.deepcopy(self.given)

    def teacher(self) -> Teacher:
        log, classes = Log(), self.conditioning.classes
        torch.manual_seed(0)
        depth = RECOMPUTED_BLOCKS if self.computed.recompute else 1
        blank = lambda: new_network(self.computed.network, classes, log, self.dropout, depth)
        denoiser = Denoiser(blank(), VPCosine(), "v").to(self.device)
        return Teacher("random", denoiser, self.shape, "random", conditioning=self.conditioning, blank=blank)

    def method(self, teacher: Teacher | None = None) -> Method:
        """The method as the harness builds it before training."""
        teacher, config = teacher or self.teacher(), self.config()
        method = build_method(self.cls, config, teacher, 0, self.device)
        method.distances = DISTANCES | dict.fromkeys(LPIPS, mean_square)  # a check has no weights of LPIPS
        if self.computed.configured:
            how = self.computed
            call = ConfiguredCall(device_type(self.device), how.precision, recompute=how.recompute)
            self._call_networks(method, call)
        return method

    def _call_networks(self, method: Method, call: NetworkCall) -> None:
        """Let the networks of `method` and of its teacher be computed by `call`, as the harness does."""
        for counter in (method.teacher.teacher_rows, method.teacher.student_rows):
            counter.call = call

    def read(self, generator: torch.Generator | None = None) -> Read | None:
        """Real images: uniform in [-1, 1], with random labels. None for a method that declares to need none."""
        generator = generator or torch.Generator(self.device).manual_seed(1)
        device = generator.device

        def images(size: int) -> tuple[Tensor, Tensor | None]:
            labels = torch.randint(0, self.conditioning.classes or 1, (size,), generator=generator, device=device)
            return 2 * torch.rand((size, *self.shape), generator=generator, device=device) - 1, labels

        return images if self.reads_data else None

    def walk(self, cost_only: bool = False) -> Iterator[Event]:
        """A cycle of steps of each of the first WALKED_PHASES phases, as in training; `prepare` makes two pairs.

        `cost_only`: instead the steps from which a plan estimates the cost.
        """
        method, read, generator = self.method(), self.read(), torch.Generator(self.device).manual_seed(0)
        workspace = workspace_of(method, Path(), BudgetConfig(), dry=True, device=self.device)
        method.prepare(workspace)
        optimizers = Optimizers(method.config, settings_of=method.settings_of)
        about = self.images, self.shape, generator, self.device, read, self.conditioning, self.share
        for phase, stage in enumerate(method.phases()[:WALKED_PHASES]):
            method.start_phase(phase)
            method.prepare_phase(phase, workspace)
            count = stage.cost_steps if cost_only else stage.cycle
            for step in range(count):
                batch = WatchedBatch(*about, step, phase)
                yield Event("begin", phase, method, batch)
                for item in method.train_step(batch):
                    yield Event("yielded", phase, method, batch, item)
                    network, loss = item
                    optimizers.update(network, loss, 1.0)
                    yield Event("updated", phase, method, batch, item)
                yield Event("stepped", phase, method, batch)
                method.after_step()
                if step == count - 1:
                    method.end_phase(phase, method.student)
                yield Event("ended", phase, method, batch)

    def steps_of(self, method: Method, cycles: int) -> Iterator[tuple[int, Callable[[], None]]]:
        """For each step of `cycles` cycles of the first WALKED_PHASES phases: the number of its cycle, and a function
        that takes it."""
        read, generator = self.read(), torch.Generator(self.device).manual_seed(0)
        workspace = workspace_of(method, Path(), BudgetConfig(), dry=True, device=self.device)
        method.prepare(workspace)
        optimizers = Optimizers(method.config, settings_of=method.settings_of)

        about = self.images, self.shape, generator, self.device, read, self.conditioning, self.share

        def take(step: int, phase: int) -> None:
            for network, loss in method.train_step(Batch(*about, step, phase)):
                optimizers.update(network, loss, 1.0)
            method.after_step()

        for phase, stage in enumerate(method.phases()[:WALKED_PHASES]):
            method.start_phase(phase)
            method.prepare_phase(phase, workspace)
            for step in range(cycles * stage.cycle):
                yield step // stage.cycle, functools.partial(take, step, phase)
            method.end_phase(phase, method.student)

    def train(self, seed: int = 0, global_seed: int = 0) -> Run:
        """A short training by the harness's own loop; `prepare` makes two pairs.

        Initial weights are always the same; `seed` is that of training, `global_seed` that of the global generators.
        """
        method = self.method()
        learning = Learning(method)
        averages: list[list[dict[str, Tensor]]] = []
        end_phase = method.end_phase

        def remember(index: int, average: nn.Module) -> None:
            averages.append([weights_of(network) for network in logged(average)])
            end_phase(index, average)

        method.__dict__["end_phase"] = remember
        images = self.images * self.steps()
        workspace = workspace_of(method, Path(), BudgetConfig(images=images), seed, dry=True, device=self.device)
        seed_global_generators(global_seed)
        before = global_generators()
        train(method, method.config, workspace, self.read(), Loop(self.images), SILENT)
        disturbed = [name for name, state in global_generators().items() if state != before[name]]
        del method.__dict__["end_phase"], method.__dict__["train_step"]
        self._call_networks(method, NetworkCall())  # samples are computed in float32
        return Run(method.eval(), images, averages, rows_of(method), disturbed, learning)

    def first_gradient(self, parts: int) -> Tensor:
        """The gradient of the first update in each step of a cycle, flattened, with steps computed in `parts` parts."""
        method, generator = self.method(), torch.Generator().manual_seed(0)
        workspace = workspace_of(method, Path(), BudgetConfig(), dry=True)
        method.prepare(workspace)
        method.start_phase(0)
        method.prepare_phase(0, workspace)
        seed_global_generators(0)
        about = self.images, self.shape, generator, "cpu", self.read(), self.conditioning, self.share
        gradients: list[Tensor] = []
        for step in range(method.phases()[0].cycle):
            batches, networks = Batch(*about, step).parts(parts), set[nn.Module]()
            for update, batch in [(iter(method.train_step(batch)), batch) for batch in batches]:
                if (item := next(update, None)) is not None:
                    networks.add(item[0])
                    (item[1] * (batch.size / self.images)).backward()
            for weight in [weight for network in networks for weight in network.parameters()]:
                gradients += [] if weight.grad is None else [weight.grad.flatten()]
                weight.grad = None
        return torch.cat(gradients)

    def steps(self) -> int:
        """The number of steps of :meth:`train`: at least a cycle in each phase."""
        phases = self.method().phases()
        total = sum(phase.share for phase in phases)
        return max(STEPS, len(phases), *(math.ceil(total / p.share * p.cycle) for p in phases if p.cycle > 1))

    def train_interrupted(self, after: int) -> Method:
        """The same training, interrupted after `after` steps and resumed by a new object."""
        with tempfile.TemporaryDirectory() as folder:
            states = States(Path(folder), 1, Progress(None))
            for stop in (StopAfter(after), Stop()):
                method, generator = self.method(), torch.Generator(self.device).manual_seed(1)
                budget = BudgetConfig(images=self.images * self.steps())
                workspace = workspace_of(method, Path(), budget, dry=True, device=self.device)
                seed_global_generators(0)
                resume = Resume(states, math.inf, {"read": generator}, stop=stop)
                with suppress(Interrupted):
                    loop, read = Loop(self.images), self.read(generator)
                    train(method, method.config, workspace, read, loop, SILENT, resume=resume)
        return method.eval()

    @functools.cached_property
    def run(self) -> Run:
        """One training, shared by all checks that come after it. They must not change it."""
        return self.train()

    def noise(self, indices: Iterable[int] = range(IMAGES), seed: int = 0) -> Noise:
        return Noise(stream_key("conformance", seed), list(indices), self.shape, self.device)

    def c(self, indices: Iterable[int] = range(IMAGES)) -> Condition:
        return self.conditioning.of_images(list(indices), self.device)

    def sample(self, n: int, method: Method | None = None) -> Tensor:
        """Images of a trained method (None: that of `run`), always from the same noise."""
        method = method or self.run.method
        with torch.no_grad(), sampling(Sampling(), method.teacher, self.device):
            return method.sample(self.noise(), n, self.c())

    def nfe(self) -> list[int]:
        """The numbers of evaluations to check: the usual ones that the method supports, else the smallest supported."""
        method = self.run.method
        usual = [n for n in USUAL_NFE if method.supports(n)]
        return usual or [n for n in range(1, MOST_NFE + 1) if method.supports(n)][:1]


def workspace_of(
    method: Method, folder: Path, budget: BudgetConfig, seed: int = 0, dry: bool = False, device: str = "cpu"
) -> Workspace:
    meter = Meter(budget, method.teacher, device)
    return Workspace(method.teacher, meter, folder, device, seed, Progress(None), dry)


# --- what can be read off a method -----------------------------------------------------------------------------------


def logged(module: nn.Module) -> list[LoggedNetwork]:
    """The copies of the bench's network in `module`."""
    return [part for part in module.modules() if isinstance(part, LoggedNetwork)]


def teachers_network(method: Method) -> nn.Module:
    return method.teacher.denoiser.network


def calls_of(method: Method) -> Log:
    """Every evaluation so far of the teacher of `method` and of its copies."""
    (network,) = logged(method.teacher.denoiser)
    return network.log


def rows_of(method: Method) -> int:
    """Counted evaluations of teacher and students, in images."""
    return method.teacher.teacher_rows.rows + method.teacher.student_rows.rows


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of its state_dict."""
    return {name: value.detach().clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that differ or are in only one of the two."""
    alike = [name for name in before.keys() & after.keys() if not differ(before[name], after[name])]
    return sorted((before.keys() | after.keys()) - set(alike))


def attributes_of(names: list[str]) -> str:
    """A text with the attributes of a method that the tensors `names` of its state_dict belong to."""
    return first_of(list(dict.fromkeys(f"self.{name.split('.')[0]}" for name in names)))
