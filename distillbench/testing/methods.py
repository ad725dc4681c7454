"""The conformance suite for methods: each check tests one promise of :mod:`distillbench.training.method` on a bench.

``CHECKS`` at the end lists all checks with the checks that each of them needs. Here are those of what a method
declares, and the comparison with a distribution whose denoiser is known; the others are in
:mod:`distillbench.testing.methods_search`, :mod:`distillbench.testing.methods_steps`,
:mod:`distillbench.testing.methods_training` and :mod:`distillbench.testing.methods_sampling`.

| symbol | meaning                                                                     | shape        |
|--------|-----------------------------------------------------------------------------|--------------|
| x_0    | samples                                                                     | (B,C,H,W)    |
| n      | network evaluations for one image                                           | int          |
| F, F_N | distribution function of the exact distribution, and of N samples           | (N,) float64 |
| KS     | Kolmogorov-Smirnov distance, sup of |F_N - F|                               | float        |
| RMSE   | root mean square distance to the exact map, over the distribution's std     | float        |
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distillbench.datasets.dataset import Dataset
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.noise import Noise, stream_key
from distillbench.diffusion.samplers import Solver, time_like, x_at_t_max
from distillbench.errors import UserError
from distillbench.testing.bench_networks import USUALLY_COMPUTED, Computed
from distillbench.testing.checks import Check, Fault, NotApplicable, check_declared, settings_with_help
from distillbench.testing.device import device
from distillbench.testing.exact_bench import draws, exact_distribution, exact_teacher
from distillbench.testing.method_bench import (
    CONDITIONINGS,
    MOST_NFE,
    SILENT,
    WALKED_PHASES,
    MethodBench,
    workspace_of,
)
from distillbench.testing.methods_flops import flops
from distillbench.testing.methods_learning import attention, learns
from distillbench.testing.methods_sampling import (
    batch_independent,
    condition_sampled,
    nfe,
    noise,
    ready,
    samples,
    save_load,
    supports,
    uncounted,
)
from distillbench.testing.methods_search import search
from distillbench.testing.methods_steps import (
    condition,
    data,
    dropout,
    gradients,
    losses,
    only_yielded,
    steps,
    teacher_untouched,
)
from distillbench.testing.methods_times import times
from distillbench.testing.methods_training import average, cost, deterministic, parts, randomness, resumes, trains
from distillbench.training.budget import BudgetConfig
from distillbench.training.compute import Sampling, sampling
from distillbench.training.loop import Loop, train
from distillbench.training.method import Method, MethodConfig, Phase

LAW_BATCH, LAW_SAMPLES = 128, 4000
LAW_ROWS = 3  # numbers of evaluations that are tested
LARGEST_RMSE = 0.5  # a constant sample, the mean, has 1; a sample for other noise about 1.4
LARGEST_KS = 0.15
LARGEST_STD_ERROR = 0.25  # relative


# --- what is declared ------------------------------------------------------------------------------------------------


def declared(bench: MethodBench) -> str:
    """The registry accepts the class, and every setting has a help text."""
    check_declared("methods", bench.cls)
    if not bench.cls.paper.strip():
        raise Fault("paper is empty: name authors, year and arXiv number, or say that there is none")
    count = settings_with_help(bench.cls.Config)
    bench.config()
    return f"{'needs real images' if bench.reads_data else 'data-free'}, {count} settings with help"


def builds(bench: MethodBench) -> str:
    """It can be built on a teacher. With a UserError it may refuse this conditioning."""
    try:
        method = bench.method()
    except UserError as error:
        raise NotApplicable(f"refused ({error})") from error
    if "student" not in dict(method.named_children()):
        raise Fault("self.student is not a network: call super().__init__(config, teacher)")
    return "a student is built"


def phases(bench: MethodBench) -> str:
    """phases() returns a list of phases with positive shares of the budget."""
    found = bench.method().phases()
    if not isinstance(found, list) or not found or not all(isinstance(phase, Phase) for phase in found):
        raise Fault(f"phases() must return a list of Phase, at least one, got {found!r}")
    for phase in found:
        if not phase.share > 0:
            raise Fault(f"every phase needs a positive share of the budget, got {phase}")
    labels = ", ".join(phase.label for phase in found[:WALKED_PHASES])
    return f"{len(found)}: {labels}" + (", ..." if len(found) > WALKED_PHASES else "")


# --- the exact distribution ------------------------------------------------------------------------------------------


def matches(bench: MethodBench) -> str:
    """Trained on an exact teacher, it gives that teacher's images, or its distribution if keeps_noise(n) is False.

    A method that never evaluates the teacher may do either: it learns the images' distribution, not the teacher's map.
    """
    if not bench.distribution_images:
        raise NotApplicable("left out")
    if bench.conditioning.classes:
        raise NotApplicable("the exact teacher is unconditional")
    if bench.computed.network != USUALLY_COMPUTED.network:
        raise NotApplicable("the exact distribution has one dimension, which only the mlp takes")
    method = bench.method(exact_teacher())
    distribution, schedule = exact_distribution(), method.teacher.schedule
    fixed = Noise(stream_key("conformance", 0), range(LAW_SAMPLES), distribution.shape)
    eps = fixed(0)
    ends = [time_like(eps, t) for t in (schedule.t_max, schedule.t_min)]
    exact = distribution.transport(schedule, x_at_t_max(schedule, eps), *ends)
    tested = [n for n in range(1, MOST_NFE + 1) if method.supports(n)][:LAW_ROWS]
    teacher = {n: Solver.parse("ddim").solve(method.teacher.denoise, schedule, eps, n) for n in {64, *tested}}
    before = [_samples(bench, method, fixed, n) for n in tested]
    evaluated = method.teacher.teacher_rows.rows
    with tempfile.TemporaryDirectory() as folder:
        group = method.group_size
        budget = BudgetConfig(images=-(-bench.distribution_images // group) * group)
        workspace = workspace_of(method, Path(folder), budget)
        read = draws(1) if bench.reads_data else None
        train(method, method.config, workspace, read, Loop(max(LAW_BATCH // group, 1) * group), SILENT)
    alone = method.teacher.teacher_rows.rows == evaluated
    method.eval()
    found = []
    for n, start in zip(tested, before, strict=True):
        x_0 = _samples(bench, method, fixed, n)
        of_map = _same_images(n, x_0, start, exact, teacher) if method.keeps_noise(n) else None
        result = of_map
        if result is None or (alone and result.fault):
            result = _either(of_map, _same_distribution(n, x_0, start, teacher))
        if result.fault:
            raise Fault(f"at NFE {n} {result.fault}")
        found.append(f"NFE {n}: {result.seen}")
    return "; ".join(found)


def _samples(bench: MethodBench, method: Method, noise: Noise, n: int) -> Tensor:
    with torch.no_grad(), sampling(Sampling(), method.teacher, bench.device):
        return method.sample(noise, n, UNCONDITIONAL)


@dataclass(frozen=True)
class Compared:
    """The result of a comparison in words; `fault` is empty if it is good enough."""

    seen: str
    fault: str


def _either(of_map: Compared | None, of_distribution: Compared) -> Compared:
    """The comparison of distributions; if it fails too, its fault follows that of the map."""
    if of_map is None or not of_distribution.fault:
        return of_distribution
    return Compared("", f"{of_map.fault}. And {of_distribution.fault}")


def _same_images(n: int, x_0: Tensor, start: Tensor, exact: Tensor, teacher: dict[int, Tensor]) -> Compared:
    std = exact_distribution().moments()[1].sqrt().item()
    rmse, untrained, to_teacher, of_teacher = ((a - b).square().mean().sqrt().item() / std for a, b in (
        (x_0, exact), (start, exact), (x_0, teacher[64]), (teacher[n], exact),
    ))  # fmt: skip
    seen = f"RMSE to the exact map {rmse:.3f} std (untrained {untrained:.2f}), "
    seen += f"to the teacher's 64 DDIM steps {to_teacher:.3f}{_worse(n, rmse, of_teacher)}"
    least = min(LARGEST_RMSE, untrained)
    if rmse < least:
        return Compared(f"{seen}; {LARGEST_RMSE} is allowed", "")
    limit = f"the {LARGEST_RMSE} allowed" if untrained >= LARGEST_RMSE else "the untrained"
    return Compared(
        seen,
        f"samples do not match the teacher's for the same noise: {seen}. The RMSE is {rmse - least:.3f} above {limit}. "
        "Check the target, its stop-gradient, noise levels and alpha; if only the distribution is meant to match, let "
        f"keeps_noise({n}) be False",
    )


def _same_distribution(n: int, x_0: Tensor, start: Tensor, teacher: dict[int, Tensor]) -> Compared:
    ks, std = _kolmogorov_smirnov(x_0), x_0.std().item() / exact_distribution().moments()[1].sqrt().item()
    seen = f"KS distance to the distribution {ks:.3f} (untrained {_kolmogorov_smirnov(start):.2f}), "
    seen += f"{std:.2f} of its std{_worse(n, ks, _kolmogorov_smirnov(teacher[n]))}"
    faults = []
    if not ks < LARGEST_KS:
        faults.append(f"the distance is {ks - LARGEST_KS:.3f} above the {LARGEST_KS} allowed")
    if not abs(std - 1) < LARGEST_STD_ERROR:
        faults.append(f"the std is not {1 - LARGEST_STD_ERROR:g} to {1 + LARGEST_STD_ERROR:g} of the distribution's")
    if faults:
        return Compared(seen, f"samples do not have the teacher's distribution: {seen}. {'; '.join(faults)}")
    return Compared(f"{seen}; {LARGEST_KS} is allowed", "")


def _worse(n: int, distance: float, of_teacher: float) -> str:
    """Words for a student that is worse than what it started from, the teacher itself."""
    if distance <= of_teacher:
        return ""
    return f", worse than the teacher itself in {n} DDIM step{'s' * (n > 1)} ({of_teacher:.3f})"


def _kolmogorov_smirnov(x_0: Tensor) -> float:
    """sup |F_N - F| with F(x) = sum_k w_k Phi((x - m_k) / s_k)."""
    distribution, x = exact_distribution(), x_0.double().flatten().sort().values
    F = (
        distribution.weights
        * torch.special.ndtr((x[:, None] - distribution.means.flatten()) / distribution.stds.flatten())
    ).sum(dim=1)
    F_N = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)  # below the first, between the first two, ...
    return max((F - F_N[:-1]).max().item(), (F_N[1:] - F).max().item())


# --- the suite -------------------------------------------------------------------------------------------------------


@contextmanager
def benches(
    cls: type[Method],
    config: MethodConfig | None,
    distribution_images: int,
    dataset: Dataset | None,
    computed: Computed = USUALLY_COMPUTED,
) -> Iterator[list[MethodBench]]:
    """One bench for each way of conditioning, on the network and with the computation of `computed`."""
    if dataset is not None:
        raise UserError("a method is checked on generated images: dataset= is for teachers")
    yield [
        MethodBench(label, cls, config, conditioning, distribution_images, computed=computed)
        for label, conditioning in CONDITIONINGS.items()
    ]


# `device` starts a process, so it runs only if these pass.
NEEDED_BY_DEVICE = (
    "resumes",
    "parts",
    "cost",
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
    Check(search, ("builds",), "first"),
    Check(data, ("phases",), "first"),
    Check(steps, ("data",), "first"),
    Check(condition, ("steps",), "conditional"),
    Check(losses, ("steps", "condition")),
    Check(gradients, ("losses",)),
    Check(dropout, ("losses",), "first"),
    Check(only_yielded, ("losses",)),
    Check(teacher_untouched, ("losses",)),
    Check(attention, ("losses",), "first"),
    Check(trains, ("losses",)),
    Check(learns, ("trains",)),
    Check(randomness, ("trains",)),
    Check(deterministic, ("randomness",)),
    Check(resumes, ("deterministic", "teacher_untouched")),
    Check(parts, ("deterministic",), "first"),
    Check(cost, ("trains",)),
    Check(flops, ("trains",), "first"),
    Check(times, ("trains",), "first"),
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
