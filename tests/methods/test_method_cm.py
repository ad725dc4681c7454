"""Consistency distillation against the paper's formulas, oracle students and the exact distribution of its samples."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from analytic import (
    MEAN,
    VARIANCE,
    assert_target_is_a_moving_average,
    close,
    column,
    gaussian_images,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    mixture_teacher,
    mlp_teacher,
    some_schedules,
    time,
    weights_of,
)
from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition, Conditioning
from distillbench.diffusion.consistency import ConsistencyFunction
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.distances import DISTANCES
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import ONE_STEP, time_like
from distillbench.diffusion.schedules import SCHEDULES, VE, VPCosine
from distillbench.errors import UserError
from distillbench.training.method import Batch
from distillbench_cm import ConsistencyDistillation

pytestmark = pytest.mark.usefixtures("float64")


def cm(teacher=None, **settings) -> ConsistencyDistillation:
    plain = {"steps": 18, "mu": 0.0, "weight": "uniform"}
    return ConsistencyDistillation(ConsistencyDistillation.Config(**plain | settings), teacher or gaussian_teacher())


def one_step(method, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return ONE_STEP[method.config.solver](method.teacher.schedule, method.teacher.denoise, x_t, t, s)


def batch_of(method, size: int = 32, seed: int = 0) -> Batch:
    pixels = method.teacher.shape[0]
    return make_batch(size, method.teacher.shape, seed, gaussian_images(seed, MEAN[:pixels], VARIANCE[:pixels]))


# --- the consistency function ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x0", "v", "flow", "eps"])
@pytest.mark.parametrize("name", some_schedules())
def test_boundary(name, prediction):
    """F(x_e, e) = x^ = x_e / alpha_e whatever the network says."""
    schedule = SCHEDULES[name]()
    method = cm(mlp_teacher(schedule, prediction))
    x = make_batch(5).noise()
    e = time_like(x, method.grid[0])
    close(method.student(x, e), x / schedule.alpha(e), rtol=1e-12)
    close(schedule.noise_level(e), torch.full_like(e, max(0.002, schedule.noise_level(time(schedule.t_min)).item())),
          rtol=1e-9)  # fmt: skip


class EdmNetwork(nn.Module):
    """EDM's preconditioning (Karras et al. 2022, table 1): k_skip x + k_out NN(k_in x, ln(sigma) / 4)."""

    embedding_channels = 4

    def __init__(self, sd: float) -> None:
        super().__init__()
        self.sd = sd
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def NN(self, x: Tensor, sigma: Tensor) -> Tensor:
        k_in = 1 / (sigma**2 + self.sd**2).sqrt()
        return self.inner(torch.cat([k_in * x, sigma.log() / 4], dim=1))

    def forward(self, x: Tensor, t: Tensor, embedding: Tensor | None = None, c=None) -> Tensor:
        sigma, flat = t[:, None], x.flatten(1)
        k_skip = self.sd**2 / (sigma**2 + self.sd**2)
        k_out = sigma * self.sd / (sigma**2 + self.sd**2).sqrt()
        return (k_skip * flat + k_out * self.NN(flat, sigma)).view(x.shape)


@pytest.mark.parametrize("sd", [0.5, 1.7])
def test_for_an_edm_network_it_is_the_paper_s_formula(sd):
    """c_skip x + c_out NN with c_skip = sd^2 / ((s - e)^2 + sd^2), c_out = (s - e) sd / sqrt(s^2 + sd^2), e = .002."""
    torch.manual_seed(0)
    network = EdmNetwork(sd)
    F = ConsistencyFunction(Denoiser(network, VE(), "x0"), 0.002, sd)
    sigma = torch.tensor([0.002, 0.01, 0.3, 2.0, 80.0])[:, None]
    x = sigma * make_batch(5).noise().flatten(1)
    c_skip = sd**2 / ((sigma - 0.002) ** 2 + sd**2)
    c_out = (sigma - 0.002) * sd / (sigma**2 + sd**2).sqrt()
    expected = c_skip * x + c_out * network.NN(x, sigma)
    close(F(x.view(5, 2, 1, 1), time(sigma)).flatten(1), expected, rtol=1e-11, atol=1e-12)


