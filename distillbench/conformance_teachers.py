"""The checks of teachers: each holds one promise of :mod:`distillbench.teachers` against a family on a dataset.

| symbol       | meaning                                             | shape             |
|--------------|-----------------------------------------------------|-------------------|
| x_0          | real images, or their latents                       | (B,C,H,W)         |
| x_t          | alpha x_0 + sigma eps                               | (B,C,H,W)         |
| t            | time                                                | (B,1,1,1) float64 |
| tau          | noise level sigma / alpha                           | (B,1,1,1) float64 |
| f            | denoiser, E[x_0 given x_t, c]                       | (B,C,H,W)         |
| c            | condition: classes                                  | of a batch        |
| MSE          | mean squared error of f                             | float             |
| MSE(mean)    | that of the mean image, the best constant: variance | float             |
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distillbench.checking import (
    Check,
    Fault,
    NotApplicable,
    check_declared,
    differ,
    seed_global_generators,
    settings_with_help,
)
from distillbench.conditions import WITHOUT_CLASSES, Condition, Conditioning
from distillbench.conformance_datasets import DIGEST
from distillbench.datasets import Dataset, DatasetConfig, to_float
from distillbench.denoiser import Denoiser
from distillbench.errors import UserError
from distillbench.files import key_of
from distillbench.laws import GaussianMixture
from distillbench.progress import Progress
from distillbench.samplers import time_like
from distillbench.schedules import VE, NoiseSchedule, VPCosine
from distillbench.teachers import Teacher, TeacherConfig, TeacherPlan, TeacherSource

SEEN = 2048  # images that their mean is taken over
IMAGES = 128  # that are noised and denoised
FEW = 4  # images where more tell nothing more
LEVELS = (0.3, 1.0, 3.0)  # tau / standard deviation of the data
WORST = 1.5  # times MSE(mean): a network read in the wrong parameterisation is far above, a poor one below
LOW_NOISE_ERROR = 0.25  # standard deviations of the data, beside 2 tau
HIGH_NOISE_ERROR, PER_TAU = 1.0, 0.05  # standard deviations; a network that predicts eps errs by sigma / alpha more
STEEPEST, FLAT = 1.25, 0.25  # slope of images over answers; share of the variance below which it is not asked for
SAME = 1e-3  # relative to the largest value: float32 in batches of another size, or on another schedule


# --- the bench -------------------------------------------------------------------------------------------------------


class TinyImages(Dataset):
    """Draws of a mixture of three Gaussians around three patterns, 1x8x8; its law is known. The default to try on."""

    name, licence = "tiny_images", "none needed: drawn from a formula"
    Config = DatasetConfig
    shape, classes = (1, 8, 8), 3

    def __init__(self, config: DatasetConfig) -> None:
        wave = torch.linspace(0, math.pi, 8, dtype=torch.float64).cos() * 0.5
        means = torch.stack([wave.expand(8, 8), wave.expand(8, 8).T, wave.outer(wave) * -2])[:, None]
        weights = torch.tensor([0.3, 0.45, 0.25], dtype=torch.float64)
        self.law = GaussianMixture(weights, means, torch.full((3, 1, 1, 1), 0.12, dtype=torch.float64))
        self.images, self.components = self.law.draw(SEEN, torch.Generator().manual_seed(0))
        self.sha256 = key_of([self.law.plain(), SEEN])

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def labels(self, indices: Tensor) -> Tensor:
        return self.components[indices]


@dataclass(frozen=True)
class Bench:
    """A family of teachers with its settings, a dataset, and whether a conditional teacher is asked for."""

    label: str
    cls: type[TeacherSource]
    given: TeacherConfig | None
    dataset: Dataset
    conditioning: Conditioning
    cache: Path

    @property
    def conditional(self) -> bool:
        return self.conditioning.classes > 0

    def config(self) -> TeacherConfig:
        return self.cls.Config() if self.given is None else copy.deepcopy(self.given)

    def source(self) -> TeacherSource:
        return self.cls(self.config(), self.dataset, self.cache, "cpu", self.conditioning)

    def load(self) -> Teacher:
        """As the harness loads it."""
        return self.source().load(Progress(None)).asked(self.conditioning)

    @functools.cached_property
    def teacher(self) -> Teacher:
        """One for all checks."""
        return self.load()

    @functools.cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """What the teacher denoises, and the classes: of real images, or random where there are none of its kind."""
        count = len(self.dataset)
        if not count or not self.source().fits_data:
            raise NotApplicable("there are no real images that go with it")
        i = torch.linspace(0, count - 1, min(SEEN, count), dtype=torch.float64).round().long()
        x_0 = to_float(self.dataset.read(i))
        labels = self.dataset.labels(i) if self.conditional else torch.zeros_like(i)
        if self.teacher.to_latents is None:
            return x_0, labels
        with torch.no_grad():
            return self.teacher.to_latents(x_0[:IMAGES]), labels[:IMAGES]

    def noised(self, tau: float | None = None, t: float | None = None, count: int = IMAGES) -> Noised:
        """Images of the data at noise level `tau`, or at time `t`."""
        schedule, (x_0, labels) = self.teacher.schedule, self.data
        order = torch.randperm(len(x_0), generator=torch.Generator().manual_seed(0))[:count]
        x_0, labels = x_0[order], labels[order]
        when = time_of(schedule, tau) if t is None else t
        return Noised.of(schedule, x_0, when, self.asking(labels))

    def anything(self, teacher: Teacher, t: float, count: int = FEW) -> Noised:
        """Random images, where any will do."""
        x_0 = torch.rand(count, *teacher.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
        return Noised.of(teacher.schedule, x_0, t, teacher.conditioning.of_images(range(count), "cpu"))

    def asking(self, labels: Tensor) -> Condition:
        """What asks the loaded teacher for the classes `labels` (B,), as texts where it reads these."""
        return self.teacher.conditioning.draw(len(labels), torch.Generator().manual_seed(4), "cpu", labels)


@dataclass(frozen=True)
class Noised:
    """x_t and what it was made of."""

    x_0: Tensor
    x_t: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    c: Condition

    @classmethod
    def of(cls, schedule: NoiseSchedule, x_0: Tensor, t: float, c: Condition) -> Noised:
        times = time_like(x_0, t)
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2))
        return cls(x_0, alpha * x_0 + sigma * eps, times, alpha, sigma, c)

    @property
    def tau(self) -> float:
        return (self.sigma / self.alpha).max().item()

    def answer(self, teacher: Teacher, rows: slice = slice(None), c: Condition | None = None) -> Tensor:
        with torch.no_grad():
            return teacher.denoise(self.x_t[rows], self.t[rows], (c or self.c)[rows])


def time_of(schedule: NoiseSchedule, tau: float | None) -> float:
    return schedule.t_of_lam(torch.tensor(math.log(tau or 1.0), dtype=torch.float64)).item()


def moments(bench: Bench) -> tuple[Tensor, float]:
    """The mean image, and the standard deviation about it."""
    x_0, _ = bench.data
    mean = x_0.mean(dim=0)
    return mean, (x_0 - mean).square().mean().sqrt().item()


# --- what it is ------------------------------------------------------------------------------------------------------


def declared(bench: Bench) -> str:
    """The class is one that the registry takes, and every setting says what it is."""
    check_declared("teachers", bench.cls)
    if bench.cls.reads not in ("classes", "texts"):
        raise Fault(f"reads must be classes or texts, got {bench.cls.reads!r}")
    count = settings_with_help(bench.cls.Config)
    bench.config()
    return f"is conditioned on {bench.cls.reads}, {count} settings with help"


def builds(bench: Bench) -> str:
    """It plans without making anything. A UserError is a refusal: of a missing file, or of what is asked for."""
    before = sorted(bench.cache.rglob("*"))
    try:
        plan = bench.source().plan()
    except UserError as error:
        raise NotApplicable(f"refused ({error})") from error
    if not isinstance(plan, TeacherPlan) or not plan.origin:
        raise Fault(f"plan() must return a TeacherPlan that says where the teacher is from, got {plan!r}")
    if sorted(bench.cache.rglob("*")) != before:
        raise Fault("plan() writes into the cache: it is asked before a run, and may only look. Make files in load()")
    return plan.origin + (f", trained on {plan.images:,} images first" if plan.images else "")


def untrained(bench: Bench) -> str:
    """What a dry run is priced with has the right shapes."""
    teacher = bench.source().untrained()
    if not isinstance(teacher, Teacher):
        raise Fault(f"untrained() must return a Teacher, got {type(teacher).__name__}")
    _check_shapes(bench, teacher.asked(bench.conditioning), "untrained()")
    return f"maps {'x'.join(map(str, teacher.shape))} to itself"


def loads(bench: Bench) -> str:
    """Loading gives one and the same teacher each time, and an identity that is its own."""
    seed_global_generators(0)
    first = bench.teacher
    if not isinstance(first, Teacher):
        raise Fault(f"load() must return a Teacher, got {type(first).__name__}")
    _check_shapes(bench, first, "load()")
    seed_global_generators(1)
    second = bench.load()
    if not isinstance(first.sha256, str) or not DIGEST.fullmatch(first.sha256):
        raise Fault(f"sha256 must be a digest of the weights and how they are read, got {first.sha256!r}")
    if first.sha256 != second.sha256:
        raise Fault("loaded twice its sha256 differs: results of one would never be found for the other")
    if first.sha256 == bench.source().untrained().sha256:
        raise Fault('untrained() has the sha256 of the loaded teacher: let it be "untrained"')
    answers = [bench.anything(made, time_of(made.schedule, 1.0)).answer(made) for made in (first, second)]
    if differ(*answers):
        raise Fault(
            "loaded twice from the same settings it answers otherwise: weights must come from a file, or from a seed "
            "of the settings"
        )
    if tuple(first.image_shape) != tuple(bench.dataset.shape):
        raise Fault(
            f"it makes images of {tuple(first.image_shape)}, the dataset's are {tuple(bench.dataset.shape)}: raise "
            "UserError in plan() where the two do not fit"
        )
    if first.conditioning.classes != bench.conditioning.classes:
        raise Fault(
            f"asked for {bench.conditioning.classes or 'no'} classes it knows {first.conditioning.classes or 'none'}: "
            "give the Teacher Conditioning(self.conditioning.classes), or raise UserError in plan()"
        )
    return f"{first.label}, the same twice"


def _check_shapes(bench: Bench, teacher: Teacher, made_by: str) -> None:
    some = bench.anything(teacher, time_of(teacher.schedule, 1.0))
    f = some.answer(teacher)
    if f.shape != some.x_t.shape:
        raise Fault(
            f"the denoiser of {made_by} must map (B,C,H,W) = {tuple(some.x_t.shape)} to itself, got {tuple(f.shape)}"
        )
    if f.dtype != some.x_t.dtype:
        raise Fault(f"the denoiser of {made_by} must answer in {some.x_t.dtype} like x_t, got {f.dtype}")


def frozen(bench: Bench) -> str:
    """Its weights take no gradient, which a Teacher sees to, its mode is evaluation; gradients flow to x_t."""
    teacher = bench.teacher
    if any(part.training for part in teacher.denoiser.modules()):
        raise Fault("the network stays in training mode where eval() is asked for: let train(mode) do what it is told")
    some = bench.anything(teacher, time_of(teacher.schedule, 1.0))
    x_t = some.x_t.clone().requires_grad_(True)
    f = teacher.denoise(x_t, some.t, some.c)
    if not f.requires_grad:
        raise Fault("no gradient flows from its answer to x_t: is the network evaluated under torch.no_grad()?")
    return "no gradient to its weights, gradients to x_t"


# --- how it denoises -------------------------------------------------------------------------------------------------


def denoises(bench: Bench) -> str:
    """Answers are finite at every noise level, the same each time, and x_t stays as it is."""
    teacher = bench.teacher
    schedule = teacher.schedule
    for t in (schedule.t_min, time_of(schedule, 1.0), schedule.t_max):
        some = bench.anything(teacher, t)
        given = some.x_t.clone()
        f = some.answer(teacher)
        if not f.isfinite().all():
            raise Fault(f"at t = {t:g} answers are not finite: t_min = {schedule.t_min:g}, t_max = {schedule.t_max:g}")
        if differ(given, some.x_t):
            raise Fault("the denoiser changes x_t in place: copy it first")
        if differ(f, some.answer(teacher)):
            raise Fault(f"at t = {t:g} the same x_t has two answers: is there dropout, or noise of its own?")
    ends = schedule.noise_level(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    return f"finite from noise level {ends[0]:.3g} to {ends[1]:.3g}"


def batch_independent(bench: Bench) -> str:
    """An image does not depend on those beside it."""
    teacher = bench.teacher
    some = bench.anything(teacher, time_of(teacher.schedule, 1.0))
    whole = some.answer(teacher)
    parts = torch.cat([some.answer(teacher, slice(k, k + 1)) for k in range(FEW)])
    error = (whole - parts).abs().max().item()
    if error > SAME * max(1.0, whole.abs().max().item()):
        raise Fault(
            f"answers change by up to {error:.2g} with the images beside them: let nothing be computed over the batch"
        )
    return "the same in a batch of another size"


def counted(bench: Bench) -> str:
    """Every evaluation of its network is counted, once an image."""
    teacher = bench.teacher
    some = bench.anything(teacher, time_of(teacher.schedule, 1.0))
    seen: list[int] = []
    hook = teacher.denoiser.network.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    before = teacher.teacher_rows.rows
    try:
        some.answer(teacher)
    finally:
        hook.remove()
    rows = teacher.teacher_rows.rows - before
    if rows != FEW or sum(seen) != rows:
        raise Fault(
            f"one answer for {FEW} images evaluates the network on {sum(seen)} and counts {rows}: a Denoiser must call "
            "self.counted(x, time, embedding, c), once, and never self.network"
        )
    return "one evaluation an image"


def low_noise(bench: Bench) -> str:
    """With next to no noise the answer is x_t / alpha."""
    teacher, (_, std) = bench.teacher, moments(bench)
    some = bench.noised(t=teacher.schedule.t_min)
    error = (some.answer(teacher) - some.x_t / some.alpha).square().mean().sqrt().item()
    seen = (
        f"at noise level {some.tau:.2g} it is {error:.2g} from x_t / alpha (standard deviation of the data {std:.2g})"
    )
    if error > 2 * some.tau + LOW_NOISE_ERROR * std:
        raise Fault(
            f"{seen}: there E[x_0 | x_t] is x_t / alpha. Does the prediction (eps, x0, v, flow, edm) fit the network, "
            "and does t grow with the noise?"
        )
    return seen


def high_noise(bench: Bench) -> str:
    """With next to no signal the answer is the mean, whatever the noise."""
    teacher, (mean, std) = bench.teacher, moments(bench)
    some = bench.noised(t=teacher.schedule.t_max)
    if bench.conditional:  # one class for all
        x_0, labels = bench.data
        mean = x_0[labels == labels[0]].mean(dim=0)
        some = dataclasses.replace(some, c=bench.asking(labels[:1].expand(len(some.x_0))))
    away = (some.answer(teacher) - mean).square().mean().sqrt().item()
    seen = f"at noise level {some.tau:.3g} it is {away / std:.2g} standard deviations of the data from the mean image"
    allowed = HIGH_NOISE_ERROR + PER_TAU * (some.tau if teacher.denoiser.prediction == "eps" else 0)
    if away > allowed * std:
        raise Fault(
            f"{seen}, {allowed:.2g} is allowed: E[x_0 | x_t] tends to it. Does the prediction fit the network, and is "
            "its input scaled as it was in training?"
        )
    return seen


def better_than_the_mean(bench: Bench) -> str:
    """Its answers are nearer to the images than their mean is, and E[x_0 | f] = f, as for every E[x_0 | x_t]."""
    teacher, (mean, std) = bench.teacher, moments(bench)
    told = []
    for level in LEVELS:
        some = bench.noised(tau=level * std)
        f, where_to_look = some.answer(teacher), "do prediction, schedule and the range of the images fit the network? "
        where_to_look += "Or is this dataset not what it was trained on (dataset=)?"
        error, constant = ((g - some.x_0).square().mean().item() for g in (f, mean))
        if error > WORST * constant:
            raise Fault(
                f"at noise level {level * std:.2g} its mean squared error is {error / constant:.1f} times that of the "
                f"mean image: {where_to_look}"
            )
        slope = _slope(f - mean, some.x_0 - mean)
        if slope is not None and not 1 / STEEPEST < slope < STEEPEST:
            raise Fault(
                f"at noise level {level * std:.2g} images depart from their mean {slope:.2f} times as far as answers "
                f"do, for E[x_0 | x_t] as far: {where_to_look}"
            )
        told.append(f"{error / constant:.2f} at {level * std:.2g}" + _exact(bench, some, constant))
    return f"mean squared error over that of the mean image, by noise level: {', '.join(told)}"


def _slope(f: Tensor, x_0: Tensor) -> float | None:
    """<f, x_0> / <f, f> of departures from the mean, 1 for f = E[x_0 | x_t]; None where f hardly departs."""
    square = f.square().sum()
    return None if square < FLAT * x_0.square().sum() else ((f * x_0).sum() / square).item()


def _exact(bench: Bench, some: Noised, constant: float) -> str:
    """What the law's own denoiser has, where the law is known."""
    law = bench.dataset.law
    if law is None or tuple(law.shape) != bench.teacher.shape:
        return ""
    labels = some.c.labels if law.components == bench.conditioning.classes else None
    f = law.denoise(some.x_t, some.alpha, some.sigma, labels)
    return f" (exact {(f - some.x_0).square().mean().item() / constant:.2f})"


