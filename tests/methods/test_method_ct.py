"""Consistency training against quadrature, the papers' tables, Gaussian closed forms and its samples' distribution."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare, kstest, norm
from torch import Tensor, nn

from analytic import (
    CENTRES,
    MEAN,
    SPREADS,
    VARIANCE,
    WEIGHTS,
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
    same_weights,
    some_schedules,
    table_teacher,
    time,
    trained,
    weights_of,
)
from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition, Conditioning
from distillbench.diffusion.consistency import ConsistencyFunction, multistep, segment_edges, segmentwise
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.samplers import ddim_step, karras_times, time_like
from distillbench.diffusion.schedules import SCHEDULES, VE, VPCosine
from distillbench.errors import UserError
from distillbench.networks.architectures import ResidualMLP
from distillbench.networks.edm import SongUNet
from distillbench.teachers.teacher import Teacher
from distillbench.training.method import Batch
from distillbench_ct import ConsistencyTraining

pytestmark = pytest.mark.usefixtures("float64")

PLAIN = {"start": "teacher", "s0": 17, "s1": 17, "metric": "l2", "weight": "uniform", "levels": "uniform"}


def ct(teacher=None, stage: int = 0, **settings) -> ConsistencyTraining:
    """In its stage `stage`; without the improvements, unless they are asked for."""
    config = ConsistencyTraining.Config(**PLAIN | settings)
    method = ConsistencyTraining(config, teacher or gaussian_teacher())
    method.start_phase(stage)
    return method


def batch_of(method, size: int = 32, seed: int = 0) -> Batch:
    return make_batch(size, method.teacher.shape, seed, gaussian_images(seed))


def karras(N: int) -> Tensor:
    """Karras et al. (2022) eq. 5 from .002 to 80, written anew."""
    return (0.002 ** (1 / 7) + torch.arange(N) / (N - 1) * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


def given(x_0: Tensor, eps: Tensor, method, n: int) -> SimpleNamespace:
    """A batch of these images and this noise, all of them at the levels n and n + 1 (counted from 0) of the grid."""
    u = time((n + 0.5) / (len(method.grid) - 1)).repeat(len(x_0), 1, 1, 1)  # where P(n) is uniform
    return SimpleNamespace(
        size=len(x_0), device="cpu", x_0=x_0, c=UNCONDITIONAL, noise=lambda: eps, uniform=lambda *_: u
    )


class Recorder(nn.Module):
    """Keeps what it is asked, and answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Tensor, Condition]] = []

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        self.asked.append((x_t, t, c))
        return torch.zeros_like(x_t)


def asked_by(method, batch) -> list[tuple[Tensor, Tensor, Condition]]:
    """What a step asks: of the target at s, then of the student at t."""
    method.student, method.target = Recorder(), Recorder()
    for _ in method.train_step(batch):
        pass
    return [*method.target.asked, *method.student.asked]


# --- the pair of images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_hat", [-2.5, 0.2, 1.7])
@pytest.mark.parametrize("n", [3, 5, 9])
@pytest.mark.parametrize("name", ["ve", "vp_cosine", "flow_matching"])
def test_the_second_image_is_on_average_one_euler_step_of_the_data_s_ode(name, n, x_hat):
    """E[x_s given x_t] by quadrature over x_0 = x^_s + (tau_s - tau_t) (x^ - f) / tau_t, f the closed form's."""
    schedule = SCHEDULES[name]()
    method = ct(mixture_teacher(schedule), s0=10, s1=10)
    t, s = time(method.grid[n + 1]), time(method.grid[n])
    tau_t, tau_s = karras(11)[[n + 1, n]]
    x_0 = torch.linspace(-6, 6, 24001)
    eps = (x_hat - x_0) / tau_t  # what lands on x^
    prior = sum(
        w * torch.exp(-0.5 * ((x_0 - m) / sd) ** 2) / sd for w, m, sd in zip(WEIGHTS, CENTRES, SPREADS, strict=True)
    )
    posterior = prior * torch.exp(-0.5 * eps**2)
    (x_s, s_asked, _), (x_t, t_asked, _) = asked_by(method, given(time(x_0), time(eps), method, n))
    assert (t_asked == t).all() and (s_asked == s).all()
    close(x_t / schedule.alpha(t), torch.full_like(x_t, x_hat), rtol=1e-7)
    mean = (posterior * (x_s / schedule.alpha(s)).flatten()).sum() / posterior.sum()
    f = method.teacher.denoise(schedule.alpha(t) * x_hat, t).flatten()[0]
    close(mean, x_hat + (tau_s - tau_t) * (x_hat - f) / tau_t, rtol=1e-7)


