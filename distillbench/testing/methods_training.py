"""Checks of a method's whole training: it learns, is reproducible and resumable, and costs what the plan estimates.

Each check uses short trainings on a bench, by the harness's own loop. The list of all checks of methods, with what each
of them needs, is ``CHECKS`` in :mod:`distillbench.testing.methods`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean, variance

from distillbench.testing.checks import Doubt, Fault, NotApplicable, where
from distillbench.testing.method_bench import (
    WALKED_PHASES,
    MethodBench,
    attributes_of,
    calls_of,
    changed,
    rows_of,
    teachers_network,
    weights_of,
)

COST_ERROR = 0.02  # relative
COST_DEVIATIONS = 4  # standard deviations by which random costs may differ from their estimate
GRADIENT_ROUNDING = {"fp32": 1e-3, "bf16": 3e-2}  # relative: sums in another order, by precision


def trains(bench: MethodBench) -> str:
    """Training runs to its end, and the student's weights change."""
    start, run = bench.method(), bench.run
    if not changed(weights_of(start.student), weights_of(run.method.student)):
        raise Fault("after training the student has the weights that it started with")
    return f"{run.images} images through all phases"


def randomness(bench: MethodBench) -> str:
    """Random numbers come from the batch or a generator of the method, never from a global one."""
    if bench.run.disturbed:
        raise Fault(
            f"training draws from the global generator of {' and '.join(bench.run.disturbed)}: use batch.noise(), "
            ".uniform() and .integers(), or a torch.Generator with the seed workspace.seed"
        )
    return "no global generator is used"


def deterministic(bench: MethodBench) -> str:
    """A seed gives bit-identical weights, whatever the state of the global generators; another seed gives others."""
    first, again, other = (weights_of(run.method) for run in (bench.run, bench.train(0, 1), bench.train(1)))
    different = changed(first, again)
    if different:
        raise Fault(
            f"two trainings from one seed differ ({attributes_of(different)}): something is random, or stored, outside "
            "the batch and the workspace"
        )
    if not changed(first, other):
        raise Fault("two seeds give the same weights: nothing that is drawn from the batch has an effect")
    return "the same seed, the same weights; another seed, others"


def resumes(bench: MethodBench) -> str:
    """A training that is interrupted and resumed by a new object ends with the same weights."""
    expected = weights_of(bench.run.method)
    for after in sorted({1, bench.steps() - 1}):
        interrupted = f"interrupted after {after} of {bench.steps()} steps"
        try:
            found = weights_of(bench.train_interrupted(after))
        except (Exception, SystemExit) as error:
            raise Fault(
                f"{interrupted} it cannot be resumed: {where(error, bench.cls)}. Keep what later steps need in "
                "networks and buffers, or set it in prepare or start_phase"
            ) from error
        different = changed(expected, found)
        if different:
            raise Fault(
                f"{interrupted} and resumed, it ends with other weights ({attributes_of(different)}): keep what later "
                "steps depend on in networks, buffers (register_buffer) or a torch.Generator that is an attribute"
            )
    return "interrupted and resumed, it ends with the same weights"


def parts(bench: MethodBench) -> str:
    """Steps computed in two parts have the gradient of the whole steps. If not, this is reported as a doubt."""
    whole, halves = bench.first_gradient(1), bench.first_gradient(2)
    error = (whole - halves).norm().item() / max(whole.norm().item(), 1e-12)
    if error > GRADIENT_ROUNDING[bench.computed.precision]:
        return Doubt(
            f"in two parts a step has another gradient (relative difference {error:.2g}): the loss is not a mean over "
            "the images, or random numbers are not drawn from the batch. Accumulation and several GPUs then train "
            "another loss"
        )
    return "a step in two parts, as with microbatch or two GPUs, has the gradient of the whole step"


def cost(bench: MethodBench) -> str:
    """Training costs the evaluations that a plan estimates from the steps of a cycle of each phase."""
    stages = bench.method().phases()
    if len(stages) > WALKED_PHASES:
        raise NotApplicable(f"it has more than {WALKED_PHASES} phases")
    once, before, last = 0, 0, 0  # evaluations outside of steps
    rows: list[list[int]] = [[] for _ in stages]  # by phase, of each of its steps
    for event in bench.walk(cost_only=True):
        if event.what == "begin":
            before = rows_of(event.method)
            once += 0 if event.batch.step else before - last  # prepare, prepare_phase and the end of the phase before
        if event.what == "stepped":
            last = rows_of(event.method)
            rows[event.phase].append(last - before)
    once += rows_of(event.method) - last
    steps = [stage.share / sum(each.share for each in stages) * bench.run.images / bench.images for stage in stages]
    means = [fmean(of_phase) for of_phase in rows]
    estimated = once + sum(count * mean for count, mean in zip(steps, means, strict=True))
    rounding = sum(abs(a - b) for a, b in pairwise(means))  # a phase ends with a whole step
    spread = 0.0
    for stage, count, of_phase in zip(stages, steps, rows, strict=True):
        if stage.cost_varies:
            spread += _variance(of_phase, stage.cycle, count)
        else:  # a phase may end within a cycle
            rounding += max(abs(sum(of_phase[:k]) - k * fmean(of_phase)) for k in range(stage.cycle))
    made = bench.run.evaluations
    allowed = COST_ERROR * estimated + rounding + COST_DEVIATIONS * math.sqrt(spread)
    if abs(made - estimated) > allowed:
        raise Fault(
            f"a plan estimates {estimated:,.0f} evaluations from the steps of a cycle of each phase, training made "
            f"{made:,}: let all cycles of a phase cost the same (Phase.cycle is the number of steps after which the "
            "cost repeats), and declare a phase where the cost changes, or Phase(cost_varies=True) if it is random"
        )
    about = f" (random, so {allowed:,.0f} more or fewer are allowed)" if spread else ""
    return f"{estimated:,.0f} evaluations estimated, {made:,} made{about}"


def _variance(rows: list[int], cycle: int, steps: float) -> float:
    """The variance of what `steps` steps cost minus the estimate from the n cycles of `rows`, all drawn independently.

    Let s^2 be the variance of a cycle's cost and m = steps / cycle. The costs of m cycles have the variance m s^2, and
    m times the mean of n has m^2 s^2 / n.
    """
    cycles = [sum(rows[first : first + cycle]) for first in range(0, len(rows), cycle)]
    m = steps / cycle
    return variance(cycles) * (m + m**2 / len(cycles))


def average(bench: MethodBench) -> str:
    """Samples come from the averaged weights."""
    method = bench.run.method
    averages = [weights for phase in bench.run.averages for weights in phase]
    for n in bench.nfe():
        before = len(calls_of(method))
        bench.sample(n)
        used = {call.network for call in calls_of(method)[before:]} - {teachers_network(method)}
        if not used:
            raise Fault(f"at NFE {n} only the teacher is evaluated: sample from self.student")
        if any(all(changed(weights_of(network), weights) for weights in averages) for network in used):
            raise Fault(
                f"at NFE {n} samples come from weights that are no phase's average: sample from self.student, or from "
                "copies that end_phase fills from `average`"
            )
    return "samples come from averaged weights"
