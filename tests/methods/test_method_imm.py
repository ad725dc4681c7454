"""Inductive moment matching: its estimators, its formulas, and the flow map of a Gaussian, which is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from analytic import (
    close,
    gaussian_images,
    gaussian_teacher,
    loss_of,
    make_batch,
    make_workspace,
    minimised,
    mlp_teacher,
    same_weights,
    schedules,
    time,
    weights_of,
)
from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition, Conditioning
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import ddim_step
from distillbench.diffusion.schedules import SCHEDULES, FlowMatching
from distillbench.errors import UserError
from distillbench.networks.architectures import ResidualMLP
from distillbench_imm import InductiveMomentMatching

pytestmark = pytest.mark.usefixtures("float64")
V, SD = 0.25, 0.5  # variance of the data, standard deviation of the paper's noise


def imm(teacher=None, **settings) -> InductiveMomentMatching:
    return InductiveMomentMatching(InductiveMomentMatching.Config(**settings), teacher or mlp_teacher(FlowMatching()))


class ExactMap(nn.Module):
    """The D of the flow map of N(0, V), and of `gain` times it where there is a gradient."""

    def __init__(self, method: InductiveMomentMatching, gain: float = 1.0) -> None:
        super().__init__()
        self.schedule, self.gain = method.teacher.schedule, nn.Parameter(torch.tensor(gain))

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        tau_t, tau_s = (self.schedule.noise_level(q) for q in (t, s))
        x = x_t / self.schedule.alpha(t)
        gain = self.gain if torch.is_grad_enabled() else 1.0
        at_s = gain * ((V + tau_s**2) / (V + tau_t**2)).sqrt() * x
        # where s is t its factor is 0; s = 0 is the schedule's smallest level
        return (at_s - tau_s / tau_t * x) / (1 - tau_s / tau_t).clamp(min=1e-12)


def with_map(gain: float = 1.0, **settings) -> InductiveMomentMatching:
    method = imm(gaussian_teacher(FlowMatching(), (0.0,), (V,)), **settings)
    method.student = ExactMap(method, gain)
    return method


def gain_slopes(gain: float, size: int, count: int, t: float = 0.5, s: float = 0.1, **settings) -> Tensor:
    """dL/dgain of `count` batches of `size` images, without the weight, from t to s."""
    method, found = with_map(gain, **settings), []
    t, s = (time([q] * size) for q in (t, s))
    r = method.r(s, t)
    read = gaussian_images(3, (0.0,), (V,))
    for seed in range(count):
        x_0, noise = read(size)[0], SD * make_batch(size, (1, 1, 1), seed).noise()
        x_t, x_r = ((1 - q) * x_0 + q * noise for q in (t, r))
        with torch.no_grad():
            target = method.f(x_r, r, s, UNCONDITIONAL)
        method.zero_grad()
        method.mmd(method.f(x_t, t, s, UNCONDITIONAL), target, (t - s) * SD, UNCONDITIONAL).mean().backward()
        found.append(method.student.gain.grad.clone())
    return torch.stack(found)


# --- the estimator ---------------------------------------------------------------------------------------------------


def kernel(a: Tensor, b: Tensor, h: float) -> float:
    return math.exp(-max((a - b).norm().item(), 1e-8) / (a.numel() * h))


def sums(y: Tensor, target: Tensor, h: float, counted) -> float:
    pairs = [(i, j) for i in range(len(y)) for j in range(len(y)) if counted(i, j)]
    k = lambda a, b: kernel(a, b, h)
    return sum(k(y[i], y[j]) + k(target[i], target[j]) - 2 * k(y[i], target[j]) for i, j in pairs)


def images(size: int, seed: int, shape=(2, 3, 1)) -> Tensor:
    return 0.3 * make_batch(size, shape, seed).noise()


@pytest.mark.parametrize("M", [2, 4])
def test_both_estimators_pair_by_pair(M):
    """Three groups, each with its own width."""
    y, target, h = images(3 * M, 1), images(3 * M, 2), torch.tensor([0.1, 0.3, 0.02]).repeat_interleave(M)
    for diagonal, divisor in ((True, M * M), (False, M * (M - 1))):
        method = imm(group_size=M, diagonal=diagonal)
        found = method.mmd(y, target, time(h), UNCONDITIONAL)
        counted = (lambda i, j: True) if diagonal else (lambda i, j: i != j)
        by_hand = [sums(y[g * M :][:M], target[g * M :][:M], h[g * M].item(), counted) / divisor for g in range(3)]
        close(found, torch.tensor(by_hand), rtol=1e-10)


def test_one_image_is_a_consistency_loss_with_a_bounded_distance():
    y, target, h = images(5, 1), images(5, 2), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    found = imm(group_size=1, diagonal=True).mmd(y, target, time(h), UNCONDITIONAL)
    expected = [2 - 2 * kernel(y[i], target[i], h[i].item()) for i in range(5)]
    close(found, torch.tensor(expected), atol=1e-6)  # k(y, y) is that of a distance of 1e-8


def test_equal_sets_have_no_distance():
    """In any order, by the published estimator."""
    y, h = images(8, 1), time([0.2] * 8)
    method = imm(group_size=4, diagonal=True)
    close(method.mmd(y, y[[2, 0, 3, 1, 5, 7, 4, 6]], h, UNCONDITIONAL), torch.zeros(2), atol=1e-12)
    assert (method.mmd(y, images(8, 2), h, UNCONDITIONAL) > 1e-3).all()


def laplace(p: Tensor, q: Tensor) -> Tensor:
    return torch.exp(-(p[:, None] - q).abs() / 0.5)


def test_without_the_diagonal_it_is_unbiased():
    """Of two sets with one distribution the mean is zero, and of two distributions that of all pairs of a large set."""
    size, M = 40_000, 4
    h = time([0.5] * size)
    for shift in (0.0, 0.4):
        y, target = images(size, 1, (1, 1, 1)), images(size, 2, (1, 1, 1)) + shift
        found = imm(group_size=M, diagonal=False).mmd(y, target, h, UNCONDITIONAL)
        a, b = y[:1000].flatten(), target[:1000].flatten()
        apart = sum((laplace(p, p).sum() - 1000) / (1000 * 999) for p in (a, b))
        expected = (apart - 2 * laplace(a, b).mean()).item()
        error = 4 * found.std().item() / math.sqrt(len(found))
        assert found.mean().item() == pytest.approx(expected, abs=error + 0.01)
        assert (found.mean() > error) == (shift > 0)
        if not shift:
            assert imm(group_size=M, diagonal=True).mmd(y, target, h, UNCONDITIONAL).mean() > 10 * error


def test_only_images_of_one_class_are_compared_without_the_diagonal():
    M, labels = 4, torch.tensor([0, 1, 0, 1, 2, 2, 2, 1])
    y, target, h = images(8, 1), images(8, 2), time([0.2] * 8)
    found = imm(group_size=M, diagonal=False).mmd(y, target, h, Condition(labels))
    for g in range(2):
        of_group = labels[g * M :][:M].tolist()
        counted = lambda i, j, of_group=of_group: i != j and of_group[i] == of_group[j]
        by_hand = sums(y[g * M :][:M], target[g * M :][:M], 0.2, counted) / (M * (M - 1))
        assert found[g].item() == pytest.approx(by_hand, rel=1e-10)
    published = imm(group_size=M, diagonal=True)
    close(published.mmd(y, target, h, Condition(labels)), published.mmd(y, target, h, UNCONDITIONAL), rtol=1e-12)


@pytest.mark.parametrize("diagonal", [False, True])
def test_equal_images_have_a_finite_gradient(diagonal):
    y = images(4, 1).requires_grad_()
    imm(group_size=4, diagonal=diagonal).mmd(y, y.detach(), time([0.2] * 4), UNCONDITIONAL).sum().backward()
    assert y.grad.isfinite().all()


# --- at the exact flow map -------------------------------------------------------------------------------------------


def test_the_exact_map_has_no_gradient_without_the_diagonal():
    """With it the mean gradient is not zero: it wants smaller samples (specification 27)."""
    settings = {"group_size": 4, "k": 9}
    found = gain_slopes(1.0, 4000, 40, **settings, diagonal=False)
    error = found.std() / math.sqrt(len(found))
    assert found.mean().abs() < 3 * error
    published = gain_slopes(1.0, 4000, 40, **settings, diagonal=True)
    assert published.mean() > 5 * published.std() / math.sqrt(len(published)) and published.mean() > 10 * error


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("gain", "sign"), [(0.9, -1), (1.1, 1)])
def test_a_gain_that_is_wrong_is_corrected(gain, sign, diagonal):
    found = gain_slopes(gain, 4000, 10, group_size=4, k=9, diagonal=diagonal)
    assert sign * found.mean() > 4 * found.std() / math.sqrt(len(found))


@pytest.mark.parametrize("start", [0.7, 1.4])
def test_a_trained_gain_is_that_of_the_exact_map(start):
    method = with_map(start, group_size=16, diagonal=False)
    images = [make_batch(256, (1, 1, 1), seed, gaussian_images(seed + 1000, (0.0,), (V,))) for seed in range(300)]
    minimised(method.student, lambda step: loss_of(method, images[step]))
    assert method.student.gain.item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_samples_of_the_exact_map_do_not_depend_on_the_number_of_steps(nfe, tmp_path):
    method, z = with_map(), make_batch(6, (1, 1, 1)).noise()
    method.student = ExactMap(method)
    tau, end = SD * 0.994 / 0.006, method.teacher.schedule.noise_level(time(0.0)).item()
    expected = math.sqrt((V + end**2) / (V + tau**2)) * tau * z
    with torch.no_grad():
        close(method.sample(FixedNoise([z]), nfe, UNCONDITIONAL), expected, rtol=1e-3)


# --- the formulas ----------------------------------------------------------------------------------------------------


def test_r_is_one_of_2_to_the_k_steps_of_eta():
    method = imm(k=6)
    t = time([0.9, 0.9, 0.99, 0.5, 0.7])
    s = time([0.1, 0.88, 0.3, 0.1, 0.69995])
    r = method.r(s, t)
    eta = lambda q: q / (1 - q)
    expected = [eta(q) - 160 / 64 for q in (0.9, 0.99)]
    close(eta(r[[0, 2]]).flatten(), torch.tensor(expected), rtol=1e-12)
    close(r[[1, 3, 4]], s[[1, 3, 4]])  # never below s; a step of eta below 0 ends at s, too
    small = imm(k=30)
    close(small.r(s[:1], t[:1]), t[:1] - 1e-4, rtol=1e-12)  # never closer to t than that


@pytest.mark.parametrize(("a", "b"), [(1.0, 5.0), (2.0, 4.0)])
def test_the_weight_is_the_paper_s(a, b):
    t, h = time([0.01, 0.3, 0.7, 0.99]), 1e-6
    logsnr = lambda q: 2 * ((1 - q) / q).log()
    slope = (logsnr(t + h) - logsnr(t - h)) / (2 * h)
    expected = 0.5 / (1 + (logsnr(t) - b).exp()) * -slope * (1 - t) ** a / ((1 - t) ** 2 + t**2)
    close(imm(a=a, b=b).w(t), expected, rtol=1e-7)


def test_a_jump_is_ddim_on_flow_matching():
    """With noise of std 1 the paper's times are the schedule's."""
    schedule = FlowMatching()
    method = imm(mlp_teacher(schedule), sigma_data=1.0)
    t, s = time([0.9, 0.5, 0.3]), time([0.2, 0.1, 0.3 - 1e-6])
    x_t = make_batch(3).noise()
    D = method.teacher.denoise(x_t, t)  # the student starts as the teacher for every s
    close(method.f(x_t, t, s, UNCONDITIONAL), ddim_step(schedule, x_t, D, t, s), rtol=1e-7, atol=1e-9)
    close(method.f(x_t, t, torch.zeros_like(t), UNCONDITIONAL), D, rtol=1e-7, atol=1e-9)
    close(method.f(x_t, t, t, UNCONDITIONAL), x_t, rtol=1e-12)


@pytest.mark.parametrize("name", schedules())
def test_the_schedule_does_not_matter(name):
    """The teacher's denoiser at equal noise levels, in x_0 + tau eps, is the same on every schedule."""
    method = imm(gaussian_teacher(SCHEDULES[name](), (0.0,), (V,)))
    x, t, s = make_batch(3, (1, 1, 1)).noise(), time([0.9, 0.5, 0.3]), time([0.2, 0.1, 0.05])
    tau = SD * t / (1 - t)
    x_0 = V / (V + tau**2) * x / (1 - t)
    close(method.f(x, t, s, UNCONDITIONAL), s / t * x + (1 - s / t) * x_0, rtol=1e-6)
    ends = [
        method.teacher.schedule.noise_level(time(q)).item() / SD
        for q in (method.teacher.schedule.t_min, method.teacher.schedule.t_max)
    ]
    assert method.low == pytest.approx(ends[0] / (1 + ends[0])) and method.high == pytest.approx(
        min(0.994, ends[1] / (1 + ends[1]))
    )


