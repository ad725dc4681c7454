"""Teachers: a frozen denoiser with an identity, and the contract of a family of teachers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from distillbench.denoiser import Counter, Denoiser
from distillbench.errors import UserError
from distillbench.options import option
from distillbench.schedules import NoiseSchedule

if TYPE_CHECKING:
    from distillbench.datasets import Dataset
    from distillbench.progress import Progress


@dataclass
class Teacher:
    """A frozen denoiser and who it is.

    `sha256` identifies its weights and how they are read (network, schedule, parameterisation). Its evaluations, and
    those of its copies, are counted in `teacher_rows`; those of students made from it in `student_rows`.
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, int, int]  # C,H,W of the images it makes
    sha256: str
    provenance: dict[str, Any] = field(default_factory=dict)
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

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """f(x_t, t) = E[x_0 | x_t], (B,C,H,W). Gradients flow to x_t, not to the weights."""
        return self.denoiser(x_t, t)

    def student(self) -> Denoiser:
        """A trainable copy: the teacher's architecture, starting from its weights."""
        return self.denoiser.copy(self.student_rows).train().requires_grad_(True)

    def deputy(self) -> Denoiser:
        """A frozen copy that is still counted as teacher: what later phases put a student's weights into."""
        return self.denoiser.copy(self.teacher_rows).freeze()


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
    """A family of teachers, such as one format of checkpoints. Constructed with its Config and the dataset."""

    name: ClassVar[str]
    Config: ClassVar[type[TeacherConfig]]

    def __init__(self, config: Any, dataset: Dataset, cache: Path, device: str) -> None:
        self.config, self.dataset, self.cache, self.device = config, dataset, cache, device

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