@pytest.mark.parametrize("name", some_schedules())
def test_both_images_are_of_one_x_0_and_one_noise_at_neighbouring_levels(name):
    schedule = SCHEDULES[name]()
    method = ct(gaussian_teacher(schedule), s0=6, s1=6)
    (x_s, s, _), (x_t, t, _) = asked_by(method, batch_of(method, 500))
    again = batch_of(method, 500)
    x_0, eps = again.x_0, again.noise()
    close(x_t, schedule.alpha(t) * x_0 + schedule.sigma(t) * eps, rtol=1e-12)
    close(x_s, schedule.alpha(s) * x_0 + schedule.sigma(s) * eps, rtol=1e-12)
    index = lambda times: (times.flatten()[:, None] - method.grid).abs().argmin(dim=1)
    assert torch.equal(index(t), index(s) + 1)
    assert sorted(index(s).unique().tolist()) == [0, 1, 2, 3, 4, 5]


# --- the distribution of the levels
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p_mean", "p_std"), [(-1.1, 2.0), (0.7, 0.6)])
def test_lognormal_levels(p_mean, p_std):
    """Phi((ln tau_{n+1} - p_mean) / p_std) - Phi((ln tau_n - p_mean) / p_std), and so are the levels that are drawn."""
    method = ct(s0=10, s1=40, stage=2, levels="lognormal", p_mean=p_mean, p_std=p_std)
    cdf = norm(p_mean, p_std).cdf(karras(41).log().numpy())
    expected = torch.from_numpy((cdf[1:] - cdf[:-1]) / (cdf[-1] - cdf[0]))
    close(method.cumulative, expected.cumsum(0), rtol=1e-9, atol=1e-12)
    size = 100_000
    _, (_, t, _) = asked_by(method, batch_of(method, size))
    n = (t.flatten()[:, None] - method.grid).abs().argmin(dim=1) - 1
    counts = torch.bincount(n, minlength=40)
    likely = expected * size > 20
    assert likely.sum() > 10
    observed, mean = counts[likely].double(), size * expected[likely]
    assert chisquare(observed.numpy(), (mean * observed.sum() / mean.sum()).numpy()).pvalue > 0.01
    assert counts[~likely].sum() < 3 * size * expected[~likely].sum() + 10


def test_lognormal_levels_are_the_paper_s_where_it_matters():
    """Spelled with erf as in arXiv:2310.14189, section 3.5; N = 11, sigma from .002 to 80."""
    erf = [math.erf((math.log(tau) + 1.1) / (math.sqrt(2) * 2.0)) for tau in karras(11).tolist()]
    weights = [b - a for a, b in pairwise(erf)]
    method = ct(s0=10, s1=10, levels="lognormal")
    close(method.cumulative.diff(prepend=torch.zeros(1)), torch.tensor(weights) / sum(weights), rtol=1e-9)


def test_uniform_levels():
    method = ct(s0=8, s1=8, levels="uniform")
    _, (_, t, _) = asked_by(method, batch_of(method, 40_000))
    counts = torch.bincount((t.flatten()[:, None] - method.grid).abs().argmin(dim=1))
    assert counts[0] == 0 and chisquare(counts[1:].numpy()).pvalue > 0.01


def test_continuous_times_end_at_x_0():
    """tau_s = tau_t (1 - (1 + 8 sigmoid(-tau_t)) / (N - 1)); with answers of 0, only rows where it is 0 have a loss."""
    method = ct(mlp_teacher(VE()), s0=2, s1=8, stage=1, levels="continuous", mu=0.5, weight="inv_step")
    assert method.student.e == 0.0 and len(method.grid) == 5
    method.student, method.target = Recorder(), Recorder()
    loss = loss_of(method, batch_of(method, 400))
    again = batch_of(method, 400)
    x_0, eps = again.x_0, again.noise()
    tau_t = (-1.1 + 2.0 * torch.special.ndtri(again.uniform())).exp().clamp(0.002, 80.0)
    tau_s = tau_t * (1 - (1 + 8 / (1 + tau_t.exp())) / 4)
    ended = (tau_s < 0.002).flatten()
    ((x_s, s, _),), ((x_t, t, _),) = method.target.asked, method.student.asked
    close(t, tau_t, rtol=1e-9)
    close(x_t, x_0 + tau_t * eps, rtol=1e-9)
    close(s[~ended], tau_s[~ended], rtol=1e-9)
    close(x_s[~ended], (x_0 + tau_s * eps)[~ended], rtol=1e-9)
    assert 50 < ended.sum() < 350
    close(loss, (x_0.square() / tau_t)[ended].sum() / (400 * 2), rtol=1e-9)


