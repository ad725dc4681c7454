"""CTM on the flow map of a Gaussian, which is known, and on Heun's chain on a mixture, which is its optimum."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from analytic import (
    MEAN,
    VARIANCE,
    assert_target_is_a_moving_average,
    close,
    column,
    gaussian_images,
    gaussian_map,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    marginal_variance,
    minimised,
    mixture_teacher,
    mlp_teacher,
    slope,
    some_schedules,
    time,
)
from distillbench import Condition, Conditioning, Denoiser, UserError
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.consistency import multistep
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import heun_step, time_like
from distillbench.diffusion.schedules import SCHEDULES, VE
from distillbench.training.method import Batch
from distillbench_ctm import ConsistencyTrajectory

pytestmark = pytest.mark.usefixtures("float64")


def ctm(teacher=None, **settings) -> ConsistencyTrajectory:
    plain = {"steps": 10, "solver_steps": 9, "mu": 0.0, "denoising": 0.0}
    return ConsistencyTrajectory(ConsistencyTrajectory.Config(**plain | settings), teacher or gaussian_teacher())


def batch_of(method, size: int = 64, seed: int = 0, step: int = 0) -> Batch:
    """`step` decides n."""
    pixels = method.teacher.shape[0]
    images = gaussian_images(seed + 100, MEAN[:pixels], VARIANCE[:pixels])
    return Batch(size, method.teacher.shape, torch.Generator().manual_seed(seed), "cpu", images, step=step)


def test_s_can_be_embedded_as_the_network_sees_time():
    assert ctm(mlp_teacher(), embeds="network").student.embeds == "network"
    assert ctm(mlp_teacher()).student.embeds == "s" and ctm(mlp_teacher()).student.in_lambda
    with pytest.raises(UserError, match="no embedding of a second time 'sines'"):
        ctm(mlp_teacher(), embeds="sines")


class Jump(nn.Module):
    """The g whose G is a given jump (x_t, t, s) -> x_s; where s = t it is 0, which G does not see."""

    def __init__(self, schedule, jump) -> None:
        super().__init__()
        self.schedule, self.jump = schedule, jump

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c=UNCONDITIONAL) -> Tensor:
        r = self.schedule.noise_level(s) / self.schedule.noise_level(t)
        x_hat, to = x_t / self.schedule.alpha(t), self.jump(x_t, t, s) / self.schedule.alpha(s)
        return torch.where(t == s, 0.0, (to - r * x_hat) / torch.where(t == s, 1.0, 1 - r))


def exact(schedule) -> Jump:
    return Jump(schedule, lambda x_t, t, s: gaussian_map(schedule, x_t, t, s))


def heun_chain(method) -> Jump:
    """Heun's steps of the teacher down the grid, from t to s."""
    grid, schedule = method.grid, method.teacher.schedule

    def chain(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        for k in range(len(grid) - 1, 0, -1):
            high, low = time_like(x_t, grid[k]), time_like(x_t, grid[k - 1])
            within = (t > (high + low) / 2) & (s < (high + low) / 2)
            x_t = torch.where(within, heun_step(schedule, method.teacher.denoise, x_t, high, low), x_t)
        return x_t

    return Jump(schedule, chain)


def with_student(method, g: nn.Module):
    method.student = method.target = g
    return method


# --- the jump --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_schedules())
def test_jumps_of_the_exact_map_compose(name):
    """G is the map, and G(G(x_t, t, u), u, s) = G(x_t, t, s)."""
    schedule = SCHEDULES[name]()
    method = with_student(ctm(gaussian_teacher(schedule)), exact(schedule))
    t, u, s = (time_like(torch.empty(16), method.grid[k]) for k in (8, 5, 1))
    x_t = schedule.noised(gaussian_images()(16)[0], t, make_batch(16).noise())
    G = lambda x, a, b: method.G(method.student, x, a, b, UNCONDITIONAL)
    close(G(x_t, t, s), gaussian_map(schedule, x_t, t, s), atol=1e-10)
    close(G(G(x_t, t, u), u, s), G(x_t, t, s), atol=1e-10)


@pytest.mark.parametrize("name", some_schedules())
def test_a_jump_of_length_zero_changes_nothing(name):
    method = ctm(mlp_teacher(SCHEDULES[name]()))
    t = method.grid.view(-1, 1, 1, 1)
    x_t = make_batch(len(t)).noise()
    assert torch.equal(method.G(method.student, x_t, t, t, UNCONDITIONAL), x_t)


def test_the_g_of_the_exact_map_tends_to_the_denoiser():
    """In proportion to 1 - s/t (specification 40.1)."""
    schedule = VE()
    teacher, g = gaussian_teacher(schedule), exact(schedule)
    t = time([0.1, 0.5, 2.0, 20.0])
    x_t = schedule.noised(gaussian_images()(4)[0], t, make_batch(4).noise())
    D = teacher.denoise(x_t, t)
    errors = [(g(x_t, t, t * (1 - h)) - D).norm().item() for h in (0.08, 0.04, 0.02, 0.01)]
    assert errors[0] > 1e-3 and slope(errors) == pytest.approx(1, abs=0.1)


def test_at_first_g_is_the_teacher_for_every_s():
    """So G is one DDIM step: the noise of x_t stays, the rest is the teacher's prediction."""
    method = ctm(mlp_teacher())
    schedule, (x_t, t) = method.teacher.schedule, (make_batch(9).noise(), method.grid[1:].view(-1, 1, 1, 1))
    f = method.teacher.denoise(x_t, t)
    for s in (t, method.grid[:-1].view(-1, 1, 1, 1), time_like(x_t, method.grid[0])):
        close(method.student(x_t, t, s), f, atol=1e-12)
        eps = (x_t - schedule.alpha(t) * f) / schedule.sigma(t)
        close(method.G(method.student, x_t, t, s, UNCONDITIONAL), schedule.noised(f, s, eps), atol=1e-9)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compare", ["soft", "local"])
@pytest.mark.parametrize("name", some_schedules())
def test_the_chain_of_the_teacher_has_no_loss_and_the_exact_map_has(name, compare):
    schedule = SCHEDULES[name]()
    for teacher in (mixture_teacher(schedule), gaussian_teacher(schedule)):
        method = ctm(teacher, compare=compare)
        with_student(method, heun_chain(method))
        for step in range(6):  # several n
            assert loss_of(method, batch_of(method, 64, step=step)).item() < 1e-18
    assert loss_of(with_student(method, exact(schedule)), batch_of(method)).item() > 1e-6


def test_fine_chains_of_the_teacher_are_the_exact_map():
    """So the loss at the exact map falls with the square of Heun's error, of second order: by 256 for 4 times the N."""
    losses = []
    for steps in (20, 77):  # 19 and 76 steps
        method = ctm(gaussian_teacher(VE()), steps=steps, solver_steps=1, sigma_min=0.1)
        with_student(method, exact(VE()))
        losses.append(loss_of(method, batch_of(method, 4000)).item() * steps**2)  # of a single step: third order
    assert losses[0] / losses[1] == pytest.approx(256, rel=0.5)


class Power(nn.Module):
    """The g whose jumps have a `power` of the Gaussian's gain; the exact map has 1."""

    def __init__(self, schedule, power: float) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor(power))
        self.g = Jump(schedule, functools.partial(self.jump, schedule))

    def jump(self, schedule, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        gain = (marginal_variance(schedule, s) / marginal_variance(schedule, t)) ** (self.power / 2)
        return schedule.alpha(s) * column(MEAN) + gain * (x_t - schedule.alpha(t) * column(MEAN))

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c=UNCONDITIONAL) -> Tensor:
        return self.g(x_t, t, s, c)


