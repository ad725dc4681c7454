"""The checks of methods: each holds one promise of :mod:`distillbench.method` against a method on a bench.

A check returns what it saw where the promise is kept, raises Fault where it is not, and NotApplicable where there is
nothing to look at. It knows nothing of the other checks; which it builds on is written in ``CHECKS``.

| symbol | meaning                                                                       | shape        |
|--------|-------------------------------------------------------------------------------|--------------|
| x_0    | samples                                                                       | (B,C,H,W)    |
| n      | network evaluations for one image                                             | int          |
| F, F_N | distribution function of the exact law, and of N samples                      | (N,) float64 |
| KS     | Kolmogorov-Smirnov distance, sup of |F_N - F|                                 | float        |
| RMSE   | root mean square distance to the exact map, in standard deviations of the law | float        |
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from distillbench.budget import BudgetConfig
from distillbench.checking import (
    Check,
    Doubt,
    Fault,
    NotApplicable,
    check_declared,
    differ,
    settings_with_help,
    some,
    where,
)
from distillbench.conditions import UNCONDITIONAL, Condition
from distillbench.conformance_device import device
from distillbench.datasets import Dataset
from distillbench.errors import UserError
from distillbench.method import Method, MethodConfig, Phase
from distillbench.noise import Noise, stream_key
from distillbench.samplers import Solver, time_like, x_at_t_max
from distillbench.testbench import (
    CLASSES,
    CONDITIONINGS,
    IMAGES,
    MOST_NFE,
    SHAPE,
    SILENT,
    USUAL_NFE,
    WALKED_PHASES,
    Bench,
    Call,
    WatchedBatch,
    WatchedNoise,
    calls_of,
    changed,
    draws,
    exact_law,
    exact_teacher,
    logged,
    rows_of,
    teachers_network,
    weights_of,
    workspace_of,
)
from distillbench.train import Loop, train

PRICE_ERROR = 0.02  # relative
SAME_IMAGE = 1e-4  # relative to the largest value: float32 in batches of another size
LAW_BATCH, LAW_SAMPLES = 128, 4000
LAW_ROWS = 3  # numbers of evaluations that are judged
LARGEST_RMSE = 0.5  # the mean as the only answer has 1, a sample that answers another noise about 1.4
LARGEST_KS = 0.15
LARGEST_STD_ERROR = 0.25  # relative


# --- what is declared ------------------------------------------------------------------------------------------------


def declared(bench: Bench) -> str:
    """The class is one that the registry takes, and every setting says what it is."""
    check_declared("methods", bench.cls)
    if not bench.cls.paper.strip():
        raise Fault("paper is empty: name authors, year and arXiv number, or say that there is none")
    count = settings_with_help(bench.cls.Config)
    bench.config()
    return f"{'needs real images' if bench.cls.needs_data else 'data-free'}, {count} settings with help"


def builds(bench: Bench) -> str:
    """It is built on a teacher. A UserError is a refusal, which is its right."""
    try:
        method = bench.method()
    except UserError as error:
        raise NotApplicable(f"refused ({error})") from error
    if "student" not in dict(method.named_children()):
        raise Fault("self.student is not a network: call super().__init__(config, teacher)")
    return "a student is built"


def phases(bench: Bench) -> str:
    """The stages of training are a list of phases with positive shares."""
    found = bench.method().phases()
    if not isinstance(found, list) or not found or not all(isinstance(phase, Phase) for phase in found):
        raise Fault(f"phases() must return a list of Phase, at least one, got {found!r}")
    for phase in found:
        if not phase.share > 0:
            raise Fault(f"every phase needs a positive share of the budget, got {phase}")
    return f"{len(found)}: {_first([phase.label for phase in found])}"


# --- one step --------------------------------------------------------------------------------------------------------


def data(bench: Bench) -> str:
    """Real images are read by those who declare it, and by nobody else."""
    batches: list[WatchedBatch] = []
    finished = False
    try:
        for moment in bench.walk():
            batches.append(moment.batch)
        finished = True
    except (Exception, SystemExit):  # whatever it was, another check tells
        pass
    asked = any(batch.asked for batch in batches)
    if asked and not bench.cls.needs_data:
        raise Fault("it declares needs_data = False and asks for real images (batch.x_0): declare needs_data = True")
    if finished and bench.cls.needs_data and not asked:
        raise Fault("it declares needs_data = True and no step reads batch.x_0: declare needs_data = False")
    if not finished and not asked:
        raise NotApplicable("the first step stops before it is over")
    return "real images are read, as declared" if asked else "no real image is read, as declared"


def steps(bench: Bench) -> str:
    """A step of each phase runs and yields networks with their losses, the student among them."""
    trained: set[nn.Module] = set()
    student = False
    for moment in bench.walk():
        if moment.what == "yielded":
            network = _well_formed(moment.item)
            trained.add(network)
            student = student or network is moment.method.student
        if moment.what == "updated" and all(weight.grad is None for weight in network.parameters()):
            raise Fault(
                f"the loss that is yielded with {_name(network, moment.method)} does not depend on its weights: is it "
                "evaluated under torch.no_grad(), or its output detached?"
            )
    if not trained:
        raise Fault("train_step yields nothing, so nothing is trained: yield (network, loss) for each update")
    if not student:
        raise Fault("self.student is never yielded, and it is what is averaged and sampled: yield (self.student, loss)")
    return f"networks with their losses are yielded ({len(trained)} trained)"


def _well_formed(item: Any) -> nn.Module:
    """The network of what train_step yielded."""
    if not (isinstance(item, tuple) and len(item) == 2):
        raise Fault(f"train_step must yield pairs (network, loss), got {type(item).__name__}")
    network, loss = item
    if not isinstance(network, nn.Module) or not isinstance(loss, Tensor):
        raise Fault(f"train_step must yield (module, tensor), got ({type(network).__name__}, {type(loss).__name__})")
    if not any(weight.requires_grad for weight in network.parameters()):
        raise Fault(f"train_step yields a {type(network).__name__} without weights to train: they are frozen, or none")
    if loss.ndim:
        raise Fault(f"a loss must be one number, got shape {tuple(loss.shape)}: take its mean")
    if not loss.requires_grad:
        raise Fault("a loss has no gradient: was it computed under torch.no_grad(), or detached?")
    return network


def condition(bench: Bench) -> str:
    """Every network is told the class, and a guided teacher is asked for its guidance."""
    try:
        moments = list(bench.walk())
    except Fault:
        raise
    except (Exception, SystemExit) as error:
        raise Fault(f"a step fails where there are classes: {where(error, bench.cls)}") from error
    method = moments[-1].method
    network = teachers_network(method)
    taught = [call.labels for call in calls_of(method) if call.network is network and call.labels is not None]
    if bench.conditioning.guided and taught and not any((labels == CLASSES).any() for labels in taught):
        raise Fault("the teacher is evaluated without its guidance: ask self.teacher.denoise(x_t, t, c)")
    return "every network is told the class, a guided teacher with guidance"


ROUNDING = 1e-3  # of a gradient, from the order in which float32 numbers are added


def losses(bench: Bench) -> str:
    """Losses are finite."""
    seen: list[float] = []
    for moment in bench.walk():
        if moment.what == "yielded":
            seen.append(moment.item[1].item())
            if not math.isfinite(seen[-1]):
                raise Fault(f"the loss of phase {moment.phase} is {seen[-1]}: is something divided by a 0 at t's ends?")
    return f"finite: {_first([f'{loss:.3g}' for loss in seen])}"


def gradients(bench: Bench) -> str:
    """No network but those that are trained gets a gradient; what gradients flow through is told."""
    trained: set[nn.Parameter] = set()
    ends: list[int] = []  # of the log, before and after the first step
    before: list[int] = []  # gradients that have come back to each evaluation
    through: dict[str, float] = {}  # network: evaluations an image that the gradient of its loss flows through
    for moment in bench.walk():
        calls = calls_of(moment.method)
        if moment.what == "yielded":
            trained |= set(moment.item[0].parameters())
            before = [len(call.reached) for call in calls]
        if moment.what == "updated":
            network, name = moment.item[0], _name(moment.item[0], moment.method)
            reached = [call for call, count in zip(calls, before, strict=False) if len(call.reached) > count]
            rows = sum(call.rows for call in reached if call.network in logged(network)) / IMAGES
            through[name] = max(rows, through.get(name, 0))
        if moment.what in ("begin", "stepped") and not moment.phase:
            ends.append(len(calls))
    method = moment.method
    astray = [name for name, weight in method.named_parameters() if weight not in trained and weight.grad is not None]
    if astray:
        raise Fault(
            f"a network that is never yielded gets a gradient ({_owners(astray)}): compute targets under "
            "torch.no_grad(), and freeze their networks with requires_grad_(False)"
        )
    seen = _evaluations(calls_of(method)[slice(*ends)], teachers_network(method))
    doubts = [
        f"the gradient of one loss flows through {count:g} evaluations of {name}: right only where the paper trains "
        "through all of them, a target belongs under torch.no_grad()"
        for name, count in through.items()
        if count > 1
    ]
    return Doubt("; ".join([*doubts, seen])) if doubts else seen


def _evaluations(calls: list[Call], teacher: nn.Module) -> str:
    """What the first step evaluated: a stop-gradient that is missing shows here, and only its author can know."""

    def rows(of_teacher: bool, with_gradient: bool) -> float:
        mine = [call for call in calls if (call.network is teacher) == of_teacher]
        return sum(call.rows for call in mine if call.with_gradient == with_gradient) / IMAGES

    text = f"evaluations an image: students {rows(False, True):g} with gradient and {rows(False, False):g} without, "
    text += f"teacher {rows(True, False):g} without"
    if rows(True, True):
        text += f" and {rows(True, True):g} with gradient to its input: right only where the paper trains through it"
    return text


DROPPED = 0.3  # share of pixels


def dropout(bench: Bench) -> str:
    """Where networks have dropout, it acts on what is trained; on what that is compared with, under the same mask."""
    alike = apart = without = start = 0
    for moment in dataclasses.replace(bench, dropout=DROPPED).walk():
        if moment.what == "yielded":
            made, start = calls_of(moment.method)[start:], len(calls_of(moment.method))
            _check_masks(made, moment.method)
            apart += sum(call.rows for call in made if call.trained)
            alike += sum(call.rows for call in made if call.mask is not None and not call.trained)
            without += sum(call.rows for call in made if call.mask is None)
        if moment.what in ("begin", "stepped", "ended"):
            start = len(calls_of(moment.method))
    phases = min(len(bench.method().phases()), WALKED_PHASES)
    rows = [count / IMAGES / phases for count in (apart, alike, without)]
    return "evaluations an image: {:g} with dropout, {:g} under the same mask, {:g} without".format(*rows)


def _check_masks(made: list[Call], method: Method) -> None:
    """Of the evaluations for one loss."""
    teacher, masks = teachers_network(method), [call.mask for call in made if call.trained and call.mask is not None]
    for call in made:
        what = "the teacher" if call.network is teacher else "a network"
        if call.mask is None and call.trained and call.network is not teacher:  # another check tells of that
            raise Fault(
                f"{what} is trained in evaluation mode, so its dropout never acts: leave networks in the mode that "
                "teacher.student() gives them, and evaluate without gradients under torch.no_grad() or networks.held"
            )
        if call.mask is not None and not call.trained and not any(torch.equal(call.mask, mask) for mask in masks):
            raise Fault(
                f"{what} that gets no gradient is evaluated with dropout: call denoisers or their .output(), never "
                "their .network; what a loss compares with the student goes into a block of dropout.one_mask"
            )


def only_yielded(bench: Bench) -> str:
    """A step itself changes nothing: updates are the harness's, and what follows them belongs into after_step."""
    before: dict[str, Tensor] = {}
    suspects: list[tuple[int, str]] = []
    trained: set[nn.Module] = set()
    for moment in bench.walk():
        if moment.what in ("yielded", "stepped"):
            suspects += [(moment.phase, name) for name in changed(before, weights_of(moment.method))]
        if moment.what == "yielded":
            trained.add(moment.item[0])
        before = weights_of(moment.method)
    allowed = {id(buffer) for network in trained for buffer in network.buffers()}  # statistics of a forward pass
    state = moment.method.state_dict(keep_vars=True)
    wrong = [(phase, name) for phase, name in suspects if name not in state or id(state[name]) not in allowed]
    if wrong:
        owners = _owners([name for _, name in wrong])
        raise Fault(
            f"train_step of phase {wrong[0][0]} itself changes {owners}: yield what is to be trained, and do what else "
            "there is in after_step"
        )
    return "nothing changes but what is yielded"


