"""A distribution with an exact denoiser and map, and a teacher that is exact on it: what `matches` compares with.

| symbol | meaning                          | shape                |
|--------|----------------------------------|----------------------|
| x_0    | images                           | (B,C,H,W) in [-1, 1] |
| t      | time                             | (B,1,1,1) float64    |
| f      | exact denoiser, E[x_0 given x_t] | (B,C,H,W)            |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.denoiser import TARGETS, Denoiser, implied_eps
from distillbench.diffusion.distributions import GaussianMixture, mixture
from distillbench.diffusion.exact_denoiser import ExactDenoiser
from distillbench.diffusion.schedules import VPCosine
from distillbench.networks.architectures import ResidualMLP
from distillbench.teachers.teacher import Teacher
from distillbench.testing.method_bench import SILENT, weights_of, workspace_of
from distillbench.training.budget import BudgetConfig
from distillbench.training.loop import Loop, train
from distillbench.training.method import Batch, Method, MethodConfig, Read

FIT_IMAGES, FIT_BATCH = 75_000, 256  # for the weights that students of the exact teacher start from


class Fit(Method):
    """Trains a student to be the exact denoiser, as v: stands in for the weights of a trained teacher.

    L = E | v(x_t, t) - (alpha_t eps_f - sigma_t f) |^2,   eps_f = (x_t - alpha_t f) / sigma_t
    """

    name, paper, needs_data = "fit", "none: regression on the exact denoiser", True
    Config = MethodConfig

    def train_step(self, batch: Batch) -> Iterator[tuple[nn.Module, Tensor]]:
        student, schedule, t = self.student, self.teacher.schedule, batch.uniform()
        assert isinstance(student, Denoiser)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x_t = alpha * batch.x_0 + sigma * batch.noise()
        f = self.teacher.denoise(x_t, t)
        target = TARGETS["v"](f, implied_eps(x_t, f, alpha, sigma), alpha, sigma)
        yield student, (student.output(x_t, t) - target).square().mean()

    def sample(self, noise: Callable[[int], Tensor], nfe: int, c: Condition) -> Tensor:
        raise NotImplementedError("only its weights are used")


@cache
def exact_distribution() -> GaussianMixture:
    """Two modes in one dimension, where the noise-to-data map is known. Its std is .51; 99 % lie in [-1, 1]."""
    return mixture([0.35, 0.65], [[-0.55], [0.4]], [[0.2], [0.25]])


def draws(seed: int) -> Read:
    """read(n): n images of the exact distribution, without labels."""
    generator = torch.Generator().manual_seed(seed)
    return lambda size: (exact_distribution().draw(size, generator)[0].to(torch.get_default_dtype()), None)


def exact_teacher() -> Teacher:
    """The exact denoiser of the distribution; students start from a network that is fitted to it."""
    teacher = _unfitted_teacher()
    assert teacher.start is not None
    teacher.start.load_state_dict(_fitted_weights())
    return teacher


def _unfitted_teacher() -> Teacher:
    distribution, schedule = exact_distribution(), VPCosine()
    torch.manual_seed(0)
    blank = lambda: ResidualMLP(distribution.shape, width=64, depth=1)
    start = Denoiser(blank(), schedule, "v")
    return Teacher(
        "exact", ExactDenoiser(distribution, schedule), distribution.shape, "exact", start=start, blank=blank
    )


@cache
def _fitted_weights() -> dict[str, Tensor]:
    fit = Fit(MethodConfig(lr=2e-3, ema_halflife_kimg=1.0), _unfitted_teacher())
    train(
        fit, fit.config, workspace_of(fit, Path(), BudgetConfig(images=FIT_IMAGES)), draws(0), Loop(FIT_BATCH), SILENT
    )
    return weights_of(fit.student)