@pytest.mark.parametrize("start", [0.5, pytest.param(1.5, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("compare", ["soft", "local"])
def test_a_trained_power_is_that_of_the_exact_map(compare, start):
    """As far as Heun's 39 steps are it."""
    method = ctm(compare=compare, steps=40, solver_steps=8)
    with_student(method, Power(method.teacher.schedule, start))
    minimised(method.student, lambda step: loss_of(method, batch_of(method, 64, step, step)), steps=200)
    assert method.student.power.item() == pytest.approx(1, abs=0.02)


class Gain(nn.Module):
    """g = w x^ with one weight w."""

    def __init__(self, schedule, w: float) -> None:
        super().__init__()
        self.schedule, self.w = schedule, nn.Parameter(torch.tensor(w))

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c=UNCONDITIONAL) -> Tensor:
        return self.w * x_t / self.schedule.alpha(t)


@pytest.mark.parametrize("mu", [0.0, 0.9])
@pytest.mark.parametrize("compare", ["soft", "local"])
@pytest.mark.parametrize("name", ["ve", "flow_matching"])
def test_the_gradient_passes_through_the_input_of_the_target_only(name, compare, mu):
    """x^_s = a(w) x^_t with a = r + (1 - r) w. For one image the loss is (a(w) o x^_t - b)^2, where the outer jump's
    o = a(w-) and b are constants, so that its gradient is 2 (1 - r) o x^_t (a o x^_t - b)."""
    schedule = SCHEDULES[name]()
    method = ctm(gaussian_teacher(schedule), compare=compare, mu=mu)
    method.student = Gain(schedule, 0.3)
    method.target = Gain(schedule, 0.7) if mu else method.student
    outer = method.target.w.item()
    r = lambda high, low: schedule.noise_level(low) / schedule.noise_level(high)
    a = lambda w, high, low: r(high, low) + (1 - r(high, low)) * w
    for seed in range(5):
        method.student.w.grad = None
        loss = loss_of(method, batch_of(method, 1, seed, step=seed))
        loss.backward()
        again, grid = batch_of(method, 1, seed, step=seed), method.grid
        n = method.draw_n(again)
        k = again.integers(n, len(grid))
        t, u, s = grid[k], grid[k - n], grid[(again.uniform() * (k - n + 1)).long()]
        x_t = x_u = schedule.noised(again.x_0, t, again.noise())
        for i in range(n):
            x_u = heun_step(schedule, method.teacher.denoise, x_u, grid[k - i], grid[k - i - 1])
        x_t, x_u = x_t / schedule.alpha(t), x_u / schedule.alpha(u)
        o = a(outer, s, grid[0]) if compare == "soft" else torch.ones(())
        b = o * a(0.3 if compare == "soft" else outer, u, s) * x_u
        close(loss, (a(0.3, t, s) * o * x_t - b).square().mean(), rtol=1e-9)
        expected = (2 * (1 - r(t, s)) * o * x_t * (a(0.3, t, s) * o * x_t - b)).mean()
        close(method.student.w.grad, expected, rtol=1e-9)
        assert method.target is method.student or method.target.w.grad is None


# --- numbers of steps, and times -------------------------------------------------------------------------------------


def test_n_is_drawn_in_proportion_to_n():
    """Every number that `one_integer` may give, once."""

    class Given:
        def one_integer(self, low, high):
            assert (low, high) == (0, 45)
            return self.k

    method, given, found = ctm(), Given(), Counter()
    for given.k in range(45):
        found[method.draw_n(given)] += 1
    assert found == {n: n for n in range(1, 10)}


@pytest.mark.parametrize("solver_steps", [1, 4, 9])
def test_times_of_a_step(solver_steps):
    """t = t_k and u = t_{k-n} with k uniform among those above n, then s uniform from the lowest to u; x_t has x_0."""
    method = ctm(mlp_teacher(), steps=10, solver_steps=solver_steps)
    asked, jumps = [], []
    denoise, student = method.teacher.denoise, method.student
    method.teacher.denoise = lambda x, t, c: asked.append((x, t)) or denoise(x, t, c)

    class Watched(nn.Module):
        def forward(self, x_t, t, s, c):
            jumps.append((x_t, t, s))
            return student(x_t, t, s, c)

    with_student(method, Watched())
    index = lambda times: (times.flatten()[:, None] - method.grid).abs().argmin(dim=1)
    seen = set()
    for step in range(8):
        asked.clear(), jumps.clear()
        loss_of(method, batch_of(method, 1000, step=step))
        n = len(asked) // 2
        (_, u, s_too), (x_t, t, s), (_, s_1, e_1), (_, s_2, e_2) = jumps
        k, j, i = index(t), index(u), index(s)
        assert torch.equal(k - j, torch.full_like(k, n)) and (i <= j).all()
        assert all(torch.equal(s, other) for other in (s_too, s_1, s_2)) and (index(e_1) + index(e_2) == 0).all()
        assert sorted(k.unique().tolist()) == list(range(n, 10))
        counts = torch.bincount(k, minlength=10)[n:]
        assert n == 9 or stats.chisquare(counts.numpy()).pvalue > 1e-6
        share = (i + 0.5) / (j + 1)  # i uniform on 0, ..., j, so of the variance (1 - 1 / (j + 1)^2) / 12
        assert share.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(share)))
        again = batch_of(method, 1000, step=step)
        method.draw_n(again), again.integers(0, 2), again.uniform()
        close(x_t, method.teacher.schedule.noised(again.x_0, t, again.noise()), rtol=1e-12)
        close(asked[0][0], x_t)
        seen.add(n)
    assert seen <= set(range(1, solver_steps + 1)) and len(seen) > solver_steps / 3