def teacher_untouched(bench: Bench) -> str:
    """The teacher's weights stay as they are, and get no gradient."""
    untouched = weights_of(bench.teacher().denoiser)
    for moment in bench.walk():
        denoiser, when = moment.method.teacher.denoiser, f"in phase {moment.phase}"
        if changed(untouched, weights_of(denoiser)):
            raise Fault(
                f"the teacher's weights change {when}: train a copy (self.teacher.student()), never the teacher"
            )
        if any(weight.grad is not None or weight.requires_grad for weight in denoiser.parameters()):
            raise Fault(f"the teacher's weights take gradients {when}: leave their requires_grad False")
        if denoiser.training:
            raise Fault(f"the teacher is in training mode {when}: leave it in eval()")
    return "no change, no gradient"


# --- a training ------------------------------------------------------------------------------------------------------


def trains(bench: Bench) -> str:
    """The harness's own loop runs through, and the student learns."""
    start, run = bench.method(), bench.run
    if not changed(weights_of(start.student), weights_of(run.method.student)):
        raise Fault("after training the student has the weights that it started with")
    return f"{run.images} images through all phases"


def randomness(bench: Bench) -> str:
    """Random numbers come from the generator that is given."""
    if bench.run.disturbed:
        raise Fault(
            f"training draws from the global generator of {' and '.join(bench.run.disturbed)}: use batch.noise(), "
            ".uniform() and .integers(), or a torch.Generator with the seed workspace.seed"
        )
    return "no global generator is used"


