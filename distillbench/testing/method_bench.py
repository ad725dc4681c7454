"""What methods are checked on: small teachers with random weights, and a distribution with an exact denoiser and map.

A bench is one way of conditioning. Its networks (:mod:`distillbench.testing.bench_networks`) log every evaluation, and
its batches record whether real images were read; the checks of methods (:mod:`distillbench.testing.methods`) use both.

| symbol | meaning                                     | shape                |
|--------|---------------------------------------------|----------------------|
| x_0    | images                                      | (B,C,H,W) in [-1, 1] |
| t      | time                                        | (B,1,1,1) float64    |
| f      | exact denoiser, E[x_0 given x_t]            | (B,C,H,W)            |
| c      | condition: class and guidance               | of a batch           |
| n      | network evaluations for one image           | int                  |
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
from distillbench.diffusion.denoiser import TARGETS, Denoiser, NetworkCall, implied_eps
from distillbench.diffusion.distributions import GaussianMixture, mixture
from distillbench.diffusion.exact_denoiser import ExactDenoiser
from distillbench.diffusion.noise import FixedNoise, Noise, stream_key
from distillbench.diffusion.schedules import VPCosine
from distillbench.networks.architectures import ResidualMLP
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
from distillbench.testing.checks import Fault, differ, global_generators, seed_global_generators, some
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.build import build_method
from distillbench.training.compute import Sampling, device_type, sampling
from distillbench.training.loop import Loop, train
from distillbench.training.method import Batch, Method, MethodConfig, Read
from distillbench.training.optimizers import Optimizers
from distillbench.training.pairs import Workspace
from distillbench.training.resume import Resume, States

CLASSES, GUIDANCE, GUIDANCE_RANGE = 3, 2.0, (1.0, 3.0)
IMAGES = 8  # of a step, and of a sample
STEPS = 16  # of a training
WALKED_PHASES = 6  # phases at most of which a walk takes a step
USUAL_NFE, MOST_NFE = (*range(1, 9), 16), 1024  # checked; if none is supported, the first up to MOST_NFE is
FIT_IMAGES, FIT_BATCH = 75_000, 256  # for the weights that students of the exact teacher start from
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
class Moment:
    """A point of a walk. `what` is one of:

    "begin": before train_step; "yielded": it has yielded `item`; "updated": the network of `item` is updated;
    "stepped": train_step has ended; "ended": after_step and end_phase have too.
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
    def conditional(self) -> bool:
        return self.conditioning.classes > 0

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

        return images if self.cls.needs_data else None

    def walk(self) -> Iterator[Moment]:
        """One step of each of the first WALKED_PHASES phases, as in training; `prepare` makes two pairs."""
        method, read, generator = self.method(), self.read(), torch.Generator(self.device).manual_seed(0)
        method.prepare(workspace_of(method, Path(), BudgetConfig(), dry=True, device=self.device))
        optimizers = Optimizers(method.config, settings_of=method.settings_of)
        for phase in range(len(method.phases()))[:WALKED_PHASES]:
            method.start_phase(phase)
            batch = WatchedBatch(IMAGES, self.shape, generator, self.device, read, self.conditioning)
            yield Moment("begin", phase, method, batch)
            for item in method.train_step(batch):
                yield Moment("yielded", phase, method, batch, item)
                network, loss = item
                optimizers.update(network, loss, 1.0)
                yield Moment("updated", phase, method, batch, item)
            yield Moment("stepped", phase, method, batch)
            method.after_step()
            method.end_phase(phase, method.student)
            yield Moment("ended", phase, method, batch)

    def steps_of(self, method: Method, count: int) -> Iterator[tuple[int, Callable[[], None]]]:
        """For `count` steps of each of the first WALKED_PHASES phases: its index, and a function that takes it."""
        read, generator = self.read(), torch.Generator(self.device).manual_seed(0)
        method.prepare(workspace_of(method, Path(), BudgetConfig(), dry=True, device=self.device))
        optimizers = Optimizers(method.config, settings_of=method.settings_of)

        def take() -> None:
            for network, loss in method.train_step(
                Batch(IMAGES, self.shape, generator, self.device, read, self.conditioning)
            ):
                optimizers.update(network, loss, 1.0)
            method.after_step()

        for phase in range(len(method.phases()))[:WALKED_PHASES]:
            method.start_phase(phase)
            yield from ((step, take) for step in range(count))
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
        images = IMAGES * self.steps()
        workspace = workspace_of(method, Path(), BudgetConfig(images=images), seed, dry=True, device=self.device)
        seed_global_generators(global_seed)
        before = global_generators()
        train(method, method.config, workspace, self.read(), Loop(IMAGES), SILENT)
        disturbed = [name for name, state in global_generators().items() if state != before[name]]
        del method.__dict__["end_phase"], method.__dict__["train_step"]
        self._call_networks(method, NetworkCall())  # samples are computed in float32
        return Run(method.eval(), images, averages, rows_of(method), disturbed, learning)

    def first_gradient(self, parts: int) -> Tensor:
        """The gradient of the first update in all its weights, flattened, with the step computed in `parts` parts."""
        method, generator = self.method(), torch.Generator().manual_seed(0)
        method.prepare(workspace_of(method, Path(), BudgetConfig(), dry=True))
        method.start_phase(0)
        seed_global_generators(0)
        about = self.shape, generator, "cpu", self.read(), self.conditioning
        batches = Batch(IMAGES, *about).parts(parts)
        for step, batch in [(iter(method.train_step(batch)), batch) for batch in batches]:
            network, loss = next(step)
            (loss * (batch.size / IMAGES)).backward()
        return torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])

    def steps(self) -> int:
        """The number of steps of :meth:`train`."""
        return max(STEPS, len(self.method().phases()))

    def train_interrupted(self, after: int) -> Method:
        """The same training, interrupted after `after` steps and resumed by a new object."""
        with tempfile.TemporaryDirectory() as folder:
            states = States(Path(folder), 1, Progress(None))
            for stop in (StopAfter(after), Stop()):
                method, generator = self.method(), torch.Generator(self.device).manual_seed(1)
                budget = BudgetConfig(images=IMAGES * self.steps())
                workspace = workspace_of(method, Path(), budget, dry=True, device=self.device)
                seed_global_generators(0)
                resume = Resume(states, math.inf, {"read": generator}, stop=stop)
                with suppress(Interrupted):
                    train(method, method.config, workspace, self.read(generator), Loop(IMAGES), SILENT, resume=resume)
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
    return some(list(dict.fromkeys(f"self.{name.split('.')[0]}" for name in names)))


