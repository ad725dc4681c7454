"""Reflow meets the contract, and agrees with closed forms on a Gaussian.

For x_0 ~ N(m, s^2) the exact map of the teacher's ODE is x_0 = m + g (z_T - (1 - T) m), g = s / sqrt(V), V = s^2 (1 -
T)^2 + T^2: a deterministic, affine coupling. On its straight paths z_t is affine in z_T, so z_T, and with it the
velocity, follows from z_t without any average: E[(z_T - x_0)/T given z_t] is a formula.
"""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from distillbench import Batch, Denoiser, Noise, Teacher, UserError
from distillbench.diffusion import UNCONDITIONAL, ExactDenoiser, FlowMatching, VPCosine, VPLinear, mixture
from distillbench.networks import ResidualMLP
from distillbench.testing import assert_conforms
from torch import Tensor, nn

from distillbench_reflow import Reflow

DISTRIBUTION_IMAGES = 20_000  # of a training on an exact teacher; `distillbench check` takes ten times as many
M, S = 0.3, 0.4


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def teacher(prediction: str = "v", schedule=None) -> Teacher:
    """The exact denoiser of N(m, s^2), one pixel, on the flow schedule as the harness reads it there."""
    distribution, own = mixture([1.0], [[M]], [[S]]), schedule or VPCosine()
    start = Denoiser(ResidualMLP(distribution.shape, width=8, depth=1), own, prediction)
    return Teacher("gaussian", ExactDenoiser(distribution, own), distribution.shape, "gaussian", start=start).on(
        FlowMatching()
    )


def method(schedule=None, **settings) -> Reflow:
    reflow = Reflow(Reflow.Config(**{"pairs": 0} | settings), teacher(schedule=schedule))
    reflow.store = None  # online, as after prepare
    reflow.start_phase(0)
    return reflow


def batch(size: int = 200, seed: int = 0) -> Batch:
    return Batch(size, (1, 1, 1), torch.Generator().manual_seed(seed), "cpu", None)


def loss_of(reflow: Reflow, size: int = 200) -> float:
    ((network, loss),) = reflow.train_step(batch(size))
    assert network is reflow.student
    return loss.item()


def gain(T: float) -> float:
    return S / math.sqrt(S**2 * (1 - T) ** 2 + T**2)


def answer(z_T: Tensor, T: float) -> Tensor:
    """x_0, exactly."""
    return M + gain(T) * (z_T - (1 - T) * M)


class Straight(nn.Module):
    """The denoiser of the straight flow: solves z_t = x_0 + t/T (z_T - x_0) for x_0, on the exact coupling.

    With k = t/T and x_0 = p + g z_T: z_t = (1 - k) p + ((1 - k) g + k) z_T.
    """

    def __init__(self, T: float, shift: float = 0.0) -> None:
        super().__init__()
        self.T, self.shift = T, shift

    def forward(self, z_t: Tensor, t: Tensor, c=UNCONDITIONAL) -> Tensor:
        k, g = t / self.T, gain(self.T)
        p = M - g * (1 - self.T) * M
        z_T = (z_t - (1 - k) * p) / ((1 - k) * g + k)
        return p + g * z_T - t * self.shift  # a velocity that is off by `shift`


@pytest.mark.parametrize("distil_from", ["teacher", "flow"])
def test_it_conforms(distil_from):
    torch.set_default_dtype(torch.float32)
    config = Reflow.Config(distil_from=distil_from, steps=16, pairs=4096)
    assert_conforms(Reflow, config, distribution_images=DISTRIBUTION_IMAGES if distil_from == "teacher" else 0)


LAST_ALPHA = math.exp(
    -0.25 * (20 - 0.1) - 0.5 * 0.1
)  # of VPLinear (Song et al. 2021, eq. 33), and alpha^2 + sigma^2 = 1


@pytest.mark.parametrize(
    ("schedule", "T"), [(VPCosine(), 1 - 1e-4), (VPLinear(), 1 / (1 + LAST_ALPHA / math.sqrt(1 - LAST_ALPHA**2)))]
)
def test_the_pairs_are_the_gaussians_map(schedule, T):
    """DDIM's samples converge to the exact map like 1/N, also if the teacher's noise ends before t = 1."""
    reflow = method(schedule)
    assert reflow.T == pytest.approx(T, abs=1e-9)
    errors = []
    for steps in (64, 128, 256):
        reflow.config.steps = steps
        z_T, x_0, _ = reflow.coupling(batch())
        errors.append((x_0 - answer(z_T, reflow.T)).abs().max().item())
    assert errors[-1] < 0.01
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("phase", [0, 1])
def test_the_loss_at_the_closed_form_is_zero_and_grows_as_the_square(phase, monkeypatch):
    """In both phases. A velocity that is off by .3 costs .09, at every t."""
    reflow = method()
    reflow.start_phase(phase)
    monkeypatch.setattr(Reflow, "solve", lambda self, eps, c: answer(eps * self.T, self.T))
    reflow.student = Straight(reflow.T)
    assert loss_of(reflow) < 1e-20
    reflow.student = Straight(reflow.T, shift=0.3)
    assert loss_of(reflow) == pytest.approx(0.09, rel=1e-9)