def deterministic(bench: Bench) -> str:
    """A seed gives the same weights, bit by bit, whatever the global generators are; another seed gives others."""
    first, again, other = (weights_of(run.method) for run in (bench.run, bench.train(0, 1), bench.train(1)))
    different = changed(first, again)
    if different:
        raise Fault(
            f"two trainings from one seed differ ({_owners(different)}): something is random, or remembered, outside "
            "of the batch and the workspace"
        )
    if not changed(first, other):
        raise Fault("two seeds give the same weights: nothing that is drawn from the batch has an effect")
    return "the same seed, the same weights; another seed, others"


def resumes(bench: Bench) -> str:
    """Cut off and gone on with by a new object, a training ends with the same weights."""
    expected = weights_of(bench.run.method)
    for after in sorted({1, bench.steps() - 1}):
        told = f"cut off after {after} of {bench.steps()} steps"
        try:
            found = weights_of(bench.train_cut_off(after))
        except (Exception, SystemExit) as error:
            raise Fault(
                f"{told} it cannot go on: {where(error, bench.cls)}. Keep what later steps need in networks and "
                "buffers, or set it in prepare or start_phase"
            ) from error
        different = changed(expected, found)
        if different:
            raise Fault(
                f"{told} and gone on with, it ends with other weights ({_owners(different)}): keep what later "
                "steps depend on in networks, buffers (register_buffer) or a torch.Generator that is an attribute"
            )
    return "cut off and gone on with, the same weights"


