"""The conformance suite for teachers, on a dataset.

Each check tests one promise of :mod:`distillbench.teachers.teacher`.
``CHECKS`` at the end lists all checks with the checks that each of them needs. Those of how a teacher denoises are in
:mod:`distillbench.testing.teachers_denoising`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from distillbench.datasets.dataset import Dataset, to_float
from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Conditioning
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import VE, NoiseSchedule, VPCosine
from distillbench.errors import UserError
from distillbench.teachers.teacher import Teacher, TeacherConfig, TeacherPlan, TeacherSource
from distillbench.testing.checks import (
    Check,
    Fault,
    NotApplicable,
    check_declared,
    differ,
    seed_global_generators,
    settings_with_help,
)
from distillbench.testing.datasets import DIGEST
from distillbench.testing.teacher_bench import FEW, Noised, TeacherBench, TinyImages, time_of
from distillbench.testing.teachers_denoising import (
    SAME,
    batch_independent,
    better_than_the_mean,
    classes,
    counted,
    denoises,
    high_noise,
    low_noise,
)

# --- loading ---------------------------------------------------------------------------------------------------------


def declared(bench: TeacherBench) -> str:
    """The registry accepts the class, and every setting has a help text."""
    check_declared("teachers", bench.cls)
    if bench.cls.reads not in ("classes", "texts"):
        raise Fault(f"reads must be classes or texts, got {bench.cls.reads!r}")
    count = settings_with_help(bench.cls.Config)
    bench.config()
    return f"is conditioned on {bench.cls.reads}, {count} settings with help"


def builds(bench: TeacherBench) -> str:
    """plan() writes nothing. A UserError is a refusal: of a missing file, or of the requested conditioning."""
    before = sorted(bench.cache.rglob("*"))
    try:
        plan = bench.source().plan()
    except UserError as error:
        raise NotApplicable(f"refused ({error})") from error
    if not isinstance(plan, TeacherPlan) or not plan.origin:
        raise Fault(f"plan() must return a TeacherPlan that says where the teacher comes from, got {plan!r}")
    if sorted(bench.cache.rglob("*")) != before:
        raise Fault(
            "plan() writes into the cache: it is called before a run, and must only read. Write files in load()"
        )
    return plan.origin + (f", trained on {plan.images:,} images first" if plan.images else "")


def untrained(bench: TeacherBench) -> str:
    """The teacher that the cost of a run is estimated with has the right shapes."""
    teacher = bench.source().untrained()
    if not isinstance(teacher, Teacher):
        raise Fault(f"untrained() must return a Teacher, got {type(teacher).__name__}")
    _check_shapes(bench, teacher.conditioned(bench.conditioning), "untrained()")
    return f"maps {'x'.join(map(str, teacher.shape))} to itself"


def loads(bench: TeacherBench) -> str:
    """Loading gives the same teacher each time, with its own sha256."""
    seed_global_generators(0)
    first = bench.teacher
    if not isinstance(first, Teacher):
        raise Fault(f"load() must return a Teacher, got {type(first).__name__}")
    _check_shapes(bench, first, "load()")
    seed_global_generators(1)
    second = bench.load()
    if not isinstance(first.sha256, str) or not DIGEST.fullmatch(first.sha256):
        raise Fault(f"sha256 must be a hash of the weights and how they are read, got {first.sha256!r}")
    if first.sha256 != second.sha256:
        raise Fault("loaded twice, its sha256 differs: results of one would never be found for the other")
    if first.sha256 == bench.source().untrained().sha256:
        raise Fault('untrained() has the sha256 of the loaded teacher: let it be "untrained"')
    outputs = [bench.random_images(one, time_of(one.schedule, 1.0)).denoised(one) for one in (first, second)]
    if differ(*outputs):
        raise Fault(
            "loaded twice from the same settings, it gives other outputs: weights must come from a file, or from a "
            "seed of the settings"
        )
    if tuple(first.image_shape) != tuple(bench.dataset.shape):
        raise Fault(
            f"its images are {tuple(first.image_shape)}, the dataset's are {tuple(bench.dataset.shape)}: raise "
            "UserError in plan() if the two do not match"
        )
    if first.conditioning.classes != bench.conditioning.classes:
        raise Fault(
            f"{bench.conditioning.classes or 'no'} classes were requested, it has "
            f"{first.conditioning.classes or 'none'}: give the Teacher Conditioning(self.conditioning.classes), or "
            "raise UserError in plan()"
        )
    return f"{first.label}, the same each time"


def _check_shapes(bench: TeacherBench, teacher: Teacher, made_by: str) -> None:
    noised = bench.random_images(teacher, time_of(teacher.schedule, 1.0))
    f = noised.denoised(teacher)
    if f.shape != noised.x_t.shape:
        raise Fault(
            f"the denoiser of {made_by} must map (B,C,H,W) = {tuple(noised.x_t.shape)} to itself, got {tuple(f.shape)}"
        )
    if f.dtype != noised.x_t.dtype:
        raise Fault(f"the denoiser of {made_by} must return {noised.x_t.dtype} like x_t, got {f.dtype}")


def frozen(bench: TeacherBench) -> str:
    """It is in evaluation mode, and gradients flow to x_t. (A Teacher makes its weights take no gradient itself.)"""
    teacher = bench.teacher
    if any(part.training for part in teacher.denoiser.modules()):
        raise Fault("the network stays in training mode after eval(): its train(mode) must set the given mode")
    noised = bench.random_images(teacher, time_of(teacher.schedule, 1.0))
    x_t = noised.x_t.clone().requires_grad_(True)
    f = teacher.denoise(x_t, noised.t, noised.c)
    if not f.requires_grad:
        raise Fault("no gradient flows from its output to x_t: is the network evaluated under torch.no_grad()?")
    return "no gradient to its weights, gradients to x_t"


# --- students and latents --------------------------------------------------------------------------------------------


def student(bench: TeacherBench) -> str:
    """Students can be trained, start at the teacher's weights or at `start`, and share no weights with the teacher."""
    teacher = bench.teacher
    noised = bench.random_images(teacher, time_of(teacher.schedule, 1.0))
    trained = teacher.student()
    if not any(weight.requires_grad for weight in trained.parameters()):
        raise Fault("student() has no weights to train: give the Teacher a `start`, a Denoiser with your own network")
    before = noised.denoised(teacher)
    with torch.no_grad():
        error = (trained.eval()(noised.x_t, noised.t, noised.c) - before).abs().max().item()
    if teacher.start is None and error > SAME * max(1.0, before.abs().max().item()):
        raise Fault(f"a student with the teacher's weights gives other outputs, by up to {error:.2g}")
    counts = teacher.teacher_rows.rows, teacher.student_rows.rows
    _train_a_little(trained, noised)
    if (teacher.teacher_rows.rows - counts[0], teacher.student_rows.rows - counts[1]) != (0, FEW):
        raise Fault("evaluations of a student must be counted as the student's: leave the counters of copies alone")
    if differ(noised.denoised(teacher), before):
        raise Fault("training a student changes the teacher: their networks share weights. Make deep copies")
    text = "starts from its own weights" if teacher.start else "starts as the teacher"
    if teacher.blank is None:
        return f"{text}; no random initialization (no `blank`)"
    with torch.no_grad():
        shape = teacher.student(fresh=True)(noised.x_t, noised.t, noised.c).shape
    if shape != noised.x_t.shape:
        raise Fault(f"a student from `blank` must map {tuple(noised.x_t.shape)} to itself, got {tuple(shape)}")
    return f"{text}, or randomly initialized"


