"""sCM against the paper's formulas in its own coordinates, and on a Gaussian, whose consistency function is known."""

from __future__ import annotations

import math

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
    marginal_variance,
    minimised,
    mlp_teacher,
    some_schedules,
    time,
)
from distillbench import Conditioning, UserError
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.schedules import SCHEDULES, VE
from distillbench_scm import ContinuousConsistency, WeightedConsistency

pytestmark = pytest.mark.usefixtures("float64")
SD = 0.5


def scm(teacher=None, **settings) -> ContinuousConsistency:
    plain = {"smooth": 0, "exact": True, "c": 0.0}
    return ContinuousConsistency(ContinuousConsistency.Config(**plain | settings), teacher or gaussian_teacher())


class ExactMap(nn.Module):
    """The end of the Gaussian's trajectory through x_t. With a `power` of the gain other than 1 it is wrong except at
    tau = 0; a wrong factor would not be seen, since it is constant along the trajectory."""

    embedding_channels = 4

    def __init__(self, schedule, power: float = 1.0) -> None:
        super().__init__()
        self.schedule, self.power = schedule, nn.Parameter(torch.tensor(power))

    def forward(self, x: Tensor, t: Tensor, embedding=None, c=None) -> Tensor:
        ratio = (column(VARIANCE) / marginal_variance(self.schedule, time(t))).sqrt()
        return column(MEAN) + ratio**self.power * (x - self.schedule.alpha(time(t)) * column(MEAN))


def with_map(schedule, power: float = 1.0, **settings) -> ContinuousConsistency:
    method = scm(gaussian_teacher(schedule), **settings)
    method.student = WeightedConsistency(Denoiser(ExactMap(schedule, power), schedule, "x0"), SD)
    method.student.u = torch.zeros_like
    return method


def batch(size: int = 64, seed: int = 0):
    return make_batch(size, seed=seed, read=gaussian_images(seed + 100))


# --- the tangent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_schedules())
def test_the_tangent_of_the_exact_consistency_function_is_zero(name):
    """|g| <= 1e-10, from the loss, whose largest weight is 1 / .002."""
    loss = loss_of(with_map(SCHEDULES[name](), p_std=3.0), batch())
    assert 0 <= loss.item() < 1e-20


def test_the_loss_is_the_paper_s():
    """Eq. 8 in the angle theta = atan(tau / sd), with x = cos x_0 + sin z: its g, normalised, with r = 1/4 of the
    warm-up, and u = 0."""
    method = scm(mlp_teacher(VE(), "edm"), smooth=8, c=0.1, warmup=4)
    method.student.u = torch.zeros_like
    found = loss_of(method, batch(16))
    again = batch(16)
    x_0, eps = again.x_0, again.noise()
    theta = (VE().noise_level(method.times(again)) / SD).atan()
    x = theta.cos() * x_0 + theta.sin() * SD * eps

    def F(denoiser: Denoiser, x: Tensor, theta: Tensor) -> Tensor:
        t = SD * theta.tan()
        return (theta.cos() * x - denoiser(x / theta.cos(), t)) / (SD * theta.sin())

    student = lambda x, theta: F(method.student.denoiser, x, theta)
    dx = SD * F(method.teacher.denoiser, x, theta)
    cos_sin = theta.cos() * theta.sin()
    F_now, dF = torch.func.jvp(student, (x, theta), (cos_sin * dx, cos_sin))
    r = 1 / 4
    g = -(theta.cos() ** 2) * (SD * F_now - dx) - r * (cos_sin * x + SD * dF)
    g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 0.1)
    close(found, (g.square().mean(dim=(1, 2, 3), keepdim=True) / (SD * theta.tan())).mean(), rtol=1e-8)


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_a_power_that_is_too_small_grows(source):
    """By a step of gradient descent; one that is too large falls."""
    for power, sign in ((0.5, -1), (2.0, 1)):
        method = with_map(VE(), power, source=source, p_mean=0.0, c=0.1)
        loss_of(method, batch(4000)).backward()
        assert sign * method.student.denoiser.network.power.grad > 0


