"""An embedding of a second time leaves every network as it was, until it is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from analytic import time
from distillbench import Condition
from distillbench.diffusion import VE, VPCosine
from distillbench.diffusion.denoiser import Counter, Denoiser
from distillbench.networks import DiT, ResidualMLP, ScalarEmbedding, TwoTimes, UNet
from distillbench.networks.edm import DhariwalUNet, SongUNet
from small_diffusers_networks import dit, pixel_unet, text_unet

SIZES = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
NETWORKS = {
    "mlp": lambda: (ResidualMLP((3, 8, 8), width=16, depth=1), VPCosine(), "v"),
    "unet": lambda: (UNet((3, 8, 8), width=8, depth=1), VPCosine(), "v"),
    "dit": lambda: (DiT((3, 8, 8), width=16, depth=1), VPCosine(), "v"),
    "edm, song": lambda: (SongUNet(8, 3, 3, **SIZES), VE(), "edm"),
    "edm, adm": lambda: (DhariwalUNet(8, 3, 3, **SIZES), VE(), "edm"),
    "diffusers, pixels": lambda: (pixel_unet(), VPCosine(), "eps"),
    "diffusers, text": lambda: (text_unet(), VPCosine(), "eps"),
    "diffusers, dit": lambda: (dit(), VPCosine(), "eps"),
}


def made(name: str) -> tuple[Denoiser, Denoiser, TwoTimes]:
    """A frozen teacher, and a student of two times that starts from it."""
    torch.manual_seed(0)
    network, schedule, prediction = NETWORKS[name]()
    for weight in network.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    teacher = Denoiser(network, schedule, prediction).freeze()
    student = teacher.copy(Counter()).requires_grad_(True)
    return teacher, student, TwoTimes(student, in_lambda=True)


def inputs(name: str, teacher: Denoiser) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Condition]:
    generator, schedule = torch.Generator().manual_seed(1), teacher.schedule
    channels = 4 if name in ("diffusers, text", "diffusers, dit") else 3
    t, s = schedule.t_of_lam(time([-1.0, 0.5, 2.0])), schedule.t_of_lam(time([-4.0, 0.4, -2.0]))
    c = Condition(torch.tensor([0, 1, 0]), text=torch.randn(3, 5, 6, generator=generator))
    return torch.randn(3, channels, 8, 8, generator=generator), t, s, c


@pytest.mark.parametrize("name", NETWORKS)
def test_the_student_starts_as_its_teacher_for_every_second_time(name):
    teacher, _, student = made(name)
    x_t, t, s, c = inputs(name, teacher)
    f = teacher(x_t, t, c)
    for second in (s, t, torch.zeros_like(s) + teacher.schedule.t_min):
        torch.testing.assert_close(student(x_t, t, second, c), f, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_second_time_is_learned(name):
    teacher, _, student = made(name)
    x_t, t, s, c = inputs(name, teacher)
    output = student.target_time[-1]
    student(x_t, t, s, c).square().sum().backward()
    assert output.weight.grad is not None and output.weight.grad.abs().sum() > 0
    nn.init.normal_(output.weight, std=0.3)
    other = s + 0.3 * (t - s)
    assert not torch.allclose(student(x_t, t, s, c), student(x_t, t, other, c))


def test_an_embedding_of_a_step_index():
    """0, 1, 2 of three steps: zero at first, and any number of (B,1,1,1), also an integer."""
    embedding, k = ScalarEmbedding(8, 0, 2), torch.tensor([0, 1, 2]).view(-1, 1, 1, 1)
    assert embedding(k).shape == (3, 8) and not embedding(k).any()
    nn.init.normal_(embedding[-1].weight)
    assert len(embedding(k).unique(dim=0)) == 3
