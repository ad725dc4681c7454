"""Easy consistency tuning against the released formulas, Gaussian closed forms, and the continuous mode of `ct`."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import kstest, norm
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
    mixture_teacher,
    mlp_teacher,
    same_weights,
    some_schedules,
    table_teacher,
    time,
    trained,
    weights_of,
)
from distillbench.diffusion import consistency_times
from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition, Conditioning
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.schedules import SCHEDULES, VE, VPCosine
from distillbench.errors import UserError
from distillbench.training.method import Batch
from distillbench_ct import ConsistencyTraining
from distillbench_ect import EasyConsistencyTuning

pytestmark = pytest.mark.usefixtures("float64")


def ect(teacher=None, stage: int = 0, **settings) -> EasyConsistencyTuning:
    """In its stage `stage`; q = 2 as released for CIFAR-10, unless asked for otherwise."""
    method = EasyConsistencyTuning(EasyConsistencyTuning.Config(**{"q": 2.0} | settings), teacher or mlp_teacher(VE()))
    method.start_phase(stage)
    return method


def batch_of(method, size: int = 64, seed: int = 0) -> Batch:
    return make_batch(size, method.teacher.shape, seed, gaussian_images(seed))


def released(t: Tensor, stage: int, q: float, k: float = 8.0, b: float = 1.0) -> Tensor:
    """r of t in the released code's `stage`, which counts from 0; written anew."""
    return (t - t * q ** -(stage + 1) * (1 + k / (1 + torch.exp(b * t)))).clamp(min=0)


def drawn(batch: Batch, low: float = 0.002, high: float = 80.0) -> Tensor:
    """The noise levels of a batch, whose noise is drawn first: log-normal, cut to the schedule's range."""
    u = batch.uniform().flatten().numpy()
    return torch.from_numpy(norm(-1.1, 2.0).ppf(u)).exp().clamp(low, high).view(-1, 1, 1, 1)


class Recorder(nn.Module):
    """Keeps what it is asked, and answers with its number."""

    def __init__(self, answer: float = 0.0) -> None:
        super().__init__()
        self.answer = nn.Parameter(torch.tensor(answer))
        self.asked: list[tuple[Tensor, Tensor, Condition]] = []

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        self.asked.append((x_t.detach(), t, c))
        return self.answer.expand_as(x_t)


# --- the pair of times and of images ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("q", "stage"), [(2.0, 0), (2.0, 3), (4.0, 1), (256.0, 0)])
@pytest.mark.parametrize("name", some_schedules())
def test_both_images_are_of_one_x_0_and_one_noise_at_the_released_levels(name, q, stage):
    schedule = SCHEDULES[name]()
    method = ect(gaussian_teacher(schedule), stage, q=q)
    batch = batch_of(method, 500)
    method.student = Recorder()
    loss_of(method, batch)
    (x_s, s, _), (x_t, t, _) = method.student.asked
    again = batch_of(method, 500)
    x_0, eps = again.x_0, again.noise()
    low, high = (max(0.002, math.exp(schedule.lam_range[0])), min(80.0, math.exp(schedule.lam_range[1])))
    tau_t = drawn(again, low, high)
    tau_s = released(tau_t, stage, q)
    close(schedule.noise_level(t), tau_t, rtol=1e-6)
    close(x_t, schedule.alpha(t) * (x_0 + tau_t * eps), rtol=1e-5, atol=1e-7)
    kept = (tau_s >= low).flatten()
    assert 50 < kept.sum() <= 500
    close(schedule.noise_level(s)[kept], tau_s[kept], rtol=1e-6)
    close(x_s[kept], (schedule.alpha(s) * (x_0 + tau_s * eps))[kept], rtol=1e-5, atol=1e-7)
    assert (s[~kept] == method.within.t_min).all()


def test_the_released_ratios():
    """Specification 21: r/t in stage 1 is 0 up to t = 1.95 and .5 from 10 on; .21 at 1 in stage 2."""
    assert released(torch.tensor([1.9, 2.0]), 0, 2.0).gt(0).tolist() == [False, True]
    for t, stage, ratio in ((10.0, 0, 0.50), (80.0, 0, 0.50), (1.0, 1, 0.21)):
        assert released(torch.tensor(t), stage, 2.0).item() / t == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize("name", some_schedules())
