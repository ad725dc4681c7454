"""Checks of a method's whole training: it learns, is reproducible and resumable, and costs what the plan estimates.

Each check uses short trainings on a bench, by the harness's own loop. The list of all checks of methods, with what each
of them needs, is ``CHECKS`` in :mod:`distillbench.testing.methods`.
"""

from __future__ import annotations

from itertools import pairwise

from distillbench.testing.checks import Doubt, Fault, NotApplicable, where
from distillbench.testing.method_bench import (
    IMAGES,
    WALKED_PHASES,
    MethodBench,
    attributes_of,
    calls_of,
    changed,
    rows_of,
    teachers_network,
    weights_of,
)

PRICE_ERROR = 0.02  # relative
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
    """A step computed in two parts has the gradient of the whole step. If not, this is reported as a doubt."""
    whole, halves = bench.first_gradient(1), bench.first_gradient(2)
    error = (whole - halves).norm().item() / max(whole.norm().item(), 1e-12)
    if error > GRADIENT_ROUNDING[bench.computed.precision]:
        return Doubt(
            f"in two parts a step has another gradient (relative difference {error:.2g}): the loss is not a mean over "
            "the images, or random numbers are not drawn from the batch. Accumulation and several GPUs then train "
            "another loss"
        )
    return "a step in two parts, as with accumulate or two GPUs, has the gradient of the whole step"


def price(bench: MethodBench) -> str:
    """Training costs the evaluations that a plan estimates from one step of each phase."""
    stages = bench.method().phases()
    if len(stages) > WALKED_PHASES:
        raise NotApplicable(f"it has more than {WALKED_PHASES} phases")
    prepared, before, rows = 0, 0, [0] * len(stages)
    for moment in bench.walk():
        if moment.what == "begin":
            before = rows_of(moment.method)
            prepared = prepared if moment.phase else before
        if moment.what == "stepped":
            rows[moment.phase] = rows_of(moment.method) - before
    batches, total = bench.run.images / IMAGES, sum(stage.share for stage in stages)
    estimated = prepared + sum(stage.share / total * batches * r for stage, r in zip(stages, rows, strict=True))
    rounding = sum(abs(a - b) for a, b in pairwise(rows))  # a phase ends with a whole step
    made = bench.run.evaluations
    if abs(made - estimated) > PRICE_ERROR * estimated + rounding:
        raise Fault(
            f"a plan estimates {estimated:,.0f} evaluations from one step of each phase, training made {made:,}: "
            "let all steps of a phase cost the same, and declare a phase where the cost changes"
        )
    return f"{estimated:,.0f} evaluations estimated, {made:,} made"


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
