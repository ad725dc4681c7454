"""Embeddings of further inputs leave every network as it was, until they are trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from distillbench import Conditioning, Teacher
from distillbench.diffusion.denoiser import Counter, Denoiser
from distillbench.networks import ScalarEmbedding, TwoTimes
from every_network import NETWORKS, denoiser, image_shape, inputs


def made(name: str) -> tuple[Denoiser, Denoiser, TwoTimes]:
    """A frozen teacher, and a student of two times that starts from it."""
    teacher = denoiser(name)
    student = teacher.copy(Counter()).requires_grad_(True)
    return teacher, student, TwoTimes(student, in_lambda=True)


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