def parts(bench: Bench) -> str:
    """The first update of a step in two parts is that of the whole; what compares images of a batch is told."""
    whole, halves = bench.first_gradient(1), bench.first_gradient(2)
    apart = (whole - halves).norm().item() / max(whole.norm().item(), 1e-12)
    if apart > ROUNDING:
        return Doubt(
            f"in two parts a step has another gradient, by {apart:.2g} of it: the loss is no mean over the images, "
            "or numbers are not drawn from the batch. Rows with accumulate, or of several GPUs, are of another loss"
        )
    return "a step in two parts, as with accumulate or two GPUs, is the whole step"


def price(bench: Bench) -> str:
    """Training costs the evaluations that a plan foresees from one step of each phase."""
    stages = bench.method().phases()
    if len(stages) > WALKED_PHASES:
        raise NotApplicable(f"it has more than {WALKED_PHASES} phases")
    ahead, before, rows = 0, 0, [0] * len(stages)
    for moment in bench.walk():
        if moment.what == "begin":
            before = rows_of(moment.method)
            ahead = ahead if moment.phase else before
        if moment.what == "stepped":
            rows[moment.phase] = rows_of(moment.method) - before
    batches, total = bench.run.images / IMAGES, sum(stage.share for stage in stages)
    foreseen = ahead + sum(stage.share / total * batches * r for stage, r in zip(stages, rows, strict=True))
    rounding = sum(abs(a - b) for a, b in pairwise(rows))  # a phase ends with a whole step
    made = bench.run.evaluations
    if abs(made - foreseen) > PRICE_ERROR * foreseen + rounding:
        raise Fault(
            f"a plan takes one step of each phase and foresees {foreseen:,.0f} evaluations, training made {made:,}: "
            "let all steps of a phase cost the same, and declare a phase where the cost changes"
        )
    return f"{foreseen:,.0f} evaluations foreseen, {made:,} made"


