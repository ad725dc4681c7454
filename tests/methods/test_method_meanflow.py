"""MeanFlow on the flow map of a Gaussian, which is known, and against its paper's formulas."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from analytic import (
    close,
    gaussian_images,
    gaussian_map,
    gaussian_teacher,
    loss_of,
    make_batch,
    minimised,
    mlp_teacher,
    same_weights,
    time,
    weights_of,
)
from distillbench import Conditioning, UserError
from distillbench.diffusion import FlowMatching, time_like
from distillbench.diffusion.conditioning import UNCONDITIONAL
from distillbench.diffusion.noise import FixedNoise
from distillbench.networks import ResidualMLP
from distillbench_meanflow import MeanFlow

pytestmark = pytest.mark.usefixtures("float64")
FLOW = FlowMatching()


def meanflow(teacher=None, **settings) -> MeanFlow:
    plain = {"smooth": 0, "exact": True, "ratio": 1.0}
    return MeanFlow(MeanFlow.Config(**plain | settings), teacher or gaussian_teacher(FLOW))


class ExactVelocity(nn.Module):
    """`gain` times (x_t - x_s) / (t - s), x_s on the Gaussian's trajectory through x_t."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c=UNCONDITIONAL) -> Tensor:
        return self.gain * (x_t - gaussian_map(FLOW, x_t, t, s)) / (t - s)


def with_map(gain: float = 1.0, **settings) -> MeanFlow:
    method = meanflow(**settings)
    method.student = ExactVelocity(gain)
    return method


def batch(size: int = 64, seed: int = 0):
    return make_batch(size, seed=seed, read=gaussian_images(seed + 100))


# --- the identity ----------------------------------------------------------------------------------------------------


def test_the_exact_average_velocity_has_no_loss():
    assert 0 <= loss_of(with_map(), batch(500)).item() < 1e-20


def test_the_average_velocity_at_equal_times_is_the_teacher_s():
    """With s = t for all rows the loss is that of flow matching: to the teacher's velocity, and to eps - x_0."""
    method = meanflow(mlp_teacher(FLOW), ratio=0.0)
    assert loss_of(method, batch()).item() < 1e-25
    data = meanflow(mlp_teacher(FLOW), ratio=0.0, source="data")
    assert not data.uses_teacher and meanflow(mlp_teacher(FLOW)).uses_teacher
    again = batch()
    x_0, eps = again.x_0, again.noise()
    t, _ = data.times(again)
    x_t = (1 - t) * x_0 + t * eps
    v = (x_t - data.teacher.denoise(x_t, t)) / t
    close(loss_of(data, batch()), (v - (eps - x_0)).square().mean(), rtol=1e-10)


def test_an_embedding_of_the_difference_moves_with_t():
    """du/dt at constant s goes through t - s too: both derivatives agree, and neither is that of an embedding of s."""
    found = {}
    for embeds, exact in (("difference", True), ("difference", False), ("s", True)):
        method = meanflow(mlp_teacher(FLOW), embeds=embeds, exact=exact, step=1e-5)
        method.h, method.t_max = 1e-5, method.teacher.schedule.t_max - 1e-5  # the same times for all three
        torch.manual_seed(3)
        with torch.no_grad():
            method.student.target_time[-1].weight.normal_(std=0.2)
        found[embeds, exact] = loss_of(method, batch()).item()
    assert found["difference", False] == pytest.approx(found["difference", True], rel=1e-3)
    assert abs(found["s", True] / found["difference", True] - 1) > 0.1


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_a_gain_that_is_too_small_grows(source):
    for gain, sign in ((0.5, -1), (2.0, 1)):
        method = with_map(gain, source=source)
        loss_of(method, batch(2000)).backward()
        assert sign * method.student.gain.grad > 0


@pytest.mark.parametrize(("source", "error"), [("teacher", 1e-4), ("data", 0.02)])
@pytest.mark.parametrize("start", [0.5, pytest.param(2.0, marks=pytest.mark.nightly)])
def test_a_trained_gain_is_that_of_the_exact_velocity(source, error, start):
    method = with_map(start, source=source)
    minimised(method.student, lambda step: loss_of(method, batch(256, step)))
    assert method.student.gain.item() == pytest.approx(1, abs=error)


def test_from_data_the_optimum_is_the_same():
    """The gradient at the exact velocity is that of noise alone: zero within four standard errors of its mean."""
    found = []
    for seed in range(20):
        method = with_map(source="data")
        loss_of(method, batch(500, seed)).backward()
        found.append(method.student.gain.grad)
    found = torch.stack(found)
    assert found.std() > 1e-3 and found.mean().abs() < 4 * found.std() / math.sqrt(20)


def test_differences_are_the_exact_derivative():
    exact, difference = (meanflow(mlp_teacher(FLOW), exact=each, smooth=8, step=1e-3) for each in (True, False))
    assert (exact.h, exact.t_max, difference.t_max) == (0.0, FLOW.t_max, FLOW.t_max - 1e-3)
    exact.h, exact.t_max = difference.h, difference.t_max  # the same times for both
    losses = [loss_of(method, batch()).item() for method in (exact, difference)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0] > 1e-5