def classes(bench: Bench) -> str:
    """A conditional teacher hears the class, and has an answer for none, which guidance asks for."""
    teacher, count = bench.teacher, bench.conditioning.classes
    some = bench.anything(teacher, time_of(teacher.schedule, 1.0))
    assert some.c.labels is not None
    other = some.answer(teacher, c=bench.asking((some.c.labels + 1) % count))
    if count > 1 and not differ(some.answer(teacher), other):
        raise Fault("other classes give the same answer: the network must use c.labels")
    try:
        none = some.answer(teacher, c=teacher.conditioning.none(some.c))
    except UserError as error:
        return f"other classes, other answers; cannot be guided ({error})"
    except (Exception, SystemExit) as error:
        raise Fault(
            f"label {count}, which stands for no class and which guidance asks for, fails: {type(error).__name__}: "
            f"{error}. Give the embedding a row more, or raise UserError"
        ) from error
    if not none.isfinite().all():
        raise Fault(f"label {count}, which stands for no class, has an answer that is not finite")
    return "other classes, other answers; one for no class"


# --- what is made from it --------------------------------------------------------------------------------------------


def student(bench: Bench) -> str:
    """Students can be trained, start where they should, and leave the teacher as it is."""
    teacher = bench.teacher
    some = bench.anything(teacher, time_of(teacher.schedule, 1.0))
    made = teacher.student()
    if not any(weight.requires_grad for weight in made.parameters()):
        raise Fault("student() has no weights to train: give the Teacher a `start`, a Denoiser with a network of yours")
    before = some.answer(teacher)
    with torch.no_grad():
        apart = (made.eval()(some.x_t, some.t, some.c) - before).abs().max().item()
    if teacher.start is None and apart > SAME * max(1.0, before.abs().max().item()):
        raise Fault(f"a student that starts from the teacher's weights answers otherwise, by up to {apart:.2g}")
    counts = teacher.teacher_rows.rows, teacher.student_rows.rows
    _train_a_little(made, some)
    if (teacher.teacher_rows.rows - counts[0], teacher.student_rows.rows - counts[1]) != (0, FEW):
        raise Fault("evaluations of a student must be counted as the student's: leave the counters of copies alone")
    if differ(some.answer(teacher), before):
        raise Fault("training a student changes the teacher: their networks share weights. Let them be deep copies")
    text = "starts from weights of its own" if teacher.start else "starts as the teacher"
    if teacher.blank is None:
        return f"{text}; none can start fresh (no `blank`)"
    with torch.no_grad():
        shape = teacher.student(fresh=True)(some.x_t, some.t, some.c).shape
    if shape != some.x_t.shape:
        raise Fault(f"a fresh student must map {tuple(some.x_t.shape)} to itself, got {tuple(shape)}: look at `blank`")
    return f"{text}, or fresh"