def average(bench: Bench) -> str:
    """Samples come from the averages that the harness makes."""
    method = bench.run.method
    averages = [weights for phase in bench.run.averages for weights in phase]
    for n in bench.nfe():
        before = len(calls_of(method))
        bench.sample(n)
        used = {call.network for call in calls_of(method)[before:]} - {teachers_network(method)}
        if not used:
            raise Fault(f"at NFE {n} nothing but the teacher is sampled: sample from self.student")
        if any(all(changed(weights_of(network), weights) for weights in averages) for network in used):
            raise Fault(
                f"at NFE {n} samples come from weights that are no phase's average: sample from self.student, or from "
                "copies that end_phase fills from `average`"
            )
    return "samples come from averaged weights"


# --- samples ---------------------------------------------------------------------------------------------------------


def supports(bench: Bench) -> str:
    """It says what numbers of evaluations it can do: some, and the same before and after training."""
    before, after = bench.method(), bench.run.method
    for n in USUAL_NFE:
        answers = before.supports(n), after.supports(n)
        if not all(isinstance(answer, bool) for answer in answers):
            raise Fault(f"supports({n}) must be True or False, got {answers[0]!r}")
        if answers[0] != answers[1]:
            raise Fault(f"supports({n}) is {answers[0]} before training and {answers[1]} after it; plans ask before")
    if not bench.nfe():
        raise Fault(f"supports(n) is False for all n up to {MOST_NFE}: nothing can be sampled")
    return f"NFE {_listed(bench)}"


def ready(bench: Bench) -> str:
    """What it can be sampled with meanwhile is supported, is not lost again, and can be sampled."""
    method = bench.method()
    phases = range(len(method.phases()))
    for n in USUAL_NFE:
        answers = [method.ready(n, phase) for phase in phases]
        if not all(isinstance(answer, bool) for answer in answers):
            raise Fault(f"ready({n}, phase) must be True or False, got {answers[0]!r}")
        if any(answers) and not method.supports(n):
            raise Fault(f"ready({n}, {answers.index(True)}) is True and supports({n}) is False")
        if any(earlier and not later for earlier, later in pairwise(answers)):
            raise Fault(f"ready({n}, phase) is {answers} over the phases: what is ready once must stay so")
    told = set()
    for moment in bench.walk():
        if moment.what == "stepped":
            for n in [n for n in bench.nfe() if moment.method.ready(n, moment.phase)]:
                _check_meanwhile(bench, moment.method, n, moment.phase)
                told.add(n)
    return f"meanwhile NFE {', '.join(map(str, sorted(told)))}" if told else "nothing before the end"


def _check_meanwhile(bench: Bench, method: Method, n: int, phase: int) -> None:
    try:
        x_0 = bench.sample(n, method)
    except (Exception, SystemExit) as error:
        raise Fault(
            f"ready({n}, {phase}) is True, and sampled in that phase it ends in {where(error, bench.cls)}"
        ) from error
    if not x_0.isfinite().all():
        raise Fault(f"ready({n}, {phase}) is True, and samples in that phase are not finite")


