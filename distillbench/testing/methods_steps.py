"""Checks of a method's training step: what it reads, what it yields, and what it must leave unchanged.

Each check takes a cycle of steps of each phase on a bench
(:meth:`distillbench.testing.method_bench.MethodBench.walk`). The list of all checks of methods, with what each of them
needs, is ``CHECKS`` in :mod:`distillbench.testing.methods`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.errors import first_of
from distillbench.testing.bench_networks import Call
from distillbench.testing.checks import Doubt, Fault, NotApplicable, where
from distillbench.testing.method_bench import (
    CLASSES,
    MethodBench,
    WatchedBatch,
    attributes_of,
    calls_of,
    changed,
    logged,
    teachers_network,
    weights_of,
)
from distillbench.training.method import STUDENT_INPUTS, Method

DROPPED = 0.3  # share of pixels that networks drop in the check of dropout


def data(bench: MethodBench) -> str:
    """Real images and the teacher are used exactly as the method declares; `inputs` is one of the known words."""
    inputs = bench.method().inputs
    if inputs not in STUDENT_INPUTS or (inputs == "data" and not bench.reads_data):
        words = ", ".join(word for word in STUDENT_INPUTS if word != "data" or bench.reads_data)
        raise Fault(f"inputs says what the student is trained on; possible are {words}, got {inputs!r}")
    batches: list[WatchedBatch] = []
    finished = asked_teacher = False
    try:
        for event in bench.walk():
            batches.append(event.batch)
            asked_teacher = event.method.teacher.teacher_rows.rows > 0
        finished = True
    except (Exception, SystemExit):  # the check `steps` reports it
        pass
    asked = any(batch.used for batch in batches)
    if asked_teacher and not bench.method().uses_teacher:
        raise Fault("it declares to learn from data alone and evaluates the teacher: remove uses_teacher = False")
    if asked and not bench.reads_data:
        raise Fault("it declares to read no real images and reads some (batch.x_0): declare needs_data = True")
    if finished and bench.reads_data and not asked:
        raise Fault("it declares to read real images and no step reads batch.x_0: declare needs_data = False")
    if not finished and not asked:
        raise NotApplicable("the first step fails before it ends")
    return "real images are read, as declared" if asked else "no real image is read, as declared"


def steps(bench: MethodBench) -> str:
    """The steps of a cycle of each phase run and yield networks with their losses; the student is one of them."""
    trained: set[nn.Module] = set()
    student = False
    for event in bench.walk():
        if event.what == "yielded":
            network = _well_formed(event.item)
            trained.add(network)
            student = student or network is event.method.student
        if event.what == "updated" and all(weight.grad is None for weight in network.parameters()):
            raise Fault(
                f"the loss yielded with {_name(network, event.method)} does not depend on its weights: is it "
                "evaluated under torch.no_grad(), or is its output detached?"
            )
    if not trained:
        raise Fault("train_step yields nothing, so nothing is trained: yield (network, loss) for each update")
    if not student:
        raise Fault(
            "self.student is never yielded, but it is averaged and sampled: yield (self.student, loss); if only every "
            "n-th step trains it, declare Phase(cycle=n)"
        )
    return f"networks with their losses are yielded ({len(trained)} trained)"


def _well_formed(item: Any) -> nn.Module:
    """The network of a pair (network, loss) from train_step; raises Fault unless the pair is valid."""
    if not (isinstance(item, tuple) and len(item) == 2):
        raise Fault(f"train_step must yield pairs (network, loss), got {type(item).__name__}")
    network, loss = item
    if not isinstance(network, nn.Module) or not isinstance(loss, Tensor):
        raise Fault(f"train_step must yield (module, tensor), got ({type(network).__name__}, {type(loss).__name__})")
    if not any(weight.requires_grad for weight in network.parameters()):
        raise Fault(
            f"train_step yields a {type(network).__name__} without weights to train: all are frozen, or it has none"
        )
    if loss.ndim:
        raise Fault(f"a loss must be a scalar, got shape {tuple(loss.shape)}: take its mean")
    if not loss.requires_grad:
        raise Fault("a loss does not require a gradient: was it computed under torch.no_grad(), or detached?")
    return network


def condition(bench: MethodBench) -> str:
    """Every network gets the class, and a guided teacher is evaluated with its guidance."""
    try:
        moments = list(bench.walk())
    except Fault:
        raise
    except (Exception, SystemExit) as error:
        raise Fault(f"a step fails on a conditional teacher: {where(error, bench.cls)}") from error
    method = moments[-1].method
    network = teachers_network(method)
    labelled = [call.labels for call in calls_of(method) if call.network is network and call.labels is not None]
    if bench.conditioning.guided and labelled and not any((labels == CLASSES).any() for labels in labelled):
        raise Fault("the teacher is evaluated without its guidance: call self.teacher.denoise(x_t, t, c)")
    return "every network gets the class, and a guided teacher is evaluated with guidance"


def losses(bench: MethodBench) -> str:
    """Losses are finite."""
    seen: list[float] = []
    for event in bench.walk():
        if event.what == "yielded":
            seen.append(event.item[1].item())
            if not math.isfinite(seen[-1]):
                raise Fault(
                    f"the loss of phase {event.phase} is {seen[-1]}: is there a division by 0 at t_min or t_max?"
                )
    return f"finite: {first_of([f'{loss:.3g}' for loss in seen])}"


def gradients(bench: MethodBench) -> str:
    """Only trained networks get gradients. The message counts the evaluations that each gradient flows through."""
    trained: set[nn.Parameter] = set()
    ends: list[int] = []  # length of the log before and after each step of the first phase
    before: list[int] = []  # for each evaluation, how many gradients had reached it
    through: dict[str, list[Call]] = {}  # by network: the evaluations that the gradient of its loss flows through
    along: dict[str, list[Call]] = {}  # and those where it flows through their derivative along a direction
    for event in bench.walk():
        calls = calls_of(event.method)
        if event.what == "yielded":
            trained |= set(event.item[0].parameters())
            before = [len(call.reached) for call in calls]
        if event.what == "updated":
            network, name = event.item[0], _name(event.item[0], event.method)
            own = [(call, count) for call, count in zip(calls, before, strict=False) if call.network in logged(network)]
            reached = [call for call, count in own if len(call.reached) > count]
            through[name] = max(reached, through.get(name, []), key=_images_of)
            along[name] = [call for call, _ in own if call.along] or along.get(name, [])
        if event.what in ("begin", "stepped") and not event.phase:
            ends.append(len(calls))
    method = event.method
    stray = [name for name, weight in method.named_parameters() if weight not in trained and weight.grad is not None]
    if stray:
        raise Fault(
            f"a network that is never yielded gets a gradient ({attributes_of(stray)}): compute targets under "
            "torch.no_grad(), and freeze their networks with requires_grad_(False)"
        )
    made = [call for begin, end in zip(ends[::2], ends[1::2], strict=True) for call in calls_of(method)[begin:end]]
    seen = _evaluations(made, teachers_network(method), bench.images, len(ends) // 2)
    doubts = [
        f"the gradient of one loss flows through {_images_of(calls) / bench.images:g} evaluations of {name}"
        f"{_lines(calls)}: correct only if the paper trains through all of them; compute a target under torch.no_grad()"
        for name, calls in through.items()
        if _images_of(calls) > bench.images
    ]
    doubts += [
        f"the gradient of one loss flows through a forward-mode derivative of {name}{_lines(calls)}: correct only if "
        "the paper trains through it; detach a target that contains it, .detach(), or use "
        "distillbench.diffusion.derivative, whose derivative has no gradient"
        for name, calls in along.items()
        if calls
    ]
    return Doubt("; ".join([*doubts, seen])) if doubts else seen


def _images_of(calls: list[Call]) -> int:
    return sum(call.rows for call in calls)


def _lines(calls: list[Call]) -> str:
    """The lines of the method that asked for the evaluations, in brackets."""
    lines = list(dict.fromkeys(call.line for call in calls if call.line))
    return f" ({first_of(lines)})" if lines else ""


def _evaluations(calls: list[Call], teacher: nn.Module, images: int, steps: int) -> str:
    """What these steps evaluated. A missing stop-gradient shows here; only the author can tell whether it is one."""

    def rows(of_teacher: bool, with_gradient: bool) -> float:
        mine = [call for call in calls if (call.network is teacher) == of_teacher]
        return sum(call.rows for call in mine if call.with_gradient == with_gradient) / images / steps

    text = "evaluations per image" + (f", the mean of a cycle of {steps} steps" if steps > 1 else "")
    text += f": students {rows(False, True):g} with gradient and {rows(False, False):g} without, "
    text += f"teacher {rows(True, False):g} without"
    if rows(True, True):
        text += f" and {rows(True, True):g} with gradient to its input: correct only if the paper trains through it"
    return text


def dropout(bench: MethodBench) -> str:
    """Dropout acts on the trained network; an output that it is compared with has no dropout, or the same mask."""
    same_mask = trained = without = start = steps = 0
    for event in dataclasses.replace(bench, dropout=DROPPED).walk():
        if event.what == "yielded":
            made, start = calls_of(event.method)[start:], len(calls_of(event.method))
            check_masks(made, event.method)
            trained += sum(call.rows for call in made if call.trained)
            same_mask += sum(call.rows for call in made if call.mask is not None and not call.trained)
            without += sum(call.rows for call in made if call.mask is None)
        if event.what in ("begin", "stepped", "ended"):
            start = len(calls_of(event.method))
            steps += event.what == "begin"
    rows = [count / bench.images / steps for count in (trained, same_mask, without)]
    return "evaluations per image: {:g} with dropout, {:g} under the same mask, {:g} without".format(*rows)


def check_masks(made: list[Call], method: Method) -> None:
    """Raise Fault unless the evaluations `made` for one loss use dropout correctly."""
    teacher, masks = teachers_network(method), [call.mask for call in made if call.trained and call.mask is not None]
    for call in made:
        what = "the teacher" if call.network is teacher else "a network"
        if call.mask is None and call.trained and call.network is not teacher:  # else `teacher_untouched` reports it
            raise Fault(
                f"{what} is trained in evaluation mode, so its dropout never acts: leave networks in the mode that "
                "teacher.student() gives them, and evaluate without gradients under torch.no_grad() or "
                "diffusion.frozen_weights"
            )
        if call.mask is not None and not call.trained and not any(torch.equal(call.mask, mask) for mask in masks):
            raise Fault(
                f"{what} that gets no gradient is evaluated with dropout: call denoisers or their .output(), never "
                "their .network, and evaluate what a loss compares with the student in a block of diffusion.one_mask"
            )


def only_yielded(bench: MethodBench) -> str:
    """train_step changes no weights: the harness updates them, and further changes belong in after_step."""
    before: dict[str, Tensor] = {}
    suspects: list[tuple[int, str]] = []
    trained: set[nn.Module] = set()
    for event in bench.walk():
        if event.what in ("yielded", "stepped"):
            suspects += [(event.phase, name) for name in changed(before, weights_of(event.method))]
        if event.what == "yielded":
            trained.add(event.item[0])
        before = weights_of(event.method)
    allowed = {
        id(buffer) for network in trained for buffer in network.buffers()
    }  # a forward pass may update running statistics
    state = event.method.state_dict(keep_vars=True)
    wrong = [(phase, name) for phase, name in suspects if name not in state or id(state[name]) not in allowed]
    if wrong:
        owners = attributes_of([name for _, name in wrong])
        raise Fault(
            f"train_step of phase {wrong[0][0]} itself changes {owners}: yield what is to be trained, and make other "
            "changes in after_step"
        )
    return "train_step changes nothing itself"


def teacher_untouched(bench: MethodBench) -> str:
    """The teacher's weights do not change and get no gradient; it stays in evaluation mode."""
    untouched = weights_of(bench.teacher().denoiser)
    for event in bench.walk():
        denoiser, when = event.method.teacher.denoiser, f"in phase {event.phase}"
        if changed(untouched, weights_of(denoiser)):
            raise Fault(
                f"the teacher's weights change {when}: train a copy (self.teacher.student()), never the teacher"
            )
        if any(weight.grad is not None or weight.requires_grad for weight in denoiser.parameters()):
            raise Fault(f"the teacher's weights take gradients {when}: leave their requires_grad at False")
        if denoiser.training:
            raise Fault(f"the teacher is in training mode {when}: leave it in eval()")
    return "no change, no gradient"


def _name(network: nn.Module, method: Method) -> str:
    """The attribute of `method` that holds `network`."""
    return next((f"self.{name}" for name, module in method.named_modules() if module is network and name), "a network")
