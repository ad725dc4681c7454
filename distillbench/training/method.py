"""The contract of a distillation method: what a method implements.

A method owns its networks and its mathematics. The harness owns optimisers, averaging, precision, budget, devices,
checkpoints, counting and evaluation.

| symbol | meaning                                | shape                     |
|--------|----------------------------------------|---------------------------|
| x_0    | real images                            | (B,C,H,W) in [-1, 1]      |
| eps    | standard normal noise                  | (B,C,H,W)                 |
| t, s   | times, s < t                           | (B,1,1,1) float64         |
| c      | condition: class and guidance weight   | of B images               |
| nfe    | network evaluations per image          | int                       |
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distillbench.datasets.augmentation import TRANSFORMS, AugmentConfig, Transformations, draw_transformations
from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.distances import DISTANCES, Distance
from distillbench.diffusion.noise import stream_key, uniform
from distillbench.diffusion.schedules import SCHEDULES
from distillbench.errors import UserError
from distillbench.options import option, require_one_of
from distillbench.system.transfers import to_device
from distillbench.training.optimizer_config import NetworkConfig, OptimizerConfig
from distillbench.training.share import WHOLE, Share

if TYPE_CHECKING:
    from distillbench.teachers.teacher import Teacher
    from distillbench.training.pairs import Workspace

__all__ = ["Batch", "Method", "MethodConfig", "Phase"]

VARIED_STEPS, VARIED_CYCLES = 16, 4  # at least, for the mean cost of a phase with `cost_varies`

# What a student is trained on: the words of Method.inputs.
STUDENT_INPUTS = {
    "data": "noised real images",
    "noise": "pure noise, or what is generated from it",
    "rollout": "images on the student's own chain of steps",
    "pairs": "noise-image pairs that are made before training",
}


@dataclass
class MethodConfig(OptimizerConfig):
    """Settings that every method has. A method's own Config derives from this one and may change the defaults.

    `replaced`: names of settings of earlier versions, and what to write instead, for the message about them.
    """

    replaced: ClassVar[dict[str, str]] = {}
    kind: str = option("", "the registered method (set by the choice of methods=...)")
    schedule: str = option("", "noise schedule that it works on, at the teacher's SNR; empty: the teacher's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule:
            require_one_of(self, "schedule", SCHEDULES)


@dataclass(frozen=True)
class Phase:
    """A stage of training: `share` of the budget (relative to the other phases).

    With `fresh`, optimisers, their learning-rate schedule and the average start anew; otherwise they continue.

    Steps may differ: after `cycle` of them the networks that they train, and their cost, repeat. A generator that is
    trained only where ``batch.step % 5 == 4`` has ``Phase(cycle=5)``. With `cost_varies` the cost of a step is random,
    and a plan estimates its mean. Raises UserError for a cycle below 1.
    """

    label: str = "training"
    share: float = 1.0
    fresh: bool = True
    cycle: int = 1
    cost_varies: bool = False

    def __post_init__(self) -> None:
        if self.cycle < 1:
            raise UserError(f"Phase.cycle is a number of steps, at least 1, got {self.cycle} in phase {self.label!r}")

    @classmethod
    def starting_at(cls, starts: Sequence[float]) -> list[Phase]:
        """One training in parts, which begin at these ascending shares of it, the first at 0; nothing starts anew.

        Raises UserError for a share of 1 or more.
        """
        if starts[-1] >= 1:
            raise UserError(f"what starts within training starts at a share of it below 1, got {starts[-1]}")
        labels = ["training", *(f"training from {100 * start:g} %" for start in starts[1:])]
        parts = zip(labels, pairwise([*starts, 1.0]), strict=True)
        return [cls(label, end - start, fresh=False) for label, (start, end) in parts]

    @property
    def cost_steps(self) -> int:
        """The steps from which its cost is estimated: a cycle, or as many whole cycles as are enough for a mean."""
        cycles = max(VARIED_CYCLES, -(-VARIED_STEPS // self.cycle)) if self.cost_varies else 1
        return self.cycle * cycles


# n -> the real images of a batch of n and their labels; of several ranks each gets its own rows
Read = Callable[[int], tuple[Tensor, Tensor | None]]


class Batch:
    """The inputs of one training step. All random numbers come from the harness's generator.

    Real images are read only when ``x_0`` (or, for a method that needs data, ``c``) is asked for. `size` is the number
    of images on this rank: all ranks draw the random numbers of the whole batch, and each keeps its `share`. `step` is
    the index of the step within its `phase`, counted by the harness, also across interruptions; `phase` is the index
    in ``Method.phases()``. With EDM's transformations in `augment`, ``x_0`` is transformed and ``c`` has their labels.
    """

    def __init__(
        self,
        size: int,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        device: str,
        read: Read | None,
        conditioning: Conditioning = WITHOUT_CLASSES,
        share: Share = WHOLE,
        step: int = 0,
        phase: int = 0,
        augment: AugmentConfig | None = None,
    ) -> None:
        if size % share.group:
            raise ValueError(f"a batch of groups of {share.group} images cannot have {size} images")
        self.size, self.shape, self.device, self.step, self.phase = share.size(size), shape, device, step, phase
        self._whole, self._share, self._integers = size, share, 0
        self._generator, self._read, self._conditioning = generator, read, conditioning
        self._augment = augment if augment is not None and augment.transforms_images else None

    def parts(self, count: int) -> list[Batch]:
        """The batch in at most `count` parts of nearly equal size, with the same random numbers as the whole batch.

        Rows are dealt out in turn: two parts have the rows 0, 2, 4, ... and 1, 3, 5, ...; with groups of two images
        (``Method.group_size``) the rows 0, 1, 4, 5, ... and 2, 3, 6, 7, ....
        """
        if count == 1:
            return [self]
        drawn: list[Any] = []  # tensors, conditions and numbers
        group = self._share.group
        return [_Part(self, Share(index, count, group), drawn) for index in range(min(count, self.size // group))]

    def _drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        """This rank's rows of what is drawn for the whole batch."""
        return to_device(self._share.of(draw(self._whole)), self.device)

    @functools.cached_property
    def _data(self) -> tuple[Tensor, Tensor | None]:
        if self._read is None:
            raise RuntimeError("the method declares that it reads no data (needs_data) but asks for real images")
        return self._read(self._whole)

    @functools.cached_property
    def _transformed(self) -> tuple[Tensor, Tensor | None]:
        """``x_0``, and its labels of augmentation."""
        images, augment = self._data[0], self._augment
        if augment is None:
            return images, None
        transformations = self._transformations(augment.probability, augment.transforms)
        return transformations(images), transformations.labels

    def _transformations(self, probability: float, transforms: Sequence[str]) -> Transformations:
        return Transformations(
            self._drawn(lambda size: draw_transformations(size, self._generator, probability, transforms))
        )

    @property
    def x_0(self) -> Tensor:
        """Real images (B,C,H,W) in [-1, 1]. A method that asks for them must declare it: ``Method.reads_data``."""
        return self._transformed[0]

    @functools.cached_property
    def c(self) -> Condition:
        """The condition: the classes of ``x_0``, or random classes for a method without data."""
        labels = self._data[1] if self._read is not None and self._conditioning.classes else None
        c = self._conditioning.draw(self._whole, self._generator, self.device, labels, self._share.of)
        augmented = self._read is not None and self._augment is not None
        return dataclasses.replace(c, augmentation=self._transformed[1]) if augmented else c

    def random_c(self, drop: float = 0.0) -> Condition:
        """Random classes, independent of ``x_0``, and a random guidance weight w if there is one; new at each call.

        If the run is guided, each image has no class with probability `drop`.
        """
        return self._conditioning.draw(self._whole, self._generator, self.device, None, self._share.of, drop)

    def augmented(self, x: Tensor, c: Condition, probability: float) -> tuple[Tensor, Condition]:
        """Images x after EDM's random transformations, each applied with `probability`, and c with their labels.

        For a network that learns from transformed images of other origin than ``x_0``, such as a fake score. With
        probability 0 both are unchanged. Networks that take no such labels raise UserError when they are called.
        """
        if not probability:
            return x, c
        if c.augmentation is not None:
            raise ValueError("images that are already transformed (c.augmentation) cannot be transformed again")
        transformations = self._transformations(probability, TRANSFORMS)
        return transformations(x), dataclasses.replace(c, augmentation=transformations.labels)

    def noise(self) -> Tensor:
        """Standard normal noise (B,C,H,W)."""
        g = self._generator
        return self._drawn(
            lambda size: torch.randn(size, *self.shape, generator=g, device=g.device, dtype=torch.get_default_dtype())
        )

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform random numbers in [low, high), (B,1,1,1) float64."""
        g = self._generator
        return self._drawn(
            lambda size: (
                low + (high - low) * torch.rand(size, 1, 1, 1, generator=g, device=g.device, dtype=torch.float64)
            )
        )

    def integers(self, low: int, high: int) -> Tensor:
        """Uniform random integers in low, ..., high - 1, (B,1,1,1) int64."""
        g = self._generator
        return self._drawn(lambda size: torch.randint(low, high, (size, 1, 1, 1), generator=g, device=g.device))

    def one_integer(self, low: int, high: int) -> int:
        """One uniform random integer in low, ..., high - 1 for the whole step, the same in all parts and on all ranks.

        It belongs to the seed, the phase, the step, and how many were drawn in the step before it; a GPU need not be
        waited for.
        """
        self._integers += 1
        stream = stream_key(f"step {self.step} of phase {self.phase}", self._generator.initial_seed())
        return low + int((high - low) * uniform(stream, [self._integers]).item())


class _Part(Batch):
    """A part of a batch. The parts draw together: what the first one draws is stored, and each takes its rows of it."""

    def __init__(self, batch: Batch, share: Share, drawn: list[Any]) -> None:
        self.size, self.shape, self.device = share.size(batch.size), batch.shape, batch.device
        self.step, self.phase = batch.step, batch.phase
        self._batch, self._share, self._stored, self._asked = batch, share, drawn, 0
        self._generator = batch._generator

    def _once(self, draw: Callable[[], Any]) -> Any:
        """The next draw of this part, from the part that asked first."""
        if self._asked == len(self._stored):
            self._stored.append(draw())
        self._asked += 1
        return self._stored[self._asked - 1]

    def _drawn(self, draw: Callable[[int], Tensor]) -> Tensor:
        return self._share.of(self._once(lambda: self._batch._drawn(draw)))

    def random_c(self, drop: float = 0.0) -> Condition:
        c: Condition = self._once(lambda: self._batch.random_c(drop))
        return c.of_rows(self._share.view)

    def one_integer(self, low: int, high: int) -> int:
        number: int = self._once(lambda: self._batch.one_integer(low, high))
        return number

    @functools.cached_property
    def _transformed(self) -> tuple[Tensor, Tensor | None]:
        x_0, labels = self._batch._transformed
        return self._share.of(x_0), None if labels is None else self._share.of(labels)

    @functools.cached_property
    def c(self) -> Condition:
        return self._batch.c.of_rows(self._share.view)


class Method(nn.Module, ABC):
    """A distillation method. The harness calls, in this order:

    ``prepare``, then for each of ``phases()``: ``start_phase``, ``prepare_phase``, ``train_step`` and ``after_step``
    many times, ``end_phase``; at the end the average is copied into ``student``, and ``sample`` is called.

    Networks that are attributes belong to the method's state and are saved. The teacher is not saved.
    """

    name: ClassVar[str]  # as on the command line: lower-case letters, digits, underscores
    label: ClassVar[str] = ""  # the name in tables, such as "BOOT"; empty: the name without underscores
    title: ClassVar[str] = ""  # the same in full, such as "progressive distillation"; empty: the label
    Config: ClassVar[type[MethodConfig]]
    paper: ClassVar[str]  # authors, year, arXiv number
    needs_data: ClassVar[bool]  # at default settings; False: may not read real images
    can_start_fresh: ClassVar[bool] = False  # True: its student may start from random weights (student.architecture)
    student: nn.Module  # what is trained, averaged and sampled
    distances: Mapping[str, Distance] = DISTANCES  # by name; in a training the harness adds those of LPIPS

    def __init__(self, config: Any, teacher: Teacher) -> None:
        super().__init__()
        self.config = config
        self.__dict__["teacher"] = teacher  # not a submodule: it is neither trained nor saved
        self.student = teacher.student()

    teacher: Teacher

    def settings_of(self, network: nn.Module) -> NetworkConfig:
        """The settings of `network` alone: the NetworkConfig under the name of its attribute, or an empty one."""
        named = {name: own for name, own in vars(self.config).items() if isinstance(own, NetworkConfig)}
        if missing := named.keys() - dict(self.named_children()).keys():
            raise RuntimeError(f"the Config names {', '.join(sorted(missing))}, but the method has no such network")
        return next((own for name, own in named.items() if getattr(self, name) is network), NetworkConfig())

    @classmethod
    def names(cls) -> tuple[str, str]:
        """Its name in tables, and in full."""
        label = cls.label or cls.name.replace("_", " ")
        return label, cls.title or label

    @classmethod
    def reads_data(cls, config: Any) -> bool:
        """Whether it trains on real images with these settings, an instance of its Config.

        Override it if a setting decides, such as the weight of an adversarial loss.
        """
        return cls.needs_data

    @property
    def inputs(self) -> str:
        """What the student is trained on: "data", "noise", "rollout" or "pairs", the column `inputs` of the results."""
        return "data" if self.reads_data(self.config) else "noise"

    @property
    def uses_teacher(self) -> bool:
        """Whether it evaluates the teacher. False: it learns from data alone, with these settings."""
        return True

    @property
    def group_size(self) -> int:
        """Rows of a batch that belong together: its losses compare images within groups of so many neighbours.

        Parts of a step and ranks then get whole groups. The batch size and a budget in images must be multiples of it.
        """
        return 1

    def phases(self) -> list[Phase]:
        """The stages of training."""
        return [Phase()]

    def prepare(self, workspace: Workspace) -> None:
        """Called once before training, to compute noise-image pairs for example. Its cost is charged to the method."""

    def start_phase(self, index: int) -> None:
        """Before the first step of phase `index`."""

    def prepare_phase(self, index: int, workspace: Workspace) -> None:
        """After ``start_phase``, with the networks as trained so far: to compute pairs from them, for example.

        Its cost is charged to the method. If the phase is interrupted it is called again, with the saved networks and
        without charging anew, so it may use only networks that the phase does not train.
        """

    @abstractmethod
    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        """Yield (network, loss) for each "update" line of the algorithm box; the harness updates, then continues here.

        It must have no other effect: what is done once per optimiser step belongs in ``after_step``. Which networks it
        yields may depend on ``batch.step``, if they repeat after the phase's `cycle`.
        """

    def after_step(self) -> None:
        """After the updates of one step, such as the moving average of a target network."""

    def end_phase(self, index: int, average: nn.Module) -> None:
        """After the last step of phase `index`; `average` is the averaged student, or the student without averaging."""

    @property
    def note(self) -> str:
        """What readers of the rows must know of the trained student, such as which of several was kept; often ""."""
        return ""

    def supports(self, nfe: int) -> bool:
        """Whether ``sample`` can use exactly `nfe` network evaluations per image."""
        return nfe == 1

    def ready(self, nfe: int, phase: int) -> bool:
        """Whether a checkpoint in phase `phase` can already sample with `nfe` evaluations."""
        return self.supports(nfe)

    def keeps_noise(self, nfe: int) -> bool:
        """Whether a sample approximates the teacher's from the same noise (False: only the same distribution)."""
        return True

    @abstractmethod
    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        """Images x_0 (B,C,H,W) for `c` from ``noise(0)``, with `nfe` network evaluations; ``noise(k)`` is fresh."""
