"""BOOT against DDIM written in x, the exact flow, and oracle students (tables of the teacher's chain)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from analytic import (
    close,
    gaussian_map,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    mixture_map,
    mixture_teacher,
    mlp_teacher,
    schedules,
    slope,
    some_schedules,
    time,
)
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.denoiser import implied_eps
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import time_like
from distillbench.diffusion.schedules import SCHEDULES, VPCosine, VPLinear
from distillbench.errors import UserError
from distillbench_boot import Boot

pytestmark = pytest.mark.usefixtures("float64")


def boot(teacher=None, **settings) -> Boot:
    return Boot(Boot.Config(**({"target": "euler", "boundary_share": 1.0} | settings)), teacher or gaussian_teacher())


def y_s_of(method: Boot, eps: Tensor, y_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The target at s, with the teacher's evaluation at t that it is given."""
    schedule = method.teacher.schedule
    f_t = method.teacher.denoise(schedule.alpha(t) * y_t + schedule.sigma(t) * eps, t)
    return method.target(eps, y_t, f_t, t, s, UNCONDITIONAL)


def between(t_min: float = 0.01, t_max: float = 0.99) -> VPCosine:
    """The cosine schedule, kept off its ends."""
    schedule = VPCosine()
    schedule.t_min, schedule.t_max = t_min, t_max
    return schedule


