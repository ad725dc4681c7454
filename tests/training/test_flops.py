"""FLOPs: torch's formulas against counts by hand, and rows times FLOPs per row against whole training steps."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from analytic import gaussian_teacher, make_batch, make_workspace, mlp_teacher, same_weights, time, weights_of
from distillbench.diffusion.conditioning import Conditioning
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.distributions import mixture
from distillbench.diffusion.exact_denoiser import ExactDenoiser
from distillbench.diffusion.schedules import VPCosine
from distillbench.networks.architectures import ResidualMLP, UNet
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.flops import (
    NetworkFlops,
    count_flops,
    denoisers_of,
    measured_flops,
    network_flops,
    training_flops,
)
from distillbench.training.network_rows import NetworkRows
from tiny_training import METHODS


def family_flops(teacher):
    """FLOPs of one image through the teacher's network, and through a new student's."""
    parts = teacher.shape, teacher.conditioning
    return network_flops(teacher.denoiser, *parts), network_flops(teacher.student(), *parts)


W, E, P = 16, 128, 2  # width, embedding and pixels of mlp_teacher's network, which has one block
FEATURES = 64  # of the time, before its two layers
MLP_FORWARD = 2 * (FEATURES * E + E * E + P * W + E * 2 * W + W * W + W * W + W * P)


# --- one call --------------------------------------------------------------------------------------------------------


def test_a_multiply_add_is_two_flops():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: a @ b).flops == 2 * 3 * 5 * 7


def test_a_convolution_and_its_backward_pass():
    """k^2 C_in C_out multiply-adds per pixel; as many for the gradient of the weights, and for that of the input."""
    layer, x = nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 6, 6, requires_grad=True)
    forward = 2 * 2 * 36 * 9 * 3 * 8
    assert count_flops(lambda: layer(x)).flops == forward
    assert count_flops(lambda: layer(x).sum().backward()).flops == 3 * forward
    assert count_flops(lambda: layer(x.detach()).sum().backward()).flops == 2 * forward


def test_operators_without_a_formula_are_listed():
    x = torch.randn(4, 4)
    assert count_flops(lambda: x.exp() + x.view(2, 8).t().contiguous().sum()).not_counted == (
        "aten.add",
        "aten.exp",
        "aten.sum",
    )
    moved = lambda: torch.cat([x[1:].clone(), torch.zeros(1, 4)]).double().to(torch.float32).index_select(
        0, torch.arange(3) + 1)  # fmt: skip
    compared = lambda: (x > 0, x.argmax(), torch.arange(3) * 2, torch.randn(3))
    assert count_flops(moved) == count_flops(compared) == count_flops(lambda: None)
    assert count_flops(moved).not_counted == ()


# --- one image through a network -------------------------------------------------------------------------------------


def test_the_perceptron_by_hand():
    """Each m x n layer costs 2mn, and the gradients of its weights and of its input as much each."""
    teacher = mlp_teacher()
    flops = network_flops(teacher.denoiser, teacher.shape)
    assert flops.forward == MLP_FORWARD
    first = 2 * (FEATURES * E + P * W)  # the first layers of time and image, without a gradient of their input
    assert flops.backward == 2 * MLP_FORWARD - first
    through_time = 2 * (FEATURES * E + E * E + E * 2 * W)
    assert flops.backward_input == MLP_FORWARD - through_time
    assert "aten.mm" not in flops.not_counted and "aten.native_layer_norm" in flops.not_counted


class Noisy(nn.Module):
    """A network with buffers that every call changes, and dropout."""

    embedding_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5)

    def forward(self, x, time, embedding=None, c=None):
        return self.drop(self.norm(self.layer(x)))


@pytest.mark.parametrize("trained", [True, False])
def test_counting_flops_changes_nothing(trained):
    denoiser = Denoiser(Noisy(), VPCosine(), "v")
    if not trained:
        denoiser.freeze()
    denoiser(torch.randn(4, 2, 1, 1), time([0.5] * 4)).sum().backward() if trained else None
    before, counter, random = weights_of(denoiser), vars(copy.copy(denoiser.counted.counter)), torch.get_rng_state()
    gradients = [None if p.grad is None else p.grad.clone() for p in denoiser.parameters()]
    wanted = [p.requires_grad for p in denoiser.parameters()]
    flops = network_flops(denoiser, (2, 1, 1))
    assert flops.forward == 8 and flops.backward == 8 and flops.backward_input == 8
    assert same_weights(weights_of(denoiser), before) and torch.equal(torch.get_rng_state(), random)
    assert vars(denoiser.counted.counter) == counter
    assert wanted == [p.requires_grad for p in denoiser.parameters()]
    for p, gradient in zip(denoiser.parameters(), gradients, strict=True):
        assert (p.grad is None and gradient is None) or torch.equal(p.grad, gradient)


CLASSES = {
    "classes": Conditioning(3),
    "guided": Conditioning(3, 2.0),
    "drawn": Conditioning(3, 2.0, (1.0, 3.0)),
}


@pytest.mark.parametrize("name", CLASSES)
def test_conditional_denoisers(name):
    """An embedding of classes is a free look-up; that of a guidance weight has two layers."""
    blank = lambda: ResidualMLP((2, 1, 1), width=W, depth=1, classes=3)
    teacher = Teacher("t", Denoiser(blank(), VPCosine(), "v"), (2, 1, 1), "t", conditioning=CLASSES[name], blank=blank)
    own, student = family_flops(teacher)
    assert teacher.student_rows.rows == teacher.teacher_rows.rows == 0
    assert own.forward == MLP_FORWARD
    assert student.forward == MLP_FORWARD + (2 * (FEATURES * E + E * E) if name == "drawn" else 0)


def test_an_analytic_denoiser_has_no_weights():
    distribution = mixture([0.3, 0.7], [[0.5, 0.0], [-1.0, 0.2]], [[0.1, 0.2], [0.3, 0.1]])
    for denoiser in (ExactDenoiser(distribution, VPCosine()), gaussian_teacher().denoiser):
        flops = network_flops(denoiser, (2, 1, 1))
        assert flops.backward == 0 and flops.forward == network_flops(denoiser, (2, 1, 1)).forward


def test_a_unet_costs_twice_as_much_backward():
    """Except for the input of the first layer. Attention has a formula too."""
    denoiser = Denoiser(UNet((1, 8, 8), width=8, depth=1), VPCosine(), "v")
    flops = network_flops(denoiser, (1, 8, 8))
    assert 1.8 * flops.forward < flops.backward < 2.3 * flops.forward
    assert 0.8 * flops.forward < flops.backward_input < 1.3 * flops.forward
    assert not {"aten.convolution", "aten.bmm", "aten.addmm"} & set(flops.not_counted)
    assert not [name for name in flops.not_counted if "attention" in name]


# --- a training ------------------------------------------------------------------------------------------------------

BATCH = 6


def steps_of(method, folder):
    """(cost, counted FLOPs) of prepare() and one step of each phase."""
    read = (lambda n: (torch.randn(n, 2, 1, 1), None)) if method.needs_data else None
    meter = Meter(BudgetConfig(), method.teacher, "cpu")
    workspace = make_workspace(method.teacher, folder)
    workspace.meter = meter

    def train() -> None:
        method.prepare(workspace)
        for phase in range(len(method.phases())):
            method.start_phase(phase)
            for _, loss in method.train_step(make_batch(BATCH, seed=phase, read=read)):
                loss.backward()
            method.after_step()
            method.end_phase(phase, method.student)

    counted = count_flops(train)
    return meter.cost(), counted


def flops_of(cost, method):
    return training_flops(cost.networks, measured_flops(cost.networks, method.teacher, denoisers_of(method)))


def as_before(cost, teacher):
    """The sum as it was before rows were counted by kind of network: of all shipped methods it must stay the same."""
    own, student = family_flops(teacher)
    to_weights = cost.student_backward - cost.student_backward_input
    return (
        (cost.teacher_nfe - cost.stand_in_nfe) * own.forward
        + (cost.teacher_backward - cost.stand_in_backward) * own.backward_input
        + (cost.student_nfe + cost.stand_in_nfe) * student.forward
        + to_weights * student.backward
        + (cost.student_backward_input + cost.stand_in_backward) * student.backward_input
    )


@pytest.mark.parametrize("name", METHODS)
def test_rows_times_flops_per_row_equal_real_steps(name, tmp_path):
    """Exactly, except for layers outside of denoisers: embeddings of a second time or a step, and sCM's weight."""
    cls, settings = METHODS[name]
    teacher = mlp_teacher()
    method = cls(cls.Config(**settings), teacher)
    cost, counted = steps_of(method, tmp_path)
    rows = cost.teacher_nfe + cost.student_nfe
    assert rows and cost.student_backward and cost.stand_in_nfe == 0
    more = 0
    layers = 2 * (FEATURES * E + E * E)
    if name == "boot":
        share = -(-BATCH // 4)  # images of the boundary loss
        more = (BATCH + BATCH + share) * layers + (BATCH + share) * (layers + 2 * E * E)
    if name == "ctm":  # five evaluations with an embedding of s, two of them with a gradient to weights
        more = 5 * BATCH * layers + 2 * BATCH * (layers + 2 * E * E)
    if name == "dmd":  # the fake score is evaluated twice, once with a gradient
        more = 2 * BATCH * layers + BATCH * (layers + 2 * E * E)
    if name == "imm":  # two evaluations with an embedding of s, one of them with a gradient to weights
        more = 2 * BATCH * layers + BATCH * (layers + 2 * E * E)
    if name == "meanflow":  # the student, and two evaluations for its derivative
        more = 3 * BATCH * layers + BATCH * (layers + 2 * E * E)
    if name == "scm":  # 64 channels, once, with a gradient to its weights
        more = BATCH * (2 * 2 * (FEATURES * 64 + 64 * 64) + 2 * 64 * 64)
    assert counted.flops == flops_of(cost, method) + more == as_before(cost, teacher) + more
    assert (cost.teacher_backward > 0) == (name == "sid")
    assert (cost.student_backward_input > 0) == (name in ("ctm", "sid"))


@pytest.mark.parametrize("name", ["pd", "sid"])
def test_frozen_copies_cost_as_much_as_students_with_an_analytic_teacher(name, tmp_path):
    """They count as teacher but have another architecture."""
    distribution = mixture([0.3, 0.7], [[0.5, 0.0], [-1.0, 0.2]], [[0.1, 0.2], [0.3, 0.1]])
    schedule = VPCosine()
    start = mlp_teacher().denoiser
    teacher = Teacher("gmm", ExactDenoiser(distribution, schedule), (2, 1, 1), "gmm", start=start)
    cls, settings = METHODS[name]
    method = cls(cls.Config(**settings), teacher)
    cost, counted = steps_of(method, tmp_path)
    assert cost.stand_in_nfe == (2 * BATCH if name == "pd" else 0)
    assert counted.flops == flops_of(cost, method) == as_before(cost, teacher)


def test_the_sum_over_kinds_of_networks():
    teacher, student = NetworkRows("teacher", "Net", 7, 0), NetworkRows("student", "Net", 7, 7)
    flops = {teacher: NetworkFlops(1, 10, 100, 1000), student: NetworkFlops(10**4, 10**5, 10**6, 10**7)}
    rows = replace(teacher, forward=2, to_input=3, along=4), replace(student, forward=5, to_weights=6, along=7)
    assert training_flops(rows, flops) == 2 + 3 * 100 + 4 * 1000 + 5 * 10**4 + 6 * 10**5 + 7 * 10**7
