"""Level 3: networks trained on a two-dimensional mixture, against the teacher's own chain (specification 9.4).

Minutes a method, so it is left out unless it is asked for: ``pytest -m level3 -s`` prints the figures. Every student is
a small MLP that starts from a fitted denoiser; the teacher is exact, and DDIM with 16 steps is the answer to learn.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor, nn

from distillbench.builtin.analytic import GmmTeacher
from distillbench.builtin.gmm import Gmm
from distillbench.builtin.trained import DenoisingTraining, TeacherTraining
from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition, Conditioning
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.distributions import mixture
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import Solver
from distillbench.diffusion.schedules import VPCosine
from distillbench.networks.architectures import ResidualMLP
from distillbench.system.progress import Progress, Step
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.build import build_method
from distillbench.training.loop import Loop, train
from distillbench.training.method import Method
from distillbench.training.pairs import Workspace
from distillbench_boot import Boot
from distillbench_cm import ConsistencyDistillation
from distillbench_ctm import ConsistencyTrajectory
from distillbench_direct import Direct
from distillbench_dmd import DistributionMatching
from distillbench_ect import EasyConsistencyTuning
from distillbench_imm import InductiveMomentMatching
from distillbench_lcm import LatentConsistency
from distillbench_meanflow import MeanFlow
from distillbench_moment import MomentMatching
from distillbench_pd import ProgressiveDistillation
from distillbench_reflow import Reflow
from distillbench_scm import ContinuousConsistency
from distillbench_sid import ScoreIdentityDistillation
from distillbench_tract import Tract
from level3_tolerances import (
    CONTINUOUS_TOLERANCES,
    DISTRIBUTION_TOLERANCES,
    GUIDED_TOLERANCES,
    SEVERAL_STEPS_TOLERANCES,
    TOLERANCES,
)

pytestmark = pytest.mark.level3

N, BATCH, UPDATES, FIT_UPDATES, SAMPLES = 16, 512, 6000, 2000, 10_000
DISTRIBUTION = mixture([0.3, 0.5, 0.2], [[-1.5, 0.3], [0.4, -0.8], [1.2, 1.1]], [[0.25], [0.35], [0.2]])
COMMON = {"lr": 2e-3, "lr_warmup": 0.0, "ema_halflife_kimg": 177.0}  # .998 an update of 512 images

# the same grid as the others: all of the cosine schedule's range, uniform in t
CM = {"steps": N + 1, "times": "uniform", "solver": "ddim", "sigma_min": 4.6e-5, "sigma_max": 22_000.0}
CM |= {"sigma_data": 1.0, "weight": "uniform", "lr_decay": "cosine"}

# name: the method and its settings
METHODS = {
    "direct": (Direct, {"steps": N, "online": True, "lr_decay": "cosine"}),
    "pd": (ProgressiveDistillation, {"steps": N, "weight": "snr_plus_one", "lr_decay": "cosine"}),
    "cm": (ConsistencyDistillation, CM),
    "cm_4_segments": (ConsistencyDistillation, CM | {"segments": 4}),
    "tract": (Tract, {"steps": [N, 1], "lr_decay": "cosine"}),
    "boot": (Boot, {"steps": N, "target": "euler", "boundary_share": 1.0, "lr_decay": "cosine"}),
}

# Methods in continuous time learn the exact map, not a chain. That of ctm is a chain of 17 steps of Heun, close to it.
CONTINUOUS = {
    "ect": (EasyConsistencyTuning, {}),
    "ect from the teacher": (EasyConsistencyTuning, {"source": "teacher"}),
    "ctm": (ConsistencyTrajectory, {"lr": 1e-3}),
    "ctm, local": (ConsistencyTrajectory, {"lr": 1e-3, "compare": "local"}),
    "scm": (ContinuousConsistency, {"sigma_data": 1.0, "lr": 1e-3}),
    "meanflow": (MeanFlow, {"lr": 1e-3}),
    "meanflow from data": (MeanFlow, {"lr": 1e-3, "source": "data"}),
    "reflow": (Reflow, {"lr": 1e-3}),
    "reflow, uniform times": (Reflow, {"lr": 1e-3, "times": "uniform"}),
}


# Methods that match the distribution, and have no map to compare: the numbers of evaluations that are tested.
DISTRIBUTIONS: dict[str, tuple[type[Method], dict, tuple[int, ...]]] = {
    # levels twice those of EDM, as the distribution is twice as wide
    "sid": (ScoreIdentityDistillation, {"lr": 1e-3, "sigma_init": 5.0, "sigma_data": 1.0}, (1,)),
    "imm": (InductiveMomentMatching, {"sigma_data": 1.0}, (1, 8)),
    "imm, without i = j": (
        InductiveMomentMatching,
        {"sigma_data": 1.0, "diagonal": False, "group_size": 32},
        (1, 8),
    ),
    "moment, K = 1": (MomentMatching, {"steps": 1}, (1,)),
    "moment, K = 4": (MomentMatching, {"steps": 4}, (4,)),
    "dmd": (DistributionMatching, {"lr": 1e-3}, (1,)),
    "dmd, four steps": (DistributionMatching, {"lr": 1e-3, "levels": [80.0, 4.0, 1.0, 0.3]}, (1, 2, 4)),
    "dmd, Diff-Instruct": (
        DistributionMatching,
        {"lr": 1e-3, "weight": "one", "fake_updates": 1, "times": "lognormal", "margin": 0.0, "levels": [2.5]}
        | {"beta1": 0.0},
        (1,),
    ),
}


class Plane(Gmm):
    """The distribution of the specification, which reaches beyond [-1, 1]: nothing is clipped here."""

    def __init__(self) -> None:
        self.distribution, self.shape, self.classes = DISTRIBUTION, DISTRIBUTION.shape, DISTRIBUTION.components


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Teacher:
    folder = tmp_path_factory.mktemp("level3")
    config = GmmTeacher.Config(network="mlp", width=160, depth=2, fit_images=FIT_UPDATES * BATCH)
    return GmmTeacher(config, Plane(), folder, "cpu").load(Progress(None))


def trained(cls, settings: dict, teacher: Teacher, folder: Path, seed: int = 0):
    torch.manual_seed(seed)
    return trained_by(cls(cls.Config(**COMMON | settings), teacher), folder, seed)


def trained_by(
    method: Method, folder: Path, seed: int = 0, updates: int = UPDATES, batch: int = BATCH, draw=None
) -> Method:
    cls, teacher = type(method), method.teacher
    meter = Meter(BudgetConfig(images=updates * batch), teacher, "cpu")
    workspace = Workspace(teacher, meter, folder, "cpu", seed, Progress(None))
    generator = torch.Generator().manual_seed(seed)

    def read(size: int) -> tuple[Tensor, Tensor | None]:
        return draw(size, generator) if draw else (DISTRIBUTION.draw(size, generator)[0].float(), None)

    train(
        method,
        method.config,
        workspace,
        read if cls.reads_data(method.config) else None,
        Loop(batch),
        Step(lambda fraction, note: None),
    )
    return method


@pytest.mark.parametrize("name", METHODS)
def test_students_learn_the_chain_of_the_teacher(name, teacher, tmp_path):
    cls, settings = METHODS[name]
    rmse_allowed, median_allowed = TOLERANCES[name]
    start = time.perf_counter()
    method = trained(cls, settings, teacher, tmp_path)
    seconds = time.perf_counter() - start
    eps = torch.randn(SAMPLES, 2, 1, 1, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        chain = Solver.parse("ddim").solve(teacher.denoise, teacher.schedule, eps, N)
        fine = Solver.parse("dpmpp_2m/uniform_lambda").solve(teacher.denoise, teacher.schedule, eps, 512)
        x_0 = method.sample(FixedNoise([eps]), settings.get("segments", 1), UNCONDITIONAL)
    distance = (x_0 - chain).flatten(1).norm(dim=1)  # in the plane, as in the specification
    rmse, median = distance.square().mean().sqrt().item(), distance.median().item()
    exact = (x_0 - fine).flatten(1).norm(dim=1).square().mean().sqrt().item()
    std, std_of_chain = x_0.std(dim=0).flatten(), chain.std(dim=0).flatten()
    print(
        f"\n{name:7s} RMSE to the chain {rmse:.4f}, median {median:.4f}, RMSE to the exact map {exact:.4f}, "
        f"std {std[0]:.3f} {std[1]:.3f} (chain {std_of_chain[0]:.3f} {std_of_chain[1]:.3f}), {seconds:.0f} s"
    )
    assert rmse < rmse_allowed and median < median_allowed
    torch.testing.assert_close(std, std_of_chain, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_students_in_continuous_time_learn_the_exact_map(name, teacher, tmp_path):
    """The teacher's trajectory, from 512 steps of a second-order solver on the teacher's own schedule."""
    cls, settings = CONTINUOUS[name]
    config = cls.Config(**COMMON | settings)
    method = build_method(cls, config, teacher, 0, "cpu")
    method = trained_by(method, tmp_path)
    eps = torch.randn(SAMPLES, 2, 1, 1, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        fine = Solver.parse("dpmpp_2m/uniform_lambda").solve(teacher.denoise, teacher.schedule, eps, 512)
    std = DISTRIBUTION.moments()[1].diagonal().mean().sqrt().item()
    for nfe, allowed in ({1: CONTINUOUS_TOLERANCES[name]} | SEVERAL_STEPS_TOLERANCES.get(name, {})).items():
        with torch.no_grad():
            x_0 = method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL)
        rmse = (x_0 - fine).square().mean().sqrt().item() / std
        print(f"\n{name:18s} NFE {nfe}: RMSE to the exact map {rmse:.4f} std")
        assert rmse < allowed


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_students_learn_the_distribution(name, teacher, tmp_path):
    """The Kolmogorov-Smirnov distance to the data, of the worse coordinate; two samples of the data have .016."""
    cls, settings, evaluations = DISTRIBUTIONS[name]
    method = build_method(cls, cls.Config(**COMMON | settings), teacher, 0, "cpu")
    method = trained_by(method, tmp_path)
    x_0 = DISTRIBUTION.draw(SAMPLES, torch.Generator().manual_seed(98))[0].flatten(1)
    generator = torch.Generator().manual_seed(99)
    draws = [torch.randn(SAMPLES, 2, 1, 1, generator=generator) for _ in range(max(evaluations))]
    for nfe in evaluations:
        with torch.no_grad():
            x = method.sample(FixedNoise(draws), nfe, UNCONDITIONAL).flatten(1)
        distance = max(ks_2samp(x[:, k], x_0[:, k]).statistic for k in range(2))
        std = x.std(dim=0).tolist()
        print(f"\n{name:18s} NFE {nfe}: KS {distance:.4f}, std {std[0]:.3f} {std[1]:.3f}")
        assert distance < DISTRIBUTION_TOLERANCES[name][nfe]


# --- a guided teacher of two classes ---------------------------------------------------------------------------------

# They share the middle component of DISTRIBUTION, with half of its weight each.
SHARE = 0.55  # of class 0
CLASSES = (
    mixture([0.3 / SHARE, 0.25 / SHARE], [[-1.5, 0.3], [0.4, -0.8]], [[0.25], [0.35]]),
    mixture([0.25 / (1 - SHARE), 0.2 / (1 - SHARE)], [[0.4, -0.8], [1.2, 1.1]], [[0.35], [0.2]]),
)


class ClassNetwork(nn.Module):
    """E[x_0 | x_t] of class 0, of class 1, and of both (label 2): exact."""

    embedding_channels = 0

    def __init__(self, schedule: VPCosine) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None, c: Condition) -> Tensor:
        t = time.view(-1, 1, 1, 1)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        answers = [law.denoise(x, alpha, sigma, None) for law in (*CLASSES, DISTRIBUTION)]
        return torch.stack(answers)[c.labels, torch.arange(len(x))]


def draw_classes(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = (torch.rand(size, generator=generator) > SHARE).long()
    both = torch.stack([law.draw(size, generator)[0].float() for law in CLASSES])
    return both[labels, torch.arange(size)], labels


@pytest.fixture(scope="module")
def guided_teacher(tmp_path_factory) -> Teacher:
    """Training draws w from 1 to 3. Students start from a fitted denoiser, as those of the other teacher do."""
    torch.manual_seed(0)
    schedule = VPCosine()
    start = Denoiser(ResidualMLP((2, 1, 1), width=160, depth=2, classes=2), schedule, "v")
    exact = Denoiser(ClassNetwork(schedule), schedule, "x0")
    teacher = Teacher("two classes", exact, (2, 1, 1), "two classes", conditioning=Conditioning(2), start=start)
    config = TeacherTraining(ema_halflife_kimg=FIT_UPDATES * BATCH / 10_000)
    fitted = trained_by(
        DenoisingTraining(config, teacher), tmp_path_factory.mktemp("fit"), 0, FIT_UPDATES, BATCH, draw_classes
    )
    start.load_state_dict(fitted.student.state_dict())
    return teacher.conditioned(Conditioning(2, 1.0, (1.0, 3.0)))


@pytest.mark.parametrize("segments", GUIDED_TOLERANCES)
def test_a_student_learns_the_guided_chain_for_every_weight(segments, guided_teacher, tmp_path):
    """One student for both classes and all w, against the guided teacher's DDIM with 50 steps (specification 40.2)."""
    settings = {"loss": "l2", "segments": segments, "lr_decay": "cosine", "ema_halflife_kimg": 88.0}
    config = LatentConsistency.Config(**COMMON | settings)
    method = build_method(LatentConsistency, config, guided_teacher, 0, "cpu")
    method = trained_by(method, tmp_path, 0, 3000, 256, draw_classes)
    eps = torch.randn(8000, 2, 1, 1, generator=torch.Generator().manual_seed(99))
    std = DISTRIBUTION.moments()[1].diagonal().mean().sqrt().item()
    chain_solver, fine_solver = Solver.parse("ddim/trailing"), Solver.parse("dpmpp_2m/uniform_lambda")
    for label in (0, 1):
        for w, allowed in GUIDED_TOLERANCES[segments].items():
            c = Condition(torch.full((8000,), label), torch.full((8000, 1, 1, 1), w))
            f = lambda x_t, t, c=c: guided_teacher.denoise(x_t, t, c)
            with torch.no_grad():
                chain = chain_solver.solve(f, guided_teacher.schedule, eps, 50)
                fine = fine_solver.solve(f, guided_teacher.schedule, eps, 256)
                x_0 = method.sample(FixedNoise([eps]), segments, c)
            rmse, exact, own = ((a - b).square().mean().sqrt().item() / std for a, b in (
                (x_0, chain), (x_0, fine), (chain, fine),
            ))  # fmt: skip
            print(f"\nlcm, {segments} segments, class {label}, w {w}: RMSE to DDIM-50 {rmse:.3f} std, to the exact map "
                  f"{exact:.3f} (the chain's {own:.3f})", end="")  # fmt: skip
            assert rmse < allowed