@pytest.mark.parametrize(("compare", "students"), [("soft", 4), ("local", 2)])
@pytest.mark.parametrize("denoising", [0.0, 0.5])
def test_evaluations_of_a_step(compare, students, denoising, tmp_path):
    """Specification 39: T 2n, Sn 2, Sg 1, one gradient to the input, and Sg 1 for denoising."""
    method = ctm(mlp_teacher(), compare=compare, denoising=denoising, mu=0.9)
    meter = make_workspace(method.teacher, tmp_path).meter
    teacher = 0
    for step in range(5):
        batch = batch_of(method, 7, step=step)
        teacher += 7 * 2 * method.draw_n(batch_of(method, 7, step=step))
        loss_of(method, batch).backward()
    cost, more = meter.cost(), bool(denoising)
    assert (cost.teacher_nfe, cost.student_nfe) == (teacher, 5 * 7 * (students + more))
    assert cost.student_backward_input == (5 * 7 if compare == "soft" else 0)
    assert cost.student_backward - cost.student_backward_input == 5 * 7 * (1 + more)
    assert method.phases()[0].cost_varies


# --- denoising -------------------------------------------------------------------------------------------------------


def test_denoising():
    """w (1/tau^2 + 1/.25) |g(x_t, t, t) - x_0|^2; levels half log-normal and half from the upper .7 of the ramp."""
    method, asked = ctm(mlp_teacher(VE()), denoising=0.3), []
    plain = ctm(mlp_teacher(VE()))
    batch = batch_of(method, 4000)
    student = method.student.forward
    method.student.forward = lambda x_t, t, s, c: asked.append((x_t, t, s)) or student(x_t, t, s, c)
    loss = method.denoising_loss(batch)
    ((x_t, tau, s),) = asked
    again = batch_of(method, 4000)
    again.uniform(), again.uniform()
    x_0, eps = again.x_0, again.noise()
    close(x_t, x_0 + tau * eps, rtol=1e-12)
    assert torch.equal(tau, s)
    close(loss, ((1 / tau**2 + 4) * (method.teacher.denoise(x_t, tau) - x_0).square()).mean(), rtol=1e-9)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)

    ramp = lambda x: ((x ** (1 / 7) - low) / (high - low) - 0.3) / 0.7
    below = lambda x: 0.5 * stats.norm.cdf((np.log(x) + 1.2) / 1.2) + 0.5 * ramp(x).clip(0, 1)
    assert stats.kstest(tau.flatten().numpy(), below).pvalue > 1e-4
    again = batch_of(plain, 64)  # the same numbers in the same order
    total = 0.3 * plain.denoising_loss(again) + loss_of(plain, again)
    close(loss_of(method, batch_of(method, 64)), total, rtol=1e-9)