def test_the_weight_is_the_paper_s():
    """w = 1 / (|e|^2 + c)^p with the square summed over pixels, for each image."""
    plain, weighted = (loss_of(with_map(0.5, p=p, c=0.1), batch(1)) for p in (0.0, 1.0))
    square = 2 * plain  # two pixels
    close(weighted, plain / (square + 0.1), rtol=1e-10)


# --- times -----------------------------------------------------------------------------------------------------------


def test_differences_stay_between_the_ends():
    method, seen = meanflow(exact=False, step=0.01), []
    student = method.student

    class Watched(nn.Module):
        def forward(self, x_t, t, s, c):
            seen.extend([t, s])
            return student(x_t, t, s, c)

    method.student = Watched()
    for _ in method.train_step(batch(2000)):
        pass
    times = torch.cat(seen)
    assert FLOW.t_min - 1e-12 <= times.min() < 0.002 and 0.998 < times.max() <= FLOW.t_max + 1e-12


def test_half_of_the_times_are_uniform():
    """The others are logit-normal: of these, P(t < .5) = Phi(.4)."""
    for share in (0.0, 0.5, 1.0):
        t = meanflow(uniform=share).time(make_batch(20_000), -0.4, 1.0)
        below = share * 0.5 + (1 - share) * torch.special.ndtr(torch.tensor(0.4)).item()
        assert (t < 0.5).double().mean().item() == pytest.approx(below, abs=0.015)


def test_two_times_of_one_distribution_are_sorted():
    """The larger of two draws has the square of their distribution function, and the smaller the rest."""
    t, s = meanflow(uniform=0.0, step=1e-5).times(make_batch(20_000))
    below = lambda x: torch.special.ndtr(torch.logit(torch.as_tensor(x)) + 0.4).numpy()
    assert stats.kstest(t.flatten().numpy(), lambda x: below(x) ** 2).pvalue > 1e-4
    assert stats.kstest(s.flatten().numpy(), lambda x: 1 - (1 - below(x)) ** 2).pvalue > 1e-4


def test_times_that_are_drawn_apart():
    """logit t ~ N(-.6, 1.6^2) alone; s = min(t, r) with logit r ~ N(-4, 2^2), as sample_two_timesteps_t_r_v1."""
    method = meanflow(uniform=0.0, p_mean=-0.6, p_std=1.6, p_mean_s=-4.0, p_std_s=2.0, step=1e-5)
    t, s = method.times(make_batch(20_000))
    logit = lambda x: torch.logit(x).flatten().numpy()
    assert stats.kstest(logit(t), stats.norm(-0.6, 1.6).cdf).pvalue > 1e-4
    above = lambda x: stats.norm(-0.6, 1.6).sf(x) * stats.norm(-4.0, 2.0).sf(x)  # both are above x
    assert stats.kstest(logit(s), lambda x: 1 - above(x)).pvalue > 1e-4
    equal = stats.norm.cdf((-4.0 + 0.6) / math.hypot(1.6, 2.0))  # P(t < r) of independent normal logits
    assert (s == t).double().mean().item() == pytest.approx(equal, abs=0.008) and (s <= t).all()


# --- the student -----------------------------------------------------------------------------------------------------


def test_at_first_it_is_the_teacher_s_velocity_for_every_s():
    method = meanflow(mlp_teacher(FLOW))
    x_t, t = batch().noise(), time(torch.linspace(0.1, 0.9, 64))
    v = (x_t - method.teacher.denoise(x_t, t)) / t
    for s in (t, t / 2, torch.zeros_like(t) + FLOW.t_min):
        close(method.student(x_t, t, s), v, atol=1e-10)


def test_the_start_is_the_teacher_s_weights_or_fresh_ones():
    teacher = mlp_teacher(FLOW)
    teacher.blank = lambda: ResidualMLP((2, 1, 1), width=16, depth=1)
    mine, fresh = weights_of(teacher.denoiser), weights_of(meanflow(teacher, start="fresh").student.denoiser)
    assert same_weights(weights_of(meanflow(teacher).student.denoiser), mine)
    assert fresh.keys() == mine.keys() and not same_weights(fresh, mine)


@pytest.mark.parametrize("nfe", [1, 2, 5])
def test_samples_of_the_exact_velocity(nfe):
    """They lie on the trajectory of the noise, whatever the number of evaluations; its last bit is a straight line."""
    method, eps = with_map(), batch().noise()
    T = time_like(eps, method.t_max)
    exact = gaussian_map(FLOW, FLOW.sigma(T) * eps, T, torch.zeros_like(T))
    with torch.no_grad():
        close(method.sample(FixedNoise([eps]), nfe, UNCONDITIONAL), exact, atol=1e-3)
    assert method.supports(nfe) and method.keeps_noise(nfe) and not method.supports(0)


def test_settings_that_are_not_possible():
    with pytest.raises(UserError, match=r"schedule must be one of .*flow_matching"):
        meanflow(schedule="ve")
    with pytest.raises(UserError, match="start must be one of fresh, teacher, got 'random'"):
        meanflow(start="random")
    with pytest.raises(UserError, match="p_std_s must be positive"):
        meanflow(p_std_s=0.0)
    with pytest.raises(UserError, match=r"source must be one of .*teacher, data"):
        meanflow(source="pairs")
    teacher = gaussian_teacher(FLOW).conditioned(Conditioning(2, 3.0))
    with pytest.raises(UserError, match="source=data cannot be guided"):
        meanflow(teacher, source="data")
