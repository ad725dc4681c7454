"""Checks of a method's samples: supported numbers of evaluations, and dependence on noise and class alone.

Each check samples from the short training of its bench. The list of all checks of methods, with what each of them
needs, is ``CHECKS`` in :mod:`distillbench.testing.methods`.

| symbol | meaning                             | shape     |
|--------|-------------------------------------|-----------|
| x_0    | samples                             | (B,C,H,W) |
| n      | network evaluations for one image   | int       |
| c      | condition: class and guidance       | of a batch |
"""

from __future__ import annotations

from itertools import pairwise

import safetensors.torch
import torch
from torch import Tensor

from distillbench.diffusion.conditioning import Condition
from distillbench.testing.checks import Fault, differ, where
from distillbench.testing.method_bench import (
    CLASSES,
    IMAGES,
    MOST_NFE,
    USUAL_NFE,
    MethodBench,
    WatchedNoise,
    attributes_of,
    calls_of,
    rows_of,
)
from distillbench.training.method import Method

SAME_IMAGE = 1e-4  # relative to the largest value: float32 in batches of another size


def supports(bench: MethodBench) -> str:
    """supports(n) is True for some n, and the same before and after training."""
    before, after = bench.method(), bench.run.method
    for n in USUAL_NFE:
        answers = before.supports(n), after.supports(n)
        if not all(isinstance(answer, bool) for answer in answers):
            raise Fault(f"supports({n}) must be True or False, got {answers[0]!r}")
        if answers[0] != answers[1]:
            raise Fault(
                f"supports({n}) is {answers[0]} before training and {answers[1]} after it; plans rely on the former"
            )
    if not bench.nfe():
        raise Fault(f"supports(n) is False for all n up to {MOST_NFE}: nothing can be sampled")
    return f"NFE {_listed(bench)}"


def ready(bench: MethodBench) -> str:
    """If ready(n, phase), then n is supported, stays ready, and can be sampled with in that phase."""
    method = bench.method()
    phases = range(len(method.phases()))
    for n in USUAL_NFE:
        answers = [method.ready(n, phase) for phase in phases]
        if not all(isinstance(answer, bool) for answer in answers):
            raise Fault(f"ready({n}, phase) must be True or False, got {answers[0]!r}")
        if any(answers) and not method.supports(n):
            raise Fault(f"ready({n}, {answers.index(True)}) is True and supports({n}) is False")
        if any(earlier and not later for earlier, later in pairwise(answers)):
            raise Fault(f"ready({n}, phase) is {answers} over the phases: once True it must stay True")
    sampled = set()
    for event in bench.walk():
        if event.what == "stepped":
            for n in [n for n in bench.nfe() if event.method.ready(n, event.phase)]:
                _check_ready(bench, event.method, n, event.phase)
                sampled.add(n)
    return f"during training: NFE {', '.join(map(str, sorted(sampled)))}" if sampled else "only after training"


def _check_ready(bench: MethodBench, method: Method, n: int, phase: int) -> None:
    try:
        x_0 = bench.sample(n, method)
    except (Exception, SystemExit) as error:
        raise Fault(
            f"ready({n}, {phase}) is True, but sampling in that phase fails: {where(error, bench.cls)}"
        ) from error
    if not x_0.isfinite().all():
        raise Fault(f"ready({n}, {phase}) is True, but samples in that phase are not finite")


def samples(bench: MethodBench) -> str:
    """Samples are finite images of the teacher's shape, in the default dtype."""
    for n in bench.nfe():
        x_0 = bench.sample(n)
        if not isinstance(x_0, Tensor):
            raise Fault(f"at NFE {n} sample must return a tensor, got {type(x_0).__name__}")
        if x_0.shape != (shape := (IMAGES, *bench.shape)):
            raise Fault(f"at NFE {n} samples must have the noise's shape {shape}, got {tuple(x_0.shape)}")
        if x_0.dtype != torch.get_default_dtype():
            raise Fault(f"at NFE {n} samples must be {torch.get_default_dtype()}, got {x_0.dtype}: only t is float64")
        if not x_0.isfinite().all():
            raise Fault(f"at NFE {n} samples are not finite: is there a division by 0 at the ends of t?")
    return "finite, of the right shape and dtype"


def condition_sampled(bench: MethodBench) -> str:
    """Samples depend on the class."""
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
            raise Fault(f"sample fails on a conditional teacher: {where(error, bench.cls)}") from error
        if _share_an_image(x_0, other):
            raise Fault(f"at NFE {n} other classes give the same images: pass c to every network")
    return "other classes give other images"