def signal(schedule, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """y_t by its definition."""
    return (x_t - schedule.sigma(t) * eps) / schedule.alpha(t)


def first(schedule, teacher, eps: Tensor) -> Tensor:
    """y_T: the teacher's first denoised image, of x_T = sigma_T eps."""
    T = time_like(eps, schedule.t_max)
    return teacher.denoise(schedule.sigma(T) * eps, T)


def start(schedule, teacher, eps: Tensor) -> Tensor:
    """BOOT's trajectory begins at alpha y_T + sigma eps (specification 2.6)."""
    T = time_like(eps, schedule.t_max)
    return schedule.alpha(T) * first(schedule, teacher, eps) + schedule.sigma(T) * eps


class Oracle(nn.Module):
    """g(eps, t): the signal of the teacher's DDIM chain on the grid, run in x with the textbook formula."""

    def __init__(self, teacher, steps: int) -> None:
        super().__init__()
        self.__dict__["teacher"], self.steps = teacher, steps

    def forward(self, eps: Tensor, t: Tensor, c=UNCONDITIONAL) -> Tensor:
        schedule, f = self.teacher.schedule, self.teacher.denoise
        grid = torch.linspace(schedule.t_min, schedule.t_max, self.steps + 1, dtype=torch.float64)
        x = start(schedule, self.teacher, eps)
        y = first(schedule, self.teacher, eps)
        for k in range(self.steps, 0, -1):
            now, after = time_like(eps, grid[k]), time_like(eps, grid[k - 1])
            f_now = f(x, now)
            eps_hat = implied_eps(x, f_now, schedule.alpha(now), schedule.sigma(now))
            x = schedule.alpha(after) * f_now + schedule.sigma(after) * eps_hat
            y = torch.where(t < (grid[k] + grid[k - 1]) / 2, signal(schedule, x, eps, after), y)
        return y


# --- the target ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_schedules())
def test_euler_target_is_ddim_in_y(name):
    """y_s of one DDIM step in x, for arbitrary y_t and eps and steps of any size."""
    schedule = SCHEDULES[name]()
    teacher = mixture_teacher(schedule)
    method = boot(teacher)
    t, s = schedule.t_of_lam(time([-1.0, 0.5, 2.0, 4.0])), schedule.t_of_lam(time([-4.0, 0.4, -2.0, 3.0]))
    y_t, eps = make_batch(4, (1, 1, 1)).noise(), make_batch(4, (1, 1, 1), seed=1).noise()
    x_t = schedule.alpha(t) * y_t + schedule.sigma(t) * eps
    f = teacher.denoise(x_t, t)
    eps_hat = implied_eps(x_t, f, schedule.alpha(t), schedule.sigma(t))
    x_s = schedule.alpha(s) * f + schedule.sigma(s) * eps_hat
    close(y_s_of(method, eps, y_t, t, s), signal(schedule, x_s, eps, s), rtol=1e-10, atol=1e-10)


def test_small_steps_follow_the_signal_ode():
    """(y_t - y_s) / delta -> dy/dt = -lam' (f - y), with lam' by differences."""
    schedule = VPLinear()
    method, h = boot(mixture_teacher(schedule)), 1e-6
    t = time([0.2, 0.5, 0.9])
    y_t, eps = make_batch(3, (1, 1, 1)).noise(), make_batch(3, (1, 1, 1), seed=1).noise()
    rate = (schedule.lam(t + h) - schedule.lam(t - h)) / (2 * h)
    f = method.teacher.denoise(schedule.alpha(t) * y_t + schedule.sigma(t) * eps, t)
    close((y_t - y_s_of(method, eps, y_t, t, t - h)) / h, -rate * (f - y_t), rtol=1e-4)


@pytest.mark.parametrize(("target", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("distribution", ["gaussian", "mixture"])
def test_order_of_the_oracle_chain(target, order, distribution):
    """The chain of targets from t_max to t_min against the exact flow (closed form; equal quantiles)."""
    schedule = between()
    teacher = {"gaussian": gaussian_teacher, "mixture": mixture_teacher}[distribution](schedule)
    eps = make_batch(64, teacher.shape).noise().clamp(-2, 2)
    T, end = time_like(eps, schedule.t_max), time_like(eps, schedule.t_min)
    x_T = start(schedule, teacher, eps)
    if distribution == "gaussian":
        x_end = gaussian_map(schedule, x_T, T, end)
    else:
        x_end = mixture_map(schedule, x_T, schedule.t_max, schedule.t_min)
    exact, errors = signal(schedule, x_end, eps, end), []
    for steps in (64, 128, 256):
        method = boot(teacher, steps=steps, target=target)
        y = first(schedule, teacher, eps)
        for k in range(steps, 0, -1):
            y = y_s_of(method, eps, y, time_like(eps, method.grid[k]), time_like(eps, method.grid[k - 1]))
        errors.append((y - exact).square().mean().sqrt().item())
    assert slope(errors) == pytest.approx(order, abs=0.2)
    assert errors[-1] < {1: 0.03, 2: 5e-4}[order]


# --- the loss at its optimum -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", [gaussian_teacher, mixture_teacher])
@pytest.mark.parametrize("name", ["vp_cosine", "vp_linear", "flow_matching"])
def test_both_losses_are_zero_at_the_oracle(name, distribution):
    """beta = 0 leaves L_BS; a beta of 1e6 would show any L_BC."""
    teacher = distribution(SCHEDULES[name]())
    for beta in (0.0, 1e6):
        method = boot(teacher, steps=8, beta=beta)
        method.student = Oracle(teacher, 8)
        assert loss_of(method, make_batch(64, teacher.shape)) < 1e-22
    method.student = Oracle(teacher, 9)  # the chain of another grid is no optimum
    assert loss_of(method, make_batch(64, teacher.shape)) > 1e-4


@pytest.mark.parametrize("target", ["euler", "heun"])
def test_a_heun_oracle_is_the_optimum_of_heun_alone(target):
    schedule = between()
    teacher = mixture_teacher(schedule)
    method = boot(teacher, steps=8, target=target, beta=0.0)
    heun = boot(teacher, steps=8, target="heun")

    class HeunOracle(nn.Module):
        def forward(self, eps: Tensor, t: Tensor, c=UNCONDITIONAL) -> Tensor:
            y = first(schedule, teacher, eps)
            for k in range(8, 0, -1):
                here, below = time_like(eps, heun.grid[k]), time_like(eps, heun.grid[k - 1])
                y = torch.where(t < (here + below) / 2, y_s_of(heun, eps, y, here, below), y)
            return y

    method.student = HeunOracle()
    loss = loss_of(method, make_batch(64, (1, 1, 1)))
    assert loss < 1e-25 if target == "heun" else loss > 1e-4


class Shifted(nn.Module):
    """y'(eps, t) = y(eps + C, t) + sigma_t / alpha_t C with C = c - eps (collapse) or -0.3 eps (less noise)."""

    def __init__(self, oracle: Oracle, shift) -> None:
        super().__init__()
        self.oracle, self.shift = oracle, shift

    def forward(self, eps: Tensor, t: Tensor, c=UNCONDITIONAL) -> Tensor:
        C = self.shift(eps)
        return self.oracle(eps + C, t) + self.oracle.teacher.schedule.noise_level(t) * C


@pytest.mark.parametrize(("shift", "least"), [(lambda eps: 0.7 - eps, 1e3), (lambda eps: -0.3 * eps, 1e2)])
def test_bootstrapping_alone_has_a_null_space_that_the_boundary_closes(shift, least):
    """Specification 2.4: these students have zero L_BS, and an L_BC of the order (sigma/alpha)^2 |C|^2."""
    teacher = mixture_teacher(between())
    losses = {}
    for beta in (0.0, 1.0):
        method = boot(teacher, steps=16, beta=beta)
        method.student = Shifted(Oracle(teacher, 16), shift)
        losses[beta] = loss_of(method, make_batch(256, (1, 1, 1))).item()
    assert losses[0.0] < 1e-20
    assert losses[1.0] > least
    collapsed = method.sample(FixedNoise([make_batch(256, (1, 1, 1)).noise()]), 1, UNCONDITIONAL).std()
    full = Oracle(teacher, 16)(make_batch(256, (1, 1, 1)).noise(), time_like(torch.zeros(256), 0.01)).std()
    assert collapsed < 0.95 * full  # so the null space is of students that are worse


# --- gradients, weights, times ---------------------------------------------------------------------------------------


class Table(nn.Module):
    """g(eps, t_k) = w_k eps."""

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.grid, self.w = grid, nn.Parameter(torch.linspace(0.1, 0.9, len(grid)))

    def forward(self, eps: Tensor, t: Tensor, c=UNCONDITIONAL) -> Tensor:
        return self.w[(t.flatten()[:, None] - self.grid).abs().argmin(dim=1)].view(-1, 1, 1, 1) * eps


@pytest.mark.parametrize("target", ["euler", "heun"])
def test_gradients_reach_the_student_at_s_and_at_t_max_only(target):
    """At fixed t = t_3: dL/dw_2 and dL/dw_N in closed form, none through y_t = g(eps, t_3), none to the teacher."""
    teacher = mlp_teacher()
    method = boot(teacher, steps=6, target=target, beta=0.5)
    method.student = Table(method.grid)
    grid = method.grid
    method.time_pair = lambda batch: (grid[3].expand(5, 1, 1, 1), grid[2].expand(5, 1, 1, 1))
    seen = []
    denoise = teacher.denoise
    teacher.denoise = lambda x, t, c=UNCONDITIONAL: seen.append(torch.is_grad_enabled()) or denoise(x, t, c)
    loss_of(method, make_batch(5)).backward()
    eps = make_batch(5).noise()
    t, s, T = time_like(eps, grid[3]), time_like(eps, grid[2]), time_like(eps, grid[6])
    w = method.student.w.detach()
    with torch.no_grad():
        y_s, y_T = y_s_of(method, eps, w[3] * eps, t, s), denoise(eps, T)
    expected = torch.zeros(7)
    expected[2] = (2 * (w[2] * eps - y_s) * eps).mean()
    expected[6] = 0.5 * (2 * (w[6] * eps - y_T) * eps).mean()
    close(method.student.w.grad, expected, rtol=1e-12, atol=1e-15)
    assert not any(seen)
    assert all(p.grad is None for p in teacher.denoiser.parameters())


def test_weights_relate_as_stated():
    """The same L_BS times 1, 1 / delta^2 and 1 / (1 - r)^2; L_BC is weighted by beta alone."""
    teacher = mixture_teacher(between())
    schedule = teacher.schedule
    for seed in range(8):  # one image, hence one t, a batch

        def loss(weight, beta=0.0, seed=seed):
            method = boot(teacher, steps=5, weight=weight, beta=beta)
            method.student = Oracle(teacher, 7)
            return loss_of(method, make_batch(1, (1, 1, 1), seed)).item()

        batch = make_batch(1, (1, 1, 1), seed)
        batch.noise()
        t, s = boot(teacher, steps=5).time_pair(batch)
        delta = (schedule.t_max - schedule.t_min) / 5
        r = schedule.alpha(t) * schedule.sigma(s) / (schedule.alpha(s) * schedule.sigma(t))
        assert (t - s).item() == pytest.approx(delta, rel=1e-12)
        uniform = loss("uniform")
        assert uniform > 0
        assert loss("inv_delta2") == pytest.approx(uniform / delta**2, rel=1e-10)
        assert loss("inv_dlam2") == pytest.approx(uniform / (1 - r.item()) ** 2, rel=1e-10)
    method = boot(teacher, steps=5, weight="inv_delta2", beta=3.0)
    method.student = Shifted(Oracle(teacher, 5), lambda eps: 0.1 + 0 * eps)  # L_BS = 0, L_BC > 0
    by_3 = loss_of(method, make_batch(9, (1, 1, 1))).item()
    method.config.beta, method.config.weight = 1.0, "uniform"
    assert by_3 == pytest.approx(3 * loss_of(method, make_batch(9, (1, 1, 1))).item(), rel=1e-9)


@pytest.mark.parametrize("name", some_schedules())
def test_grid_times_are_neighbours_of_the_grid_and_cover_it(name):
    schedule = SCHEDULES[name]()
    method = boot(gaussian_teacher(schedule), steps=7, times="uniform")
    t, s = method.time_pair(make_batch(2000))
    grid = [schedule.t_min + k / 7 * (schedule.t_max - schedule.t_min) for k in range(8)]
    assert sorted(set(t.flatten().tolist())) == pytest.approx(grid[1:], rel=1e-12)
    assert sorted(set(s.flatten().tolist())) == pytest.approx(grid[:-1], rel=1e-12)
    assert ((t - s) * 7).flatten().tolist() == pytest.approx([schedule.t_max - schedule.t_min] * 2000, rel=1e-9)
    assert t.max() <= schedule.t_max and s.min() >= schedule.t_min


@pytest.mark.parametrize("name", some_schedules())
def test_uniform_times_stay_in_range_and_fill_it(name):
    schedule = SCHEDULES[name]()
    method = boot(gaussian_teacher(schedule), steps=7, times="continuous")
    t, s = method.time_pair(make_batch(4000))
    width = schedule.t_max - schedule.t_min
    assert t.max() <= schedule.t_max and s.min() >= schedule.t_min
    assert ((t - s) * 7).flatten().tolist() == pytest.approx([width] * 4000, rel=1e-9)
    assert t.max() > schedule.t_max - 0.01 * width and s.min() < schedule.t_min + 0.01 * width
    assert (t.mean().item() - schedule.t_min) / width == pytest.approx((1 + 1 / 7) / 2, abs=0.03)


# --- network, accounting, sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prediction"), [*((name, "x0") for name in schedules()), *(("vp_cosine", p) for p in ("v", "eps", "flow"))]
)
def test_the_student_starts_as_the_teacher_at_t_max_for_every_t(name, prediction):
    """g(eps, t) = f(sigma_T eps, t_max), so L_BC = 0 at first."""
    teacher = mlp_teacher(SCHEDULES[name](), prediction)
    schedule = teacher.schedule
    method = boot(teacher)
    eps, T = make_batch(11).noise(), time(schedule.t_max).expand(11, 1, 1, 1)
    y_T = teacher.denoise(schedule.sigma(T) * eps, T)
    for t in (time(torch.linspace(schedule.t_min, schedule.t_max, 11, dtype=torch.float64)), T):
        assert torch.equal(method.student(eps, t), y_T)
    method.config.beta = 1e12
    method.target = lambda eps, y_t, f_t, t, s, c: y_t  # L_BS = 0 at the start, so only L_BC is left
    assert loss_of(method, make_batch(11)) < 1e-15  # rounding: some CPUs multiply other rows of a batch otherwise


def test_the_target_time_is_alive():
    """The first gradient step changes the answers at different t differently."""
    method = boot(mlp_teacher())
    eps, t = make_batch(3).noise(), time([0.0, 0.5, 1.0])
    before = method.student(eps, t)
    with torch.no_grad():
        for parameter in method.student.target_time[-1].parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(method.student(eps, t), before)
    same = eps[:1].expand(3, 2, 1, 1)
    answers = method.student(same, t)
    assert not torch.allclose(answers[0], answers[1]) and not torch.allclose(answers[1], answers[2])
    loss_of(method, make_batch(8)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.target_time.parameters())


@pytest.mark.parametrize(("target", "teacher_nfe"), [("euler", 2), ("heun", 3)])
def test_evaluations_of_a_step(target, teacher_nfe, tmp_path):
    """Specification 8: T = 1 (2 with Heun) + 1 at the boundary, Sn + Sg = 1 + 2, for each image; and no real image."""
    method = boot(mlp_teacher(), target=target)
    meter = make_workspace(method.teacher, tmp_path).meter
    loss_of(method, make_batch(7, read=None))  # the batch would raise if x_0 were asked for
    assert not method.needs_data
    assert (meter.teacher_nfe, meter.student_nfe) == (7 * teacher_nfe, 7 * 3)


def test_sample_is_the_student_at_t_min_with_one_evaluation(tmp_path):
    """What training regresses onto the end of the chain, and no noise added to it."""
    teacher = mixture_teacher(between())
    method = boot(teacher, steps=64)
    method.student = Oracle(teacher, 64)
    eps = make_batch(64, (1, 1, 1)).noise().clamp(-2, 2)
    x_0 = method.sample(FixedNoise([eps]), 1, UNCONDITIONAL)
    x_end = mixture_map(teacher.schedule, start(teacher.schedule, teacher, eps), 0.99, 0.01)
    exact = signal(teacher.schedule, x_end, eps, time_like(eps, 0.01))
    assert (x_0 - exact).square().mean().sqrt() < 0.06
    method = boot(mlp_teacher())
    meter = make_workspace(method.teacher, tmp_path).meter
    method.sample(FixedNoise([make_batch(5).noise()]), 1, UNCONDITIONAL)
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 5)
    assert method.supports(1) and not method.supports(2) and method.keeps_noise(1)


@pytest.mark.parametrize("name", some_schedules())
def test_the_boundary_is_the_teacher_at_the_noise_scaled_to_the_schedule(name):
    """x_T = sigma_T eps, which is 80 eps on VE: the loss of a student that says 0 is E[x_0 | x_T]^2 in closed form."""
    teacher = gaussian_teacher(SCHEDULES[name](), (0.0,), (6400.0,))
    schedule = teacher.schedule
    method = boot(teacher, beta=1.0)
    method.student = Table(method.grid)
    method.student.w.data.zero_()
    method.target = lambda eps, y_t, f_t, t, s, c: y_t  # L_BS = 0
    alpha, sigma = schedule.alpha(time(schedule.t_max)), schedule.sigma(time(schedule.t_max))
    f = 6400 * alpha / (6400 * alpha**2 + sigma**2) * sigma * make_batch(50, (1, 1, 1)).noise()
    loss = loss_of(method, make_batch(50, (1, 1, 1)))
    assert loss.item() == pytest.approx(f.square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"beta": -1}, {"times": "x"}, {"target": "rk4"}, {"weight": "snr"}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Boot.Config(**settings)


def test_the_boundary_on_a_share_of_the_batch_costs_and_counts_that_share():
    """Specification 8: with a quarter of the batch, teacher rows 1 + 1/4 and student rows 2 + 1/4 an image (Euler)."""
    teacher = mlp_teacher()
    method = boot(teacher, boundary_share=0.25)
    for _ in method.train_step(make_batch(16, teacher.shape)):
        pass
    assert (teacher.teacher_rows.rows, teacher.student_rows.rows) == (16 + 4, 2 * 16 + 4)