def samples(bench: Bench) -> str:
    """Samples are finite images of the teacher's shape, in the default dtype."""
    for n in bench.nfe():
        x_0 = bench.sample(n)
        if not isinstance(x_0, Tensor):
            raise Fault(f"at NFE {n} sample must return a tensor, got {type(x_0).__name__}")
        if x_0.shape != (IMAGES, *SHAPE):
            raise Fault(f"at NFE {n} samples must have the noise's shape {(IMAGES, *SHAPE)}, got {tuple(x_0.shape)}")
        if x_0.dtype != torch.get_default_dtype():
            raise Fault(f"at NFE {n} samples must be {torch.get_default_dtype()}, got {x_0.dtype}: t alone is float64")
        if not x_0.isfinite().all():
            raise Fault(f"at NFE {n} samples are not finite: is something divided by a 0 at t's ends?")
    return "finite, right shape and dtype"


def condition_sampled(bench: Bench) -> str:
    """Samples are of the class that is asked for."""
    c = bench.c()
    assert c.labels is not None
    for n in bench.nfe():
        try:
            with torch.no_grad():
                other = bench.run.method.sample(bench.noise(), n, Condition((c.labels + 1) % CLASSES, c.w))
            x_0 = bench.sample(n)
        except Fault:
            raise
        except (Exception, SystemExit) as error:
            raise Fault(f"sample fails where there are classes: {where(error, bench.cls)}") from error
        if _share_an_image(x_0, other):
            raise Fault(f"at NFE {n} other classes give the same images: hand c on to every network")
    return "other classes, other images"


def nfe(bench: Bench) -> str:
    """Sampling evaluates networks exactly as often as asked, guidance included."""
    for n in bench.nfe():
        before = rows_of(bench.run.method)
        bench.sample(n)
        counted = (rows_of(bench.run.method) - before) / IMAGES
        if counted != n:
            hint = "" if counted else " (only networks from self.teacher.student() and .deputy() are counted)"
            raise Fault(f"asked for {n} evaluations an image, counted {counted:g}{hint}: let sample and supports agree")
    return f"counted as asked: {_listed(bench)}"


def uncounted(bench: Bench) -> str:
    """No network is evaluated around its counter."""
    for n in bench.nfe():
        bench.sample(n)
    made, counted = sum(call.rows for call in calls_of(bench.run.method)), rows_of(bench.run.method)
    if made != counted:
        raise Fault(
            f"networks were evaluated on {made:,} images in training and sampling, and {counted:,} were counted: call "
            "denoisers or their .output(), never their .network, and leave their counters in place"
        )
    return "every evaluation is counted"


def noise(bench: Bench) -> str:
    """A sample is a function of the noise that is given, and of no other."""
    method, c = bench.run.method, bench.c()
    for n in bench.nfe():
        given = WatchedNoise([bench.noise()(k) for k in range(n)])
        with torch.no_grad():
            x_0, again = method.sample(given, n, c), bench.sample(n)
            other = method.sample(bench.noise(seed=1), n, c)
        if 0 not in given.asked:
            raise Fault(f"at NFE {n} sample never asks for noise(0), which all methods answer: start from it")
        if any(differ(draw, bench.noise()(k)) for k, draw in enumerate(given.draws)):
            raise Fault(f"at NFE {n} sample overwrites the noise that it is given: copy it first")
        if differ(x_0, again):
            raise Fault(
                f"at NFE {n} the same noise gives other images: fresh noise must come from noise(k), k = 1, ..."
            )
        if _share_an_image(x_0, other):
            raise Fault(f"at NFE {n} other noise gives the same images: start from noise(0)")
        keeps = method.keeps_noise(n)
        if not isinstance(keeps, bool):
            raise Fault(f"keeps_noise({n}) must be True or False, got {keeps!r}")
        if keeps and given.asked != {0}:
            raise Fault(
                f"at NFE {n} fresh noise is added, so a sample is not the teacher's answer to noise(0): let "
                f"keeps_noise({n}) be False"
            )
    return "the same noise, the same images; other noise, others"


