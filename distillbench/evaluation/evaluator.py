"""Evaluation: every method and the teacher are sampled from the same noise and scored by the same metrics."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillbench.datasets.dataset import to_uint8
from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.denoiser import NetworkCall
from distillbench.diffusion.noise import Noise, PrefetchedNoise, prefetched, stream_key
from distillbench.diffusion.samplers import Solver
from distillbench.errors import DivergedError, Unavailable
from distillbench.evaluation.distributed import SampleOrder
from distillbench.evaluation.features import ImageSet
from distillbench.evaluation.metric import Metric, Need, Samples, check_needs
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.evaluation.stored_images import StoredImages
from distillbench.storage.array_cache import cached_array
from distillbench.storage.files import check_room
from distillbench.system.progress import Progress, Step
from distillbench.system.transfers import to_host
from distillbench.teachers.teacher import Teacher
from distillbench.training.compute import sampling, sampling_call, sampling_identity
from distillbench.training.data_parallel import SINGLE_RANK, Ranks
from distillbench.training.turns import in_turns

Sampler = Callable[[Callable[[int], Tensor], int, Condition], Tensor]  # (noise, nfe, c) -> x_0 (B,C,H,W)
OfTeacher = Callable[[], tuple[StoredImages, ImageSet]]  # the teacher's many-step samples
EVALUATION = "evaluation"  # the purpose of samples whose scores are reported; the noise of others differs
SHOWN = 64  # images of every row that are saved for viewing
MOST_KEPT = 2**29  # bytes of features that are kept only for influences: 50,000 of Inception are fewer
TEACHER_SAMPLES_PROTOCOL = 2  # version of the cached teacher samples: increase it when samples change
ROW = "scoring a row, whose samples are stored in float32,"  # what takes room on the disk


@dataclass(frozen=True)
class Measured:
    """The scores of one row; None if undefined, for the reason in `missing`."""

    scores: dict[str, float | None]
    missing: dict[str, str]
    shown: Tensor  # the first images, uint8
    influences: dict[str, Tensor]  # (N,) of each score of which they are known, if they were asked for


class Evaluator:
    """Scores samplers on one dataset against one teacher. One object serves all samplers: same noise, same metrics."""

    def __init__(
        self, config: EvaluationConfig, metrics: dict[str, type[Metric]], real: RealImages, teacher: Teacher,
        progress: Progress, cache: Path | None = None, ranks: Ranks = SINGLE_RANK, noise: str = EVALUATION,
    ) -> None:  # fmt: skip
        """`noise`: the purpose of what is sampled. Different purposes have different noise for the same seed."""
        self.ranks, self.noise = ranks, noise
        self.config, self.teacher, self.real, self.progress, self.cache = config, teacher, real, progress, cache
        self.networks, self.device = real.networks, real.networks.device
        self.metrics = [cls() for cls in metrics.values()]
        self.kept = features_kept(metrics) | kept_for_influences(metrics, config.images)
        self._teacher_samples: dict[int, tuple[StoredImages, ImageSet]] = {}  # by sampling seed
        self._call: NetworkCall | None = None  # shared by all rows of a cell

    def teacher_samples(self, seed: int, order: SampleOrder | None = None) -> tuple[StoredImages, ImageSet]:
        """The teacher's many-step samples for the noise of `seed`: in a file, and as 8-bit images.

        With a cache they are computed once for all processes and stored. `order` is sent to the other ranks, which
        sample their share.
        """
        if seed not in self._teacher_samples:
            order = order and replace(order, teacher_samples=True, seed=seed)
            if self.cache is None:
                x_0 = self._new_file()
                self._sample_teacher(seed, order, x_0.add)
            else:
                x_0 = self._cached_teacher_samples(seed, self.cache, order)
            self._teacher_samples[seed] = x_0, self._images(x_0)
        return self._teacher_samples[seed]

    def _sample_teacher(self, seed: int, order: SampleOrder | None, keep: Callable[[Tensor], None]) -> None:
        with self.progress.step("the teacher's many-step samples") as step:
            self._sample(self._solver(), self._most_nfe(), seed, step, order, keep)

    def _new_file(self) -> StoredImages:
        """A temporary file for the samples of a row."""
        self._check_room(1)
        return StoredImages(self.cache)

    def _check_room(self, rows: int) -> None:
        """Raise UserError unless the disk has room for the samples of so many rows."""
        size = self.config.bytes_of_row(self.teacher.image_shape)
        check_room(self.cache or Path(tempfile.gettempdir()), rows * size, ROW)

    def _solver(self) -> Sampler:
        """The sampler of the many-step samples."""
        return teacher_sampler(self.teacher, self.config.solvers()[0])

    def _most_nfe(self) -> int:
        return most_nfe(self.config, self.teacher)

    def _cached_teacher_samples(self, seed: int, cache: Path, order: SampleOrder | None) -> StoredImages:
        dataset = self.real.dataset.sha256
        recipe = teacher_samples_recipe(self.config, self.teacher, self.teacher.sha256, dataset, self.device, seed)
        if self.noise != EVALUATION:
            recipe["noise"] = self.noise

        def fill(write: Callable[[np.ndarray], Any]) -> None:
            self._check_room(2)  # these samples, and then those of the first row
            self._sample_teacher(seed, order, lambda images: write(images.numpy()))

        shape = (self.config.images, *self.teacher.image_shape)
        return StoredImages.in_npy(cached_array(cache, "the teacher's samples", recipe, shape, fill, self.progress))

    def measure(
        self, sampler: Sampler, nfe: int, seed: int, keeps_noise: bool, label: str, order: SampleOrder | None = None,
        influences: bool = False,
    ) -> Measured:  # fmt: skip
        """The scores of `sampler` at `nfe` evaluations per image, on the noise of sampling seed `seed`.

        If several ranks sample, `order` (the cell and the weights) is sent to the others. The teacher is sampled only
        if a metric compares with it. With `influences` those of the images on the scores are computed, too.
        """
        of_teacher = partial(self.teacher_samples, seed, order)
        x_0 = self._new_file()
        try:
            with self.progress.step(f"{label}: sampling with {nfe} NFE") as step:
                self._sample(sampler, nfe, seed, step, order and replace(order, nfe=nfe, seed=seed), x_0.add)
            return self._scored(x_0, of_teacher, keeps_noise, f"{label}: scoring {nfe} NFE", influences)
        finally:
            x_0.close()

    def _scored(
        self, x_0: StoredImages, of_teacher: OfTeacher, keeps_noise: bool, label: str, influences: bool
    ) -> Measured:
        conditioning = self.teacher.conditioning
        labels = conditioning.labels_of_images(range(x_0.count)) if conditioning.classes else None
        texts = self.real.dataset.prompts
        prompts = [texts[label] for label in labels.tolist()] if texts is not None and labels is not None else None
        made: dict[str, Any] = {"teacher_x_0": lambda: of_teacher()[0].tensor, "teacher": lambda: of_teacher()[1]}
        samples = Samples(
            x_0=x_0.tensor, images=self._images(x_0), real=self.real, keeps_noise=keeps_noise, labels=labels,
            prompts=prompts, read=lambda: zip(x_0.batches(), of_teacher()[0].batches(), strict=True), **made,
        )  # fmt: skip
        scores: dict[str, float | None] = {}
        missing: dict[str, str] = {}
        moved: dict[str, Tensor] = {}
        with self.progress.step(label) as step:
            for index, metric in enumerate(self.metrics):
                scores[metric.name], reason = score_or_reason(metric, samples)
                if reason:
                    missing[metric.name] = reason
                elif influences and (values := self._influence(metric, samples)) is not None:
                    moved[metric.name] = values
                step.advance((index + 1) / len(self.metrics), metric.name)
        return Measured(scores, missing, to_uint8(x_0.first(SHOWN)), moved)

    def _influence(self, metric: Metric, samples: Samples) -> Tensor | None:
        """(N,) float32 on the host, of a score that methods are compared by."""
        kept = metric.network is None or Need.features not in metric.influence_needs or metric.network in self.kept
        if metric.direction == "none" or not kept:
            return None
        try:
            values = metric.influence(samples)
        except Unavailable:
            return None
        return None if values is None else values.float().cpu()

    def _images(self, x_0: StoredImages) -> ImageSet:
        return ImageSet(lambda: map(to_uint8, x_0.batches()), x_0.count, x_0.shape, self.networks, self.kept)

    def _noise(self, first: int, seed: int) -> Noise:
        indices = range(first, min(first + self.config.batch_size, self.config.images))
        return Noise(stream_key(self.noise, seed), indices, self.teacher.shape, self.device)

    def sample(self, sampler: Sampler, nfe: int, seed: int, label: str, keep: Callable[[Tensor], None]) -> None:
        """Call `keep` with each batch of the row that :meth:`measure` scores, (B,C,H,W) on the host, in order."""
        with self.progress.step(f"{label}: sampling with {nfe} NFE") as step:
            self._sample(sampler, nfe, seed, step, None, keep)

    def _sample(
        self, sampler: Sampler, nfe: int, seed: int, step: Step, order: SampleOrder | None,
        keep: Callable[[Tensor], None],
    ) -> None:  # fmt: skip
        """Call `keep` with each batch of a row, (B,C,H,W) on the host, in order."""
        if self.ranks.count > 1:
            with self.ranks.lead(order):
                error = self._in_turns(sampler, nfe, seed, step, keep)
            if error is not None:
                raise error
            return
        with self._sampling():
            for images in self._checked(to_host(self._batches(sampler, nfe, seed), self.device), nfe, step):
                keep(images)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """A context for sampling rows. CUDA graphs are captured once for all rows of a cell."""
        self._call = self._call or sampling_call(self.config.sampling, self.device)
        computed = sampling(self.config.sampling, self.teacher, self.device, self._call)
        with torch.no_grad(), self.teacher.autoencoder_kept_on_device(), computed:
            try:
                yield
            except Exception:
                self.release()  # the next row may need the memory
                raise

    def release(self) -> None:
        """Free the CUDA graphs: the next cell has other networks, and its training needs the memory."""
        self._call = None

    def follow_sampling(self, sampler: Sampler | None, order: SampleOrder) -> None:
        """Sample this rank's batches of rank 0's row; `sampler` None: the teacher's many-step sampler."""
        nfe = self._most_nfe() if order.teacher_samples else order.nfe
        sampler = self._solver() if sampler is None else sampler
        self._in_turns(sampler, nfe, order.seed, Step(lambda *_: None), lambda images: None)

    def _in_turns(
        self, sampler: Sampler, nfe: int, seed: int, step: Step, keep: Callable[[Tensor], None]
    ) -> Exception | None:
        """The batches of a row, each sampled by one of several ranks; rank 0 keeps them."""
        count = math.ceil(self.config.images / self.config.batch_size)

        def sample_batch(index: int) -> Tensor:
            batches = to_host(self._batches(sampler, nfe, seed, range(index, index + 1)), self.device)
            (images,) = self._checked(batches, nfe, step, index * self.config.batch_size)
            return images

        with self._sampling():
            return in_turns(count, sample_batch, self.ranks, keep)

    def _batches(
        self, sampler: Sampler, nfe: int, seed: int, which: range | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images of a row in batches (None: all), and whether each batch was finite before it was clipped.

        Both stay on the device: reading the flag here would wait for the device.
        """
        size = self.config.batch_size
        indices = which or range(math.ceil(self.config.images / size))
        for noise in prefetched((self._noise(size * index, seed) for index in indices), self.device):
            x_0 = self._counted(sampler, noise, len(noise.indices), nfe)
            yield self.teacher.to_images(x_0), torch.isfinite(x_0).all()

    def _checked(self, batches: Iterable[tuple[Tensor, ...]], nfe: int, step: Step, done: int = 0) -> Iterator[Tensor]:
        """The images of batches on the host; raises DivergedError if a batch is not finite."""
        for images, finite in batches:
            if not finite:
                raise DivergedError(f"samples with {nfe} evaluations are not finite")
            yield images
            done += len(images)
            step.advance(done / self.config.images)

    def _counted(self, sampler: Sampler, noise: Noise | PrefetchedNoise, size: int, nfe: int) -> Tensor:
        """A batch of samples; raises RuntimeError if its shape or its number of evaluations is wrong."""
        c = self.teacher.conditioning.of_images(
            noise.indices, self.device
        )  # before counting: an upscaler's base samples are not part of the row
        before = self._rows()
        x_0 = sampler(noise, nfe, c)
        counted = self._rows() - before
        if counted != nfe * size:
            raise RuntimeError(f"requested {nfe} evaluations per image, counted {counted / size:g}")
        if x_0.shape != (size, *self.teacher.shape):
            raise RuntimeError(f"samples must have shape {(size, *self.teacher.shape)}, got {tuple(x_0.shape)}")
        return x_0

    def _rows(self) -> int:
        return self.teacher.teacher_rows.rows + self.teacher.student_rows.rows


def most_nfe(config: EvaluationConfig, teacher: Teacher) -> int:
    """Network evaluations of one of the teacher's many-step samples."""
    return config.solvers()[0].evaluations(max(config.teacher_steps)) * teacher.conditioning.evaluations


def teacher_samples_recipe(
    config: EvaluationConfig, teacher: Teacher, teacher_sha256: str, dataset_sha256: str, device: str, seed: int
) -> dict[str, Any]:
    """All that determines the teacher's many-step samples for a sampling seed.

    `dataset_sha256` includes the dataset's texts, and the images that an upscaler enlarges.
    """
    return {
        "protocol": TEACHER_SAMPLES_PROTOCOL,
        "teacher_sha256": teacher_sha256,
        "sampler": config.solvers()[0].name,
        "nfe": most_nfe(config, teacher),
        "images": config.images,
        "batch_size": config.batch_size,  # changes the last bits, as do devices and threads
        "seed": seed,
        "device": device.split(":")[0],
        "threads": torch.get_num_threads(),
        "dataset_sha256": dataset_sha256,
        **teacher.conditioning.evaluation_identity(),
        **({"compute": computed} if (computed := sampling_identity(config.sampling, device)) else {}),
    }


def features_kept(metrics: dict[str, type[Metric]]) -> frozenset:
    """The networks of which some metric needs every feature, not only mean and covariance."""
    return frozenset(cls.network for cls in metrics.values() if cls.network and Need.features in cls.needs)


def kept_for_influences(metrics: dict[str, type[Metric]], images: int) -> frozenset:
    """The networks of which every feature is needed only for influences of so many images, and takes little memory."""
    asked = {cls.network for cls in metrics.values() if cls.network and Need.features in cls.influence_needs}
    return frozenset(network for network in asked if 4 * images * network.width <= MOST_KEPT)


def score_or_reason(metric: Metric, samples: Samples) -> tuple[float | None, str]:
    """The score and no reason; or None and why there is none."""
    try:
        check_needs(type(metric), samples)
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
            raise ValueError(f"{solver.name} cannot use exactly {nfe} evaluations, {evaluations} for each denoising")
        return solver.solve(partial(teacher.denoise, c=c), teacher.schedule, noise(0), steps, noise)

    return sample
