"""Evaluation: the same noise for every method and the teacher, the same scores, and the speed of sampling."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distillbench.conditions import Condition
from distillbench.datasets import Dataset, to_uint8
from distillbench.errors import DivergedError, Unavailable, UserError, unknown
from distillbench.memory import peak_gpu_mib
from distillbench.metrics import Metric, Samples
from distillbench.noise import FixedNoise, Noise, stream_key
from distillbench.options import option, require_positive
from distillbench.progress import Progress, Step
from distillbench.registry import Registry
from distillbench.samplers import SAMPLERS, Solver
from distillbench.teachers import Teacher

Sampler = Callable[[Callable[[int], Tensor], int, Condition], Tensor]  # (noise, nfe, c) -> x_0 (B,C,H,W)
SHOWN = 64  # images of every row that are kept to be looked at


@dataclass
class EvaluationConfig:
    """What is sampled and scored. The teacher's row with its first sampler and the most steps is the reference."""

    images: int = option(2048, "images of every row")
    batch_size: int = option(256, "images sampled at once, also when images per second are timed")
    nfe: list[int] = option([], "network evaluations an image; empty: those of 1, 2 and 4 that a method can do")
    teacher_samplers: list[str] = option(["ddim"], f"of the teacher's own rows: {', '.join(SAMPLERS)}, or SAMPLER/GRID")
    teacher_steps: list[int] = option(
        [1, 2, 4, 8, 64], "steps of each of them; the first with the most is the reference"
    )
    seed: int = option(0, "seed of the noise; the noise of an image depends on this and on its index alone")
    metrics: list[str] = option(["fd_efficientnet_lite0", "teacher_rmse"], "scores, by name")
    timing_seconds: float = option(0.5, "how long each timing measures, after its warm-up")

    def __post_init__(self) -> None:
        require_positive(self, "images", "batch_size", "timing_seconds")
        for name in ("nfe", "teacher_steps"):
            values = getattr(self, name)
            if (not values and name != "nfe") or min(values, default=1) < 1 or len(set(values)) != len(values):
                raise UserError(f"evaluation.{name} must list different positive numbers, got {values}")
        solvers = self.solvers()
        if not solvers or len({solver.name for solver in solvers}) != len(solvers):
            raise UserError(f"evaluation.teacher_samplers must list different samplers, got {self.teacher_samplers}")
        if not solvers[0].deterministic:
            raise UserError(
                f"evaluation.teacher_samplers: the first gives the answers that others are compared with, and "
                f"{solvers[0].name} adds noise. Put another before it, such as ddim"
            )

    def solvers(self) -> list[Solver]:
        """The teacher's samplers; raises UserError for one that does not exist."""
        return [Solver.parse(name) for name in self.teacher_samplers]

    def check_metrics(self, registry: Registry) -> None:
        """Raise UserError for a metric that is not registered."""
        for name in self.metrics:
            if name not in registry.metrics:
                raise unknown("metric", name, registry.metrics, " in evaluation.metrics")


@dataclass(frozen=True)
class Measured:
    """What evaluation found for one number of evaluations; None where `missing` gives the reason."""

    nfe: int
    scores: dict[str, float | None]
    sample_latency_ms: float
    sample_images_per_second: float
    sample_peak_gpu_mib: float | None
    missing: dict[str, str]
    shown: Tensor  # the first images, uint8