def test_it_depends_on_the_schedule_only_through_the_noise_level():
    """At equal noise levels, F of the exact denoiser at alpha x^ is the same on every schedule that has them."""
    tau = time([0.01, 0.05, 0.5, 3.0, 10.0, 50.0])
    x_hat = make_batch(len(tau)).noise()

    def answers(name: str) -> tuple[Tensor, Tensor]:
        schedule = SCHEDULES[name]()
        low, high = schedule.noise_level(time([schedule.t_min, schedule.t_max])).flatten()
        has = ((tau > low) & (tau < high)).flatten()
        F = ConsistencyFunction(gaussian_teacher(schedule).denoiser, 0.002, 0.5)
        t = schedule.t_of_lam(tau[has].log())
        return has, F(schedule.alpha(t) * tau[has] * x_hat[has], t)

    has, expected = answers("ve")
    assert has.all()
    for name in SCHEDULES:
        has, answer = answers(name)
        assert has.sum() >= (4 if name == "ddpm_scaled_linear" else 5)
        close(answer, expected[has], rtol=1e-8, atol=1e-10)


# --- solver, loss, target network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_schedules())
@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_solver_step_on_a_gaussian(name, solver):
    """Euler's and Heun's factors for dx^/dtau = tau (x^ - m) / (v + tau^2), over the whole grid."""
    method = cm(gaussian_teacher(SCHEDULES[name]()), solver=solver)
    schedule, grid = method.teacher.schedule, time(method.grid)
    t, s = grid[1:], grid[:-1]
    tau_t, tau_s = schedule.noise_level(t), schedule.noise_level(s)
    v, m, h = column(VARIANCE), column(MEAN), tau_s - tau_t
    rate = lambda tau: tau / (v + tau**2)
    euler = 1 + h * rate(tau_t)
    gain = euler if solver == "ddim" else 1 + h / 2 * (rate(tau_t) + rate(tau_s) * euler)
    x_hat = m + (v + tau_t**2).sqrt() * make_batch(len(t)).noise()
    x_s = ONE_STEP[solver](schedule, method.teacher.denoise, schedule.alpha(t) * x_hat, t, s)
    close(x_s / schedule.alpha(s), m + gain * (x_hat - m), rtol=1e-9, atol=1e-9)


class Chain(nn.Module):
    """The optimum: the solver's chain from t down to the end of the grid, in units of x^."""

    def __init__(self, method) -> None:
        super().__init__()
        self.__dict__["method"] = method

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        grid, schedule = self.method.grid, self.method.teacher.schedule
        for k in range(len(grid) - 1, 0, -1):
            x_s = one_step(self.method, x_t, time_like(x_t, grid[k]), time_like(x_t, grid[k - 1]))
            x_t = torch.where(t > (grid[k] + grid[k - 1]) / 2, x_s, x_t)
        return x_t / schedule.alpha(time_like(x_t, grid[0]))


@pytest.mark.parametrize("metric", ["l2", "pseudo_huber"])
@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("name", ["ve", "vp_cosine", "flow_matching"])
def test_the_loss_is_zero_at_the_chain_and_not_at_another(name, solver, metric):
    teacher = mixture_teacher(SCHEDULES[name]())
    method = cm(teacher, solver=solver, metric=metric, steps=10)
    method.student = method.target = Chain(method)
    assert loss_of(method, batch_of(method, 256)).abs() < 1e-15
    other = Chain(cm(teacher, solver={"ddim": "heun", "heun": "ddim"}[solver], steps=10))
    method.student = method.target = other
    assert loss_of(method, batch_of(method, 256)) > 1e-6