def test_no_level_is_drawn_that_has_no_weight():
    """A log-normal as narrow as one step: every image is at the step that holds e^p_mean."""
    method = ct(s0=8, s1=8, levels="lognormal", p_mean=math.log(10.0), p_std=1e-3)
    _, (_, t, _) = asked_by(method, batch_of(method, 2000))
    tau = karras(9)
    above = method.grid[int((tau < 10.0).sum())]
    assert (t == above).all()
    edge = given(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), method, 0)
    for u in (0.0, 1 - 2**-53):  # the ends of what is drawn
        edge.uniform = lambda u=u: time(u)
        assert asked_by(method, edge)[1][1] == above


# --- the curriculum --------------------------------------------------------------------------------------------------


def doubling(k: int, K: int, s0: int, s1: int) -> int:
    """N(k) as printed in arXiv:2310.14189, section 3.4."""
    K_ = math.floor(K / (math.log2(math.floor(s1 / s0)) + 1))
    return min(s0 * 2 ** math.floor(k / K_), s1) + 1


def square_root(k: float, K: float, s0: int, s1: int) -> int:
    """N(k) as printed in arXiv:2303.01469, appendix C."""
    return math.ceil(math.sqrt(k / K * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1


def stage_at(method, progress: float) -> int:
    """N at a share of training."""
    shares = torch.tensor([phase.share for phase in method.phases()])
    index = int((shares.cumsum(0) / shares.sum() <= progress).sum())
    method.start_phase(index)
    assert method.phases()[index].label == f"N = {len(method.grid)}"
    return len(method.grid)


def test_doubling_as_tabulated():
    """11, 21, ..., 1281 in eight equal stages (arXiv:2310.14189), and the formula at every step."""
    method = ct(s0=10, s1=1280, curriculum="doubling")
    assert [N for N, _ in method.stages] == [11, 21, 41, 81, 161, 321, 641, 1281]
    assert {phase.share for phase in method.phases()} == {1.0}
    assert [stage_at(method, k / 800) for k in range(0, 800, 7)] == [
        doubling(k, 800, 10, 1280) for k in range(0, 800, 7)
    ]


@pytest.mark.parametrize(("s0", "s1"), [(10, 150), (4, 50), (3, 3), (10, 19), (5, 30)])
def test_doubling_where_the_ratio_is_no_power_of_two(s0, s1):
    """The last stage is cut short as the formula does it, for K' a whole number up to rounding of one step."""
    method = ct(s0=s0, s1=s1, curriculum="doubling")
    K = 10**7
    for k in range(123, K, K // 97):
        assert stage_at(method, k / K) == doubling(k, K, s0, s1)


def test_square_root_as_tabulated():
    """2, 76, 107, 151 at k/K = 0, 1/4, 1/2, 1 for s0 = 2, s1 = 150; the first of them at k = 0 alone."""
    assert [square_root(k, 4, 2, 150) for k in (0, 1, 2, 4)] == [2, 76, 107, 151]
    method = ct(s0=2, s1=150, curriculum="sqrt")
    assert [stage_at(method, progress) for progress in (1e-9, 0.25, 0.5, 1 - 1e-9)] == [3, 76, 107, 151]
    for k in range(1, 5000, 11):
        assert stage_at(method, k / 5000) == square_root(k, 5000, 2, 150)


@pytest.mark.parametrize(("curriculum", "formula"), [("doubling", doubling), ("sqrt", square_root)])
def test_the_training_loop_goes_through_the_stages(tmp_path, curriculum, formula):
    """N at every step of the real loop, one optimiser and one average for all of them."""
    steps = 40
    method, used = ct(mlp_teacher(), s0=2, s1=16, curriculum=curriculum), []
    after = method.after_step
    method.after_step = lambda: used.append(len(method.grid)) or after()
    assert not any(phase.fresh for phase in method.phases())
    trained(method, tmp_path, steps, 4)
    expected = [formula(k, steps, 2, 16) for k in range(steps)]
    assert used[1:] == expected[1:] and used[0] == 3


def test_e_and_the_boundary_are_the_same_in_all_stages():
    for curriculum in ("doubling", "sqrt"):
        method = ct(mlp_teacher(), s0=3, s1=24, curriculum=curriculum)
        x = make_batch(3).noise()
        for index in range(len(method.phases())):
            method.start_phase(index)
            e = time_like(x, method.grid[0])
            close(method.student(x, e), x / method.teacher.schedule.alpha(e), rtol=1e-12)
            close(method.teacher.schedule.noise_level(method.grid), karras(len(method.grid)), rtol=1e-8)


def test_samples_do_not_depend_on_the_stage_that_the_object_has_seen():
    """A method that is built anew around saved weights samples as the one that was trained."""
    method = ct(mlp_teacher(), s0=2, s1=16, mu=0.5)
    torch.manual_seed(3)
    for parameter in method.student.parameters():
        nn.init.normal_(parameter, std=0.1)
    again = ConsistencyTraining(method.config, mlp_teacher(seed=1))
    again.load_state_dict(method.state_dict())
    method.start_phase(len(method.phases()) - 1)
    noise = FixedNoise([make_batch(4, seed=k).noise() for k in range(16)])
    for nfe in (1, 2, 16):
        assert torch.equal(method.sample(noise, nfe, UNCONDITIONAL), again.sample(noise, nfe, UNCONDITIONAL))
    assert [nfe for nfe in range(20) if again.supports(nfe)] == list(range(1, 17))


# --- the loss --------------------------------------------------------------------------------------------------------


def images_between(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """d of each image, pixel by pixel in plain numbers."""
    out = []
    for one, other in zip(a, b, strict=True):
        squares = [(p - q) ** 2 for p, q in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)]
        c = 0.00054 * math.sqrt(len(squares))
        out.append(sum(squares) / len(squares) if metric == "l2" else math.sqrt(sum(squares) + c * c) - c)
    return torch.tensor(out)


@pytest.mark.parametrize("weight", ["uniform", "inv_step"])
@pytest.mark.parametrize("metric", ["l2", "pseudo_huber"])
def test_loss(metric, weight):
    """Mean of lambda d, lambda = 1 / (tau_t - tau_s) with Karras et al.'s levels."""
    method = ct(mlp_teacher(), metric=metric, weight=weight, s0=5, s1=5)
    loss = loss_of(method, batch_of(method, 64))
    batch, schedule = batch_of(method, 64), method.teacher.schedule
    x_0, eps = batch.x_0, batch.noise()
    n = (batch.uniform() * 5).long()
    t, s = method.grid[n + 1], method.grid[n]
    F_t, F_s = (method.student(schedule.alpha(r) * x_0 + schedule.sigma(r) * eps, r) for r in (t, s))
    tau = karras(6)
    weights = 1.0 if weight == "uniform" else 1 / (tau[n + 1] - tau[n]).flatten()
    close(loss, (weights * images_between(F_t, F_s, metric)).mean(), rtol=1e-7)


@pytest.mark.parametrize("name", some_schedules())
def test_in_single_precision_it_is_finite_on_the_finest_grid(name):
    torch.set_default_dtype(torch.float32)
    teacher, settings = mlp_teacher(SCHEDULES[name]()), ConsistencyTraining.Config(start="teacher", s1=160)
    method = ConsistencyTraining(settings, teacher)
    method.start_phase(len(method.phases()) - 1)
    images = gaussian_images()
    loss = loss_of(method, make_batch(512, read=lambda n: (images(n)[0].float(), None)))
    loss.backward()
    assert len(method.grid) == 161 and loss.dtype == torch.float32 and math.isfinite(loss.item())
    assert all(p.grad.isfinite().all() for p in method.student.parameters())


class Affine(nn.Module):
    """F = gain x^ + bias at each level of a grid, one of each for every pixel."""

    def __init__(self, schedule, grid: Tensor, gain: Tensor) -> None:
        super().__init__()
        self.schedule, self.grid = schedule, grid
        self.gain = nn.Parameter(gain.clone())
        self.bias = nn.Parameter(column(MEAN) * (1 - gain))

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        k = (self.grid - t.flatten()[:, None]).abs().argmin(dim=1)
        return self.gain[k] * x_t / self.schedule.alpha(t) + self.bias[k]


def closed_form(tau: Tensor, variance=VARIANCE) -> Tensor:
    """Gain of the optimal F at each level: the product of (v + tau_n tau_{n+1}) / (v + tau_{n+1}^2), (N,D,1,1)."""
    v, gain = column(variance), [torch.ones(len(variance), 1, 1)]
    for n in range(len(tau) - 1):
        gain.append(gain[-1] * (v + tau[n] * tau[n + 1]) / (v + tau[n + 1] ** 2))
    return torch.stack(gain)


@pytest.mark.parametrize("metric", ["l2", "pseudo_huber"])
@pytest.mark.parametrize("name", ["ve", "vp_cosine", "flow_matching"])
def test_the_expected_gradient_is_zero_at_the_closed_form_and_stops_at_the_target(name, metric):
    """Exactly: x_0 = m +- sd and eps = +-1 have the moments that the gradient of l2 is made of.

    pseudo_huber is convex and these four differences come in pairs +-, so that its optimum is the same with d of one
    pixel; here it has two, so only its stop-gradient is looked at.
    """
    schedule = SCHEDULES[name]()
    method = ct(gaussian_teacher(schedule), s0=12, s1=12, metric=metric)
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x_0, eps = column(MEAN) + column(VARIANCE).sqrt() * time(sign[:, 0]), time(sign[:, 1]).expand(4, 2, 1, 1)
    gain = closed_form(karras(13))
    for n in range(12):
        for off in (1.0, 1.01):
            table = gain.clone()
            table[n + 1] *= off
            method.student = method.target = Affine(schedule, method.grid, table)
            loss_of(method, given(x_0, eps, method, n)).backward()
            gradient = method.student.gain.grad.abs().flatten(1)
            x_hat = (column(VARIANCE) + karras(13)[n + 1] ** 2).sqrt().flatten()  # its scale
            others = [k for k in range(13) if k != n + 1]
            assert gradient[others].max() == 0  # the target at level n has none
            if metric == "l2":
                relative = gradient[n + 1] / x_hat**2
                assert (relative < 1e-11).all() if off == 1.0 else (relative > 1e-3 * gain[n + 1].flatten()).all()


def test_the_closed_form_against_the_exact_map():
    """Specification 5.3: v = .25, ratio of the gain from 80 down to e to that of the exact flow, .846, ..., .998."""
    v, e = 0.25, 0.002
    exact = math.sqrt((v + e**2) / (v + 80.0**2))
    for N, ratio in ((18, 0.846), (40, 0.930), (160, 0.982), (1280, 0.998)):
        method = ct(s0=N - 1, s1=N - 1)
        tau = method.teacher.schedule.noise_level(method.last)
        assert closed_form(tau, (v,))[-1].item() / exact == pytest.approx(ratio, abs=5e-4)


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_gradients_reach_neither_target_nor_teacher(mu):
    method = ct(mlp_teacher(), mu=mu)
    loss_of(method, batch_of(method)).backward()
    assert all(p.grad is None for p in method.teacher.denoiser.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in method.student.parameters())
    if mu:
        assert not any(p.requires_grad for p in method.target.parameters())
    else:
        assert method.target is method.student


def test_target_network_is_a_moving_average():
    assert_target_is_a_moving_average(ct(mlp_teacher(), mu=0.9), 0.9)


def test_the_decay_of_the_target_network_grows_with_the_number_of_levels():
    """exp(s0 ln mu / (N - 1)), as in OpenAI's code: .9 at N = 3, .9986 at N = 151 (arXiv:2303.01469, section 6)."""
    for index, published in ((0, 0.9), (148, 0.9986)):
        method = ct(mlp_teacher(), curriculum="sqrt", s0=2, s1=150, mu=0.9, mu_grows=True)
        method.start_phase(index)
        mu = math.exp(2 * math.log(0.9) / (len(method.grid) - 1))
        assert mu == pytest.approx(published, abs=5e-5)
        assert_target_is_a_moving_average(method, mu)


def test_the_target_is_what_is_compared_with():
    """With mu > 0 the answer at s is the target network's, not the student's."""
    method = ct(mlp_teacher(), mu=0.9)
    before = loss_of(method, batch_of(method)).item()
    with torch.no_grad():
        for parameter in method.target.parameters():
            parameter.add_(0.1)
    assert abs(loss_of(method, batch_of(method)).item() - before) > 1e-3 * before
    method = ct(mlp_teacher(), mu=0.0)
    assert loss_of(method, batch_of(method)).item() == pytest.approx(before, rel=1e-12)


# --- what it costs, what it is given ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize("start", ["fresh", "teacher"])
def test_the_teacher_is_never_asked(tmp_path, start, mu):
    """Specification 8: T 0, Sn + Sg = 1 + 1 for each image, in training and in sampling."""
    method = ct(with_blank(mlp_teacher()), start=start, mu=mu)
    meter = make_workspace(method.teacher, tmp_path).meter
    loss_of(method, batch_of(method, 7))
    method.after_step()
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 14)
    method.sample(FixedNoise([make_batch(4, seed=k).noise() for k in range(3)]), 3, UNCONDITIONAL)
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 14 + 12)
    assert method.needs_data and method.keeps_noise(1) and not method.keeps_noise(2)


def test_every_network_is_told_the_classes_of_the_real_images():
    teacher = dataclasses.replace(mlp_teacher(), conditioning=Conditioning(classes=3))
    method, labels, images = ct(teacher, mu=0.5), torch.tensor([2, 0, 1, 1]), gaussian_images()
    read = lambda n: (images(n)[0], labels)
    batch = Batch(4, (2, 1, 1), torch.Generator().manual_seed(0), "cpu", read, teacher.conditioning)
    told = [c.labels for *_, c in asked_by(method, batch)]
    assert len(told) == 2 and all(torch.equal(c, labels) for c in told)
    method.student.schedule, method.student.e = teacher.schedule, 0.002
    method.sample(FixedNoise([make_batch(4, seed=k).noise() for k in range(3)]), 3, Condition(labels))
    assert len(method.student.asked) == 4 and all(torch.equal(c.labels, labels) for *_, c in method.student.asked)


def test_the_consistency_function_reads_its_denoiser_given_the_class():
    """F = (c_skip - (1 - e/tau) k_skip) x^ + (1 - e/tau) D(x_t, t, c), tau = x of VE; three classes, three answers."""
    torch.manual_seed(0)
    network = ResidualMLP((2, 1, 1), width=16, depth=1, classes=3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    D, e, sd = Denoiser(network, VE(), "x0"), 0.002, 0.7
    x, tau, answers = make_batch(5).noise(), time([0.002, 0.1, 1.0, 9.0, 80.0]), []
    for label in range(3):
        c = Condition(torch.full((5,), label))
        answers.append(ConsistencyFunction(D, e, sd)(x, tau, c))
        skip = sd**2 / ((tau - e) ** 2 + sd**2) - (1 - e / tau) * sd**2 / (tau**2 + sd**2)
        close(answers[-1], skip * x + (1 - e / tau) * D(x, tau, c), rtol=1e-9, atol=1e-12)
    for a, b in pairwise(answers):
        assert (a[1:] != b[1:]).all() and torch.allclose(a[0], b[0], rtol=0, atol=1e-12)


def with_blank(teacher):
    return dataclasses.replace(teacher, blank=lambda: ResidualMLP((2, 1, 1), width=16, depth=1))


def test_fresh_weights_are_not_the_teacher_s_and_follow_the_seed():
    teacher = with_blank(mlp_teacher())

    def weights(start: str, seed: int):
        torch.manual_seed(seed)
        method = ct(teacher, start=start, mu=0.5)
        assert same_weights(weights_of(method.student), weights_of(method.target))
        return weights_of(method.student.denoiser.network)

    theirs = weights_of(teacher.denoiser.network)
    assert same_weights(weights("teacher", 0), theirs)
    fresh = weights("fresh", 0)
    assert fresh.keys() == theirs.keys()
    learned = [name for name, value in fresh.items() if value.std() > 0 and "frequencies" not in name]
    assert len(learned) > 5 and not any(torch.allclose(fresh[name], theirs[name]) for name in learned)
    assert same_weights(fresh, weights("fresh", 0)) and not same_weights(fresh, weights("fresh", 1))
    assert ConsistencyTraining.Config().start == "fresh"


def test_training_is_reproducible(tmp_path):
    def run(seed: int):
        torch.manual_seed(0)
        method = ct(with_blank(mlp_teacher()), start="fresh", s0=2, s1=8, mu=0.5, levels="lognormal")
        return weights_of(trained(method, tmp_path, 20, 8, seed))

    assert same_weights(run(0), run(0))
    assert not same_weights(run(0), run(1))


# --- trained ---------------------------------------------------------------------------------------------------------

ADAM = {"lr": 0.03, "lr_warmup": 0.0, "lr_decay": "linear", "beta2": 0.99, "ema_halflife_kimg": 0.0, "grad_clip": 1e6}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 1000),
        ({"mu": 0.9, "weight": "inv_step"}, 1000),
        ({"metric": "pseudo_huber", "levels": "lognormal", "p_mean": 1.0, "p_std": 2.5, "s0": 2}, 1000),
        ({"start": "fresh", "s0": 2}, 1600),
    ],
    ids=["plain", "target network", "improved, doubling", "fresh, doubling"],
)
def test_trained_students_reach_the_closed_form(tmp_path, settings, steps):
    """Affine students on a Gaussian. Grids of 2, 4 and 8 steps are nested, so that one table serves all stages."""
    grid = karras_times(VPCosine(), 9, 0.002, 80.0)
    teacher = table_teacher(grid)
    empty = lambda: type(teacher.denoiser.network)(grid, torch.zeros(9, 2), torch.zeros(9, 2))
    teacher = dataclasses.replace(teacher, blank=empty)
    method = ct(teacher, **ADAM | {"s0": 8, "s1": 8} | settings)
    gain = closed_form(karras(9))[-1]
    expected = lambda eps: column(MEAN) + gain * (80 * eps - column(MEAN))
    eps = make_batch(1000, seed=99).noise()

    def error() -> float:
        with torch.no_grad():
            return (method.sample(FixedNoise([eps]), 1, UNCONDITIONAL) - expected(eps)).square().mean().sqrt().item()

    before = error()
    trained(method, tmp_path, steps, 128)
    assert error() < 0.04 < 0.1 * before