def nfe(bench: MethodBench) -> str:
    """Sampling makes exactly the requested number of network evaluations, guidance included."""
    for n in bench.nfe():
        before = rows_of(bench.run.method)
        bench.sample(n)
        counted = (rows_of(bench.run.method) - before) / IMAGES
        if counted != n:
            hint = "" if counted else " (only networks from self.teacher.student() and .frozen_copy() are counted)"
            raise Fault(
                f"requested {n} evaluations per image, counted {counted:g}{hint}: let sample and supports agree"
            )
    return f"counted as requested: {_listed(bench)}"


def uncounted(bench: MethodBench) -> str:
    """No network evaluation bypasses its counter."""
    for n in bench.nfe():
        bench.sample(n)
    evaluated, counted = sum(call.rows for call in calls_of(bench.run.method)), rows_of(bench.run.method)
    if evaluated != counted:
        raise Fault(
            f"networks were evaluated on {evaluated:,} images in training and sampling, but {counted:,} were counted: "
            "call denoisers or their .output(), never their .network, and leave their counters in place"
        )
    return "every evaluation is counted"


def noise(bench: MethodBench) -> str:
    """A sample is a function of the given noise and of no other random numbers."""
    method, c = bench.run.method, bench.c()
    for n in bench.nfe():
        given = WatchedNoise([bench.noise()(k) for k in range(n)])
        with torch.no_grad():
            x_0, again = method.sample(given, n, c), bench.sample(n)
            other = method.sample(bench.noise(seed=1), n, c)
        if 0 not in given.used:
            raise Fault(f"at NFE {n} sample never calls noise(0), the noise shared by all methods: start from it")
        if any(differ(draw, bench.noise()(k)) for k, draw in enumerate(given.draws)):
            raise Fault(f"at NFE {n} sample overwrites the given noise: copy it first")
        if differ(x_0, again):
            raise Fault(
                f"at NFE {n} the same noise gives other images: fresh noise must come from noise(k), k = 1, ..."
            )
        if _share_an_image(x_0, other):
            raise Fault(f"at NFE {n} other noise gives the same images: start from noise(0)")
        keeps = method.keeps_noise(n)
        if not isinstance(keeps, bool):
            raise Fault(f"keeps_noise({n}) must be True or False, got {keeps!r}")
        if keeps and given.used != {0}:
            raise Fault(
                f"at NFE {n} fresh noise is added, so a sample does not match the teacher's for noise(0): let "
                f"keeps_noise({n}) be False"
            )
    return "the same noise gives the same images; other noise gives others"


def batch_independent(bench: MethodBench) -> str:
    """A sample does not depend on the others in its batch."""
    halves = range(IMAGES // 2), range(IMAGES // 2, IMAGES)
    for n in bench.nfe():
        whole = bench.sample(n)
        with torch.no_grad():
            parts = torch.cat([bench.run.method.sample(bench.noise(half), n, bench.c(half)) for half in halves])
        error = (whole - parts).abs().max().item()
        if error > SAME_IMAGE * max(1.0, whole.abs().max().item()):
            raise Fault(
                f"at NFE {n} images change by up to {error:.2g} with the other images of the batch: compute nothing "
                "over the batch in sample"
            )
    return "the same in a batch of another size"


def save_load(bench: MethodBench) -> str:
    """state_dict holds all that sampling needs: loaded into a new object, it gives the same samples."""
    trained, restored = bench.run.method, bench.method()
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in trained.state_dict().items()}
    unmatched = sorted(tensors.keys() ^ restored.state_dict().keys())
    if unmatched:
        raise Fault(
            f"the state_dict of a trained object has other keys than that of a new one ({attributes_of(unmatched)}): "
            "make all networks and buffers in __init__"
        )
    restored.load_state_dict(safetensors.torch.load(safetensors.torch.save(tensors)))
    restored.eval()
    plain = [name for name, value in vars(trained).items() if isinstance(value, Tensor)]
    advice = "keep what sample needs in networks and buffers (register_buffer)"
    advice += f"; these plain tensors are lost: {attributes_of(plain)}" if plain else ""
    for n in bench.nfe():
        try:
            again = bench.sample(n, restored)
        except (Exception, SystemExit) as error:
            raise Fault(f"saved and loaded, it cannot be sampled: {where(error, bench.cls)}; {advice}") from error
        if differ(bench.sample(n), again):
            raise Fault(f"at NFE {n}, saved and loaded, it gives other images: {advice}")
    return "saved and loaded, it gives the same images"


def _share_an_image(a: Tensor, b: Tensor) -> bool:
    """Whether some image of one batch is the same in the other."""
    return bool((a == b).flatten(1).all(dim=1).any())


def _listed(bench: MethodBench) -> str:
    return ", ".join(map(str, bench.nfe()))
