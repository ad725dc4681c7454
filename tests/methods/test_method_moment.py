"""Moment matching against closed forms on a Gaussian: all losses are quadratic forms in independent normal draws.

With x_0 ~ N(0, v), a student x = g z_t and an auxiliary network k z_s, the expectation of a loss is the sum of its
values at (1, 0, 0), (0, 1, 0) and (0, 0, 1) for the draws (x_0 / sqrt(v), eps, noise of the posterior).
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from analytic import (
    close,
    gaussian_images,
    gaussian_teacher,
    learnable_teacher,
    make_batch,
    make_workspace,
    mlp_teacher,
    same_weights,
    some_schedules,
    time,
    weights_of,
)
from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition, Conditioning
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.schedules import SCHEDULES, VE, VPCosine
from distillbench.errors import UserError
from distillbench.networks.architectures import ResidualMLP
from distillbench.system.progress import Step
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig
from distillbench.training.loop import Loop, train
from distillbench.training.optimizers import Optimizers
from distillbench_moment import MomentMatching

pytestmark = pytest.mark.usefixtures("float64")
V = 0.25  # variance of the data
U, D = 0.35, 0.3  # position of s on the clock; t is D / K later


def moment(teacher=None, **settings) -> MomentMatching:
    return MomentMatching(MomentMatching.Config(**settings), teacher or mlp_teacher())


class Gain(nn.Module):
    """x = g z, whatever the time."""

    def __init__(self, g: float) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor(g))

    def forward(self, z: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        return self.g * z


class UnitDraws:
    """The unit vectors of all draws, at fixed times: the mean of a quadratic form is a third of its trace."""

    x_0 = torch.tensor([V**0.5, 0, 0], dtype=torch.float64).view(3, 1, 1, 1)
    c = UNCONDITIONAL

    def __init__(self, step: int) -> None:
        self.step = step
        self.normal = iter(torch.eye(3, dtype=torch.float64)[1:])
        self.numbers = iter((U, D))

    def noise(self) -> Tensor:
        return next(self.normal).view(3, 1, 1, 1)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return time([low + (high - low) * next(self.numbers)] * 3)


def linear(g: float, k: float, name: str = "vp_cosine", steps: int = 2, **settings) -> MomentMatching:
    method = moment(gaussian_teacher(SCHEDULES[name](), (0.0,), (V,)), steps=steps, **settings)
    method.student, method.auxiliary = Gain(g), Gain(k)
    return method


def expected(method: MomentMatching, step: int) -> Tensor:
    """The expectation of the loss of an even or an odd step."""
    ((network, loss),) = method.train_step(UnitDraws(step))
    assert network is (method.student if step % 2 else method.auxiliary)
    return 3 * loss


def moments(method: MomentMatching, g: float) -> dict[str, float]:
    """Var z_t, the gain of z_s in z_t, Cov(x, z_s), Var z_s and the gain of the teacher, from equation (6) of DDPM."""
    schedule, K = method.teacher.schedule, method.config.steps
    low, high = (math.atan(math.exp(lam)) for lam in schedule.lam_range)
    levels = [math.tan(low + u * (high - low)) for u in (U, U + D / K if K > 1 else 1.0)]
    s, t = (schedule.t_of_lam(torch.tensor(tau, dtype=torch.float64).log()) for tau in levels)
    a_s, a_t, b_s, b_t = (
        q.item() for q in (schedule.alpha(s), schedule.alpha(t), schedule.sigma(s), schedule.sigma(t))
    )
    a_t = a_t if K > 1 else 0.0  # one step starts from pure noise
    fresh = b_t**2 - (a_t / a_s * b_s) ** 2  # variance of z_t given z_s
    A = a_t / a_s * b_s**2 / b_t**2
    B = a_s * fresh / b_t**2
    z_t = a_t**2 * V + b_t**2
    z_s = (A + B * g) ** 2 * z_t + b_s**2 * fresh / b_t**2
    teacher = a_s * V / (a_s**2 * V + b_s**2)
    return {
        "z_t": z_t,
        "along": A + B * g,
        "cov": g * (A + B * g) * z_t,
        "z_s": z_s,
        "teacher": teacher,
        "tau": levels[0],
    }


WEIGHTS = {"uniform": lambda tau: 1.0, "snr_plus_one": lambda tau: tau**-2 + 1, "edm": lambda tau: tau**-2 + 4}


# --- the losses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", some_schedules())
def test_the_optimal_auxiliary_network_is_the_mean_of_both_denoisers(name, steps, weight):
    """dL/dk = 2 w Var z_s (2 k - E[x given z_s]/z_s - teacher's gain), in even steps."""
    g = 0.3
    of = moments(linear(g, 0.0, name, steps), g)
    conditional, w = of["cov"] / of["z_s"], WEIGHTS[weight](of["tau"])
    best = (conditional + of["teacher"]) / 2
    for k in (best, 0.1, 0.8):
        method = linear(g, k, name, steps, weight=weight)
        loss = expected(method, 0)
        loss.backward()
        others = (conditional - k) ** 2 + (of["teacher"] - k) ** 2
        given = g**2 * of["z_t"] - conditional**2 * of["z_s"]  # variance of x given z_s
        assert loss.item() == pytest.approx(w * (given + others * of["z_s"]), rel=1e-9)
        slope = 2 * w * of["z_s"] * (2 * k - conditional - of["teacher"])
        assert method.auxiliary.g.grad.item() == pytest.approx(slope, rel=1e-9, abs=1e-12 * w)
        assert method.student.g.grad is None


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", some_schedules())
def test_the_student_s_gradient_has_no_part_through_z_s(name, steps, weight):
    """dL/dg = w (k - teacher's gain) E[z_t z_s], in odd steps."""
    g, k = 0.3, 0.8
    method = linear(g, k, name, steps, weight=weight)
    of = moments(method, g)
    expected(method, 1).backward()
    slope = WEIGHTS[weight](of["tau"]) * (k - of["teacher"]) * of["along"] * of["z_t"]
    assert method.student.g.grad.item() == pytest.approx(slope, rel=1e-9)
    assert method.auxiliary.g.grad is None


@pytest.mark.parametrize(("std", "sign"), [(0.3, -1), (0.5, 0), (0.9, 1)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_s_gradient_is_half_the_moments_difference_and_changes_sign_at_the_data_s_distribution(
    name, std, sign
):
    """At the optimal auxiliary network: w/2 (E[x given z_s] - teacher), zero where x = g z has the data's variance.

    On every schedule, also on one whose last alpha is far from 0, such as Stable Diffusion's.
    """
    schedule = SCHEDULES[name]()
    g = std / schedule.sigma(time([schedule.t_max])).item()
    method = linear(g, 0.0, name, steps=1)
    of = moments(method, g)
    conditional = of["cov"] / of["z_s"]
    method.auxiliary.g.data.fill_((conditional + of["teacher"]) / 2)
    expected(method, 1).backward()
    slope = 0.5 * (conditional - of["teacher"]) * of["along"] * of["z_t"]
    assert method.student.g.grad.item() == pytest.approx(slope, rel=1e-9, abs=1e-12)
    if sign:
        assert sign * slope > 0.01
    else:
        assert abs(slope) < 1e-12 * of["z_t"]


@pytest.mark.parametrize("gain", ["teacher", "wide"])
def test_of_several_steps_a_mean_is_too_narrow(gain):
    """The teacher's E[x_0 given z_t] has too small a moment at s, and a sample of twice its size too large a one."""
    schedule = VPCosine()
    t = schedule.t_of_lam(torch.tensor(math.log(math.tan(math.pi / 2 * (U + D / 2))), dtype=torch.float64))
    teacher = (schedule.alpha(t) * V / (schedule.alpha(t) ** 2 * V + schedule.sigma(t) ** 2)).item()
    g = teacher * (1 if gain == "teacher" else 3)
    method = linear(g, 0.0)
    of = moments(method, g)
    method.auxiliary.g.data.fill_((of["cov"] / of["z_s"] + of["teacher"]) / 2)
    expected(method, 1).backward()
    assert (method.student.g.grad < -1e-4) if gain == "teacher" else (method.student.g.grad > 1e-4)


# --- the posterior ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_posterior_marginalises(name):
    """Over z_t ~ q(z_t given x) it gives q(z_s given x): mean alpha_s x, variance sigma_s^2."""
    method = moment(gaussian_teacher(SCHEDULES[name](), (0.0,), (V,)))
    schedule = method.teacher.schedule
    t, s = (method.clock(time([u] * 3)) for u in (0.8, 0.45))
    x, eps, z = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1, 1)
    z_s, _ = method.at_s(schedule.noised(x, t, eps), x, z, t, s, UNCONDITIONAL)
    close(z_s[0], schedule.alpha(s)[0], rtol=1e-12)
    close(z_s[1:].square().sum(0), schedule.sigma(s)[0] ** 2, rtol=1e-12)


@pytest.mark.parametrize("name", some_schedules())
def test_the_true_x_0_has_the_teacher_s_moment(name):
    """E[x_0 given z_s] is the teacher's denoiser at s, since z_s is drawn: of DDIM's z_s it is not."""
    method = moment(gaussian_teacher(SCHEDULES[name](), (0.0,), (V,)))
    schedule = method.teacher.schedule
    t, s = (method.clock(time([u] * 3)) for u in (0.8, 0.45))
    x_0, eps, z = torch.eye(3, dtype=torch.float64).view(3, 3, 1, 1, 1)
    x_0 = V**0.5 * x_0
    z_s, g_theta = method.at_s(schedule.noised(x_0, t, eps), x_0, z, t, s, UNCONDITIONAL)
    close((x_0 * z_s).sum() / z_s.square().sum(), (g_theta * z_s).sum() / z_s.square().sum(), rtol=1e-12)
    assert not z_s.requires_grad


@pytest.mark.parametrize("u", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_s_x_of_the_data_s_variance_has_the_teacher_s_moment(name, u):
    """E[x given z_s] is the teacher's, at every s on every schedule: z_s tells nothing of the noise that x is made of.

    With the DDPM posterior from t_max it is not. That moment vanishes at a std of .415 instead of .5 on Stable
    Diffusion's schedule, and at .478 on EDM's.
    """
    method = moment(gaussian_teacher(SCHEDULES[name](), (0.0,), (V,)), steps=1)
    draws = UnitDraws(1)
    z_t, t, _ = method.start(draws)
    eps = z_t / method.teacher.schedule.sigma(t)
    x, s = V**0.5 * eps, method.clock(time([u] * 3))
    z_s, g_theta = method.at_s(z_t, x, draws.noise(), t, s, UNCONDITIONAL)
    close((x * z_s).sum() / z_s.square().sum(), (g_theta * z_s).sum() / z_s.square().sum(), rtol=1e-10)


# --- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_clock_is_the_cosine_schedule_s(name):
    schedule = SCHEDULES[name]()
    method, u = moment(mlp_teacher(schedule, "x0")), torch.linspace(0, 1, 11, dtype=torch.float64)
    times = method.clock(u)
    angles = schedule.noise_level(times).atan()
    close(angles, angles[0] + u * (angles[-1] - angles[0]), rtol=1e-9)
    close(times[[0, -1]], torch.tensor([schedule.t_min, schedule.t_max]), rtol=1e-9, atol=1e-12)
    if name == "vp_cosine":
        close(times, u, atol=1e-12)
    close(method.grid, method.clock(torch.arange(5) / 4), rtol=1e-12)


@pytest.mark.parametrize("K", [1, 2, 4])
def test_times_are_the_algorithm_s(K):
    """s is uniform and t at most 1/K later; a share 1/(2K) of the batch starts at t_max. Of one step all does."""
    method = moment(steps=K)
    z_t, t, s = method.start(make_batch(20_000, read=gaussian_images()))
    assert t.dtype == s.dtype == torch.float64 and z_t.shape == (20_000, 2, 1, 1)
    assert stats.kstest(s.flatten().numpy(), stats.uniform().cdf).pvalue > 0.01
    if K == 1:
        assert (t == 1).all()
        return
    assert (s <= t).all() and (t - s).max() <= 1 / K + 1e-9
    assert (t == 1).double().mean().item() == pytest.approx(1 / (2 * K), abs=0.01)
    inside = (s < 1 - 1 / K).flatten()
    assert stats.kstest((t - s).flatten()[inside].numpy(), stats.uniform(0, 1 / K).cdf).pvalue > 0.01


def test_only_several_steps_read_real_images():
    assert [MomentMatching.reads_data(MomentMatching.Config(steps=K)) for K in (1, 2, 8)] == [False, True, True]
    assert [moment(steps=K).inputs for K in (1, 2)] == ["noise", "data"]
    list(moment(steps=1).train_step(make_batch(4)))
    with pytest.raises(RuntimeError, match="reads no data"):
        list(moment(steps=2).train_step(make_batch(4)))


# --- who is trained, and at what cost -------------------------------------------------------------------------------


def batch(step: int, size: int = 16):
    made = make_batch(size, seed=step, read=gaussian_images())
    made.step = step
    return made


def test_steps_take_turns_and_move_one_network():
    method = moment(weight="snr_plus_one")
    optimizers, teacher, moved = Optimizers(method.config), weights_of(method.teacher.denoiser), []
    assert same_weights(weights_of(method.student), teacher) and same_weights(weights_of(method.auxiliary), teacher)
    assert [phase.cycle for phase in method.phases()] == [2]
    for step in range(4):
        before = {name: weights_of(getattr(method, name)) for name in ("student", "auxiliary")}
        for network, loss in method.train_step(batch(step)):
            optimizers.update(network, loss, 1.0)
        moved.append([name for name in before if not same_weights(before[name], weights_of(getattr(method, name)))])
    assert moved == [["auxiliary"], ["student"]] * 2
    assert same_weights(weights_of(method.teacher.denoiser), teacher)


@pytest.mark.parametrize("step", [0, 1])
def test_evaluations_of_a_step(step, tmp_path):
    """Of student, teacher and auxiliary network, one each; one of them with a gradient."""
    method = moment()
    meter = make_workspace(method.teacher, tmp_path).meter
    list(method.train_step(batch(step, 6)))
    cost = meter.cost()
    assert (cost.teacher_nfe, cost.student_nfe) == (6, 12)
    assert (cost.student_backward, cost.student_backward_input, cost.teacher_backward) == (6, 0, 0)


def test_every_network_gets_the_condition_and_the_teacher_is_guided():
    torch.manual_seed(0)
    network = ResidualMLP((2, 1, 1), width=16, depth=1, classes=3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    conditioning = Conditioning(3, 2.0)
    teacher = Teacher("mlp", Denoiser(network, VPCosine(), "v"), (2, 1, 1), "mlp", conditioning=conditioning)
    z_t, z, (t, s) = torch.randn(4, 2, 1, 1), torch.randn(4, 2, 1, 1), (time([u] * 4) for u in (0.8, 0.5))
    c = conditioning.of_images(range(4), "cpu")
    z_s, g_theta = moment(teacher).at_s(z_t, z_t, z, t, s, c)
    given, none = (teacher.denoiser(z_s, s, q) for q in (Condition(c.labels), conditioning.none(c)))
    close(g_theta, none + 2 * (given - none), rtol=1e-9)


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("name", some_schedules())
def test_a_sample_is_made_in_K_ancestral_steps(name, K, tmp_path):
    """On N(0, v) the student is the teacher: by hand, in arctan of the noise level."""
    method = moment(gaussian_teacher(SCHEDULES[name](), (0.0,), (V,)), steps=K)
    meter = make_workspace(method.teacher, tmp_path).meter
    draws = [make_batch(5, (1, 1, 1), seed).noise() for seed in range(K)]
    found = method.sample(FixedNoise(draws), K, UNCONDITIONAL)
    assert (meter.teacher_nfe, meter.student_nfe) == (0, 5 * K)
    low, high = (math.atan(math.exp(lam)) for lam in method.teacher.schedule.lam_range)
    levels = [math.tan(low + k / K * (high - low)) for k in range(K, 0, -1)]
    x = levels[0] * draws[0]  # x_t / alpha_t
    for tau, below, z in zip(levels, [*levels[1:], 0.0], [*draws[1:], torch.zeros(())], strict=True):
        x_0 = V / (V + tau**2) * x
        kept = (below / tau) ** 2
        x = kept * x + (1 - kept) * x_0 + below * math.sqrt(1 - kept) * z
    close(found, x, rtol=1e-7, atol=1e-9)


def test_a_trained_student_has_the_teacher_s_distribution(tmp_path):
    """N(.3, .25) from a student of one step that starts with a standard deviation of .096."""
    schedule = VE().restricted(math.log(0.002), math.log(2.5))
    method = moment(learnable_teacher(schedule), steps=1, lr=0.03, ema_halflife_kimg=4.0)
    workspace = make_workspace(method.teacher, tmp_path, BudgetConfig(images=800 * 192))
    train(method, method.config, workspace, None, Loop(192), Step(lambda fraction, note: None))
    z = FixedNoise([make_batch(10_000, (1, 1, 1), seed=5).noise()])
    with torch.no_grad():
        x = method.sample(z, 1, UNCONDITIONAL).flatten()
    assert (x.mean().item(), x.std().item()) == (pytest.approx(0.3, abs=0.03), pytest.approx(0.5, rel=0.08))


def test_it_is_sampled_in_K_steps_without_a_promise_about_the_noise():
    assert [nfe for nfe in range(9) if moment(steps=3).supports(nfe)] == [3]
    assert not any(moment(steps=K).keeps_noise(K) for K in (1, 3))


@pytest.mark.parametrize(("settings", "said"), [({"steps": 0}, "steps"), ({"weight": "snr"}, "weight")])
def test_settings_that_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        MomentMatching.Config(**settings)
