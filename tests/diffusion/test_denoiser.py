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
from distillbench.diffusion.conditioning import Condition, Conditioning
from distillbench.diffusion.denoiser import PREDICTIONS, TARGETS, Counter, Denoiser, implied_eps
from distillbench.diffusion.schedules import SCHEDULES, VE, FlowMatching, VPCosine, VPLinear
from distillbench.teachers.teacher import Teacher

pytestmark = pytest.mark.usefixtures("float64")


class Says(nn.Module):
    """A network with a fixed answer, which remembers what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x, t, embedding, c):
        self.asked = x, t, embedding, c.labels
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
    assert set(PREDICTIONS) == set(TARGETS) == {"eps", "x0", "v", "flow", "edm"}


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
    labels = torch.tensor([2, 0, 1])
    Denoiser(network, VPCosine(), "x0")(x, t, Condition(labels), embedding)
    asked_x, asked_t, asked_embedding, asked_labels = network.asked
    assert asked_labels is labels
    assert asked_x is x and asked_embedding is embedding
    assert asked_t.shape == (3,) and asked_t.dtype is torch.float32
    assert torch.equal(asked_t, t.flatten().float())


def test_edm_s_network_is_read_as_in_its_paper():
    """Karras et al. (2022), table 1: D = c_skip x + c_out F(c_in x, ln(sigma) / 4); on any schedule in x^."""
    F = lambda x, time: torch.sin(3 * x + time.view(-1, 1, 1, 1))

    class Network(nn.Module):
        def forward(self, x, time, embedding, c):
            return F(x, time)

    x = torch.randn(5, 2, 1, 1)
    s = time([0.003, 0.1, 1.0, 7.0, 70.0])
    D = 0.25 / (s**2 + 0.25) * x + s * 0.5 / (s**2 + 0.25).sqrt() * F(x / (s**2 + 0.25).sqrt(), s.log() / 4)
    close(Denoiser(Network(), VE(), "edm")(x, s), D, rtol=1e-12)
    for schedule in (VPCosine(), VPLinear()):
        t = schedule.t_of_lam(s.log().clamp(min=-4))
        level = schedule.noise_level(t)
        again = Denoiser(Network(), VE(), "edm")(x, level)
        close(Denoiser(Network(), schedule, "edm")(schedule.alpha(t) * x, t), again, rtol=1e-9)


@pytest.mark.parametrize("ours", schedules())
@pytest.mark.parametrize("theirs", schedules())
def test_a_teacher_of_one_schedule_serves_another_at_equal_snr(ours, theirs):
    """The exact denoiser of a Gaussian, read on another schedule, is the exact denoiser written for that schedule."""
    schedule = SCHEDULES[ours]()
    read = gaussian_teacher(SCHEDULES[theirs]()).on(schedule)
    low, high = (read.schedule.lam(time(t)) for t in (read.schedule.t_min, read.schedule.t_max))
    native = read.denoiser.native
    assert native.lam(time(native.t_min)) <= low + 1e-9 and high - 1e-9 <= native.lam(time(native.t_max))
    t = time(torch.linspace(read.schedule.t_min, read.schedule.t_max, 7, dtype=torch.float64))
    x_t = schedule.alpha(t) * 0.3 + schedule.sigma(t) * torch.randn(7, 2, 1, 1)
    close(read.denoise(x_t, t), gaussian_teacher(schedule).denoise(x_t, t), rtol=1e-6, atol=1e-7)


def test_what_is_read_on_another_schedule_is_the_same_network_and_account():
    teacher = mlp_teacher()
    read = teacher.on(VE())
    x, t = torch.randn(4, 2, 1, 1), time([0.01, 0.5, 3.0, 80.0])
    read.denoise(x, t)
    assert read.denoiser.network is teacher.denoiser.network and teacher.teacher_rows.rows == 4
    student = read.student()
    assert torch.equal(student(x, t), read.denoise(x, t)) and read.student_rows is teacher.student_rows
    assert student.schedule.t_max == 80.0 and student.network is not teacher.denoiser.network
    native = teacher.schedule
    s = native.t_of_lam(t.log())
    close(read.denoise(x, t), teacher.denoise(native.alpha(s) * x, s), rtol=1e-10)


# --- guidance --------------------------------------------------------------------------------------------------------


class ClassMeans(nn.Module):
    """f for x_0 ~ N(m_label, v): three classes, and their mixture, broadened, for no class."""

    embedding_channels = 8
    means = torch.tensor([-1.0, 0.2, 1.5, 0.4], dtype=torch.float64)

    def forward(self, x, t, embedding, c):
        labels = c.labels
        alpha, sigma = VPCosine().alpha(time(t)), VPCosine().sigma(time(t))
        m, v = self.means[labels].view(-1, 1, 1, 1), torch.where(labels == 3, 2.0, 0.25).view(-1, 1, 1, 1)
        return m + alpha * v / (alpha**2 * v + sigma**2) * (x - alpha * m)


def conditional_teacher(**conditioning) -> Teacher:
    conditioning = Conditioning(3, **conditioning)
    return Teacher("classes", Denoiser(ClassMeans(), VPCosine(), "x0"), (1, 1, 1), "x", conditioning=conditioning)


@pytest.mark.parametrize("w", [0.0, 0.5, 1.0, 3.0])
def test_guidance_in_imagen_s_convention(w):
    """f_0 + w (f_c - f_0): w = 0 is unconditional, w = 1 conditional; the same as Ho & Salimans with w - 1."""
    teacher = conditional_teacher(w=w)
    labels, x, t = torch.tensor([0, 1, 2, 2]), torch.randn(4, 1, 1, 1), time([0.2, 0.5, 0.8, 1.0])
    f_c = teacher.denoiser(x, t, Condition(labels))
    f_0 = teacher.denoiser(x, t, Condition(torch.full((4,), 3)))
    before = teacher.teacher_rows.rows
    f_w = teacher.denoise(x, t, Condition(labels, torch.full((4, 1, 1, 1), w)))
    assert teacher.teacher_rows.rows - before == 8  # two evaluations an image
    close(f_w, f_c + (w - 1) * (f_c - f_0), atol=1e-14)
    close(teacher.denoise(x, t, Condition(labels)), f_c)  # no w, no guidance: one evaluation
    assert teacher.teacher_rows.rows - before == 12


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "edm"])
def test_guidance_commutes_with_the_parameterisation(prediction):
    """Guiding f is guiding the network's own output, for each of its affine parameterisations (specification 1.6)."""
    schedule, x, t = VPCosine(), torch.randn(3, 1, 1, 1), time([0.2, 0.5, 0.9])
    out_c, out_0, w = torch.randn(3, 1, 1, 1), torch.randn(3, 1, 1, 1), torch.tensor([1.0, 3.0, 7.5]).view(-1, 1, 1, 1)
    a, b = PREDICTIONS[prediction](schedule.alpha(t), schedule.sigma(t))
    f = lambda out: a * x + b * out
    close(f(out_0) + w * (f(out_c) - f(out_0)), f(out_0 + w * (out_c - out_0)), rtol=1e-9, atol=1e-10)