@pytest.mark.parametrize("compare", ["soft", "local"])
def test_the_adaptive_weight_makes_both_gradients_of_the_last_layer_equally_long(compare):
    """w |a| / (|b| + 1e-4) by gradients of whole losses, and the step's gradient is a + that times b in all weights."""
    plain = ctm(mlp_teacher(), mu=0.5, compare=compare)
    adaptive = ctm(mlp_teacher(), mu=0.5, compare=compare, adaptive=True, denoising=0.3)
    for method in (plain, adaptive):
        torch.manual_seed(3)
        with torch.no_grad():
            for weight in method.student.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    batch, weights = batch_of(plain, 16), dict(plain.student.named_parameters())
    losses = [plain.denoising_loss(batch), plain.consistency_loss(batch)]
    b, a = (torch.autograd.grad(loss, list(weights.values()), retain_graph=True) for loss in losses)
    last = [*weights].index("denoiser.counted.network.exit.weight")
    ratio = a[last].norm() / (b[last].norm() + 1e-4)
    assert abs(ratio - 1) > 0.1
    loss = loss_of(adaptive, batch_of(adaptive, 16))
    close(loss, 0.3 * ratio * losses[0] + losses[1], rtol=1e-9)
    loss.backward()
    for weight, of_a, of_b in zip(adaptive.student.parameters(), a, b, strict=True):
        close(weight.grad, of_a + 0.3 * ratio * of_b, rtol=1e-8, atol=1e-14)
    assert all(weight.grad is None for weight in adaptive.target.parameters())


