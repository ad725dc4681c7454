"""Teachers: a frozen denoiser with an identity, and the contract of a family of teachers."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from distillbench.diffusion.conditioning import UNCONDITIONAL, WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.denoiser import Counter, Denoiser, guided
from distillbench.diffusion.embeddings import GuidanceEmbedding
from distillbench.diffusion.schedules import NoiseSchedule
from distillbench.errors import UserError
from distillbench.options import option
from distillbench.system.offloading import Offloaded

if TYPE_CHECKING:
    from distillbench.datasets.dataset import Dataset
    from distillbench.system.progress import Progress

__all__ = ["Clip", "Teacher", "TeacherConfig", "TeacherPlan", "TeacherSource"]


MOST_PIXELS = 2**20  # of the images that are decoded or encoded at once: 256 float32 channels of them are 1 GiB


@dataclass(frozen=True)
class Clip:
    """What is done to guided answers that leave [-1, 1].

    "static" cuts them there. "dynamic" (Saharia et al. 2022, section 2.3) clips each image to [-q, q] and divides it by
    q, its `quantile` of |f|, held between 1 and `largest`.
    """

    kind: str = ""
    quantile: float = 0.995
    largest: float = math.inf

    def __call__(self, f: Tensor) -> Tensor:
        return CLIPS[self.kind](self, f)

    def plain(self) -> Any:
        """What it is, as plain values."""
        return [self.kind, self.quantile, self.largest] if self.kind == "dynamic" else self.kind


def _dynamic(clip: Clip, f: Tensor) -> Tensor:
    q = torch.quantile(f.abs().flatten(1).float(), clip.quantile, dim=1).clamp(1, clip.largest)
    q = q.view(-1, 1, 1, 1).to(f.dtype)
    return f.clamp(-q, q) / q


CLIPS: dict[str, Callable[[Clip, Tensor], Tensor]] = {
    "": lambda clip, f: f,
    "static": lambda clip, f: f.clamp(-1, 1),
    "dynamic": _dynamic,
}


@dataclass
class Teacher:
    """A frozen denoiser and who it is.

    `sha256` identifies its weights and how they are read (network, schedule, parameterisation). Its evaluations, and
    those of its deputies, are counted in `teacher_rows`; those of students made from it in `student_rows`.

    Students start as copies of `start`, which is the teacher's own denoiser unless that cannot be trained (a closed
    form has no weights). `blank` makes a network of the same architecture with fresh weights, from torch's generator.

    A teacher of latents has a `shape` of its own, and decodes them to images of `image_shape`. `encode` and `decode`
    stand before and after sampling and are timed apart from it. With `clip` its answers stay in the range of images.
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, int, int]  # C,H,W of what it denoises
    sha256: str
    provenance: dict[str, Any] = field(default_factory=dict)
    conditioning: Conditioning = WITHOUT_CLASSES
    start: Denoiser | None = None
    blank: Callable[[], nn.Module] | None = None
    decode: Callable[[Tensor], Tensor] | None = None  # latents (B,c,h,w) to images (B,C,H,W); None: works on pixels
    to_latents: Callable[[Tensor], Tensor] | None = None  # images (B,C,H,W) to latents (B,c,h,w)
    decoded: tuple[int, int, int] | None = None  # C,H,W of the images that `decode` makes
    encode: Callable[[list[str]], Tensor] | None = None  # texts to (B,L,D); None: knows no texts
    offloaded: tuple[Offloaded, ...] = ()  # what encodes and decodes: on the device only while it does
    clip: Clip = Clip()
    student_rows: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.denoiser.freeze()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C,H,W of the images it makes."""
        return self.decoded or self.shape

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

    def conditioned(self, conditioning: Conditioning) -> Teacher:
        """The same teacher, conditioned as a run asks; what turns labels into texts or small images stays its own."""
        own = self.conditioning
        return dataclasses.replace(
            self, conditioning=dataclasses.replace(conditioning, texts=own.texts, small=own.small)
        )

    def denoise(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        """f(x_t, t, c) = E[x_0 | x_t, c], guided where `c` says so (two evaluations), (B,C,H,W).

        Gradients flow to x_t, not to the weights.
        """
        return self.clip(guided(self.denoiser, self.conditioning, x_t, t, c))

    def to_images(self, x_0: Tensor) -> Tensor:
        """Images (B,C,H,W) in [-1, 1] of its answers: latents are decoded, at most MOST_PIXELS of images at a time."""
        return self._in_parts(self.decode, x_0).clamp(-1, 1)

    def encoded(self, images: Tensor) -> Tensor:
        """What it denoises, of `images` (B,C,H,W) in [-1, 1]: its latents, encoded in such parts, or the images."""
        return self._in_parts(self.to_latents, images)

    def _in_parts(self, call: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
        if call is None:
            return x
        images_at_once = max(1, MOST_PIXELS // math.prod(self.image_shape[1:]))
        return call(x) if len(x) <= images_at_once else torch.cat([call(part) for part in x.split(images_at_once)])

    def autoencoder_kept_on_device(self) -> AbstractContextManager[object]:
        """A block in which what encodes and decodes, once it is used, stays on the device: for loops over batches."""
        stack = ExitStack()
        for module in self.offloaded:
            stack.enter_context(module.keep_on_device())
        return stack

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
            student.guidance = GuidanceEmbedding(student.embedding_channels, *self.conditioning.w_range)
        return student.train().requires_grad_(True)

    def frozen_copy(self) -> Denoiser:
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


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline of diffusers on this machine, and which of its weights are meant ("" or as "fp16")."""

    folder: Path
    variant: str


class TeacherSource(ABC):
    """A family of teachers, such as one format of checkpoints. Constructed with its Config and the dataset.

    `conditioning.classes` is not 0 where the run asks for a class-conditional teacher.
    """

    name: ClassVar[str]
    Config: ClassVar[type[TeacherConfig]]
    reads: ClassVar[str] = "classes"  # what conditions it: classes, or texts

    def __init__(
        self, config: Any, dataset: Dataset, cache: Path, device: str, conditioning: Conditioning = WITHOUT_CLASSES
    ) -> None:
        self.config, self.dataset, self.cache, self.device = config, dataset, cache, device
        self.conditioning = conditioning

    @property
    def fits_data(self) -> bool:
        """Whether real images go with what it is conditioned on: they do not with the small images of an upscaler."""
        return True

    def pipeline(self) -> PipelineFolder | None:
        """The pipeline that the teacher is read from, whose other parts its students are exported with; None: none."""
        return None

    def notes(self) -> Sequence[str]:
        """What a user should know of how the teacher is read: what its files say and is not understood."""
        return ()

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