@pytest.mark.parametrize(("source", "error"), [("teacher", 1e-3), ("data", 0.03)])
@pytest.mark.parametrize("start", [0.5, pytest.param(1.5, marks=pytest.mark.nightly)])
def test_a_trained_power_is_that_of_the_exact_map(source, error, start):
    method = with_map(VE(), start, source=source, p_mean=0.0)
    minimised(method.student, lambda step: loss_of(method, batch(256, step)))
    assert method.student.denoiser.network.power.item() == pytest.approx(1, abs=error)


def test_from_data_the_optimum_is_the_same():
    """The gradient at the exact map is that of noise alone: zero within four standard errors of its mean."""
    found = []
    for seed in range(20):
        method = with_map(VE(), source="data", p_mean=0.0, p_std=0.5)
        loss_of(method, batch(500, seed)).backward()
        found.append(method.student.denoiser.network.power.grad)
    found = torch.stack(found)
    assert found.std() > 1e-3 and found.mean().abs() < 4 * found.std() / math.sqrt(20)


def test_differences_are_the_exact_derivative():
    losses = [loss_of(scm(mlp_teacher(), smooth=8, exact=exact), batch()).item() for exact in (True, False)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0] > 1e-3


def test_u_is_learned_as_the_logarithm_of_the_squared_tangent():
    """For one time, the minimum over u of e^-u q + u is at u = log q. It starts at u = -lam = 1."""
    method = scm(mlp_teacher(), p_std=1e-9, smooth=8)
    q = math.e * (loss_of(method, batch()) - 1)
    last = method.student.log_weight[-1]
    with torch.no_grad():
        last.bias.fill_(q.log() - 1)
    loss = loss_of(method, batch())
    loss.backward()
    close(loss, 1 + q.log(), rtol=1e-6)
    assert last.bias.grad.abs().max() < 1e-6


# --- state, sampling, refusals ---------------------------------------------------------------------------------------


def test_the_warm_up_is_part_of_the_state():
    method = scm(mlp_teacher(), warmup=10, smooth=8)
    first = loss_of(method, batch())
    for _ in range(5):
        method.after_step()
    resumed = scm(mlp_teacher(), warmup=10, smooth=8)
    resumed.load_state_dict(method.state_dict())
    close(loss_of(resumed, batch()), loss_of(method, batch()))
    assert not torch.equal(loss_of(method, batch()), first)


def test_the_student_starts_as_the_teacher():
    method = scm(mlp_teacher())
    x_t, t = batch().noise(), time(torch.linspace(0.1, 0.9, 64))
    close(method.student(x_t, t), method.teacher.denoise(x_t, t), atol=1e-12)


def test_samples_of_the_exact_map():
    """One evaluation: the end of the trajectory from the largest level."""
    method, eps = with_map(VE()), batch().noise()
    exact = column(MEAN) + (column(VARIANCE) / (column(VARIANCE) + 80.0**2)).sqrt() * (80 * eps - column(MEAN))
    with torch.no_grad():
        close(method.sample(FixedNoise([eps]), 1, UNCONDITIONAL), exact, rtol=1e-9, atol=1e-9)
    assert method.keeps_noise(1) and not method.keeps_noise(2) and method.supports(4) and not method.supports(0)


def test_settings_that_are_not_possible():
    with pytest.raises(UserError, match=r"source must be one of .*teacher, data"):
        scm(source="pairs")
    with pytest.raises(UserError, match="sigma_min must be below sigma_max"):
        scm(sigma_min=90.0)
    teacher = gaussian_teacher().conditioned(Conditioning(2, 3.0))
    with pytest.raises(UserError, match="source=data cannot be guided"):
        scm(teacher, source="data")


def test_from_data_it_uses_no_teacher():
    assert scm(mlp_teacher(VE())).uses_teacher and not scm(mlp_teacher(VE()), source="data").uses_teacher