def test_with_the_teacher_the_second_image_is_a_step_of_euler_s_method(name):
    """In EDM's coordinates x^_r = D + (r/t) (x^_t - D), and where r = 0 the target is D."""
    schedule = SCHEDULES[name]()
    method = ect(mixture_teacher(schedule, centres=[[-1.0, 0.3], [0.4, -0.5], [1.0, 1.0]]), source="teacher")
    method.student = Recorder(0.3)
    loss = loss_of(method, batch_of(method, 300))
    (x_s, s, _), (x_t, t, _) = method.student.asked
    tau_t = schedule.noise_level(t)
    tau_s = released(tau_t, 0, 2.0)
    tau_s[tau_s < schedule.noise_level(time(method.within.t_min))] = 0.0
    D, x_hat = method.teacher.denoise(x_t, t), x_t / schedule.alpha(t)
    kept = (tau_s > 0).flatten()
    close((x_s / schedule.alpha(s))[kept], (D + tau_s / tau_t * (x_hat - D))[kept], rtol=1e-6, atol=1e-6)
    square = torch.where(tau_s > 0, 0.0, 0.3 - D).square()
    close(loss, (square / (tau_t - tau_s)).mean(), rtol=1e-6)


def test_the_noise_levels_are_log_normal():
    method = ect(p_mean=-0.8, p_std=1.6)
    method.student = Recorder()
    loss_of(method, batch_of(method, 20_000))
    lam = method.student.asked[1][1].log().flatten()
    assert kstest(lam[(lam > math.log(0.0021)) & (lam < math.log(79))].numpy(), norm(-0.8, 1.6).cdf).pvalue > 0.01


def test_without_bounds_edm_s_networks_learn_at_every_level_that_is_drawn():
    method = ect(mlp_teacher(VE(0.1, 5.0), "edm"), bounded=False, sigma_min=0.2, sigma_max=4.0)
    method.student, batch = Recorder(), batch_of(method, 500)
    loss_of(method, batch)
    (x_s, s, _), (x_t, t, _) = method.student.asked
    again = batch_of(method, 500)
    x_0, eps = again.x_0, again.noise()
    tau_t = drawn(again, 0.0, math.inf)
    tau_s = released(tau_t, 0, 2.0)
    assert (tau_t < 0.1).sum() > 50 and (tau_t > 5).sum() > 20
    kept = (tau_s > 0).flatten()
    close(t, tau_t, rtol=1e-9)
    close(s[kept], tau_s[kept], rtol=1e-9)
    close(x_t, x_0 + tau_t * eps, rtol=1e-9)
    close(x_s[kept], (x_0 + tau_s * eps)[kept], rtol=1e-9, atol=1e-9)
    schedule = method.teacher.schedule
    close(schedule.noise_level(method.grid[[0, -1]]), torch.tensor([0.2, 4.0]), rtol=1e-9)  # of samples


def test_without_bounds_other_networks_learn_within_their_own_schedule():
    """And EDM's where they are read on another one."""
    for teacher in (mlp_teacher(VE(0.1, 5.0), "x0"), mlp_teacher(VE(0.1, 5.0), "edm").on(VPCosine())):
        method = ect(teacher, bounded=False, sigma_min=0.2, sigma_max=4.0)
        close(torch.tensor(method.within.lam_range).exp(), torch.tensor([0.1, 5.0]), rtol=1e-6)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "c"), [("l2", 0.0), ("pseudo_huber", 0.0), ("pseudo_huber", 0.3)])
