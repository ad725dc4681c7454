"""Parameterisations, the one denoiser type, its copies and counters; and the analytic teachers of these tests."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from analytic import CENTRES, SPREADS, WEIGHTS, close, gaussian_teacher, mixture_teacher, mlp_teacher, schedules, time
from distillbench.denoiser import PREDICTIONS, TARGETS, Counter, Denoiser, implied_eps
from distillbench.schedules import SCHEDULES, FlowMatching, VPCosine, VPLinear

pytestmark = pytest.mark.usefixtures("float64")


class Says(nn.Module):
    """A network with a fixed answer, which remembers what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x, t, embedding=None):
        self.asked = x, t, embedding
        return self.answer


@pytest.mark.parametrize("prediction", sorted(PREDICTIONS))
@pytest.mark.parametrize("name", schedules())
def test_round_trip(name, prediction):
    """A network that outputs its target exactly gives f = x_0, eps^ = eps and x_t = alpha f + sigma eps^."""
    schedule = SCHEDULES[name]()
    t = time(torch.linspace(schedule.t_min, schedule.t_max, 9, dtype=torch.float64)[1:-1])
    x_0, eps = torch.randn(2, 7, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t = alpha * x_0 + sigma * eps
    f = Denoiser(Says(TARGETS[prediction](x_0, eps, alpha, sigma)), schedule, prediction)(x_t, t)
    eps_hat = implied_eps(x_t, f, alpha, sigma)
    close(f, x_0, atol=1e-10)
    close(alpha * f + sigma * eps_hat, x_t, atol=1e-12)
    close(sigma * eps_hat, sigma * eps, atol=1e-10)


def test_every_prediction_has_a_target():
    assert set(PREDICTIONS) == set(TARGETS) == {"eps", "x0", "v", "flow"}


def test_targets_are_velocities_of_the_forward_process():
    """v = dx/dtheta on the variance-preserving circle, u = dx/dt on the straight line: by central differences."""
    x_0, eps = torch.tensor(0.7), torch.tensor(-1.3)
    h = 1e-6
    circle = VPLinear()  # its own t is not the angle: only alpha and sigma matter
    alpha, sigma = circle.alpha(torch.tensor(0.3)), circle.sigma(torch.tensor(0.3))
    theta = torch.atan2(sigma, alpha)
    x = lambda angle: torch.cos(angle) * x_0 + torch.sin(angle) * eps
    v = (x(theta + h) - x(theta - h)) / (2 * h)
    close(TARGETS["v"](x_0, eps, alpha, sigma), v, rtol=1e-8)
    line, t = FlowMatching(), torch.tensor(0.3)
    x = lambda at: line.alpha(at) * x_0 + line.sigma(at) * eps
    u = (x(t + h) - x(t - h)) / (2 * h)
    close(TARGETS["flow"](x_0, eps, line.alpha(t), line.sigma(t)), u, rtol=1e-8)
    assert TARGETS["eps"](x_0, eps, alpha, sigma) is eps and TARGETS["x0"](x_0, eps, alpha, sigma) is x_0


def test_network_gets_one_time_an_image_in_the_image_dtype():
    network = Says(torch.zeros(3, 2, 1, 1))
    x, t, embedding = torch.randn(3, 2, 1, 1).float(), time([0.1, 0.2, 0.3]), torch.randn(3, 4)
    Denoiser(network, VPCosine(), "x0")(x, t, embedding)
    asked_x, asked_t, asked_embedding = network.asked
    assert asked_x is x and asked_embedding is embedding
    assert asked_t.shape == (3,) and asked_t.dtype is torch.float32
    assert torch.equal(asked_t, t.flatten().float())


# --- copies and counters ---------------------------------------------------------------------------------------------


def test_counter_counts_rows_of_everything_that_shares_it():
    counter = Counter()
    denoiser = Denoiser(Says(torch.zeros(5, 2, 1, 1)), VPCosine(), "x0", counter)
    x, t = torch.zeros(5, 2, 1, 1), time([0.5] * 5)
    denoiser(x, t)
    denoiser.output(x, t)
    copy.deepcopy(denoiser)(x, t)  # a copy of a network is charged to the same account
    assert counter.rows == 15
    other = Counter()
    denoiser.copy(other)(x, t)
    assert (counter.rows, other.rows) == (15, 5)


def test_teacher_and_students_have_separate_accounts():
    teacher = mlp_teacher()
    x, t = torch.zeros(4, 2, 1, 1), time([0.5] * 4)
    teacher.denoise(x, t)
    teacher.deputy()(x, t)
    assert (teacher.teacher_rows.rows, teacher.student_rows.rows) == (8, 0)
    teacher.student()(x, t)
    copy.deepcopy(teacher.student())(x, t)
    assert (teacher.teacher_rows.rows, teacher.student_rows.rows) == (8, 8)


def test_students_start_as_the_teacher_and_have_weights_of_their_own():
    teacher = mlp_teacher()
    x, t = torch.randn(4, 2, 1, 1), time([0.1, 0.4, 0.7, 1.0])
    before = teacher.denoise(x, t)
    student, deputy = teacher.student(), teacher.deputy()
    assert torch.equal(student(x, t), before) and torch.equal(deputy(x, t), before)
    assert all(p.requires_grad for p in student.parameters()) and student.training
    assert not any(p.requires_grad for p in deputy.parameters()) and not deputy.training
    with torch.no_grad():
        for parameter in [*student.parameters(), *deputy.parameters()]:
            parameter.add_(1.0)
    assert torch.equal(teacher.denoise(x, t), before)
    assert not torch.allclose(student(x, t), before)


def test_teacher_is_frozen_but_gradients_flow_to_its_input():
    teacher = mlp_teacher()
    x = torch.randn(4, 2, 1, 1, requires_grad=True)
    teacher.denoise(x, time([0.5] * 4)).sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0
    assert all(p.grad is None and not p.requires_grad for p in teacher.denoiser.parameters())
    assert not teacher.denoiser.training


# --- the teachers of these tests -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules())
@pytest.mark.parametrize("t", [0.05, 0.4, 0.9])
def test_analytic_teachers_are_posterior_means(name, t):
    """E[x_0 | x_t] by quadrature of Bayes' rule, for the mixture and for a Gaussian."""
    schedule = SCHEDULES[name]()
    alpha, sigma = schedule.alpha(time(t)).item(), schedule.sigma(time(t)).item()
    deviation = lambda x, m, s: math.exp(-0.5 * ((x - m) / s) ** 2) / s
    laws = {
        "mixture": lambda x: sum(w * deviation(x, m, s) for w, m, s in zip(WEIGHTS, CENTRES, SPREADS, strict=True)),
        "gaussian": lambda x: deviation(x, 0.5, 0.6),
    }
    teachers = {"mixture": mixture_teacher(schedule), "gaussian": gaussian_teacher(schedule, (0.5,), (0.36,))}
    for law, density in laws.items():
        for x_t in (-1.1, 0.2, 0.9):
            likelihood = lambda x, y=x_t: math.exp(-0.5 * ((y - alpha * x) / sigma) ** 2)
            points = sorted({*CENTRES, float(np.clip(x_t / alpha, -4, 4))})
            integral = lambda g: quad(g, -6, 6, points=points, limit=400, epsabs=1e-14)[0]  # noqa: B023
            below = integral(lambda x: density(x) * likelihood(x))  # noqa: B023
            above = integral(lambda x: x * density(x) * likelihood(x))  # noqa: B023
            f = teachers[law].denoise(torch.full((1, 1, 1, 1), x_t), time(t)).item()
            assert f == pytest.approx(above / below, abs=1e-8)