def _train_a_little(trained: Denoiser, noised: Noised) -> None:
    """One step of gradient descent."""
    loss = trained.train()(noised.x_t, noised.t, noised.c).square().mean()
    loss.backward()
    gradients = [weight.grad for weight in trained.parameters() if weight.grad is not None]
    if not any(gradient.abs().max() > 0 for gradient in gradients):
        raise Fault("no gradient reaches the weights of a student: is the network evaluated under torch.no_grad()?")
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.grad is not None:
                weight.add_(weight.grad.sign(), alpha=0.01)


def embedding(bench: TeacherBench) -> str:
    """A student accepts an embedding that is added to the embedding of time."""
    network: nn.Module = bench.teacher.student().network
    channels = getattr(network, "embedding_channels", None)
    if type(channels) is not int or channels <= 0:
        raise Fault(
            "the students' network must declare the width of its embedding of time (embedding_channels, a positive "
            f"integer), got {channels!r}"
        )
    denoiser = bench.teacher.student().eval()
    _perturb(denoiser)
    noised = bench.random_images(bench.teacher, time_of(bench.teacher.schedule, 1.0))
    with torch.no_grad():
        none, zero, other = (denoiser(noised.x_t, noised.t, noised.c, e) for e in (None, *_embeddings(channels)))
    if (none - zero).abs().max().item() > SAME * max(1.0, none.abs().max().item()):
        raise Fault("an embedding of zeros must change nothing: add it to the network's embedding of time")
    if not differ(none, other):
        raise Fault("the network ignores the given embedding: add it to its embedding of time")
    return f"{channels} channels"