# --- segments --------------------------------------------------------------------------------------------------------


class EulerTo(nn.Module):
    """`gain` times the optimum with segments on a Gaussian: Euler steps of its ODE from t to `end`, over `times`."""

    def __init__(self, method, times: Tensor, gain: float = 1.0) -> None:
        super().__init__()
        self.denoise, self.schedule, self.times = method.teacher.denoise, method.teacher.schedule, times
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x_t: Tensor, t: Tensor, c: Condition, end: Tensor) -> Tensor:
        for lower, upper in reversed(list(pairwise(self.times))):
            a, b = time_like(x_t, upper), time_like(x_t, lower)
            step = ddim_step(self.schedule, x_t, self.denoise(x_t, a), a, b)
            x_t = torch.where((t >= a) & (end <= b), step, x_t)
        return self.gain * x_t


@pytest.mark.parametrize("name", ["ve", "vp_cosine", "flow_matching"])
def test_with_segments_the_optimum_is_the_chain_cut_at_the_edges(name):
    """The mean gradient is zero there, exactly: x_0 = m +- sd and eps = +-1 have the moments that it is made of.

    Edges are levels of the last stage, 0, 2, 5 and 8 of 9. In the first stage, whose levels are 0, 2, 4, 6, 8 of these,
    the pair of 6 and 4 is cut at 5.
    """
    schedule = SCHEDULES[name]()
    method = ct(gaussian_teacher(schedule), s0=4, s1=8, curriculum="doubling", segments=3)
    assert torch.equal(method.edges, method.last[[0, 2, 5, 8]])
    assert len(method.grid) == 5
    times = torch.cat([method.grid, method.last[[5]]]).sort().values
    sign = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    x_0, eps = column(MEAN) + column(VARIANCE).sqrt() * time(sign[:, 0]), time(sign[:, 1]).expand(4, 2, 1, 1)
    for n in range(4):
        slopes = []
        for gain in (1.0, 1.02):
            method.student, method.target = EulerTo(method, times, gain), EulerTo(method, times)
            loss_of(method, given(x_0, eps, method, n)).backward()
            slopes.append(method.student.gain.grad.abs().item())
        assert slopes[0] < 1e-9 * slopes[1] and slopes[1] > 0


