"""MeanFlow against the exact flow map of a Gaussian, the paper's identity in its own coordinates, and trained."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from analytic import (
    close,
    gaussian_images,
    gaussian_map,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    mlp_teacher,
    some_schedules,
    time,
)
from distillbench.diffusion import SCHEDULES, UNCONDITIONAL, ddim_step, derivative, tangent, time_like
from distillbench.diffusion.conditioning import Conditioning
from distillbench.diffusion.noise import FixedNoise
from distillbench.errors import UserError
from distillbench_meanflow import MeanFlow
from smooth import map_errors, smooth_teacher, trained

pytestmark = pytest.mark.usefixtures("float64")

PLAIN = {"derivative": "exact", "ratio": 1.0}


def meanflow(teacher=None, **settings) -> MeanFlow:
    return MeanFlow(MeanFlow.Config(**PLAIN | settings), teacher or gaussian_teacher())


def batch_of(size: int = 64, seed: int = 0):
    return make_batch(size, (2, 1, 1), seed, gaussian_images(seed))


class FlowMap(nn.Module):
    """The G with which a DDIM step from t to s < t ends on the exact trajectory of the Gaussian."""

    def __init__(self, schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c=UNCONDITIONAL) -> Tensor:
        schedule = self.schedule
        r = schedule.noise_level(s) / schedule.noise_level(t)
        x_s = gaussian_map(schedule, x_t, t, s)
        return (x_s / schedule.alpha(s) - r * x_t / schedule.alpha(t)) / (1 - r) + self.weight


def points(schedule) -> tuple[Tensor, Tensor, Tensor]:
    t, s = schedule.t_of_lam(time([-1.0, 0.5, 2.0, 3.5])), schedule.t_of_lam(time([-4.0, 0.4, -2.0, 3.0]))
    return (1 + schedule.sigma(t)) * make_batch(4).noise(), t, s


@pytest.mark.parametrize("name", some_schedules())
def test_the_exact_flow_map_is_its_own_target(name):
    """The identity, to 1e-10, and that the loss is zero there."""
    schedule = SCHEDULES[name]()
    teacher = gaussian_teacher(schedule)
    method, G = meanflow(teacher, uniform=0.0), FlowMap(schedule)
    x_t, t, s = points(schedule)
    f = teacher.denoise(x_t, t)
    value, dG = derivative(G, (x_t, t), tangent(schedule, x_t, t, f), s, exact=True)
    close(method.target(value.detach(), dG, f, t, s), value, rtol=1e-10, atol=1e-10)
    method.student = G
    assert loss_of(method, batch_of()) < 1e-9


@pytest.mark.parametrize("name", some_schedules())
def test_the_target_is_the_papers_in_flow_matching(name):
    """u - e = v - (q - p) du/dq, with torch.func.jvp of u(z, p, q) along (v, 0, 1)."""
    schedule = SCHEDULES[name]()
    method = meanflow(mlp_teacher(schedule))
    nn.init.normal_(method.student.target_time[-1].weight, std=0.2)
    q, p = time([0.2, 0.5, 0.7, 0.9]), time([0.1, 0.4, 0.05, 0.6])
    z, f = make_batch(4).noise(), make_batch(4, seed=1).noise()
    v, s = (z - f) / q, schedule.t_of_lam(torch.logit(p))

    def place(z: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        t = schedule.t_of_lam(torch.logit(q))
        return schedule.alpha(t) * z / (1 - q), t

    def u(z: Tensor, q: Tensor) -> Tensor:
        return (z - method.student(*place(z, q), s)) / q

    with torch.no_grad():
        _, du = torch.func.jvp(u, (z, q), (v, torch.ones_like(q)))
        x_t, t = place(z, q)
        G, dG = derivative(method.student, (x_t, t), tangent(schedule, x_t, t, f), s, exact=True)
    close((z - method.target(G, dG, f, t, s)) / q, v - (q - p) * du, rtol=1e-8, atol=1e-8)


def test_without_a_jump_the_target_is_the_teacher():
    method = meanflow(mlp_teacher())
    _, t, _ = points(method.teacher.schedule)
    G, dG, f = (make_batch(4, seed=seed).noise() for seed in range(3))
    close(method.target(G, dG, f, t, t), f, rtol=1e-12)


@pytest.mark.parametrize("name", some_schedules())
def test_the_exact_flow_map_samples_exactly_at_every_nfe(name):
    teacher = gaussian_teacher(SCHEDULES[name]())
    method, schedule = meanflow(teacher), teacher.schedule
    method.student, eps = FlowMap(schedule), make_batch(9).noise()
    T = time_like(eps, method.levels.t_max)
    exact = gaussian_map(schedule, schedule.sigma(T) * eps, T, time_like(eps, method.levels.t_min))
    for nfe in (1, 2, 4, 7):
        assert method.supports(nfe) and method.keeps_noise(nfe)
        close(method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL), exact, rtol=1e-2, atol=1e-2)


def test_the_student_starts_as_the_teachers_ddim():
    method = meanflow(mlp_teacher())
    schedule, (x_t, t, s) = method.teacher.schedule, points(method.teacher.schedule)
    f = method.teacher.denoise(x_t, t)
    close(ddim_step(schedule, x_t, method.student(x_t, t, s), t, s), ddim_step(schedule, x_t, f, t, s), rtol=1e-12)


def test_times():
    """s <= t, within the levels; the share of jumps; some times close to t_max."""
    method = meanflow(ratio=0.25)
    t, s = method.times(make_batch(20_000))
    assert (s <= t).all() and s.min() >= method.levels.t_min and t.max() <= method.levels.t_max
    assert (s < t).double().mean().item() == pytest.approx(0.25, abs=0.02)
    q = torch.sigmoid(method.teacher.schedule.lam(t))
    assert (q > 0.97).double().mean() > 0.01


def test_the_adaptive_weight():
    """|e|^2 / sg[|e|^2 + c]^power, a sum over pixels."""
    losses = [loss_of(meanflow(mlp_teacher(), power=power, c=0.1), batch_of(1)) for power in (0.0, 1.0)]
    close(losses[1], losses[0] / (losses[0] + 0.1), rtol=1e-9)


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_evaluations_of_a_step(source, tmp_path):
    method = meanflow(mlp_teacher(), derivative="finite", source=source)
    meter = make_workspace(method.teacher, tmp_path).meter
    loss_of(method, batch_of(7)).backward()
    assert (meter.teacher_nfe, meter.student_nfe) == (7 * (source == "teacher"), 21)
    assert method.teacher.student_rows.rows_with_gradient == 7
    assert all(p.grad is not None for p in method.student.target_time[-1].parameters())


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"source": "x"}, {"derivative": "x"}, {"step": 0.0}, {"ratio": 2.0}, {"power": -1.0}):
        with pytest.raises(UserError, match=next(iter(settings))):
            MeanFlow.Config(**settings)
    with pytest.raises(UserError, match="cannot be guided"):
        meanflow(mlp_teacher().conditioned(Conditioning(3, 2.0)), source="data")


@pytest.mark.slow
def test_a_short_training_learns_the_map_of_a_gaussian(tmp_path):
    config = MeanFlow.Config(lr=2e-3, ema_halflife_kimg=5.0)
    method = MeanFlow(config, smooth_teacher())
    before = map_errors(method, 1)
    trained(method, tmp_path, 500)
    assert max(map_errors(method, nfe) for nfe in (1, 2, 4)) < 0.35 < before