@pytest.mark.parametrize("stage", [0, 3])
def test_the_loss_is_the_released_one(metric, c, stage):
    """On VE, with f the denoiser itself: w phi(|f(x_t, t) - sg f(x_r, r)|), f(x_r, r) = x_0 where r = 0, w = 1/(t - r).

    The released phi takes the sum over pixels; l2 is its square, a mean over pixels.
    """
    method = ect(stage=stage, metric=metric, huber_c=c)
    loss = loss_of(method, batch_of(method, 200))
    batch, f = batch_of(method, 200), method.teacher.denoiser
    x_0, eps = batch.x_0, batch.noise()
    t = drawn(batch)
    r = released(t, stage, 2.0)
    r[r < 0.002] = 0.0
    f_r = torch.where(r > 0, f(x_0 + r * eps, r.clamp(min=0.002)), x_0)
    total, ended = 0.0, 0
    for a, b, t_i, r_i in zip(f(x_0 + t * eps, t), f_r, t.flatten().tolist(), r.flatten().tolist(), strict=True):
        square = sum((p - o) ** 2 for p, o in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        total += (square / 2 if metric == "l2" else math.sqrt(square + c * c) - c) / (t_i - r_i) / 200
        ended += r_i == 0
    assert 0 < ended < 200
    assert loss.item() == pytest.approx(total, rel=1e-6)


class Affine(nn.Module):
    """F = m + gain (x^ - m) at each level of a chain, one gain for every pixel; VE."""

    def __init__(self, tau: Tensor, mean: Tensor) -> None:
        super().__init__()
        self.tau, self.mean, self.gain = tau, mean, nn.Parameter(torch.zeros(len(tau), len(mean), 1, 1))

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        return self.mean + self.gain[(self.tau - t.flatten()[:1]).abs().argmin()] * (x_t - self.mean)


TABLE = {  # specification 21: gain over that of the exact flow, from 80 down, for variances .25 and .01
    1: (0.597, 0.254),
    2: (0.678, 0.269),
    3: (0.862, 0.808),
    4: (0.937, 0.918),
    5: (0.970, 0.961),
    6: (0.985, 0.981),
}


@pytest.mark.parametrize("source", ["data", "teacher"])
@pytest.mark.parametrize("a", [1, 2, 3, 4, pytest.param(5, marks=pytest.mark.nightly)])
def test_the_optimum_of_the_squared_loss_on_a_gaussian(a, source):
    """The loss at each level of the chain 80, r(80), ... is minimised by Newton's method, which a parabola needs once.

    x_0 = m +- sd and eps = +-1 have the moments that its gradient is made of.
    """
    mean, v = (0.5, -0.3), (0.25, 0.01)
    method = ect(gaussian_teacher(VE(), mean, v), a - 1, source=source)
    levels = [80.0]
    while (r := released(torch.tensor(levels[-1]), a - 1, 2.0).item()) >= 0.002:
        levels.append(r)
    tau = torch.tensor(levels[::-1])
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x_0, eps = column(mean) + column(v).sqrt() * time(sign[:, 0]), time(sign[:, 1]).expand(4, 2, 1, 1)
    method.student = Affine(tau, column(mean))
    parameter = method.student.gain
    u = torch.from_numpy(norm(-1.1, 2.0).cdf(tau.log().numpy()))

    def gradient(k: int) -> Tensor:
        given = SimpleNamespace(x_0=x_0, c=UNCONDITIONAL, noise=lambda: eps, uniform=lambda: u[k].expand(4, 1, 1, 1))
        parameter.grad = None
        loss_of(method, given).backward()
        assert parameter.grad[:k].abs().sum() == 0  # none to the target
        return parameter.grad[k].clone()

    for k in range(len(tau)):
        at_0 = gradient(k)
        with torch.no_grad():
            parameter[k] = 1.0
        at_1 = gradient(k)
        with torch.no_grad():
            parameter[k] = at_0 / (at_0 - at_1)
    gain, expected = parameter[-1].flatten(), torch.ones(2)
    for low, high in zip([0.0, *tau.tolist()], tau.tolist(), strict=False):
        expected *= (torch.tensor(v) + low * high) / (torch.tensor(v) + high**2)
    close(gain, expected, rtol=1e-8)
    exact = (torch.tensor(v) / (torch.tensor(v) + 80.0**2)).sqrt()
    close(gain / exact, torch.tensor(TABLE[a]), atol=1e-3)


def test_gradients_reach_only_the_student_at_t():
    method = ect(source="teacher")
    loss = loss_of(method, batch_of(method))
    loss.backward()
    assert all(p.grad is None for p in method.teacher.denoiser.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())
    found = [p.grad.clone() for p in method.student.parameters()]
    again = ect(source="teacher")
    with torch.enable_grad():  # the same with a target that is computed beforehand
        batch = batch_of(again)
        x_0, eps = batch.x_0, batch.noise()
        t = drawn(batch)
        r = released(t, 0, 2.0)
        x_t = x_0 + t * eps
        D = again.teacher.denoise(x_t, t)
        target = torch.where(r > 0.002, again.student(D + r / t * (x_t - D), r.clamp(min=0.002)), D).detach()
        r = torch.where(r > 0.002, r, 0.0)
        ((again.student(x_t, t) - target).square() / (t - r)).mean().backward()
    for one, other in zip(found, again.student.parameters(), strict=True):
        close(one, other.grad, rtol=1e-6, atol=1e-9)


class Dropped(nn.Module):
    """Ones of which dropout drops some, whatever the input."""

    embedding_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.dropout = nn.Parameter(torch.ones(1)), nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor, embedding=None, c=None) -> Tensor:
        return self.dropout(self.scale * torch.ones_like(x))