def _train_a_little(made: Denoiser, some: Noised) -> None:
    """One step of gradient descent."""
    loss = made.train()(some.x_t, some.t, some.c).square().mean()
    loss.backward()
    gradients = [weight.grad for weight in made.parameters() if weight.grad is not None]
    if not any(gradient.abs().max() > 0 for gradient in gradients):
        raise Fault("no gradient reaches the weights of a student: is the network evaluated under torch.no_grad()?")
    with torch.no_grad():
        for weight in made.parameters():
            if weight.grad is not None:
                weight.add_(weight.grad.sign(), alpha=0.01)


def embedding(bench: Bench) -> str:
    """A student can be told more than the time: an embedding that is added to that of time."""
    network: nn.Module = bench.teacher.student().network
    channels = getattr(network, "embedding_channels", None)
    if type(channels) is not int or channels <= 0:
        raise Fault(
            "the students' network must say how wide an embedding it takes beside that of time (embedding_channels, "
            f"a positive whole number), got {channels!r}"
        )
    made = bench.teacher.student().eval()
    _stir(made)
    some = bench.anything(bench.teacher, time_of(bench.teacher.schedule, 1.0))
    with torch.no_grad():
        none, zero, other = (made(some.x_t, some.t, some.c, e) for e in (None, *_embeddings(channels)))
    if (none - zero).abs().max().item() > SAME * max(1.0, none.abs().max().item()):
        raise Fault("an embedding of zeros must change nothing: add it to the network's embedding of time")
    if not differ(none, other):
        raise Fault("the network does not use the embedding that it is given: add it to its embedding of time")
    return f"{channels} channels beside the time's"