def test_a_step_draws_neighbouring_levels_and_noises_real_images(tmp_path):
    """What the teacher is asked: x_t = alpha x_0 + sigma eps at levels 2..N, then levels 1..N-1 below."""
    method = cm(steps=6)
    asked = []
    denoise = method.teacher.denoise
    method.teacher.denoise = lambda x, t, c: asked.append((x, t)) or denoise(x, t, c)
    loss_of(method, batch_of(method, 500))
    (x_t, t), (_, s) = asked
    again = batch_of(method, 500)
    schedule, x_0, eps = method.teacher.schedule, again.x_0, again.noise()
    close(x_t, schedule.alpha(t) * x_0 + schedule.sigma(t) * eps, rtol=1e-12)
    index = lambda times: (times.flatten()[:, None] - method.grid).abs().argmin(dim=1)
    assert torch.equal(index(t), index(s) + 1)
    assert sorted(index(s).unique().tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize(("solver", "teacher_nfe"), [("ddim", 1), ("heun", 2)])
def test_evaluations_of_a_step(solver, teacher_nfe, mu, tmp_path):
    """Specification 8: T 1 / 2, Sn + Sg = 1 + 1, for each image."""
    method = cm(mlp_teacher(), solver=solver, mu=mu)
    meter = make_workspace(method.teacher, tmp_path).meter
    loss_of(method, batch_of(method, 7))
    assert method.needs_data
    assert (meter.teacher_nfe, meter.student_nfe) == (7 * teacher_nfe, 7 * 2)


def test_target_network_is_a_moving_average():
    assert_target_is_a_moving_average(cm(mlp_teacher(), mu=0.9), 0.9)


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_gradients_reach_neither_target_nor_teacher(mu):
    """The gradient of a one-parameter student F = w x^ is 2 (F - target) x^: none through the target."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5))
            self.e = 0.002

        def forward(self, x_t, t, c=UNCONDITIONAL):
            return self.w * x_t / schedule.alpha(t)

    teacher = mlp_teacher()
    schedule = teacher.schedule
    method = cm(teacher, mu=mu, steps=4)
    method.student = Linear()
    method.target = Linear() if mu else method.student
    batch = batch_of(method, 6)
    loss_of(method, batch).backward()
    again = batch_of(method, 6)
    x_0, eps = again.x_0, again.noise()
    n = again.integers(0, 3)
    t, s = method.grid[n + 1], method.grid[n]
    x_t = schedule.alpha(t) * x_0 + schedule.sigma(t) * eps
    x_hat = x_t / schedule.alpha(t)
    with torch.no_grad():
        target = 0.5 * one_step(method, x_t, t, s) / schedule.alpha(s)
    close(method.student.w.grad, (2 * (0.5 * x_hat - target) * x_hat).mean(), rtol=1e-10)
    assert all(p.grad is None for p in teacher.denoiser.parameters())
    assert method.target is method.student or method.target.w.grad is None


def test_without_mu_the_target_is_the_student_itself():
    method = cm(mlp_teacher(), mu=0.0)
    assert method.target is method.student
    before = weights_of(method.student)
    method.after_step()
    assert all(torch.equal(before[name], value) for name, value in weights_of(method.student).items())
    assert not any(p.requires_grad for p in cm(mlp_teacher(), mu=0.9).target.parameters())


def test_distances():
    """l2: mean over pixels and images; pseudo-Huber: sqrt(|d|^2 + c^2) - c an image, c = .00054 sqrt(pixels)."""
    a, b = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    a[0] += 0.5  # |d| = .5 sqrt 12
    b[1, 0, 0, 0] = 1e-5  # far below c
    assert DISTANCES["l2"](a, b).mean().item() == pytest.approx((0.25 * 12 + 1e-10) / 24, rel=1e-12)
    c = 0.00054 * math.sqrt(12)
    expected = (math.sqrt(3 + c**2) - c + math.sqrt(1e-10 + c**2) - c) / 2
    huber = DISTANCES["pseudo_huber"]
    assert huber(a, b).mean().item() == pytest.approx(expected, rel=1e-12)
    assert huber(a[1:], b[1:]).item() == pytest.approx(1e-10 / (2 * c), rel=1e-4)  # quadratic near 0
    assert huber(a[:1], b[:1]).item() == pytest.approx(math.sqrt(3) - c, rel=1e-5)  # linear far away


def test_weight_is_one_over_the_step_in_noise_level():
    """The same loss times lambda = 1 / (tau_t - tau_s), with the levels from equation 5 of Karras et al."""
    tau = (0.002 ** (1 / 7) + torch.arange(18) / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    seen = set()
    for seed in range(20):  # one image, hence one pair of levels, a batch
        uniform, inv_step = (
            loss_of(method, batch_of(method, 1, seed)).item()
            for method in (cm(mlp_teacher()), cm(mlp_teacher(), weight="inv_step"))
        )
        batch = batch_of(cm(), 1, seed)
        batch.noise()
        n = batch.integers(0, 17).item()
        seen.add(n)
        assert inv_step == pytest.approx(uniform / (tau[n + 1] - tau[n]).item(), rel=1e-8)
    assert len(seen) > 8


# --- sampling --------------------------------------------------------------------------------------------------------


class ExactGaussian(nn.Module):
    """The Gaussian's consistency function: the exact flow to noise level e, in units of x^."""

    def __init__(self, schedule, e: float) -> None:
        super().__init__()
        self.schedule, self.e = schedule, e

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        v, m, tau = column(VARIANCE), column(MEAN), self.schedule.noise_level(t)
        return m + ((v + self.e**2) / (v + tau**2)).sqrt() * (x_t / self.schedule.alpha(t) - m)


@pytest.mark.parametrize("nfe", [1, 2, 3])
@pytest.mark.parametrize("name", some_schedules())
def test_samples_of_an_exact_consistency_function_have_the_distribution(name, nfe):
    """sample is affine in its draws, so unit draws give its distribution: N(m, v + e^2), but for where it starts.

    It starts at N(0, T^2) instead of N(m, v + T^2), and every jump brings the two closer. e = .3, so that the e^2 that
    x_e already carries is not lost in the tolerance.
    """
    schedule = SCHEDULES[name]()
    method = cm(gaussian_teacher(schedule), sigma_min=0.3, steps=12)
    method.student = ExactGaussian(schedule, 0.3)
    draw = lambda value: torch.full((1, 2, 1, 1), float(value))
    at = lambda values: method.sample(FixedNoise([draw(value) for value in values]), nfe, UNCONDITIONAL)
    mean = at([0] * nfe)
    unit = [[float(i == k) for i in range(nfe)] for k in range(nfe)]
    variance = sum((at(values) - mean).square() for values in unit)
    v, m, e2 = column(VARIANCE), column(MEAN), 0.3**2
    T2 = schedule.noise_level(method.grid[-1]).item() ** 2
    missing = 1 - variance[0] / (v + e2)  # of the variance, relative
    assert (missing > -1e-9).all() and (missing < (1 + 1e-6) * v / (v + T2)).all()
    assert ((mean[0] - m).abs() < (1 + 1e-6) * m.abs() * ((v + e2) / (v + T2)).sqrt()).all()


def test_the_first_jump_starts_at_the_largest_level_and_levels_fall():
    for nfe in range(1, 10):
        method = cm(steps=10)
        asked = []

        class Asked(ExactGaussian):
            def forward(self, x_t, t, c=UNCONDITIONAL, asked=asked):
                asked.append(self.schedule.noise_level(t)[0].item())
                return super().forward(x_t, t, c)

        method.student = Asked(method.teacher.schedule, 0.002)
        method.sample(FixedNoise([make_batch(3, seed=k).noise() for k in range(nfe)]), nfe, UNCONDITIONAL)
        assert len(asked) == nfe
        assert asked[0] == pytest.approx(80.0, rel=1e-9)
        assert all(a > b for a, b in pairwise(asked)) and asked[-1] > 0.002


def test_every_network_is_told_the_condition():
    """Teacher, target and student are asked for the classes of the real images; samples for those that are given."""
    teacher = dataclasses.replace(mlp_teacher(), conditioning=Conditioning(classes=3))
    method, labels, told = cm(teacher, mu=0.5), torch.tensor([2, 0, 1, 1]), []

    def hear(name: str, answer):
        return lambda x, t, c=UNCONDITIONAL: told.append((name, c.labels)) or answer(x, t, c)

    teacher.denoise = hear("teacher", teacher.denoise)
    for name in ("student", "target"):
        network = getattr(method, name)
        network.forward = hear(name, network.forward)
    images = gaussian_images()
    read = lambda n: (images(n)[0], labels)
    loss_of(method, Batch(4, (2, 1, 1), torch.Generator().manual_seed(0), "cpu", read, teacher.conditioning))
    assert [name for name, _ in told] == ["teacher", "teacher", "target", "student"]
    method.sample(FixedNoise([make_batch(4, seed=k).noise() for k in range(2)]), 2, Condition(labels))
    assert len(told) == 6 and all(torch.equal(c, labels) for _, c in told)


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_sample_makes_the_evaluations_it_is_asked_for(nfe, tmp_path):
    method = cm(mlp_teacher(), steps=6)
    meter = make_workspace(method.teacher, tmp_path).meter
    method.sample(FixedNoise([make_batch(4, seed=k).noise() for k in range(nfe)]), nfe, UNCONDITIONAL)
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 4 * nfe)
    assert [n for n in range(9) if method.supports(n)] == [1, 2, 3, 4, 5]
    assert method.keeps_noise(1) and not method.keeps_noise(2)