def test_a_student_of_a_drawn_w_is_told_it_and_starts_as_if_it_were_not():
    teacher = mlp_teacher()
    teacher.conditioning = Conditioning(3, w_range=(1.0, 5.0))
    student, x, t = teacher.student(), torch.randn(4, 2, 1, 1), time([0.5] * 4)
    w = torch.tensor([1.0, 2.0, 3.0, 5.0]).view(-1, 1, 1, 1)
    c = Condition(torch.tensor([0, 1, 2, 0]), w)
    close(student(x, t, c), teacher.denoiser(x, t))
    student(x, t, c).square().sum().backward()
    assert student.guidance[-1].weight.grad.abs().max() > 0
    with torch.no_grad():
        nn.init.normal_(student.guidance[-1].weight)
    assert not torch.allclose(student(x, t, c), student(x, t, Condition(c.labels, w.flip(0))))
    conditional_teacher(w=3.0).student()  # a fixed w is not fed
    assert conditional_teacher(w=3.0).student().guidance is None


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
    teacher.frozen_copy()(x, t)
    assert (teacher.teacher_rows.rows, teacher.student_rows.rows) == (8, 0)
    teacher.student()(x, t)
    copy.deepcopy(teacher.student())(x, t)
    assert (teacher.teacher_rows.rows, teacher.student_rows.rows) == (8, 8)


def test_students_start_as_the_teacher_and_have_weights_of_their_own():
    teacher = mlp_teacher()
    x, t = torch.randn(4, 2, 1, 1), time([0.1, 0.4, 0.7, 1.0])
    before = teacher.denoise(x, t)
    student, frozen_copy = teacher.student(), teacher.frozen_copy()
    assert torch.equal(student(x, t), before) and torch.equal(frozen_copy(x, t), before)
    assert all(p.requires_grad for p in student.parameters()) and student.training
    assert not any(p.requires_grad for p in frozen_copy.parameters()) and not frozen_copy.training
    with torch.no_grad():
        for parameter in [*student.parameters(), *frozen_copy.parameters()]:
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
    distributions = {
        "mixture": lambda x: sum(w * deviation(x, m, s) for w, m, s in zip(WEIGHTS, CENTRES, SPREADS, strict=True)),
        "gaussian": lambda x: deviation(x, 0.5, 0.6),
    }
    teachers = {"mixture": mixture_teacher(schedule), "gaussian": gaussian_teacher(schedule, (0.5,), (0.36,))}
    for distribution, density in distributions.items():
        for x_t in (-1.1, 0.2, 0.9):
            likelihood = lambda x, y=x_t: math.exp(-0.5 * ((y - alpha * x) / sigma) ** 2)
            points = sorted({*CENTRES, float(np.clip(x_t / alpha, -4, 4))})
            integral = lambda g: quad(g, -6, 6, points=points, limit=400, epsabs=1e-14)[0]  # noqa: B023
            below = integral(lambda x: density(x) * likelihood(x))  # noqa: B023
            above = integral(lambda x: x * density(x) * likelihood(x))  # noqa: B023
            f = teachers[distribution].denoise(torch.full((1, 1, 1, 1), x_t), time(t)).item()
            assert f == pytest.approx(above / below, abs=1e-8)
