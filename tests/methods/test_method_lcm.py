"""Latent consistency distillation against the paper's formulas and the guided teacher's chain in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from analytic import (
    MEAN,
    VARIANCE,
    assert_target_is_a_moving_average,
    close,
    column,
    ddim_gain,
    gaussian_images,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    mlp_teacher,
    some_schedules,
    table_teacher,
    time,
)
from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition, Conditioning
from distillbench.diffusion.consistency import segment_edges, segment_start
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import time_like
from distillbench.diffusion.schedules import SCHEDULES, VPCosine
from distillbench.errors import UserError
from distillbench.networks.architectures import ResidualMLP
from distillbench.system.progress import Step
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig
from distillbench.training.loop import Loop, train
from distillbench.training.method import Batch
from distillbench_lcm import LatentConsistency

pytestmark = pytest.mark.usefixtures("float64")

DRAWN = Conditioning(2, 1.0, (1.0, 3.0))
MEANS, VARIANCES = ((0.8, -0.5), (-0.6, 0.4), (0.1, -0.05)), ((0.2, 0.05), (0.3, 0.1), (0.9, 0.4))  # the last: no class


def lcm(teacher=None, **settings) -> LatentConsistency:
    return LatentConsistency(LatentConsistency.Config(**{"mu": 0.0} | settings), teacher or gaussian_teacher())


def batch_of(size: int = 64, seed: int = 0, conditioning: Conditioning | None = None) -> Batch:
    images = gaussian_images(seed)
    if conditioning is None:
        return make_batch(size, seed=seed, read=images)
    labels = lambda n: torch.arange(n) % conditioning.classes
    generator = torch.Generator().manual_seed(seed)
    return Batch(size, (2, 1, 1), generator, "cpu", lambda n: (images(n)[0], labels(n)), conditioning)


# --- the guided teacher in closed form -------------------------------------------------------------------------------


class ClassGaussian(nn.Module):
    """E[x_0 given x_t] of a Gaussian for each class, and of another one for none."""

    embedding_channels = 4

    def __init__(self, schedule) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor, embedding=None, c: Condition = UNCONDITIONAL) -> Tensor:
        return denoised(self.schedule, x, time(t), c.labels)


def denoised(schedule, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """m + alpha v / (alpha^2 v + sigma^2) (x - alpha m), with m and v of each label."""
    m, v = (torch.tensor(table)[labels].view(x.shape) for table in (MEANS, VARIANCES))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return m + alpha * v / (alpha**2 * v + sigma**2) * (x - alpha * m)


def guided_step(schedule, x: Tensor, t: Tensor, s: Tensor, labels: Tensor, w: Tensor) -> Tensor:
    """alpha_s f_w + sigma_s eps_w with f_w = f_0 + w (f_c - f_0) and eps_w = (x_t - alpha_t f_w) / sigma_t."""
    f_c, f_0 = denoised(schedule, x, t, labels), denoised(schedule, x, t, torch.full_like(labels, 2))
    f_w = f_0 + w * (f_c - f_0)
    return schedule.alpha(s) * f_w + schedule.sigma(s) * (x - schedule.alpha(t) * f_w) / schedule.sigma(t)


def class_teacher(name: str = "vp_cosine", conditioning: Conditioning = DRAWN) -> Teacher:
    schedule = SCHEDULES[name]()
    return Teacher("g", Denoiser(ClassGaussian(schedule), schedule, "x0"), (2, 1, 1), "g", conditioning=conditioning)


class GuidedChain(nn.Module):
    """The optimum: the guided teacher's DDIM chain from t down to `end`, or to the grid's first time."""

    e = 0.0

    def __init__(self, method, more: float = 0.0) -> None:
        super().__init__()
        self.schedule, self.grid, self.more = method.teacher.schedule, method.grid, more

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, end: Tensor | None = None) -> Tensor:
        end = time_like(x_t, self.grid[0]) if end is None else end
        for k in range(len(self.grid) - 1, 0, -1):
            upper, lower = (time_like(x_t, self.grid[i]) for i in (k, k - 1))
            x_s = guided_step(self.schedule, x_t, upper, lower, c.labels, c.w + self.more)
            x_t = torch.where((t >= upper) & (end <= lower), x_s, x_t)
        return x_t


# --- boundary, grid, segments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x0", "v", "flow", "eps"])
@pytest.mark.parametrize("name", some_schedules())
def test_boundary(name, prediction):
    """F(x, t_min) = x whatever the network says."""
    method = lcm(mlp_teacher(SCHEDULES[name](), prediction), times="uniform")
    x = make_batch(5).noise()
    close(method.student(x, time_like(x, method.grid[0])), x, rtol=1e-12)


def test_c_skip_and_c_out_are_those_of_the_release():
    """tau = 10 i for the index i: c_out(1) = 10 / sqrt(100.25) = .998752, c_skip(1) = .25 / 100.25."""
    student = lcm(mlp_teacher(SCHEDULES["ddpm_scaled_linear"]())).student
    c_skip, c_out = student.coefficients(time([1 / 1000, 2 / 1000, 20 / 1000, 1.0]), torch.float64)
    close(c_out[0], torch.zeros(1, 1, 1), atol=1e-12)
    assert c_skip[0].item() == pytest.approx(1.0, rel=1e-12)
    assert c_out[1].item() == pytest.approx(0.998752, abs=5e-7)
    assert c_skip[1].item() == pytest.approx(0.25 / 100.25, rel=1e-9)
    assert c_skip[2].item() == pytest.approx(0.25 / (190**2 + 0.25), rel=1e-9)
    assert c_out[3].item() == pytest.approx(9990 / math.sqrt(9990**2 + 0.25), rel=1e-12)


def test_f_is_c_skip_x_plus_c_out_times_the_data_prediction():
    method = lcm(mlp_teacher())
    x, t = make_batch(3).noise(), time([0.0003, 0.4, 1.0])
    tau = 10 * 999 * t
    expected = 0.25 / (tau**2 + 0.25) * x + tau / (tau**2 + 0.25).sqrt() * method.student.denoiser(x, t)
    close(method.student(x, t), expected, rtol=1e-10)


def test_the_solver_skips_19_of_20_indices():
    """Indices 20 j - 1, j = 1, ..., 50, and 0 below the first; index i is t = (i + 1) / 1000."""
    grid = lcm(gaussian_teacher(SCHEDULES["ddpm_scaled_linear"]())).grid
    close(grid * 1000 - 1, torch.tensor([0.0, *range(19, 1000, 20)], dtype=torch.float64), atol=1e-9)


def test_edges_of_segments():
    """floor(j 50 / 4) = 0, 12, 25, 37, 50; the start of a segment belongs to the one below."""
    grid = torch.arange(51, dtype=torch.float64) / 50
    edges = segment_edges(grid, 4)
    close(edges * 50, torch.tensor([0.0, 12, 25, 37, 50]), atol=1e-12)
    index = (segment_start(edges, time(grid[1:])).flatten() * 50).round().long().tolist()
    assert index == [0] * 12 + [12] * 13 + [25] * 12 + [37] * 13
    assert torch.equal(segment_edges(grid, 50), grid) and segment_edges(grid, 1).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", some_schedules())
def test_a_jump_is_ddim_on_the_student_s_prediction_and_of_length_zero_the_identity(name):
    schedule = SCHEDULES[name]()
    method = lcm(mlp_teacher(schedule), segments=2, times="uniform")
    x, t = make_batch(4).noise(), time(method.grid[[1, 20, 35, 50]])
    assert torch.equal(method.student(x, t, UNCONDITIONAL, t), x)
    gauss = lcm(gaussian_teacher(schedule), segments=2, times="uniform")
    end = segment_start(gauss.edges, t)
    m = column(MEAN)
    expected = schedule.alpha(end) * m + ddim_gain(schedule, t, end) * (x - schedule.alpha(t) * m)
    close(gauss.student(x, t, UNCONDITIONAL, end), expected, rtol=1e-9, atol=1e-9)


# --- solver, loss, target network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 4])
def test_a_step_follows_the_guided_teacher_and_its_ends(segments):
    """What the networks are asked, and the loss by hand. If t's segment starts at s, the target is x_s itself."""
    teacher = class_teacher()
    method = lcm(teacher, segments=segments, steps=8, loss="l2")
    asked = []
    hear = lambda module, args, out: asked.append((*args, out))
    method.target = lcm(teacher, segments=segments, steps=8).student
    for network in (method.target, method.student):
        network.register_forward_hook(hear)
    loss = loss_of(method, batch_of(300, conditioning=DRAWN))
    (x_s, s, c, *end, target), (x_t, t, _, *same_end, F) = asked
    again = batch_of(300, conditioning=DRAWN)
    c_again, n, x_0, eps = again.c, again.integers(1, 9), again.x_0, again.noise()
    schedule = teacher.schedule
    assert torch.equal(t, method.grid[n]) and torch.equal(s, method.grid[n - 1])
    assert n.unique().tolist() == [*range(1, 9)]
    close(x_t, schedule.alpha(t) * x_0 + schedule.sigma(t) * eps, rtol=1e-12)
    assert torch.equal(c.w, c_again.w) and c.w.min() < 1.1 and c.w.max() > 2.9 and len(c.w.unique()) == 300
    close(x_s, guided_step(schedule, x_t, t, s, c.labels, c.w), rtol=1e-9, atol=1e-10)
    close(loss, (F - target).square().mean(), rtol=1e-12)
    if segments == 1:
        assert not end and not same_end
        return
    assert torch.equal(end[0], same_end[0])
    assert torch.equal(end[0], method.grid[2 * ((n - 1) // 2)])
    at_end = (s == end[0]).flatten()
    assert at_end.sum() > 100 and torch.equal(target[at_end], x_s[at_end])


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("name", ["vp_cosine", "ddpm_scaled_linear"])
def test_the_loss_is_zero_at_the_chain_of_the_guided_teacher_for_every_w(name, segments):
    """And not at that of a w that is off by one, as with the paper's definition of w."""
    method = lcm(class_teacher(name), segments=segments, steps=20)
    method.student = method.target = GuidedChain(method)
    assert loss_of(method, batch_of(200, conditioning=DRAWN)).abs() < 1e-15
    for more in (1.0, -1.0):
        method.student = method.target = GuidedChain(method, more)
        assert loss_of(method, batch_of(200, conditioning=DRAWN)) > 1e-3


def test_the_huber_loss_is_of_each_value():
    """sqrt(d^2 + h^2) - h: d^2 / (2 h) near zero, |d| far away; images do not matter."""
    method = lcm(huber_c=0.01)
    a = torch.tensor([0.0, 3.0, 1e-5, -0.02]).view(1, 4, 1, 1)
    expected = (3.0 - 0.01 + 0.01**2 / 6 + 1e-10 / 0.02 + math.sqrt(5e-4) - 0.01) / 4
    assert method.distance(a, torch.zeros_like(a)).item() == pytest.approx(expected, rel=1e-6)
    close(method.distance(a, 0 * a), method.distance(a.view(4, 1, 1, 1), 0 * a.view(4, 1, 1, 1)), rtol=1e-12)
    assert lcm(loss="l2").distance(a, 0 * a).item() == pytest.approx((9 + 1e-10 + 4e-4) / 4, rel=1e-12)


def class_mlp(conditioning: Conditioning) -> Teacher:
    torch.manual_seed(0)
    network = ResidualMLP((2, 1, 1), width=16, depth=1, classes=2)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Teacher("mlp", Denoiser(network, VPCosine(), "v"), (2, 1, 1), "mlp", conditioning=conditioning)


@pytest.mark.parametrize("mu", [0.0, 0.9])
@pytest.mark.parametrize("segments", [1, 4])
def test_gradients_reach_neither_target_nor_teacher(segments, mu):
    """Those of the loss with the target as a constant, computed from outside."""
    teacher = class_mlp(DRAWN)
    method = lcm(teacher, mu=mu, segments=segments, loss="l2")
    seen = []
    method.target.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    if mu:
        method.student.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    loss_of(method, batch_of(16, conditioning=DRAWN)).backward()
    (_, target), (args, _) = seen
    found = {name: p.grad.clone() for name, p in method.student.named_parameters()}
    method.zero_grad()
    (method.student(*args) - target.detach()).square().mean().backward()
    for name, p in method.student.named_parameters():
        close(p.grad, found[name], rtol=1e-9, atol=1e-14)
    assert all(p.grad is None for p in teacher.denoiser.parameters())
    assert method.target is method.student or all(p.grad is None for p in method.target.parameters())


def test_w_is_an_input_of_the_student_that_starts_at_zero():
    method = lcm(class_mlp(DRAWN), mu=0.9)
    batch = batch_of(6, conditioning=DRAWN)
    x, t = batch.noise(), time(0.7).expand(6, 1, 1, 1)
    plain = Condition(batch.c.labels)
    close(method.student.denoiser(x, t, batch.c), method.teacher.denoiser(x, t, plain), rtol=1e-12)
    with torch.no_grad():
        nn.init.normal_(method.student.denoiser.guidance[-1].weight)
    other = Condition(batch.c.labels, batch.c.w + 0.5)
    assert (method.student(x, t, batch.c) - method.student(x, t, other)).abs().min() > 1e-4


def test_target_network_is_a_moving_average():
    assert_target_is_a_moving_average(lcm(mlp_teacher(), mu=0.9), 0.9)
    without = lcm(mlp_teacher())
    assert without.target is without.student


@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize(("conditioning", "teacher_nfe"), [(Conditioning(2), 1), (Conditioning(2, 3.0), 2), (DRAWN, 2)])
def test_evaluations_of_a_step(conditioning, teacher_nfe, segments, tmp_path):
    """Specification 39: T 1 (guided 2 rows), Sn 1, Sg 1."""
    method = lcm(class_mlp(conditioning), segments=segments)
    meter = make_workspace(method.teacher, tmp_path).meter
    loss_of(method, batch_of(6, conditioning=conditioning))
    rows = method.teacher.student_rows
    assert method.needs_data
    assert (meter.teacher_nfe, meter.student_nfe, rows.rows_with_gradient) == (6 * teacher_nfe, 6 * 2, 6)


# --- sampling --------------------------------------------------------------------------------------------------------


def test_several_steps_noise_the_answer_to_levels_spread_over_the_grid():
    """x_t = alpha_t F + sigma_t eps: F is taken for an image without noise."""
    method = lcm(mlp_teacher())
    draws = [make_batch(3, seed=k).noise() for k in range(3)]
    schedule, x = method.teacher.schedule, None
    for draw, index in zip(draws, (50, 33, 17), strict=True):
        t = time_like(draw, method.grid[index])
        x = method.student(schedule.sigma(t) * draw + (0 if x is None else schedule.alpha(t) * x), t)
    close(method.sample(FixedNoise(draws), 3, UNCONDITIONAL), x, rtol=1e-10)
    assert [nfe for nfe in range(60) if method.supports(nfe)] == [*range(1, 51)]
    assert method.keeps_noise(1) and not method.keeps_noise(2)


@pytest.mark.parametrize("name", ["vp_cosine", "ddpm_scaled_linear"])
@pytest.mark.parametrize("segments", [1, 4])
def test_a_sample_of_the_optimum_is_the_guided_chain(name, segments):
    """From sigma_T eps to t_min, in as many evaluations as there are segments, without fresh noise."""
    method = lcm(class_teacher(name), segments=segments)
    method.student = GuidedChain(method)
    schedule, grid, eps = method.teacher.schedule, time(method.grid), make_batch(6).noise()
    labels, w = torch.arange(6) % 2, torch.tensor([1.0, 1, 2, 2, 3, 3]).view(-1, 1, 1, 1)
    x = schedule.sigma(grid[-1:]) * eps
    for k in range(50, 0, -1):
        x = guided_step(schedule, x, grid[k : k + 1], grid[k - 1 : k], labels, w)
    if segments > 1:
        x = x / schedule.alpha(grid[:1])  # in units of x^, as consistency.segmentwise says
    close(method.sample(FixedNoise([eps]), segments, Condition(labels, w)), x, rtol=1e-9, atol=1e-10)


def test_segments_are_sampled_in_as_many_evaluations_only(tmp_path):
    method = lcm(mlp_teacher(), segments=4)
    meter = make_workspace(method.teacher, tmp_path).meter
    method.sample(FixedNoise([make_batch(5).noise()]), 4, UNCONDITIONAL)
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 5 * 4)
    assert [nfe for nfe in range(60) if method.supports(nfe)] == [4] and method.keeps_noise(4)


# --- trained ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("segments", "loss"), [(1, "huber"), (2, "l2")])
def test_trained_students_reach_the_closed_form_chain(segments, loss, tmp_path):
    """Affine students on a Gaussian: the product of DDIM's gains down the solver's grid."""
    schedule, steps, size = VPCosine(), 8, 128
    settings = {"lr": 0.03, "lr_warmup": 0.0, "lr_decay": "linear", "beta2": 0.99, "grad_clip": 1e6}
    settings |= {"ema_halflife_kimg": 0.0, "mu": 0.9, "steps": steps, "segments": segments, "loss": loss}
    grid = lcm(steps=steps).grid
    method = lcm(table_teacher(grid), **settings)
    workspace = make_workspace(method.teacher, tmp_path, BudgetConfig(images=800 * size))
    train(method, method.config, workspace, gaussian_images(), Loop(size), Step(lambda fraction, note: None))
    eps, m, gain = make_batch(1000, seed=99).noise(), column(MEAN), torch.ones(1, len(VARIANCE), 1, 1)
    for k in range(steps, 0, -1):
        gain = gain * ddim_gain(schedule, time(grid[k]), time(grid[k - 1]))
    expected = m + gain * (eps - schedule.alpha(time(grid[-1])) * m)
    with torch.no_grad():
        error = (method.sample(FixedNoise([eps]), segments, UNCONDITIONAL) - expected).square().mean().sqrt().item()
    assert error < 1e-3


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_release_s():
    config = LatentConsistency.Config()
    expected = {"steps": 50, "times": "trailing", "mu": 0.95, "huber_c": 1e-3, "sigma_data": 0.5, "scaling": 10.0}
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1},
        {"steps": 1000},
        {"segments": 0},
        {"segments": 51},
        {"times": "karras"},
        {"loss": "linf"},
        {"mu": 1.0},
        {"huber_c": 0.0},
        {"sigma_data": -1.0},
        {"scaling": 0.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        LatentConsistency.Config(**settings)