# --- segments --------------------------------------------------------------------------------------------------------


class ChainTo(nn.Module):
    """The optimum with segments: the solver's chain from t down to `end`."""

    def __init__(self, method) -> None:
        super().__init__()
        self.__dict__["method"] = method
        self.schedule = method.teacher.schedule

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, end: Tensor) -> Tensor:
        grid = self.method.grid
        for k in range(len(grid) - 1, 0, -1):
            upper, lower = time_like(x_t, grid[k]), time_like(x_t, grid[k - 1])
            x_t = torch.where((t >= upper) & (end <= lower), one_step(self.method, x_t, upper, lower), x_t)
        return x_t


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("name", ["ve", "vp_cosine", "flow_matching"])
def test_with_segments_the_optimum_is_the_chain_cut_at_the_edges(name, solver):
    """The loss is zero there, and K evaluations of it are the whole chain, in units of x^."""
    method = cm(mixture_teacher(SCHEDULES[name]()), solver=solver, steps=10, segments=4)
    method.student = method.target = ChainTo(method)
    assert torch.equal(method.edges, method.grid[[0, 2, 4, 6, 9]])  # floor(9 j / 4)
    assert loss_of(method, batch_of(method, 256)).abs() < 1e-15
    eps = make_batch(50, (1, 1, 1)).noise()
    x_T = method.teacher.schedule.sigma(time_like(eps, method.grid[-1])) * eps
    expected = Chain(method)(x_T, time_like(eps, method.grid[-1]))
    close(method.sample(FixedNoise([eps]), 4, UNCONDITIONAL), expected, rtol=1e-9, atol=1e-9)
    other = ChainTo(cm(method.teacher, solver={"ddim": "heun", "heun": "ddim"}[solver], steps=10, segments=4))
    method.student = method.target = other
    assert loss_of(method, batch_of(method, 256)) > 1e-7