def batch_independent(bench: Bench) -> str:
    """An image does not depend on those beside it."""
    halves = range(IMAGES // 2), range(IMAGES // 2, IMAGES)
    for n in bench.nfe():
        whole = bench.sample(n)
        with torch.no_grad():
            parts = torch.cat([bench.run.method.sample(bench.noise(half), n, bench.c(half)) for half in halves])
        error = (whole - parts).abs().max().item()
        if error > SAME_IMAGE * max(1.0, whole.abs().max().item()):
            raise Fault(
                f"at NFE {n} images change by up to {error:.2g} with those beside them in the batch: let nothing in "
                "sample be computed over the batch"
            )
    return "the same in a batch of another size"


def save_load(bench: Bench) -> str:
    """All that sampling needs is in the state: saved and loaded into a new object, it gives the same samples."""
    trained, restored = bench.run.method, bench.method()
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in trained.state_dict().items()}
    unmatched = sorted(tensors.keys() ^ restored.state_dict().keys())
    if unmatched:
        raise Fault(
            f"what a trained object keeps is not what a new one has ({_owners(unmatched)}): make all networks and "
            "buffers in __init__"
        )
    restored.load_state_dict(safetensors.torch.load(safetensors.torch.save(tensors)))
    restored.eval()
    plain = [name for name, value in vars(trained).items() if isinstance(value, Tensor)]
    advice = "keep what sample needs in networks and buffers (register_buffer)"
    advice += f"; plain tensors, which are lost: {_owners(plain)}" if plain else ""
    for n in bench.nfe():
        try:
            again = bench.sample(n, restored)
        except (Exception, SystemExit) as error:
            raise Fault(f"saved and loaded it cannot be sampled: {where(error, bench.cls)}; {advice}") from error
        if differ(bench.sample(n), again):
            raise Fault(f"at NFE {n}, saved and loaded, it gives other images: {advice}")
    return "saved and loaded, the same images"


# --- a law -----------------------------------------------------------------------------------------------------------


def matches(bench: Bench) -> str:
    """Trained on an exact teacher, it gives that teacher's images, or its law where it does not keep the noise."""
    if not bench.law_images:
        raise NotApplicable("left out")
    if bench.conditioning.classes:
        raise NotApplicable("the exact teacher knows no classes")
    method = bench.method(exact_teacher())
    law, schedule = exact_law(), method.teacher.schedule
    fixed = Noise(stream_key("conformance", 0), range(LAW_SAMPLES), law.shape)
    eps = fixed(0)
    ends = [time_like(eps, t) for t in (schedule.t_max, schedule.t_min)]
    exact = law.transport(schedule, x_at_t_max(schedule, eps), *ends)
    many_steps = Solver.parse("ddim").solve(method.teacher.denoise, schedule, eps, 64)
    rows = [n for n in range(1, MOST_NFE + 1) if method.supports(n)][:LAW_ROWS]
    with torch.no_grad():
        before = [method.sample(fixed, n, UNCONDITIONAL) for n in rows]
    with tempfile.TemporaryDirectory() as folder:
        workspace = workspace_of(method, Path(folder), BudgetConfig(images=bench.law_images))
        read = draws(1) if method.needs_data else None
        train(method, method.config, workspace, read, Loop(LAW_BATCH), SILENT)
    method.eval()
    told = []
    for n, start in zip(rows, before, strict=True):
        with torch.no_grad():
            x_0 = method.sample(fixed, n, UNCONDITIONAL)
        judged = _same_images(n, x_0, start, exact, many_steps) if method.keeps_noise(n) else _same_law(n, x_0, start)
        told.append(f"NFE {n}: {judged}")
    return "; ".join(told)


def _same_images(n: int, x_0: Tensor, start: Tensor, exact: Tensor, many_steps: Tensor) -> str:
    unit = exact_law().moments()[1].sqrt().item()
    rmse, first, own = ((a - b).square().mean().sqrt().item() / unit for a, b in (
        (x_0, exact), (start, exact), (x_0, many_steps),
    ))  # fmt: skip
    seen = f"RMSE to the exact map {rmse:.3f} std (untrained {first:.2f}), to the teacher's 64 DDIM steps {own:.3f}"
    if not rmse < min(LARGEST_RMSE, first):
        raise Fault(
            f"at NFE {n} samples are not the teacher's answers to the same noise: {seen}; below {LARGEST_RMSE} and "
            f"below the untrained is asked. Look at the target, its stop-gradient, noise levels and alpha; if only the "
            f"law is meant, let keeps_noise({n}) be False"
        )
    return f"{seen}; {LARGEST_RMSE} is allowed"


