"""Settings of evaluation: what is sampled and scored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distillbench.diffusion.samplers import SAMPLERS, Solver
from distillbench.errors import UserError
from distillbench.options import option, require_between, require_one_of, require_positive
from distillbench.training.compute import SAMPLED, Sampling

TIMINGS = ("process", "inline", "off")


@dataclass
class EvaluationConfig:
    """What is sampled and scored. The teacher's row with its first sampler and the most steps is the reference."""

    images: int = option(2048, "images of every row")
    batch_size: int = option(256, "images sampled at once, also when the memory of sampling is measured")
    nfe: list[int] = option([], "network evaluations an image; empty: those of 1, 2 and 4 that a method can do")
    teacher_samplers: list[str] = option(["ddim"], f"of the teacher's own rows: {', '.join(SAMPLERS)}, or SAMPLER/GRID")
    teacher_steps: list[int] = option(
        [1, 2, 4, 8, 64], "steps of each of them; the first with the most is the reference"
    )
    seeds: list[int] = option([0], "sampling seeds: rows for each; an image's noise depends on it and its index alone")
    metrics: list[str] = option(["fd_efficientnet_lite0", "teacher_rmse"], "scores, by name or pattern: '*_inception'")
    download: bool = option(False, "download missing weights of the scores' networks, and of LPIPS as a distance")
    references: list[str] = option(
        [], "files of reference statistics (.npz) to use instead of the dataset's images", path=True
    )
    real_features: int = option(
        0, "real images, drawn at random, whose features are kept: precision, recall, density, ...; 0: all"
    )
    checkpoints: int = option(0, "points along training, between its start and end, at which students are scored too")
    progress_every: float = option(
        0.1, "share of the budget after which the student is scored cheaply while it trains; 0: never"
    )
    progress_images: int = option(256, "images of these scores, which take at most 2 % of the network evaluations")
    precision: str = option("fp32", "of networks where they are sampled from and timed: fp32, tf32 (GPU), bf16 or fp16")
    cuda_graphs: bool = option(False, "on a GPU, networks are captured once for each shape and replayed by one launch")
    timing: str = option("process", "speed is measured in a fresh process, inline (in this one), or off")
    timing_seconds: float = option(0.25, "how long each timing measures at least, after its warm-up")
    largest_timed_batch: int = option(256, "largest batch that is tried for the most images per second")

    def __post_init__(self) -> None:
        require_positive(self, "images", "batch_size", "timing_seconds", "largest_timed_batch")
        require_between(self, 0, 1000, "checkpoints")
        require_between(self, 0, 2**53, "real_features")
        require_between(self, 0, 1, "progress_every")
        require_between(self, 2, 1_000_000, "progress_images")
        require_one_of(self, "timing", TIMINGS)
        require_one_of(self, "precision", SAMPLED)
        for name in ("nfe", "teacher_steps"):
            values = getattr(self, name)
            if (not values and name != "nfe") or min(values, default=1) < 1 or len(set(values)) != len(values):
                raise UserError(f"evaluation.{name} must list different positive numbers, got {values}")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"evaluation.seeds must list different numbers, none negative, got {self.seeds}")
        solvers = self.solvers()
        if not solvers or len({solver.name for solver in solvers}) != len(solvers):
            raise UserError(f"evaluation.teacher_samplers must list different samplers, got {self.teacher_samplers}")
        if not solvers[0].deterministic:
            raise UserError(
                f"evaluation.teacher_samplers: the first gives the samples that others are compared with, and "
                f"{solvers[0].name} adds noise. Put another before it, such as ddim"
            )

    def bytes_of_row(self, shape: tuple[int, ...]) -> int:
        """The size of a row's samples on disk: float32 images of `shape` (C,H,W)."""
        return 4 * self.images * math.prod(shape)

    @property
    def sampling(self) -> Sampling:
        """How networks are computed where they are sampled from."""
        return Sampling(self.precision, self.cuda_graphs)

    def solvers(self) -> list[Solver]:
        """The teacher's samplers; raises UserError for one that does not exist."""
        return [Solver.parse(name) for name in self.teacher_samplers]