def test_both_evaluations_drop_the_same_features():
    """Where tau_s > 0 the loss of a constant network is zero under one mask, and about 1 / 2 w under two."""
    teacher = dataclasses.replace(mlp_teacher(VE()), denoiser=Denoiser(Dropped(), VE(), "x0"))
    method = ect(teacher, q=256.0, p_mean=1.0, p_std=0.5)  # no tau_s is 0
    method.student.train()
    assert loss_of(method, batch_of(method)).item() == 0
    with torch.no_grad():
        seen = method.student(torch.zeros(64, 2, 1, 1), torch.full((64, 1, 1, 1), 3.0))
    assert (seen == 1).all()  # without gradient and outside of a block: no dropout
    seen = method.student(torch.zeros(64, 2, 1, 1), torch.full((64, 1, 1, 1), 3.0))
    assert set(seen.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("name", some_schedules())
def test_in_single_precision_it_is_finite_in_late_stages(name):
    torch.set_default_dtype(torch.float32)
    images = gaussian_images()
    for source in ("data", "teacher"):
        for metric in ("l2", "pseudo_huber"):
            method = ect(mlp_teacher(SCHEDULES[name]()), 15, source=source, metric=metric)
            loss = loss_of(method, make_batch(512, read=lambda n: (images(n)[0].float(), None)))
            loss.backward()
            assert loss.dtype == torch.float32 and math.isfinite(loss.item())
            assert all(p.grad.isfinite().all() for p in method.student.parameters())


# --- the continuous mode of ct ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some_schedules())
def test_ct_in_continuous_time_is_this_method(name):
    """n = N - 1 in ct is q^a here: 2, 4, 8, ..., in equally long stages."""
    teacher = mlp_teacher(SCHEDULES[name]())
    settings = {"levels": "continuous", "s0": 2, "s1": 64, "mu": 0.0, "start": "teacher"}
    other = ConsistencyTraining(ConsistencyTraining.Config(**settings), teacher)
    method = ect(teacher, stages=6)
    assert [phase.share for phase in other.phases()] == [phase.share for phase in method.phases()] == [1.0] * 6
    for stage in range(6):
        method.start_phase(stage)
        other.start_phase(stage)
        loss = loss_of(method, batch_of(method, 100))
        close(loss_of(other, batch_of(other, 100)), loss, rtol=1e-6)
    batch = [make_batch(5, seed=k).noise() for k in range(3)]
    close(
        other.sample(FixedNoise(batch), 1, UNCONDITIONAL), method.sample(FixedNoise(batch), 1, UNCONDITIONAL), rtol=1e-9
    )


# --- stages, cost, conditions ----------------------------------------------------------------------------------------


def test_stages_are_shares_of_the_images_seen(tmp_path):
    """8 stages of 25.6 million images as released: 3.2 million each; here of 40 steps."""
    method = ect(stages=8)
    used, after = [], method.after_step
    method.after_step = lambda: used.append(method.n) or after()
    trained(method, tmp_path, 40, 4)
    assert used == [2.0 ** (1 + k // 5) for k in range(40)]
    assert not any(phase.fresh for phase in method.phases())
    assert [phase.label for phase in ect(q=4.0, stages=2).phases()] == ["q^a = 4", "q^a = 16"]


@pytest.mark.parametrize(("source", "evaluations"), [("data", 0), ("teacher", 7)])
def test_cost(tmp_path, source, evaluations):
    """Specification 21: T 0 or 1, Sn + Sg = 1 + 1 for each image; rows with tau_s = 0 cost as much."""
    method = ect(source=source)
    meter = make_workspace(method.teacher, tmp_path).meter
    loss_of(method, batch_of(method, 7))
    assert (meter.teacher_nfe, meter.student_nfe) == (evaluations, 14)
    method.sample(FixedNoise([make_batch(4, seed=k).noise() for k in range(3)]), 3, UNCONDITIONAL)
    assert (meter.teacher_nfe, meter.student_nfe) == (evaluations, 14 + 12)
    assert method.needs_data and method.keeps_noise(1) and not method.keeps_noise(2)


def test_networks_are_told_classes_and_guidance():
    conditioning = Conditioning(classes=3, w_range=(1.0, 3.0))
    teacher = dataclasses.replace(mlp_teacher(VE()), conditioning=conditioning)
    with pytest.raises(UserError, match="cannot be guided"):
        ect(teacher)
    method, labels, images = ect(teacher, source="teacher"), torch.tensor([2, 0, 1, 1]), gaussian_images()
    batch = Batch(4, (2, 1, 1), torch.Generator().manual_seed(0), "cpu", lambda n: (images(n)[0], labels), conditioning)
    told: list[Condition] = []
    method.student = Recorder()
    method.teacher.denoise = lambda x_t, t, c: told.append(c) or x_t
    loss_of(method, batch)
    told += [c for *_, c in method.student.asked]
    assert len(told) == 3 and all(torch.equal(c.labels, labels) and torch.equal(c.w, batch.c.w) for c in told)


def test_it_starts_as_the_teacher_s_denoiser():
    method = ect()
    batch = batch_of(method)
    x_0, eps = batch.x_0, batch.noise()
    t = drawn(batch)
    close(method.student(x_0 + t * eps, t), method.teacher.denoise(x_0 + t * eps, t), rtol=1e-12)
    assert same_weights(weights_of(method.student.denoiser.network), weights_of(method.teacher.denoiser.network))


# --- trained ---------------------------------------------------------------------------------------------------------

ADAM = {"lr": 0.03, "lr_warmup": 0.0, "lr_decay": "linear", "beta2": 0.99, "ema_halflife_kimg": 0.0, "grad_clip": 1e6}


@pytest.mark.parametrize("settings", [{}, {"source": "teacher"}, {"source": "teacher", "metric": "pseudo_huber"}])
def test_trained_students_reach_the_closed_form(tmp_path, monkeypatch, settings):
    """Affine students on a Gaussian, at the levels 80, r(80), ... of one stage. Targets from the teacher are not
    random, and so pseudo_huber has the same optimum."""
    schedule, levels = VPCosine(), [80.0]
    while (r := released(torch.tensor(levels[-1]), 0, 2.0).item()) >= 0.002:
        levels.append(r)
    tau = torch.tensor(levels[::-1])
    times = schedule.t_of_lam(tau.log())
    chosen = lambda schedule, u, p_mean, p_std: times[(u * len(times)).long()]
    monkeypatch.setattr(consistency_times, "lognormal_time", chosen)
    method = ect(table_teacher(times), **ADAM | {"stages": 1} | settings)
    gain = torch.ones(2, 1, 1)
    for low, high in zip([0.0, *tau.tolist()], tau.tolist(), strict=False):
        gain = gain * (column(VARIANCE) + low * high) / (column(VARIANCE) + high**2)
    eps = make_batch(1000, seed=99).noise()
    expected = column(MEAN) + gain * (80 * eps - column(MEAN))

    def error() -> float:
        with torch.no_grad():
            return (method.sample(FixedNoise([eps]), 1, UNCONDITIONAL) - expected).square().mean().sqrt().item()

    before = error()
    trained(method, tmp_path, 1000, 128)
    assert error() < 0.04 < 0.1 * before


# --- samples ---------------------------------------------------------------------------------------------------------


def test_the_second_of_two_steps_starts_at_mid():
    """x = F(80 z_0), then F(x + .821 z_1); three steps and more are spread over Karras et al.'s grid."""
    method, F = ect(), mlp_teacher(VE()).denoiser
    z = [make_batch(4, seed=k).noise() for k in range(17)]
    level = lambda value: torch.full((4, 1, 1, 1), value)
    with torch.no_grad():
        x = F(80 * z[0], level(80.0))
        close(method.sample(FixedNoise(z), 1, UNCONDITIONAL), x, rtol=1e-9)
        close(method.sample(FixedNoise(z), 2, UNCONDITIONAL), F(x + 0.821 * z[1], level(0.821)), rtol=1e-9)
        karras = lambda i: (0.002 ** (1 / 7) + i / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
        for k, i in ((1, 11), (2, 6)):  # 17 * 2/3 and 17 / 3, rounded
            x = F(x + karras(i) * z[k], level(karras(i)))
        close(method.sample(FixedNoise(z), 3, UNCONDITIONAL), x, rtol=1e-9)
        assert method.sample(FixedNoise(z), 17, UNCONDITIONAL).isfinite().all()
    assert [nfe for nfe in range(30) if method.supports(nfe)] == list(range(1, 18))


def test_a_boundary_shifts_samples_as_in_the_release_and_nothing_in_training():
    """ECMPrecond: c_skip = s^2 / ((tau - e)^2 + s^2) and c_out = (tau - e) s / sqrt(tau^2 + s^2), s = .5, e = .003."""
    teacher, e = mlp_teacher(VE(), "edm"), 0.003
    method, z = ect(teacher, boundary=e), [make_batch(4, seed=k).noise() for k in range(2)]

    def F(x: Tensor, tau: float) -> Tensor:
        network = teacher.denoiser.network(x / math.hypot(tau, 0.5), torch.full((4,), math.log(tau) / 4), None, None)
        return 0.25 / ((tau - e) ** 2 + 0.25) * x + (tau - e) * 0.5 / math.hypot(tau, 0.5) * network

    with torch.no_grad():
        x = F(80 * z[0], 80.0)
        close(method.sample(FixedNoise(z), 1, UNCONDITIONAL), x, rtol=1e-9, atol=1e-12)
        fresh = math.sqrt(0.821**2 - e**2)
        close(method.sample(FixedNoise(z), 2, UNCONDITIONAL), F(x + fresh * z[1], 0.821), rtol=1e-9, atol=1e-12)
        x = method.sample(FixedNoise(z), 2, UNCONDITIONAL)
        close(x, F(F(80 * z[0], 80.0) + 0.821 * z[1], 0.821), rtol=1e-4, atol=1e-5)  # as released
    assert loss_of(method, batch_of(method)) == loss_of(ect(teacher), batch_of(method))
    with pytest.raises(UserError, match=r"boundary must lie between 0 and 0\.821, got 1\.0"):
        ect(teacher, boundary=1.0, sigma_min=0.8)


@pytest.mark.parametrize(
    "settings",
    [
        {"source": "noise"},
        {"metric": "linf"},
        {"huber_c": -1.0},
        {"q": 1.0},
        {"stages": 0},
        {"k": -1.0},
        {"p_std": 0.0},
        {"sampling_levels": [[-1.0]]},
        {"sigma_max": 1, "sigma_min": 2},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        EasyConsistencyTuning.Config(**settings)