# --- the exact distribution ------------------------------------------------------------------------------------------


class Fit(Method):
    """Trains a student to be the exact denoiser, as v: stands in for the weights of a trained teacher.

    L = E | v(x_t, t) - (alpha_t eps_f - sigma_t f) |^2,   eps_f = (x_t - alpha_t f) / sigma_t
    """

    name, paper, needs_data = "fit", "none: regression on the exact denoiser", True
    Config = MethodConfig

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        student, schedule, t = self.student, self.teacher.schedule, batch.uniform()
        assert isinstance(student, Denoiser)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_t = alpha * batch.x_0 + sigma * batch.noise()
        f = self.teacher.denoise(x_t, t)
        target = TARGETS["v"](f, implied_eps(x_t, f, alpha, sigma), alpha, sigma)
        yield student, (student.output(x_t, t) - target).square().mean()

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        raise NotImplementedError("only its weights are used")


@functools.cache
def exact_distribution() -> GaussianMixture:
    """Two modes in one dimension, where the noise-to-data map is known. Its std is .51; 99 % lie in [-1, 1]."""
    return mixture([0.35, 0.65], [[-0.55], [0.4]], [[0.2], [0.25]])


def draws(seed: int) -> Read:
    """read(n): n images of the exact distribution, without labels."""
    generator = torch.Generator().manual_seed(seed)
    return lambda size: (exact_distribution().draw(size, generator)[0].to(torch.get_default_dtype()), None)


def exact_teacher() -> Teacher:
    """The exact denoiser of the distribution; students start from a network that is fitted to it."""
    teacher = _unfitted_teacher()
    assert teacher.start is not None
    teacher.start.load_state_dict(_fitted_weights())
    return teacher


def _unfitted_teacher() -> Teacher:
    distribution, schedule = exact_distribution(), VPCosine()
    torch.manual_seed(0)
    blank = lambda: ResidualMLP(distribution.shape, width=64, depth=1)
    start = Denoiser(blank(), schedule, "v")
    return Teacher(
        "exact", ExactDenoiser(distribution, schedule), distribution.shape, "exact", start=start, blank=blank
    )


@functools.cache
def _fitted_weights() -> dict[str, Tensor]:
    fit = Fit(MethodConfig(lr=2e-3, ema_halflife_kimg=1.0), _unfitted_teacher())
    train(
        fit, fit.config, workspace_of(fit, Path(), BudgetConfig(images=FIT_IMAGES)), draws(0), Loop(FIT_BATCH), SILENT
    )
    return weights_of(fit.student)
