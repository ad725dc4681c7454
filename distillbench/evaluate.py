"""Evaluation: the same noise for every method and the teacher, the same scores, and the speed of sampling."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.datasets import Dataset, to_uint8
from distillbench.errors import DivergedError, Unavailable, UserError, unknown
from distillbench.memory import peak_gpu_mib
from distillbench.metrics import Metric, Samples
from distillbench.noise import FixedNoise, Noise, stream_key
from distillbench.options import option, require_positive
from distillbench.progress import Progress, Step
from distillbench.registry import Registry
from distillbench.samplers import ddim, uniform_times, x_at_t_max
from distillbench.teachers import Teacher

Sampler = Callable[[Callable[[int], Tensor], int], Tensor]  # (noise, nfe) -> x_0 (B,C,H,W)
SHOWN = 64  # images of every row that are kept to be looked at


@dataclass
class EvaluationConfig:
    """What is sampled and scored. The teacher's row with the most evaluations is the reference of teacher_rmse."""

    images: int = option(2048, "images of every row")
    batch_size: int = option(256, "images sampled at once, also when images per second are timed")
    nfe: list[int] = option([1, 2, 4], "network evaluations an image; a method gets rows where it supports them")
    teacher_nfe: list[int] = option([1, 2, 4, 8, 64], "steps of the teacher's own DDIM rows")
    seed: int = option(0, "seed of the noise; the noise of an image depends on this and on its index alone")
    metrics: list[str] = option(["fd_efficientnet_lite0", "teacher_rmse"], "scores, by name")
    timing_seconds: float = option(0.5, "how long each timing measures, after its warm-up")

    def __post_init__(self) -> None:
        require_positive(self, "images", "batch_size", "timing_seconds")
        for name in ("nfe", "teacher_nfe"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise UserError(f"evaluation.{name} must list different positive numbers, got {values}")

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
            self.teacher_x_0 = self._sample(teacher_sampler(teacher), max(config.teacher_nfe), step)

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
        x_0 = sampler(noise, nfe)
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
        with torch.no_grad():
            sampler(noise, nfe)
            timer = Timer("sampler(noise, nfe)", globals=locals(), num_threads=torch.get_num_threads())
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


def teacher_sampler(teacher: Teacher) -> Sampler:
    """The teacher's own DDIM with `nfe` steps, uniform in time."""
    schedule = teacher.schedule

    def sample(noise: Callable[[int], Tensor], nfe: int) -> Tensor:
        return ddim(teacher.denoise, schedule, x_at_t_max(schedule, noise(0)), uniform_times(schedule, nfe))

    return sample