def test_the_velocity_of_the_closed_form_is_the_conditional_mean(monkeypatch):
    """E[(z_T - x_0)/T given z_t] by brute force, in narrow bins of z_t, for one t."""
    reflow = method()
    T, t = reflow.T, 0.4
    z_T = T * torch.randn(400_000, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    x_0 = answer(z_T, T)
    z_t = x_0 + t / T * (z_T - x_0)
    v = reflow.v(Straight(T), z_t, torch.full_like(z_t, t), UNCONDITIONAL)
    for low in (-0.8, -0.1, 0.5):
        inside = (z_t >= low) & (z_t < low + 0.02)
        assert v[inside].mean() == pytest.approx(((z_T - x_0) / T)[inside].mean().item(), abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_on_straight_paths_any_number_of_steps_is_exact(steps):
    reflow = method()
    eps = batch().noise()
    x_0 = reflow.euler(Straight(reflow.T), reflow.T * eps, steps, UNCONDITIONAL)
    torch.testing.assert_close(x_0, answer(reflow.T * eps, reflow.T), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_eulers_steps_are_ddims(steps):
    """On the teacher's own, curved, flow: Euler's gain is the product of (alpha_s alpha_t s^2 + sigma_s sigma_t) / V_t.

    The factor is DDIM's of a Gaussian (docs/methods.md), and ends on f: alpha_t s^2 / V_t, which is its case s = 0.
    """
    reflow = method()
    eps = batch(20).noise()
    times = [reflow.T * k / steps for k in range(steps, -1, -1)]
    expected = reflow.T * eps - (1 - reflow.T) * M
    for t, s in pairwise(times):
        expected = expected * ((1 - s) * (1 - t) * S**2 + s * t) / ((1 - t) ** 2 * S**2 + t**2)
    x_0 = reflow.euler(reflow.teacher.denoiser, reflow.T * eps, steps, UNCONDITIONAL)
    torch.testing.assert_close(x_0, M + expected, rtol=0, atol=1e-12)


def test_one_step_is_the_students_and_more_are_the_flows(tmp_path):
    reflow = method()
    noise = Noise(0, range(5), (1, 1, 1))
    reflow.flow, reflow.student = Straight(reflow.T), Straight(reflow.T, shift=1.0)
    exact = answer(reflow.T * noise(0), reflow.T)
    torch.testing.assert_close(reflow.sample(noise, 3, UNCONDITIONAL), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close(reflow.sample(noise, 1, UNCONDITIONAL), exact - reflow.T, rtol=0, atol=1e-12)


def test_the_flow_is_distilled_from_its_own_answers_where_asked():
    reflow = method(distil_from="flow", steps=4)
    reflow.start_phase(1)
    reflow.flow = Straight(reflow.T, shift=0.5)
    z_T, x_0, _ = reflow.coupling(batch())
    torch.testing.assert_close(x_0, reflow.euler(reflow.flow, z_T, 4, UNCONDITIONAL))
    assert (x_0 - answer(z_T, reflow.T)).abs().min() > 0.1


def test_phases_and_settings():
    assert [phase.label for phase in method().phases()] == ["reflow", "distil"]
    assert [phase.label for phase in method(distil_share=0.0).phases()] == ["reflow"]
    reflow = method()
    assert (reflow.ready(1, 0), reflow.ready(2, 0), reflow.ready(2, 1)) == (True, False, True)
    wrong = {"steps": 0, "pairs": -1, "t_low": 0.0, "schedule": "ve", "distil_from": "data", "solver": "ddpm"}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=name):
            Reflow.Config(**{name: value})
    with pytest.raises(UserError, match="eps does not give a velocity"):
        Reflow(Reflow.Config(), teacher("eps"))


def test_it_is_one_short_file():
    source = Path(__file__).parent.parent / "src" / "distillbench_reflow.py"
    assert len(source.read_text().splitlines()) <= 150
