"""Checks of how a teacher denoises: finite, image by image, counted once, and close to E[x_0 | x_t].

The list of all checks of teachers, with what each of them needs, is ``CHECKS`` in
:mod:`distillbench.testing.teachers`.

| symbol       | meaning                                                        | shape             |
|--------------|----------------------------------------------------------------|-------------------|
| x_0          | real images, or their latents                                  | (B,C,H,W)         |
| x_t          | alpha x_0 + sigma eps                                          | (B,C,H,W)         |
| t            | time                                                           | (B,1,1,1) float64 |
| tau          | noise level sigma / alpha                                      | (B,1,1,1) float64 |
| f            | denoiser, E[x_0 given x_t, c]                                  | (B,C,H,W)         |
| c            | condition: classes                                             | of a batch        |
| MSE          | mean squared error of f                                        | float             |
| MSE(mean)    | that of the mean image, the best constant: variance            | float             |
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.testing.checks import Fault, differ
from distillbench.testing.teacher_bench import FEW, Noised, TeacherBench, moments, time_of

LEVELS = (0.3, 1.0, 3.0)  # tau / standard deviation of the data
WORST = 1.5  # times MSE(mean): a network with the wrong parameterisation is far above, a poor one below
LOW_NOISE_ERROR = 0.25  # standard deviations of the data, beside 2 tau
HIGH_NOISE_ERROR, PER_TAU = 1.0, 0.05  # standard deviations; a network that predicts eps errs by sigma / alpha more
STEEPEST, FLAT = 1.25, 0.25  # slope of x_0 over f; share of the variance below which the slope is not tested
SAME = 1e-3  # relative to the largest value: float32 in batches of another size, or on another schedule


def denoises(bench: TeacherBench) -> str:
    """f is finite at every noise level and the same each time, and x_t is not changed."""
    teacher = bench.teacher
    schedule = teacher.schedule
    for t in (schedule.t_min, time_of(schedule, 1.0), schedule.t_max):
        noised = bench.random_images(teacher, t)
        given = noised.x_t.clone()
        f = noised.denoised(teacher)
        if not f.isfinite().all():
            raise Fault(f"at t = {t:g} outputs are not finite: t_min = {schedule.t_min:g}, t_max = {schedule.t_max:g}")
        if differ(given, noised.x_t):
            raise Fault("the denoiser changes x_t in place: copy it first")
        if differ(f, noised.denoised(teacher)):
            raise Fault(f"at t = {t:g} the same x_t gives two outputs: is dropout active, or is noise added?")
    ends = schedule.noise_level(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)).tolist()
    return f"finite from noise level {ends[0]:.3g} to {ends[1]:.3g}"


def batch_independent(bench: TeacherBench) -> str:
    """The output for an image does not depend on the others in its batch."""
    teacher = bench.teacher
    noised = bench.random_images(teacher, time_of(teacher.schedule, 1.0))
    whole = noised.denoised(teacher)
    parts = torch.cat([noised.denoised(teacher, slice(k, k + 1)) for k in range(FEW)])
    error = (whole - parts).abs().max().item()
    if error > SAME * max(1.0, whole.abs().max().item()):
        raise Fault(
            f"outputs change by up to {error:.2g} with the other images of the batch: compute nothing over the batch"
        )
    return "the same in a batch of another size"


def counted(bench: TeacherBench) -> str:
    """Every evaluation of its network is counted, once per image."""
    teacher = bench.teacher
    noised = bench.random_images(teacher, time_of(teacher.schedule, 1.0))
    seen: list[int] = []
    hook = teacher.denoiser.network.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    before = teacher.teacher_rows.rows
    try:
        noised.denoised(teacher)
    finally:
        hook.remove()
    rows = teacher.teacher_rows.rows - before
    if rows != FEW or sum(seen) != rows:
        raise Fault(
            f"denoising {FEW} images evaluates the network on {sum(seen)} and counts {rows}: a Denoiser must call "
            "self.counted(x, time, embedding, c) once, and never self.network"
        )
    return "one evaluation per image"


def low_noise(bench: TeacherBench) -> str:
    """At the lowest noise level f is close to x_t / alpha."""
    teacher, (_, std) = bench.teacher, moments(bench)
    noised = bench.noised(t=teacher.schedule.t_min)
    error = (noised.denoised(teacher) - noised.x_t / noised.alpha).square().mean().sqrt().item()
    seen = (
        f"at noise level {noised.tau:.2g} it is {error:.2g} from x_t / alpha (standard deviation of the data {std:.2g})"
    )
    if error > 2 * noised.tau + LOW_NOISE_ERROR * std:
        raise Fault(
            f"{seen}: there E[x_0 | x_t] is x_t / alpha. Does the prediction (eps, x0, v, flow, edm) fit the network, "
            "and does t grow with the noise?"
        )
    return seen


def high_noise(bench: TeacherBench) -> str:
    """At the highest noise level f is close to the mean image."""
    teacher, (mean, std) = bench.teacher, moments(bench)
    noised = bench.noised(t=teacher.schedule.t_max)
    if bench.conditional:  # one class for all
        x_0, labels = bench.data
        mean = x_0[labels == labels[0]].mean(dim=0)
        noised = dataclasses.replace(noised, c=bench.condition(labels[:1].expand(len(noised.x_0))))
    away = (noised.denoised(teacher) - mean).square().mean().sqrt().item()
    seen = f"at noise level {noised.tau:.3g} it is {away / std:.2g} standard deviations of the data from the mean image"
    allowed = HIGH_NOISE_ERROR + PER_TAU * (noised.tau if teacher.denoiser.prediction == "eps" else 0)
    if away > allowed * std:
        raise Fault(
            f"{seen}, {allowed:.2g} is allowed: E[x_0 | x_t] tends to it. Does the prediction fit the network, and is "
            "its input scaled as it was in training?"
        )
    return seen


def better_than_the_mean(bench: TeacherBench) -> str:
    """MSE is below MSE(mean) (or not far above), and E[x_0 | f] = f, as for every E[x_0 | x_t]."""
    teacher, (mean, std) = bench.teacher, moments(bench)
    results = []
    for level in LEVELS:
        noised = bench.noised(tau=level * std)
        f, causes = noised.denoised(teacher), "do prediction, schedule and the range of the images fit the network? "
        causes += "Or was it trained on another dataset (dataset=)?"
        error, constant = ((g - noised.x_0).square().mean().item() for g in (f, mean))
        if error > WORST * constant:
            raise Fault(
                f"at noise level {level * std:.2g} its mean squared error is {error / constant:.1f} times that of the "
                f"mean image: {causes}"
            )
        slope = _slope(f - mean, noised.x_0 - mean)
        if slope is not None and not 1 / STEEPEST < slope < STEEPEST:
            raise Fault(
                f"at noise level {level * std:.2g} images are {slope:.2f} times as far from their mean as its "
                f"outputs are, for E[x_0 | x_t] as far: {causes}"
            )
        results.append(f"{error / constant:.2f} at {level * std:.2g}" + _exact(bench, noised, constant))
    return f"mean squared error over that of the mean image, by noise level: {', '.join(results)}"


def _slope(f: Tensor, x_0: Tensor) -> float | None:
    """<f, x_0> / <f, f> of differences from the mean, 1 for f = E[x_0 | x_t]; None if f is close to the mean."""
    square = f.square().sum()
    return None if square < FLAT * x_0.square().sum() else ((f * x_0).sum() / square).item()


def _exact(bench: TeacherBench, noised: Noised, constant: float) -> str:
    """The same figure of the exact denoiser, if the distribution of the dataset is known."""
    distribution = bench.dataset.distribution
    if distribution is None or tuple(distribution.shape) != bench.teacher.shape:
        return ""
    labels = noised.c.labels if distribution.components == bench.conditioning.classes else None
    f = distribution.denoise(noised.x_t, noised.alpha, noised.sigma, labels)
    return f" (exact {(f - noised.x_0).square().mean().item() / constant:.2f})"


def classes(bench: TeacherBench) -> str:
    """A conditional teacher uses the class, and accepts the label that stands for no class, which guidance needs."""
    teacher, count = bench.teacher, bench.conditioning.classes
    noised = bench.random_images(teacher, time_of(teacher.schedule, 1.0))
    assert noised.c.labels is not None
    other = noised.denoised(teacher, c=bench.condition((noised.c.labels + 1) % count))
    if count > 1 and not differ(noised.denoised(teacher), other):
        raise Fault("other classes give the same output: the network must use c.labels")
    try:
        none = noised.denoised(teacher, c=teacher.conditioning.none(noised.c))
    except UserError as error:
        return f"other classes give other outputs; it cannot be guided ({error})"
    except (Exception, SystemExit) as error:
        raise Fault(
            f"label {count}, which stands for no class and which guidance needs, fails: {type(error).__name__}: "
            f"{error}. Give the embedding one more row, or raise UserError"
        ) from error
    if not none.isfinite().all():
        raise Fault(f"label {count}, which stands for no class, gives an output that is not finite")
    return "other classes give other outputs; label for no class accepted"
