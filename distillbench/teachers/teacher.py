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
from distillbench.networks.adapters import inject
from distillbench.networks.time_features import scale_fourier
from distillbench.options import option
from distillbench.system.offloading import Offloaded
from distillbench.teachers.students import AS_TEACHER, StudentForm

if TYPE_CHECKING:
    from distillbench.datasets.dataset import Dataset
    from distillbench.system.progress import Progress

__all__ = ["Clip", "Teacher", "TeacherConfig", "TeacherPlan", "TeacherSource"]


MOST_PIXELS = 2**20  # of images decoded or encoded at once: 256 float32 channels of so many pixels are 1 GiB


@dataclass(frozen=True)
class Clip:
    """Clipping of guided data predictions f to [-1, 1].

    "static" clips values. "dynamic" (Saharia et al. 2022, section 2.3) clips each image to [-q, q] and divides it by
    q, the `quantile` of its |f|, clamped to [1, largest]. "" does nothing.
    """

    kind: str = ""
    quantile: float = 0.995
    largest: float = math.inf

    def __call__(self, f: Tensor) -> Tensor:
        return CLIPS[self.kind](self, f)

    def plain(self) -> Any:
        """Its settings, as plain values."""
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
    """A frozen denoiser, its identity, and what students are made from.

    `sha256` identifies its weights and their use (network, schedule, parameterisation). Its evaluations, and those of
    its frozen copies, are counted in `teacher_rows`; those of its students in `student_rows`.

    Students start as copies of `start`, by default the teacher's own denoiser, or another one if that cannot be trained
    (a closed form has no weights). `blank` makes a network of the same architecture with random weights from torch's
    global generator. `students` says whether students are such copies, adapters, or another architecture.

    A latent teacher denoises latents of `shape` and decodes them to images of `image_shape`. `encode` runs before
    sampling and `decode` after it; neither is part of the sampling time. With `to_posterior` students train on latents
    that are drawn anew at each use of an image, without it on `to_latents`. `clip` clips its data predictions.
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
    encode: Callable[[list[str]], Tensor] | None = None  # texts to (B,L,D); None: not conditioned on texts
    offloaded: tuple[Offloaded, ...] = ()  # text encoder and autoencoder: on the device only while they run
    clip: Clip = Clip()
    students: StudentForm = AS_TEACHER
    student_rows: Counter = field(default_factory=Counter)
    to_posterior: Callable[[Tensor], Tensor] | None = None  # images to mean and deviation of latents, (B,2c,h,w)

    def __post_init__(self) -> None:
        self.denoiser.freeze()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C,H,W of the images it makes."""
        return self.decoded or self.shape

    @property
    def label(self) -> str:
        """Its name in tables: the family's name and the first digits of `sha256`."""
        return f"{self.name}-{self.sha256[:8]}"

    @property
    def teacher_rows(self) -> Counter:
        return self.denoiser.counted.counter

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def conditioned(self, conditioning: Conditioning) -> Teacher:
        """The same teacher with the `conditioning` of a run, but its own texts and small images."""
        own = self.conditioning
        return dataclasses.replace(
            self, conditioning=dataclasses.replace(conditioning, texts=own.texts, small=own.small)
        )

    def with_students(self, students: StudentForm) -> Teacher:
        """The same teacher, with the same counters, whose students have this form."""
        return dataclasses.replace(self, students=students)

    def denoise(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        """f(x_t, t, c) = E[x_0 | x_t, c], (B,C,H,W); with guidance if `c` has a weight w (two evaluations).

        Gradients flow to x_t, not to the weights.
        """
        return self.clip(guided(self.denoiser, self.conditioning, x_t, t, c))

    def to_images(self, x_0: Tensor) -> Tensor:
        """Images (B,C,H,W) in [-1, 1] from x_0: latents are decoded, at most MOST_PIXELS of images at a time."""
        return self._in_parts(self.decode, x_0).clamp(-1, 1)

    def encoded(self, images: Tensor) -> Tensor:
        """The latents of `images` (B,C,H,W) in [-1, 1], encoded in parts; for a teacher in pixel space the images."""
        return self._in_parts(self.to_latents, images)

    def posterior(self, images: Tensor) -> Tensor:
        """Mean and standard deviation (B,2c,h,w) of the latents of `images` (B,C,H,W), encoded in parts."""
        return self._in_parts(self.to_posterior, images)

    def _in_parts(self, call: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
        if call is None:
            return x
        images_at_once = max(1, MOST_PIXELS // math.prod(self.image_shape[1:]))
        return call(x) if len(x) <= images_at_once else torch.cat([call(part) for part in x.split(images_at_once)])

    def autoencoder_kept_on_device(self) -> AbstractContextManager[object]:
        """A block in which text encoder and autoencoder stay on the device once used: for loops over batches."""
        stack = ExitStack()
        for module in self.offloaded:
            stack.enter_context(module.keep_on_device())
        return stack

    def student(self, fresh: bool | None = None, fourier_scale: float = 0.0) -> Denoiser:
        """A trainable network of the form that the run's settings (`student`) give.

        By default it is a copy of the teacher's, or starts as one and trains adapters alone, or is another architecture
        with random weights. `fresh` insists on random weights (True) or on the teacher's (False): UserError if the
        settings do not allow that. If training draws w, the student has w as an input, by an embedding that is zero
        before training. `fourier_scale` above 0 is the scale of its Fourier features of time (``scale_fourier``), in
        place of its own, which other weights than random ones have learned to read: UserError for those.
        """
        if fourier_scale:
            if not fresh:
                raise UserError("fourier_scale needs a student that starts from random weights (start=fresh)")
            return scale_fourier(self.student(fresh), fourier_scale)
        form = self.students
        if form.architecture is not None:
            if fresh is False:
                raise UserError(
                    "student.architecture: a student of another architecture starts from random weights, and this "
                    "method is set to start from the teacher's"
                )
            return self._trainable(form.network(self.shape, self._start, self.conditioning))
        if form.adapters is not None and fresh:
            raise UserError(
                f"student.lora_rank={form.rank}: adapters need the teacher's weights, and this method is set to start "
                "from random ones"
            )
        student = self._trainable(self._blank() if fresh else None)
        if form.adapters is not None:
            inject(student.network, form.adapters)
        return student

    def trainable_copy(self) -> Denoiser:
        """A trainable copy of the teacher's network, whatever form students have: for a fake score or a critic.

        Counted as a student's.
        """
        return self._trainable(None)

    def frozen_copy(self) -> Denoiser:
        """A frozen network like a student, but counted as a teacher: for a student that teaches a later phase."""
        return self.student().copy(self.teacher_rows).freeze()

    @property
    def _start(self) -> Denoiser:
        return self.start or self.denoiser

    def _blank(self) -> nn.Module:
        if self.blank is None:
            raise UserError(f"teacher={self.name} has no network with random weights: no student can start fresh")
        return self.blank()

    def _trainable(self, network: nn.Module | None) -> Denoiser:
        """A copy of the network that students start from, or `network` in its place; all weights are trained."""
        student = self._start.copy(self.student_rows)
        if network is not None:
            student.counted.network = network.to(next(student.parameters()).device)
        if self.conditioning.w_range is not None:
            student.guidance = GuidanceEmbedding(student.embedding_channels, *self.conditioning.w_range)
        return student.train().requires_grad_(True)

    def on(self, schedule: NoiseSchedule) -> Teacher:
        """The same teacher, with the same counters, evaluated on another schedule at equal signal-to-noise ratio."""
        start = None if self.start is None else self.start.on(schedule)
        return dataclasses.replace(self, denoiser=self.denoiser.on(schedule), start=start)

    @property
    def native(self) -> Teacher:
        """The same teacher, with the same counters, on its own schedule."""
        return self.on(self.denoiser.native)


@dataclass
class TeacherConfig:
    """Settings that every family of teachers has. A family's own Config derives from this one."""

    kind: str = option("", "the registered teacher (set by the choice of teacher=...)")


@dataclass(frozen=True)
class TeacherPlan:
    """Where the teacher would be loaded from, or what its training would cost.

    A training takes `seconds` where its budget says so; otherwise the time of steps of `batch_size` images decides.
    `setting` is the setting that limits it, such as "teacher.budget.images".
    """

    origin: str  # file it is read from, or "to be trained"
    images: int = 0
    nfe: int = 0
    batch_size: int = 1
    seconds: float | None = None
    setting: str = ""


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline of diffusers on this machine, and the variant of its weights ("" or, for example, "fp16")."""

    folder: Path
    variant: str


class TeacherSource(ABC):
    """A family of teachers, such as one format of checkpoints. Constructed with its Config and the dataset.

    `conditioning.classes` is not 0 if the run needs a class-conditional teacher.
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
        """Whether real images match its conditioning: they do not match the small images of an upscaler."""
        return True

    def pipeline(self) -> PipelineFolder | None:
        """The pipeline that the teacher was loaded from, or None. Students are exported with its other components."""
        return None

    def notes(self) -> Sequence[str]:
        """Notes for the user on the teacher's files, such as settings in them that are ignored."""
        return ()

    @abstractmethod
    def plan(self) -> TeacherPlan:
        """Check quickly, without loading weights; raise UserError if the teacher is missing or does not fit."""

    @abstractmethod
    def untrained(self) -> Teacher:
        """A teacher of the right architecture with any weights, by which a dry run estimates the cost."""

    @abstractmethod
    def load(self, progress: Progress) -> Teacher:
        """The frozen teacher on `device`; it is trained first if necessary."""

    def train(self, output: Path | None, progress: Progress) -> Path:
        """Train again, write to `output` or into the cache, return the file. UserError if it cannot be trained."""
        raise UserError(f"teacher={self.name} is not trained by distillbench")