def test_the_adaptive_weight_costs_no_further_pass_through_the_target(tmp_path):
    method = ctm(mlp_teacher(), denoising=0.5, mu=0.9, adaptive=True)
    meter, passes = make_workspace(method.teacher, tmp_path).meter, []

    def note(gradient: Tensor) -> None:
        passes.append(gradient)

    def watch(target: nn.Module, given: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(note)

    method.target.register_forward_hook(watch)
    loss_of(method, batch_of(method, 7)).backward()
    assert len(passes) == 1 and meter.cost().student_backward_input == 7


def test_a_guided_teacher_is_followed_and_not_denoised():
    teacher = dataclasses.replace(mlp_teacher(), conditioning=Conditioning(3, 2.0))
    assert ctm(teacher, denoising=0.5).w == 0
    assert ctm(dataclasses.replace(mlp_teacher(), conditioning=Conditioning(3)), denoising=0.5).w == 0.5


def test_every_network_is_told_the_condition():
    teacher = dataclasses.replace(mlp_teacher(), conditioning=Conditioning(classes=3))
    method, labels, told = ctm(teacher, mu=0.5, denoising=1.0), torch.tensor([2, 0, 1, 1]), []

    def hear(name: str, answer):
        return lambda *inputs: told.append((name, inputs[-1].labels)) or answer(*inputs)

    denoise = hear("teacher", teacher.denoise)
    teacher.denoise = lambda x, t, c: denoise(x, t, c)
    for name in ("student", "target"):
        network = getattr(method, name)
        network.forward = hear(name, network.forward)
    read = lambda n: (gaussian_images()(n)[0], labels)
    loss_of(method, Batch(4, (2, 1, 1), torch.Generator().manual_seed(0), "cpu", read, teacher.conditioning))
    assert [name for name, _ in told][-4:] == ["student", "student", "target", "target"]
    method.sample(FixedNoise([make_batch(4, seed=k).noise() for k in range(2)]), 2, Condition(labels))
    assert all(torch.equal(c, labels) for _, c in told)


class Dropped(nn.Module):
    """Ones of which dropout drops some, whatever the input; keeps what it answers."""

    embedding_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.dropout, self.seen = nn.Parameter(torch.ones(1)), nn.Dropout(0.5), []

    def forward(self, x: Tensor, t: Tensor, embedding=None, c=None) -> Tensor:
        self.seen.append(self.dropout(self.scale * torch.ones_like(x)))
        return self.seen[-1]


@pytest.mark.parametrize("mu", [0.0, 0.9])
@pytest.mark.parametrize("compare", ["soft", "local"])
def test_all_evaluations_of_the_comparison_drop_the_same_features(compare, mu):
    """Those of denoising drop others; the teacher drops none."""
    teacher = dataclasses.replace(mlp_teacher(VE()), denoiser=Denoiser(Dropped(), VE(), "x0"))
    method = ctm(teacher, compare=compare, mu=mu, denoising=1.0)
    loss_of(method, batch_of(method)).backward()
    networks = {id(m): m for m in (*method.student.modules(), *method.target.modules()) if isinstance(m, Dropped)}
    first, *others = [answer for network in networks.values() for answer in network.seen]
    assert len(others) == (4 if compare == "soft" else 2) and set(first.unique().tolist()) == {0.0, 2.0}
    assert all((answer == others[0]).all() for answer in others) and not (others[0] == first).all()
    assert all((answer == 1).all() for answer in teacher.denoiser.network.seen)


def test_target_network_is_a_moving_average():
    method = ctm(mlp_teacher(), mu=0.9)
    assert_target_is_a_moving_average(method, 0.9)
    assert not any(p.requires_grad for p in method.target.parameters())
    assert (same := ctm(mlp_teacher(), mu=0.0)).target is same.student


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nfe", [1, 2, 5, 9])
@pytest.mark.parametrize("name", some_schedules())
def test_without_noise_samples_stay_on_the_trajectory(name, nfe, tmp_path):
    """They are the exact map's of the noise, to the lowest level, in units of x^."""
    schedule = SCHEDULES[name]()
    method = with_student(ctm(gaussian_teacher(schedule)), exact(schedule))
    eps = make_batch(8).noise()
    T, e = time_like(eps, method.grid[-1]), time_like(eps, method.grid[0])
    expected = gaussian_map(schedule, schedule.sigma(T) * eps, T, e) / schedule.alpha(e)
    close(method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL), expected, atol=1e-9)
    assert method.supports(nfe) and method.keeps_noise(nfe) and not method.supports(0) and not method.supports(10)


