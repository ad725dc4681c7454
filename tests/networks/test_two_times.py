"""Embeddings of further inputs leave every network as it was, until they are trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from analytic import time
from distillbench import Conditioning, Teacher, UserError
from distillbench.diffusion import SCHEDULES, VPCosine
from distillbench.diffusion.denoiser import Counter, Denoiser
from distillbench.diffusion.two_times import EMBEDDED
from distillbench.networks import ScalarEmbedding, TwoTimes
from every_network import NETWORKS, denoiser, image_shape, inputs
from small_diffusers_networks import pixel_unet


def made(name: str, **settings: str) -> tuple[Denoiser, Denoiser, TwoTimes]:
    """A frozen teacher, and a student of two times that starts from it."""
    teacher = denoiser(name)
    student = teacher.copy(Counter()).requires_grad_(True)
    return teacher, student, TwoTimes(student, in_lambda=True, **settings)


SOME = ("mlp", "edm, ncsn++", "diffusers, text", "diffusers, dit")  # features of each kind
CASES = [*((name, "s") for name in NETWORKS), *((name, embeds) for name in SOME for embeds in EMBEDDED[1:])]


@pytest.mark.parametrize(("name", "embeds"), CASES)
def test_the_student_starts_as_its_teacher_for_every_second_time(name, embeds):
    teacher, _, student = made(name, embeds=embeds)
    x_t, t, s, c = inputs(name, teacher)
    f = teacher(x_t, t, c)
    lowest = teacher.schedule.t_min if embeds == "s" else 0.0  # lam is -inf at 0 on some schedules
    for second in (s, t, torch.zeros_like(s) + lowest):
        torch.testing.assert_close(student(x_t, t, second, c), f, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "embeds"), CASES)
def test_the_second_time_is_learned(name, embeds):
    teacher, _, student = made(name, embeds=embeds)
    x_t, t, s, c = inputs(name, teacher)
    output = student.target_time[-1]
    student(x_t, t, s, c).square().sum().backward()
    assert output.weight.grad is not None and output.weight.grad.abs().sum() > 0
    nn.init.normal_(output.weight, std=0.3)
    other = s + 0.3 * (t - s)
    assert not torch.allclose(student(x_t, t, s, c), student(x_t, t, other, c))


def sines(value: Tensor) -> Tensor:
    """EDM's positional features of DDPM++ with 16 channels: cos, then sin, at 1e-4^(k / 7), k = 0, ..., 7."""
    angles = value.flatten()[:, None] * 1e-4 ** (torch.arange(8) / 7)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


@pytest.mark.parametrize("schedule", ["native", "flow_matching"])
def test_what_is_embedded_on_edm_is_ln_s_over_4_or_the_difference(schedule):
    """By the features of the network (Kim et al. 2023 as released; Geng et al. 2025), also read on another schedule."""
    teacher = denoiser("edm, ddpm++")
    teacher = teacher if schedule == "native" else teacher.on(SCHEDULES[schedule]())
    s, t = teacher.schedule.t_of_lam(time([-4.0, 0.4, -2.0])), teacher.schedule.t_of_lam(time([-1.0, 0.5, 2.0]))
    for embeds, value in (("network", teacher.schedule.lam(s) / 4), ("difference", t - s)):
        student = TwoTimes(teacher, embeds=embeds)
        _, first, _, last = student.target_time
        nn.init.normal_(last.weight)
        expected = last(nn.functional.silu(first(sines(value))))
        torch.testing.assert_close(student._embedding(t, s), expected, rtol=1e-5, atol=1e-5)
        assert expected.std(dim=0).max() > 0.01


def test_what_cannot_be_embedded_is_refused():
    unknown = Denoiser(nn.Linear(2, 2), VPCosine(), "v")
    unknown.network.embedding_channels = 4
    logarithmic = Denoiser(pixel_unet(time_embedding_type="fourier"), VPCosine(), "eps")
    with pytest.raises(UserError, match=r"no embedding of a second time 'lam'.*Possible: difference, network, s"):
        TwoTimes(unknown, embeds="lam")
    with pytest.raises(UserError, match=r"features of time of a Linear are not known.*embeds=network"):
        TwoTimes(unknown, embeds="network")
    with pytest.raises(UserError, match="a PixelUNet sees the logarithm of its time, and t - s may be 0"):
        TwoTimes(logarithmic, embeds="difference")


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_with_the_guidance_weight_as_an_input_starts_as_its_teacher(name):
    """For every w, and it learns to tell them apart."""
    teacher = denoiser(name)
    x_t, t, _, c = inputs(name, teacher)
    drawn = Conditioning(2, 2.0, (1.0, 3.0))
    student = Teacher("t", teacher, image_shape(name), "t", conditioning=drawn).student().eval()
    with_w = lambda w: student(x_t, t, replace(c, w=torch.full((3, 1, 1, 1), w)))
    f = teacher(x_t, t, c)
    for w in (1.0, 3.0):
        torch.testing.assert_close(with_w(w), f, rtol=0, atol=1e-5)
    with_w(2.0).square().sum().backward()
    output = student.guidance[-1].weight
    assert output.grad is not None and output.grad.any()
    nn.init.normal_(output, std=0.3)
    assert not torch.allclose(with_w(1.0), with_w(3.0))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_index_is_an_input_of_every_network(name):
    student = denoiser(name)
    x_t, t, _, c = inputs(name, student)
    embedding, k = ScalarEmbedding(student.embedding_channels, 0, 2), torch.tensor([0, 1, 2]).view(-1, 1, 1, 1)
    torch.testing.assert_close(student(x_t, t, c, embedding(k)), student(x_t, t, c), rtol=0, atol=1e-5)
    nn.init.normal_(embedding[-1].weight, std=0.3)
    moved = (student(x_t, t, c, embedding(k)) - student(x_t, t, c, embedding(k.flip(0)))).flatten(1).norm(dim=1)
    assert moved[0] > 0 and moved[1] == 0 and moved[2] > 0


def test_an_embedding_of_a_step_index():
    """0, 1, 2 of three steps: zero at first, and any number of (B,1,1,1), also an integer."""
    embedding, k = ScalarEmbedding(8, 0, 2), torch.tensor([0, 1, 2]).view(-1, 1, 1, 1)
    assert embedding(k).shape == (3, 8) and not embedding(k).any()
    nn.init.normal_(embedding[-1].weight)
    assert len(embedding(k).unique(dim=0)) == 3