# --- a step ----------------------------------------------------------------------------------------------------------


def batch(size: int = 24, seed: int = 0):
    return make_batch(size, seed=seed, read=gaussian_images(seed + 100))


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_step_by_hand(diagonal):
    """From the same draws: equal times in a group, x_r from the images and noise of x_t, the weight of each group."""
    method = imm(group_size=3, diagonal=diagonal, a=1.0, b=5.0, k=9, to_image=0.25)
    found = loss_of(method, batch())
    again = batch()
    x_0, noise, first, second = again.x_0, SD * again.noise(), again.uniform(), again.uniform()
    total = 0.0
    for g in range(8):
        rows = slice(3 * g, 3 * g + 3)
        t = method.low + (method.high - method.low) * first[3 * g].item()
        s = method.low + (t - method.low) * max(0, second[3 * g].item() - 0.25) / 0.75
        r = max(s, min(t - 1e-4, max((step := t / (1 - t) - 160 / 2**9), 0) / (1 + max(step, 0))))
        y, target = (
            method.f((1 - q) * x_0[rows] + q * noise[rows], time([q] * 3), time([s] * 3), UNCONDITIONAL).detach()
            for q in (t, r)
        )
        counted = (lambda i, j: True) if diagonal else (lambda i, j: i != j)
        distance = sums(y, target, (t - s) * SD, counted) / (9 if diagonal else 6)
        logsnr = -2 * math.log(t / (1 - t))
        w = 0.5 / (1 + math.exp(logsnr - 5)) * 2 / (t * (1 - t)) * (1 - t) / (t**2 + (1 - t) ** 2)
        total += w * distance / 8
    assert found.item() == pytest.approx(total, rel=1e-8)