def _stir(made: Denoiser) -> None:
    """Move all weights a little: networks often start with layers of zeros, which nothing gets through."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)


def _embeddings(channels: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(FEW, channels), torch.randn(FEW, channels, generator=torch.Generator().manual_seed(3))


def other_schedule(bench: Bench) -> str:
    """Read on another schedule, at equal signal-to-noise ratio, it answers alike."""
    teacher = bench.teacher
    other: NoiseSchedule = VE() if isinstance(teacher.schedule, VPCosine) else VPCosine()
    twin = teacher.on(other)
    some = bench.anything(teacher, time_of(teacher.schedule, 1.0))
    t = twin.schedule.t_of_lam(teacher.schedule.lam(some.t))
    with torch.no_grad():
        f = twin.denoise(some.x_t / some.alpha * twin.schedule.alpha(t), t, some.c)
    error = (f - some.answer(teacher)).abs().max().item()
    if error > SAME * max(1.0, f.abs().max().item()):
        raise Fault(
            f"on {type(other).__name__} at equal signal-to-noise ratio answers differ by up to {error:.2g}: a Denoiser "
            "must read x_t and t on self.native, and say its own schedule truly"
        )
    return f"the same on {type(other).__name__}"


def decodes(bench: Bench) -> str:
    """Latents become images of the dataset's shape, in their range."""
    teacher = bench.teacher
    if teacher.decode is None:
        raise NotApplicable("it works on pixels")
    z = bench.anything(teacher, teacher.schedule.t_min).x_0
    with torch.no_grad():
        x_0 = teacher.decode(z)
    if tuple(x_0.shape) != (FEW, *teacher.image_shape):
        raise Fault(f"decode must give (B,C,H,W) = {(FEW, *teacher.image_shape)}, got {tuple(x_0.shape)}")
    if not x_0.isfinite().all():
        raise Fault("decode gives images that are not finite")
    if teacher.to_latents is None:
        return "images of the right shape; real images cannot be encoded"
    real = to_float(bench.dataset.read(torch.arange(min(FEW, len(bench.dataset)))))
    with torch.no_grad():
        error = (teacher.decode(teacher.to_latents(real)) - real).square().mean().sqrt().item()
    std = real.std().item()
    if error > std:
        raise Fault(
            f"real images that are encoded and decoded are off by {error:.2g} (root mean square), more than their "
            f"standard deviation {std:.2g}: images lie in [-1, 1], and latents are scaled in both directions"
        )
    return f"encoded and decoded, real images are off by {error:.2g}"


