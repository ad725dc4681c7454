"""A teacher of a Gaussian whose students see time through low frequencies, as continuous-time methods need."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from analytic import VARIANCE, column, gaussian_images, gaussian_map, gaussian_teacher, make_batch, make_workspace
from distillbench.diffusion import UNCONDITIONAL, VPCosine, time_like, x_at_t_max
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.noise import FixedNoise
from distillbench.networks import ResidualMLP
from distillbench.system.progress import Step
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig
from distillbench.training.loop import Loop, train
from distillbench.training.method import Method

FREQUENCY = 5.0


def smooth_teacher() -> Teacher:
    """The exact denoiser of the tests' Gaussian; students start from a small network with random weights."""
    torch.manual_seed(0)
    network, exact = ResidualMLP((2, 1, 1), width=64, depth=2), gaussian_teacher()
    network.time[0].frequencies.clamp_(max=FREQUENCY)
    start = Denoiser(network, VPCosine(), "v")
    return Teacher("gaussian", exact.denoiser, exact.shape, "smooth", start=start)


def map_errors(method: Method, nfe: int) -> float:
    """RMSE of one-noise samples to the closed form's, in standard deviations of the images."""
    eps, schedule = make_batch(2000, seed=7).noise(), method.teacher.schedule
    T, end = time_like(eps, schedule.t_max), time_like(eps, schedule.t_min)
    exact: Tensor = gaussian_map(schedule, x_at_t_max(schedule, eps), T, end)
    with torch.no_grad():
        x_0 = method.sample(FixedNoise([eps, make_batch(2000, seed=8).noise()]), nfe, UNCONDITIONAL)
    return ((x_0 - exact) / column(VARIANCE).sqrt()).square().mean().sqrt().item()


def trained(method: Method, folder: Path, steps: int, batch: int = 256) -> Method:
    images = gaussian_images()
    workspace = make_workspace(method.teacher, folder, BudgetConfig(images=steps * batch))
    train(method, method.config, workspace, images, Loop(batch), Step(lambda fraction, note: None))
    return method