def test_a_step_trains_the_student_alone_and_never_asks_the_teacher(tmp_path):
    method = imm(group_size=4)
    meter = make_workspace(method.teacher, tmp_path).meter
    before = weights_of(method.teacher.denoiser)
    loss_of(method, batch()).backward()
    cost = meter.cost()
    assert (cost.teacher_nfe, cost.student_nfe, cost.student_backward) == (0, 48, 24)
    assert any(p.grad is not None and p.grad.any() for p in method.student.parameters())
    assert same_weights(weights_of(method.teacher.denoiser), before)


def test_the_least_random_numbers_are_no_trouble():
    method, given = imm(group_size=4), batch()
    given.uniform = lambda low=0.0, high=1.0: torch.full((24, 1, 1, 1), low, dtype=torch.float64)
    loss = loss_of(method, given)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


# --- settings --------------------------------------------------------------------------------------------------------


def test_any_number_of_steps_without_a_promise_about_the_noise():
    method = imm(group_size=5)
    assert not method.supports(0) and all(method.supports(nfe) for nfe in (1, 2, 7, 64))
    assert not method.keeps_noise(1) and method.group_size == 5


def test_the_start_is_the_teacher_s_weights_or_fresh_ones():
    teacher = mlp_teacher(FlowMatching())
    teacher.blank = lambda: ResidualMLP((2, 1, 1), width=16, depth=1)
    mine, fresh = weights_of(teacher.denoiser), weights_of(imm(teacher, start="fresh").student.denoiser)
    assert same_weights(weights_of(imm(teacher).student.denoiser), mine)
    assert fresh.keys() == mine.keys() and not same_weights(fresh, mine)


def test_what_is_refused():
    with pytest.raises(UserError, match="group_size"):
        InductiveMomentMatching.Config(group_size=1, diagonal=False)
    InductiveMomentMatching.Config(group_size=1, diagonal=True)
    with pytest.raises(UserError, match="start"):
        InductiveMomentMatching.Config(start="random")
    teacher = mlp_teacher(FlowMatching())
    teacher.conditioning = Conditioning(2, 2.0)
    with pytest.raises(UserError, match="guided"):
        imm(teacher)