# --- the suite -------------------------------------------------------------------------------------------------------


@contextmanager
def benches(
    cls: type[TeacherSource], config: TeacherConfig | None, law_images: int, dataset: Dataset | None
) -> Iterator[list[Bench]]:
    """Without classes, and with those of the dataset where it has some."""
    dataset = dataset or TinyImages(TinyImages.Config())
    asked = {"unconditional": WITHOUT_CLASSES}
    if dataset.classes:
        asked["classes"] = Conditioning(dataset.classes)
    with tempfile.TemporaryDirectory() as folder:
        yield [Bench(label, cls, config, dataset, conditioning, Path(folder)) for label, conditioning in asked.items()]


CHECKS = [
    Check(declared, benches="first"),
    Check(builds, ("declared",), must_apply=True),
    Check(untrained, ("builds",)),
    Check(loads, ("untrained",)),
    Check(frozen, ("loads",)),
    Check(denoises, ("loads",)),
    Check(batch_independent, ("denoises",)),
    Check(counted, ("denoises",)),
    Check(low_noise, ("denoises",)),
    Check(high_noise, ("denoises",)),
    Check(better_than_the_mean, ("low_noise", "high_noise")),
    Check(classes, ("denoises",), "conditional"),
    Check(student, ("frozen", "denoises")),
    Check(embedding, ("student",)),
    Check(other_schedule, ("denoises",)),
    Check(decodes, ("loads",)),
]