def _same_law(n: int, x_0: Tensor, start: Tensor) -> str:
    ks, std = _kolmogorov_smirnov(x_0), x_0.std().item() / exact_law().moments()[1].sqrt().item()
    seen = f"KS distance to the law {ks:.3f} (untrained {_kolmogorov_smirnov(start):.2f}), {std:.2f} of its std"
    if not (ks < LARGEST_KS and abs(std - 1) < LARGEST_STD_ERROR):
        raise Fault(
            f"at NFE {n} samples do not have the teacher's law: {seen}; below {LARGEST_KS}, and "
            f"{1 - LARGEST_STD_ERROR:g} to {1 + LARGEST_STD_ERROR:g}, is asked"
        )
    return f"{seen}; {LARGEST_KS} is allowed"


def _kolmogorov_smirnov(x_0: Tensor) -> float:
    """sup |F_N - F| with F(x) = sum_k w_k Phi((x - m_k) / s_k)."""
    law, x = exact_law(), x_0.double().flatten().sort().values
    F = (law.weights * torch.special.ndtr((x[:, None] - law.means.flatten()) / law.stds.flatten())).sum(dim=1)
    F_N = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)  # below the first, between the first two, ...
    return max((F - F_N[:-1]).max().item(), (F_N[1:] - F).max().item())


# --- words -----------------------------------------------------------------------------------------------------------


def _share_an_image(a: Tensor, b: Tensor) -> bool:
    """Whether an image of one batch is the same in the other."""
    return bool((a == b).flatten(1).all(dim=1).any())


def _first(texts: list[str]) -> str:
    """As many of them as there are phases that are walked through."""
    return ", ".join(texts[:WALKED_PHASES]) + (", ..." if len(texts) > WALKED_PHASES else "")


def _name(network: nn.Module, method: Method) -> str:
    """What the method calls it."""
    return next((f"self.{name}" for name, module in method.named_modules() if module is network and name), "a network")


def _listed(bench: Bench) -> str:
    return ", ".join(map(str, bench.nfe()))


def _owners(names: list[str]) -> str:
    """The attributes of a method that tensors of its state belong to."""
    return some(list(dict.fromkeys(f"self.{name.split('.')[0]}" for name in names)))


# --- the suite -------------------------------------------------------------------------------------------------------


@contextmanager
def benches(
    cls: type[Method], config: MethodConfig | None, law_images: int, dataset: Dataset | None
) -> Iterator[list[Bench]]:
    """Every way of conditioning."""
    if dataset is not None:
        raise UserError("a method is checked on images of its bench: dataset= is for teachers")
    yield [Bench(label, cls, config, conditioning, law_images) for label, conditioning in CONDITIONINGS.items()]


# It starts a process: only where nothing else is wrong.
NEEDED_BY_DEVICE = (
    "resumes",
    "parts",
    "price",
    "ready",
    "nfe",
    "uncounted",
    "batch_independent",
    "average",
    "save_load",
)

CHECKS = [
    Check(declared, benches="first"),
    Check(builds, ("declared",), must_apply=True),
    Check(phases, ("builds",), "first"),
    Check(data, ("phases",), "first"),
    Check(steps, ("data",), "first"),
    Check(condition, ("steps",), "conditional"),
    Check(losses, ("steps", "condition")),
    Check(gradients, ("losses",)),
    Check(dropout, ("losses",), "first"),
    Check(only_yielded, ("losses",)),
    Check(teacher_untouched, ("losses",)),
    Check(trains, ("losses",)),
    Check(randomness, ("trains",)),
    Check(deterministic, ("randomness",)),
    Check(resumes, ("deterministic", "teacher_untouched")),
    Check(parts, ("deterministic",), "first"),
    Check(price, ("trains",)),
    Check(supports, ("trains",), "first"),
    Check(samples, ("supports",), "first"),
    Check(ready, ("samples",), "first"),
    Check(condition_sampled, ("samples",), "conditional"),
    Check(nfe, ("samples", "condition_sampled")),
    Check(uncounted, ("samples", "condition_sampled")),
    Check(noise, ("samples", "condition_sampled")),
    Check(batch_independent, ("noise",)),
    Check(average, ("noise",)),
    Check(save_load, ("noise",)),
    Check(device, NEEDED_BY_DEVICE, "first"),
    Check(matches, ("samples",), "first"),
]