def test_with_segments_pairs_are_cut_at_the_edges():
    method = ct(mlp_teacher(), s0=4, s1=8, curriculum="doubling", segments=3, weight="inv_step")
    asked = []
    for network in (method.target, method.student):
        network.register_forward_hook(lambda module, args, out: asked.append((*args, out)))
    loss = loss_of(method, batch_of(method, 200))
    (x_s, s, _, end, target), (_, t, _, same, F) = asked
    found = {tuple(torch.cat([t, s, end], dim=1)[k].flatten().tolist()) for k in range(200)}
    places = {tuple(int((method.last - value).abs().argmin()) for value in row) for row in found}
    assert places == {(2, 0, 0), (4, 2, 2), (6, 5, 5), (8, 6, 5)} and torch.equal(end, same)
    at_end = (s == end).flatten()
    assert torch.equal(target[at_end], x_s[at_end])
    tau_t, tau_s = (method.teacher.schedule.noise_level(q) for q in (t, s))
    close(loss, ((F - target).square() / (tau_t - tau_s)).mean(), rtol=1e-9)


def test_segments_are_sampled_in_as_many_evaluations_only():
    method = ct(mlp_teacher(), segments=4)
    assert [n for n in range(20) if method.supports(n)] == [4] and method.keeps_noise(4)
    eps = make_batch(5).noise()
    expected = segmentwise(method.student, segment_edges(method.last, 4), eps)
    assert torch.equal(method.sample(FixedNoise([eps]), 4, UNCONDITIONAL), expected)
    for wrong in ({"segments": 0}, {"segments": 18}, {"segments": 2, "levels": "continuous"}):
        with pytest.raises(UserError, match="segments"):
            ct(**wrong)


