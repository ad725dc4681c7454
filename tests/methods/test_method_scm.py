"""sCM against its TrigFlow formulas, the exact consistency function of a Gaussian, and its samples after training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from analytic import (
    MEAN,
    VARIANCE,
    close,
    column,
    gaussian_images,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    mlp_teacher,
    some_schedules,
    time,
)
from distillbench.diffusion import SCHEDULES, UNCONDITIONAL, derivative, tangent
from distillbench.diffusion.conditioning import Conditioning
from distillbench.errors import UserError
from distillbench_scm import ContinuousConsistency
from smooth import map_errors, smooth_teacher, trained

pytestmark = pytest.mark.usefixtures("float64")

PLAIN = {"derivative": "exact", "normalise": 0.0, "adaptive": False}


def scm(teacher=None, **settings) -> ContinuousConsistency:
    return ContinuousConsistency(ContinuousConsistency.Config(**PLAIN | settings), teacher or gaussian_teacher())


def batch_of(size: int = 64, seed: int = 0):
    return make_batch(size, (2, 1, 1), seed, gaussian_images(seed))


class Power(nn.Module):
    """f = m + (v / (v + tau^2))^k (x^ - m): the denoiser for k = 1, the exact consistency function for k = 1/2."""

    def __init__(self, schedule, k: float) -> None:
        super().__init__()
        self.schedule, self.k = schedule, nn.Parameter(torch.tensor(k))

    def forward(self, x_t: Tensor, t: Tensor, c=UNCONDITIONAL) -> Tensor:
        mean, v = column(MEAN), column(VARIANCE)
        gain = (v / (v + self.schedule.noise_level(t) ** 2)) ** self.k
        return mean + gain * (x_t / self.schedule.alpha(t) - mean)


# --- the tangent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_schedules())
def test_the_tangent_vanishes_at_the_exact_consistency_function(name):
    """|g| <= 1e-10 from tau = .002 to 80 (or the schedule's end); and the loss with it."""
    schedule = SCHEDULES[name]()
    teacher = gaussian_teacher(schedule)
    method, f = scm(teacher), Power(schedule, 0.5)
    t = method.levels.t_of_lam(time(torch.linspace(*method.levels.lam_range, 30)))
    x_t = schedule.alpha(t) + (schedule.alpha(t) + schedule.sigma(t)) * make_batch(30).noise()
    D = teacher.denoise(x_t, t)
    value, df = derivative(f, (x_t, t), tangent(schedule, x_t, t, D), exact=True)
    tau = schedule.noise_level(t)
    sin, cos = (tau / 0.5) / (1 + (tau / 0.5) ** 2).sqrt(), 1 / (1 + (tau / 0.5) ** 2).sqrt()
    g = method.tangent_of(value.detach(), df, D, sin, cos)
    assert g.abs().max() < 1e-10
    method.student.f = f
    assert loss_of(method, batch_of()) < 1e-16


@pytest.mark.parametrize("steps", [0, 3, 20])
@pytest.mark.parametrize("name", some_schedules())
def test_it_is_the_papers_in_trigflow(name, steps):
    """g = -cos^2 (sd F - dx/dtheta) - r (cos sin x + sd dF), with dF by torch.func.jvp in theta; r = steps / 10."""
    schedule, sd = SCHEDULES[name](), 0.5
    method = scm(mlp_teacher(schedule), warmup_steps=10)
    method.steps.fill_(steps)
    r = min(1.0, steps / 10)
    f, theta = method.student.f, torch.linspace(0.1, 1.5, 12).view(-1, 1, 1, 1)
    x, D = make_batch(12).noise(), make_batch(12, seed=1).noise()
    dx = (theta.cos() * x - D) / theta.sin()

    def F(x: Tensor, theta: Tensor) -> Tensor:
        t = schedule.t_of_lam((sd * theta.tan()).log())
        return (theta.cos() * x - f(schedule.alpha(t) * x / theta.cos(), t)) / (sd * theta.sin())

    both = theta.cos() * theta.sin()
    with torch.no_grad():
        value, dF = torch.func.jvp(F, (x, theta), (both * dx, both))
        t = schedule.t_of_lam((sd * theta.tan()).log())
        x_t = schedule.alpha(t) * x / theta.cos()
        f_t, df = derivative(f, (x_t, t), tangent(schedule, x_t, t, D), exact=True)
    expected = -(theta.cos() ** 2) * (sd * value - dx) - r * (both * x + sd * dF)
    close(method.tangent_of(f_t, df, D, theta.sin(), theta.cos()), expected, rtol=1e-7, atol=1e-8)


def test_the_tangent_from_data_is_that_of_the_teacher_on_average():
    """It is linear in D, so that of E[x_0 given x_t] is the mean over x_0."""
    method, schedule = scm(mlp_teacher()), mlp_teacher().schedule
    x_t, t = make_batch(5).noise(), schedule.t_of_lam(time([-4.0, -1.0, 0.0, 1.0, 3.0]))
    theta = torch.atan(schedule.noise_level(t) / 0.5)

    def g(D: Tensor) -> Tensor:
        f, df = derivative(method.student.f, (x_t, t), tangent(schedule, x_t, t, D), exact=True)
        return method.tangent_of(f.detach(), df, D, theta.sin(), theta.cos())

    a, b = make_batch(5, seed=1).noise(), make_batch(5, seed=2).noise()
    close(g(0.3 * a + 0.7 * b), 0.3 * g(a) + 0.7 * g(b), rtol=1e-9, atol=1e-9)


def test_normalised_tangents_are_shorter_than_one():
    method = scm(mlp_teacher(), normalise=0.1)
    f, df, D = (1e3 * make_batch(9, seed=seed).noise() for seed in range(3))
    half = torch.full((9, 1, 1, 1), 0.5).sqrt()
    g, plain = method.tangent_of(f, df, D, half, half), df / half
    norm = plain.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    close(g, plain / (norm + 0.1), rtol=1e-12)
    assert g.flatten(1).norm(dim=1).max() < 1


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("derivative", ["exact", "finite"])
@pytest.mark.parametrize("source", ["teacher", "data"])
@pytest.mark.parametrize(("k", "sign"), [(0.8, 1), (0.3, -1)])
def test_a_step_moves_a_wrong_gain_towards_the_exact_one(k, sign, source, derivative):
    """The optimum is k = 1/2, so the gradient in k is positive above it and negative below."""
    method = scm(source=source, derivative=derivative, p_std=1.0)
    method.student.f = Power(method.teacher.schedule, k)
    loss_of(method, batch_of(4000)).backward()
    assert sign * method.student.f.k.grad > 0


def test_the_weight_of_the_loss_is_learned_and_starts_at_one():
    method, plain = scm(mlp_teacher(), adaptive=True), scm(mlp_teacher())
    loss = loss_of(method, batch_of())
    close(loss, loss_of(plain, batch_of()), rtol=1e-12)
    loss.backward()
    assert method.student.log_variance[-1].bias.grad.abs() > 0


def test_evaluations_of_a_step(tmp_path):
    """sCD: one of the teacher, the student's with gradient and two for the difference. sCT: none of the teacher."""
    for source, expected in (("teacher", (7, 21)), ("data", (0, 21))):
        method = scm(mlp_teacher(), derivative="finite", source=source)
        meter = make_workspace(method.teacher, tmp_path).meter
        loss_of(method, batch_of(7))
        assert (meter.teacher_nfe, meter.student_nfe) == expected
        assert method.teacher.student_rows.rows_with_gradient == 7


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"source": "x"}, {"derivative": "x"}, {"step": 0.0}, {"middle": 100.0}, {"normalise": -1.0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            ContinuousConsistency.Config(**settings)
    teacher = mlp_teacher().conditioned(Conditioning(3, 2.0))
    with pytest.raises(UserError, match="cannot be guided"):
        scm(teacher, source="data")


# --- trained ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_short_training_learns_the_map_of_a_gaussian(tmp_path):
    config = ContinuousConsistency.Config(lr=2e-3, ema_halflife_kimg=5.0)
    method = ContinuousConsistency(config, smooth_teacher())
    before = map_errors(method, 1)
    assert map_errors(trained(method, tmp_path, 500), 1) < 0.35 < before
