"""Teachers: a frozen denoiser with an identity, and the contract of a family of teachers."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from distillbench.conditions import UNCONDITIONAL, WITHOUT_CLASSES, Condition, Conditioning
from distillbench.denoiser import Counter, Denoiser, guided
from distillbench.errors import UserError
from distillbench.networks import GuidanceEmbedding
from distillbench.options import option
from distillbench.schedules import NoiseSchedule

if TYPE_CHECKING:
    from distillbench.datasets import Dataset
    from distillbench.progress import Progress


@dataclass
class Teacher:
    """A frozen denoiser and who it is.

    `sha256` identifies its weights and how they are read (network, schedule, parameterisation). Its evaluations, and
    those of its deputies, are counted in `teacher_rows`; those of students made from it in `student_rows`.

    Students start as copies of `start`, which is the teacher's own denoiser unless that cannot be trained (a closed
    form has no weights). `blank` makes a network of the same architecture with fresh weights, from torch's generator.

    `encode` and `decode` stand before and after sampling and are timed apart from it; nothing else uses them.
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, int, int]  # C,H,W of the images it makes
    sha256: str
    provenance: dict[str, Any] = field(default_factory=dict)
    conditioning: Conditioning = WITHOUT_CLASSES
    start: Denoiser | None = None
    blank: Callable[[], nn.Module] | None = None
    decode: Callable[[Tensor], Tensor] | None = None  # latents (B,c,h,w) to images (B,C,H,W); None: works on pixels
    encode: Callable[[list[str]], Any] | None = None  # texts to what conditions the network; None: knows no texts
    student_rows: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.denoiser.freeze()

    @property
    def label(self) -> str:
        """What the table calls it: the family's name and the first digits of its weights' hash."""
        return f"{self.name}-{self.sha256[:8]}"

    @property
    def teacher_rows(self) -> Counter:
        return self.denoiser.counted.counter

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def denoise(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        """f(x_t, t, c) = E[x_0 | x_t, c], guided where `c` says so (two evaluations), (B,C,H,W).

        Gradients flow to x_t, not to the weights.
        """
        return guided(self.denoiser, self.conditioning.classes, x_t, t, c)

    def student(self, fresh: bool = False) -> Denoiser:
        """A trainable network that starts from the teacher's weights; with `fresh`, from none.

        Where w is drawn it is told its guidance weight, by an embedding that starts at zero.
        """
        student = (self.start or self.denoiser).copy(self.student_rows)
        if fresh:
            if self.blank is None:
                raise UserError(f"teacher={self.name} cannot build its architecture anew: no student can start fresh")
            device = next(student.parameters()).device
            student.counted.network = self.blank().to(device)
        if self.conditioning.w_range is not None:
            channels = student.network.embedding_channels
            student.guidance = GuidanceEmbedding(channels, *self.conditioning.w_range)
        return student.train().requires_grad_(True)

    def deputy(self) -> Denoiser:
        """A frozen network like a student's, but counted as teacher: later phases put a student's weights into it."""
        return self.student().copy(self.teacher_rows).freeze()

    def on(self, schedule: NoiseSchedule) -> Teacher:
        """The same teacher, with the same counters, read on another schedule at equal signal-to-noise ratio."""
        start = None if self.start is None else self.start.on(schedule)
        return dataclasses.replace(self, denoiser=self.denoiser.on(schedule), start=start)


@dataclass
class TeacherConfig:
    """Settings that every family of teachers has. A family's own Config derives from this one."""

    kind: str = option("", "the registered teacher (set by the choice of teacher=...)")


@dataclass(frozen=True)
class TeacherPlan:
    """What would happen if the teacher were loaded: from where, or trained at what price."""

    origin: str  # file it is read from, or "to be trained"
    images: int = 0
    nfe: int = 0


class TeacherSource(ABC):
    """A family of teachers, such as one format of checkpoints. Constructed with its Config and the dataset.

    `conditioning.classes` is not 0 where the run asks for a class-conditional teacher.
    """

    name: ClassVar[str]
    Config: ClassVar[type[TeacherConfig]]

    def __init__(
        self, config: Any, dataset: Dataset, cache: Path, device: str, conditioning: Conditioning = WITHOUT_CLASSES
    ) -> None:
        self.config, self.dataset, self.cache, self.device = config, dataset, cache, device
        self.conditioning = conditioning

    @abstractmethod
    def plan(self) -> TeacherPlan:
        """Check what can be checked without work; raise UserError if the teacher is missing or does not fit."""

    @abstractmethod
    def untrained(self) -> Teacher:
        """A teacher of the right architecture whose weights do not matter: what a dry run is priced with."""

    @abstractmethod
    def load(self, progress: Progress) -> Teacher:
        """The frozen teacher on `device`, made first if need be."""

    def train(self, output: Path | None, progress: Progress) -> Path:
        """Train anew, write to `output` or into the cache, return the file. UserError where nothing is trained."""
        raise UserError(f"teacher={self.name} is not trained by distillbench")