# --- samples ---------------------------------------------------------------------------------------------------------


class ExactGaussian(nn.Module):
    """The consistency function of N(m, v): the exact flow to noise level e, in units of x^."""

    def __init__(self, schedule, e: float, m: float, v: float) -> None:
        super().__init__()
        self.schedule, self.e, self.m, self.v = schedule, e, m, v

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        tau = self.schedule.noise_level(t)
        x_hat = x_t / self.schedule.alpha(t)
        return self.m + ((self.v + self.e**2) / (self.v + tau**2)).sqrt() * (x_hat - self.m)


@pytest.mark.parametrize(("tau", "factor"), [(0.5, 1.2), (2.0, 1.1)])
@pytest.mark.parametrize("name", ["ve", "vp_cosine"])
def test_steps_of_an_exact_function_preserve_the_distribution_and_too_much_noise_does_not(name, tau, factor):
    """Kolmogorov and Smirnov's distance from N(m, v + e^2) below 1.63 / sqrt(n); specification 5.5."""
    schedule, n, m, v, e = SCHEDULES[name](), 20_000, 0.3, 0.25, 0.002
    grid = schedule.t_of_lam(torch.tensor([e, tau, 80.0]).log())
    distribution = norm(m, math.sqrt(v + e**2))

    def distance(nfe: int, factor: float = 1.0) -> float:
        noise = FixedNoise([make_batch(n, (1, 1, 1), 10).noise(), factor * make_batch(n, (1, 1, 1), 11).noise()])
        x = multistep(ExactGaussian(schedule, e, m, v), grid, noise, nfe)
        return kstest(x.flatten().numpy(), distribution.cdf).statistic

    bound = 1.63 / math.sqrt(n)
    assert distance(1) < bound and distance(2) < bound < distance(2, factor)