@pytest.mark.parametrize("gamma", [0.3, 1.0])
@pytest.mark.parametrize("nfe", [1, 2, 3])
@pytest.mark.parametrize("name", some_schedules())
def test_samples_with_noise_have_the_distribution(name, nfe, gamma):
    """sample is affine in its draws, so unit draws give its distribution: N(m, v + e^2), but for where it starts.

    It starts at N(0, T^2) instead of N(m, v + T^2), and the noise brings the two closer. e = .3, so that the e^2 that
    x_e already carries is not lost in the tolerance.
    """
    schedule = SCHEDULES[name]()
    method = with_student(ctm(gaussian_teacher(schedule), sigma_min=0.3, gamma=gamma), exact(schedule))
    draw = lambda value: torch.full((1, 2, 1, 1), float(value))
    at = lambda values: method.sample(FixedNoise([draw(value) for value in values]), nfe, UNCONDITIONAL)
    mean = at([0] * nfe)
    parts = [(at([float(i == k) for i in range(nfe)]) - mean).square()[0] for k in range(nfe)]
    v, m, e2 = column(VARIANCE), column(MEAN), 0.3**2
    T2 = schedule.noise_level(method.grid[-1]).item() ** 2
    missing = 1 - sum(parts) / (v + e2)  # of the variance, relative
    assert (missing > -1e-9).all() and (missing < (1 + 1e-6) * v / (v + T2)).all()
    assert ((mean[0] - m).abs() < (1 + 1e-6) * m.abs() * ((v + e2) / (v + T2)).sqrt()).all()
    if nfe > 1:
        assert (parts[-1] > 0.01 * gamma**2).all() and not method.keeps_noise(nfe) and method.keeps_noise(1)


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_with_gamma_1_samples_are_those_of_a_consistency_model(nfe):
    method = ctm(mlp_teacher(), gamma=1.0)
    schedule, draws = method.teacher.schedule, [make_batch(4, seed=k).noise() for k in range(nfe)]

    class F(nn.Module):
        e = 0.002

        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x_t, t, c):
            e = time_like(x_t, method.grid[0])
            return method.G(method.student, x_t, t, e, c) / schedule.alpha(e)

    expected = multistep(F(), method.grid, FixedNoise(draws), nfe)
    close(method.sample(FixedNoise(draws), nfe, UNCONDITIONAL), expected, atol=1e-9)


def test_with_noise_a_jump_ends_below_the_next_level():
    """At s = e + sqrt(1 - gamma^2) (tau - e), as released."""
    method, asked = ctm(mlp_teacher(VE()), gamma=0.6), []
    student = method.student.forward
    method.student.forward = lambda x_t, t, s, c: asked.append((t[0].item(), s[0].item())) or student(x_t, t, s, c)
    method.sample(FixedNoise([make_batch(4, seed=k).noise() for k in range(3)]), 3, UNCONDITIONAL)
    levels = method.grid[[9, 6, 3, 0]].tolist()
    below = [0.002 + 0.8 * (tau - 0.002) for tau in levels[1:]]
    assert [t for t, _ in asked] == pytest.approx(levels[:3], rel=1e-9)
    assert [s for _, s in asked] == pytest.approx(below, rel=1e-9)


def test_with_very_little_noise_samples_are_those_without():
    """tau_s is tau but for rounding, which here leaves it above at some levels."""
    draws = [make_batch(4, seed=k).noise() for k in range(17)]
    teacher = mlp_teacher(SCHEDULES["vp_linear"]())
    small, none = (ctm(teacher, steps=18, gamma=g).sample(FixedNoise(draws), 17, UNCONDITIONAL) for g in (1e-9, 0.0))
    close(small, none, atol=1e-5)


# --- settings --------------------------------------------------------------------------------------------------------


def test_heun_needs_levels_that_are_close(tmp_path):
    method = ctm(gaussian_teacher(VE()), steps=3, solver_steps=2)
    with pytest.raises(UserError, match="heun needs noise levels close together"):
        method.prepare(make_workspace(method.teacher, tmp_path))
    ctm(gaussian_teacher(VE())).prepare(make_workspace(method.teacher, tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1},
        {"solver_steps": 0},
        {"solver_steps": 12, "steps": 12},
        {"mu": 1.0},
        {"compare": "hard"},
        {"denoising": -1.0},
        {"gamma": 1.5},
        {"sigma_min": 0.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        ConsistencyTrajectory.Config(**settings)