def _perturb(denoiser: Denoiser) -> None:
    """Add noise to all weights: networks often start with layers of zeros, whose output does not depend on anything."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in denoiser.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)


def _embeddings(channels: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(FEW, channels), torch.randn(FEW, channels, generator=torch.Generator().manual_seed(3))


def other_schedule(bench: TeacherBench) -> str:
    """On another schedule, at equal signal-to-noise ratio, it gives the same outputs."""
    teacher = bench.teacher
    other: NoiseSchedule = VE() if isinstance(teacher.schedule, VPCosine) else VPCosine()
    twin = teacher.on(other)
    noised = bench.random_images(teacher, time_of(teacher.schedule, 1.0))
    t = twin.schedule.t_of_lam(teacher.schedule.lam(noised.t))
    with torch.no_grad():
        f = twin.denoise(noised.x_t / noised.alpha * twin.schedule.alpha(t), t, noised.c)
    error = (f - noised.denoised(teacher)).abs().max().item()
    if error > SAME * max(1.0, f.abs().max().item()):
        raise Fault(
            f"on {type(other).__name__} at equal signal-to-noise ratio outputs differ by up to {error:.2g}: a Denoiser "
            "must read x_t and t on self.native, and declare its own schedule correctly"
        )
    return f"the same on {type(other).__name__}"


def decodes(bench: TeacherBench) -> str:
    """decode gives images of the dataset's shape and range."""
    teacher = bench.teacher
    if teacher.decode is None:
        raise NotApplicable("it works on pixels")
    z = bench.random_images(teacher, teacher.schedule.t_min).x_0
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
            f"encoded and decoded, real images are off by {error:.2g} (root mean square), more than their standard "
            f"deviation {std:.2g}: images lie in [-1, 1], and latents are scaled in both directions"
        )
    return f"encoded and decoded, real images are off by {error:.2g}"


# --- the suite -------------------------------------------------------------------------------------------------------


@contextmanager
def benches(
    cls: type[TeacherSource], config: TeacherConfig | None, distribution_images: int, dataset: Dataset | None
) -> Iterator[list[TeacherBench]]:
    """Without classes, and, if the dataset has classes, with them."""
    dataset = dataset or TinyImages(TinyImages.Config())
    conditionings = {"unconditional": WITHOUT_CLASSES}
    if dataset.classes:
        conditionings["classes"] = Conditioning(dataset.classes)
    with tempfile.TemporaryDirectory() as folder:
        yield [
            TeacherBench(label, cls, config, dataset, conditioning, Path(folder))
            for label, conditioning in conditionings.items()
        ]


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