@pytest.mark.parametrize("name", some_schedules())
def test_what_is_left_of_e_is_not_added_again(name):
    """Exactly, at e = .3: after two steps the variance is v + e^2, but for the start at N(0, T^2)."""
    schedule, m, v, e, tau = SCHEDULES[name](), 0.3, 0.25, 0.3, 0.9
    grid = schedule.t_of_lam(torch.tensor([e, tau, 80.0]).log())  # 80, or the largest that there is
    F, T = ExactGaussian(schedule, e, m, v), schedule.noise_level(grid[-1]).item()
    at = lambda *values: multistep(F, grid, FixedNoise([time(float(value)) for value in values]), 2).item()
    gain = [math.sqrt((v + e**2) / (v + level**2)) for level in (T, tau)]
    assert at(0, 0) == pytest.approx(m - gain[0] * gain[1] * m, rel=1e-9)
    assert at(1, 0) - at(0, 0) == pytest.approx(gain[0] * gain[1] * T, rel=1e-9)
    assert at(0, 1) - at(0, 0) == pytest.approx(gain[1] * math.sqrt(tau**2 - e**2), rel=1e-9)
    variance = (at(1, 0) - at(0, 0)) ** 2 + (at(0, 1) - at(0, 0)) ** 2
    assert variance == pytest.approx(v + e**2, rel=v / (v + T**2))