class Evaluator:
    """Scores samplers on one dataset against one teacher. Made once for all of them, so that all meet the same."""

    def __init__(
        self, config: EvaluationConfig, dataset: Dataset, teacher: Teacher, registry: Registry, device: str,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.config, self.teacher, self.device, self.progress = config, teacher, device, progress
        self.metrics: list[Metric] = []
        self.unavailable: dict[str, str] = {}  # metric: reason
        with progress.step("features of the real images"):
            for name in config.metrics:
                try:
                    self.metrics.append(registry.get("metrics", name).cls(dataset, device))
                except Unavailable as reason:
                    self.unavailable[name] = str(reason)
        with progress.step("the teacher's many-step answers") as step:
            solver = config.solvers()[0]
            nfe = solver.evaluations(max(config.teacher_steps)) * teacher.conditioning.evaluations
            self.teacher_x_0 = self._sample(teacher_sampler(teacher, solver), nfe, step)

    def _noise(self, first: int) -> Noise:
        indices = range(first, min(first + self.config.batch_size, self.config.images))
        return Noise(stream_key("evaluation", self.config.seed), indices, self.teacher.shape, self.device)

    def _sample(self, sampler: Sampler, nfe: int, step: Step) -> Tensor:
        images = []
        with torch.no_grad():
            for first in range(0, self.config.images, self.config.batch_size):
                noise = self._noise(first)
                images.append(self._checked(sampler, noise, len(noise.indices), nfe).cpu())
                step.advance((first + len(noise.indices)) / self.config.images)
        return torch.cat(images).clamp(-1, 1)

    def _checked(self, sampler: Sampler, noise: Noise, size: int, nfe: int) -> Tensor:
        """A batch of samples, held to the number of evaluations, the shape and the finiteness that a row promises."""
        before = self._rows()
        x_0 = sampler(noise, nfe, self.teacher.conditioning.of_images(noise.indices, self.device))
        counted = self._rows() - before
        if counted != nfe * size:
            raise RuntimeError(f"asked for {nfe} evaluations an image, counted {counted / size:g}")
        if x_0.shape != (size, *self.teacher.shape):
            raise RuntimeError(f"samples must have shape {(size, *self.teacher.shape)}, got {tuple(x_0.shape)}")
        if not torch.isfinite(x_0).all():
            raise DivergedError(f"samples with {nfe} evaluations are not finite")
        return x_0

    def _rows(self) -> int:
        return self.teacher.teacher_rows.rows + self.teacher.student_rows.rows

    def measure(self, sampler: Sampler, nfe: int, keeps_noise: bool, label: str) -> Measured:
        """One row: scores, speed and memory of `sampler` at `nfe` evaluations an image."""
        missing = dict(self.unavailable)
        with self.progress.step(f"{label}: sampling with {nfe} NFE") as step, peak_gpu_mib(self.device) as gpu:
            x_0 = self._sample(sampler, nfe, step)
        if gpu.reason:
            missing["sample_peak_gpu_mib"] = gpu.reason
        samples = Samples(x_0, self.teacher_x_0, keeps_noise)
        scores: dict[str, float | None] = dict.fromkeys(self.unavailable)
        for metric in self.metrics:
            scores[metric.name], reason = _score(metric, samples)
            if reason:
                missing[metric.name] = reason
        one, batch = 1, min(self.config.batch_size, self.config.images)
        latency = self._seconds(sampler, nfe, one)
        throughput = batch / self._seconds(sampler, nfe, batch)
        return Measured(
            nfe, scores, 1000 * latency, throughput, gpu.mib, missing, to_uint8(x_0[:SHOWN]),
        )  # fmt: skip

    def _seconds(self, sampler: Sampler, nfe: int, size: int) -> float:
        """Median seconds of one call on `size` images, warmed up and synchronised by torch.utils.benchmark."""
        Timer = _timer()
        indices = range(size)
        drawn = Noise(stream_key("timing", 0), indices, self.teacher.shape, self.device)
        noise = FixedNoise([drawn(k) for k in range(nfe)])
        c = self.teacher.conditioning.of_images(indices, self.device)
        with torch.no_grad():
            sampler(noise, nfe, c)
            timer = Timer("sampler(noise, nfe, c)", globals=locals(), num_threads=torch.get_num_threads())
            return timer.blocked_autorange(min_run_time=self.config.timing_seconds).median


def _timer() -> type:
    """torch's Timer, imported without the warning that no CUDA runtime was found to compile C++ for."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.benchmark import Timer
    finally:
        logger.setLevel(level)
    return Timer


def _score(metric: Metric, samples: Samples) -> tuple[float | None, str]:
    try:
        value = metric.score(samples)
    except Unavailable as reason:
        return None, str(reason)
    return (value, "") if math.isfinite(value) else (None, f"the score is {value}")


def teacher_sampler(teacher: Teacher, solver: Solver) -> Sampler:
    """The teacher's own sampler: as many steps as `nfe` evaluations of its network allow."""
    evaluations = teacher.conditioning.evaluations

    def sample(noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        steps = solver.steps(nfe // evaluations)
        if steps is None or nfe % evaluations:
            raise ValueError(f"{solver.name} cannot use exactly {nfe} evaluations, {evaluations} of them an answer")
        return solver.solve(partial(teacher.denoise, c=c), teacher.schedule, noise(0), steps, noise)

    return sample