def test_edges_are_computed_once_and_again_for_another_grid():
    method = cm(mlp_teacher(), steps=10, segments=3)
    edges = method.edges
    assert method.edges is edges and torch.equal(edges, method.grid[[0, 3, 6, 9]])
    method.grid.mul_(0.5)  # in place, as load_state_dict does
    assert torch.equal(method.edges, method.grid[[0, 3, 6, 9]]) and not torch.equal(method.edges, edges)
    method.grid = method.grid.float()  # as a move to another device or dtype
    assert method.edges.dtype is torch.float32 and torch.equal(method.edges, method.grid[[0, 3, 6, 9]])


def test_with_segments_both_networks_jump_to_the_start_of_t_s_segment(tmp_path):
    """By DDIM on their own prediction. Where that start is s, the target is x_s itself, whatever the network says."""
    method = cm(mlp_teacher(), mu=0.5, steps=10, segments=3)
    asked = []
    for network in (method.target, method.student):
        network.register_forward_hook(lambda module, args, out: asked.append((*args, out)))
    meter = make_workspace(method.teacher, tmp_path).meter
    loss = loss_of(method, batch_of(method, 200))
    assert (meter.teacher_nfe, meter.student_nfe) == (200 * 2, 200 * 2)
    (x_s, s, _, end, target), (x_t, t, _, same, F) = asked
    again = batch_of(method, 200)
    again.noise()
    n = again.integers(0, 9)
    assert torch.equal(t, method.grid[n + 1]) and torch.equal(s, method.grid[n])
    assert torch.equal(end, method.grid[3 * (n // 3)]) and torch.equal(end, same)
    schedule = method.teacher.schedule
    D = method.student.denoiser(x_t, t)
    eps = (x_t - schedule.alpha(t) * D) / schedule.sigma(t)
    close(F, schedule.alpha(end) * D + schedule.sigma(end) * eps, rtol=1e-8, atol=1e-10)
    at_end = (s == end).flatten()
    assert at_end.sum() > 30 and torch.equal(target[at_end], x_s[at_end]) and not (target == x_s)[~at_end].any()
    close(loss, (F - target).square().mean(), rtol=1e-12)


def test_segments_are_sampled_in_as_many_evaluations_only(tmp_path):
    method = cm(mlp_teacher(), steps=10, segments=4)
    meter = make_workspace(method.teacher, tmp_path).meter
    method.sample(FixedNoise([make_batch(5).noise()]), 4, UNCONDITIONAL)
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 5 * 4)
    assert [n for n in range(12) if method.supports(n)] == [4] and method.keeps_noise(4)


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_schedule_that_does_not_reach_the_levels_bounds_the_grid_and_e():
    """The smallest level is the schedule's own, and the boundary holds there."""
    method = cm(mlp_teacher(VE(sigma_min=0.1, sigma_max=10.0), "x0"), steps=8)
    assert method.student.e == pytest.approx(0.1, rel=1e-12) and method.grid[-1] == 10.0
    x = make_batch(3).noise()
    close(method.student(x, time_like(x, method.grid[0])), x, rtol=1e-12)


def test_other_grids_of_levels():
    """uniform: equal steps in theta = atan(tau), the time of vp_cosine; uniform_lambda: a geometric progression."""
    uniform, geometric = (
        VPCosine().noise_level(cm(times=times, steps=6).grid) for times in ("uniform", "uniform_lambda")
    )
    close(uniform.atan(), torch.linspace(math.atan(0.002), math.atan(80.0), 6, dtype=torch.float64), rtol=1e-9)
    close(geometric, 0.002 * 40000 ** (torch.arange(6) / 5), rtol=1e-9)


@pytest.mark.parametrize("weight", ["uniform", "inv_step"])
@pytest.mark.parametrize(("name", "settings"), [("vp_linear", {"sigma_max": 500.0}), ("ve", {"sigma_max": 200.0})])
def test_levels_beyond_the_schedule_leave_no_step_of_length_zero(name, settings, weight):
    """N distinct levels and a finite loss: with two equal ones, lambda = 1 / (tau_t - tau_s) is infinite."""
    method = cm(mlp_teacher(SCHEDULES[name](), "x0"), weight=weight, **settings)
    assert (method.grid.diff() > 0).all() and len(method.grid) == 18
    assert math.isfinite(loss_of(method, batch_of(method, 256)).item())


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1},
        {"mu": 1.5},
        {"mu": 1.0},
        {"solver": "rk4"},
        {"metric": "linf"},
        {"segments": 0},
        {"segments": 12},
        {"sigma_data": 0},
        {"sigma_min": 2, "sigma_max": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        ConsistencyDistillation.Config(**settings)