def test_a_fresh_ncsn_may_have_slower_features_of_time():
    """iCT's .02 in place of 16, in the student and in the target network, and nothing else is another."""
    sizes = {"model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": ()}
    blank = lambda: SongUNet(8, 3, 3, embedding_type="fourier", **sizes)
    teacher = Teacher("ncsn++", Denoiser(blank(), VE(), "edm"), (3, 8, 8), "ncsn++", blank=blank)

    def weights(**settings):
        torch.manual_seed(0)
        method = ct(teacher, start="fresh", mu=0.5, **settings)
        own = method.student.denoiser.network.state_dict()
        assert all(torch.equal(own[name], value) for name, value in method.target.denoiser.network.state_dict().items())
        return own

    theirs, ours = weights(), weights(fourier_scale=0.02)
    close(ours.pop("map_noise.freqs"), theirs.pop("map_noise.freqs") * 0.02 / 16, rtol=1e-6)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    with pytest.raises(UserError, match="fourier_scale needs a student that starts from random weights"):
        ct(teacher, start="teacher", fourier_scale=0.02)


# --- settings --------------------------------------------------------------------------------------------------------


def test_a_schedule_that_does_not_reach_the_levels_bounds_the_grid_and_e():
    method = ct(mlp_teacher(VE(sigma_min=0.1, sigma_max=10.0), "x0"), s0=2, s1=8, stage=1)
    assert method.student.e == pytest.approx(0.1, rel=1e-12)
    assert method.grid[-1] == 10.0 and len(method.grid) == 5 and (method.last.diff() > 0).all()
    x = make_batch(3).noise()
    close(method.student(x, time_like(x, method.grid[0])), x, rtol=1e-12)


@pytest.mark.parametrize("conditioning", [Conditioning(3, w=2.0), Conditioning(3, w_range=(1.0, 3.0))])
def test_guidance_is_refused(conditioning):
    teacher = dataclasses.replace(mlp_teacher(), conditioning=conditioning)
    with pytest.raises(UserError, match="cannot be guided"):
        ct(teacher)


def test_a_teacher_without_an_architecture_of_its_own_is_refused():
    with pytest.raises(UserError, match="fresh"):
        ct(mlp_teacher(), start="fresh")


def test_levels_without_any_weight_are_refused():
    with pytest.raises(UserError, match="p_mean"):
        ct(levels="lognormal", p_mean=1000.0, p_std=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"s0": 0},
        {"s1": 5, "s0": 10},
        {"mu": 1.0},
        {"start": "noise"},
        {"fourier_scale": -1.0},
        {"curriculum": "linear"},
        {"metric": "linf"},
        {"weight": "snr"},
        {"levels": "cosine"},
        {"p_std": 0.0},
        {"sigma_data": 0},
        {"sigma_min": 2, "sigma_max": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        ConsistencyTraining.Config(**settings)
