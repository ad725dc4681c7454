"""Shortcut models meet the contract, and agree with closed forms on a Gaussian.

For x_0 ~ N(m, v) the teacher's ODE moves x_t - (1 - t) m in proportion to sqrt(V_t), V_t = v (1 - t)^2 + t^2. So the
exact average velocity between any two times is known, and with it every target.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from distillbench import Batch, Denoiser, Noise, Teacher, UserError
from distillbench.diffusion import UNCONDITIONAL, ExactDenoiser, FlowMatching, VPCosine, mixture
from distillbench.networks import ResidualMLP
from distillbench.testing import assert_conforms
from torch import Tensor, nn

from distillbench_shortcut import Shortcut

DISTRIBUTION_IMAGES = 20_000  # of a training on an exact teacher; `distillbench check` takes ten times as many
M, V = 0.3, 0.16


@pytest.fixture(autouse=True)
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def teacher(prediction: str = "v") -> Teacher:
    """The exact denoiser of N(m, v), one pixel, on the flow schedule as the harness reads it there."""
    distribution, own = mixture([1.0], [[M]], [[V**0.5]]), VPCosine()
    start = Denoiser(ResidualMLP(distribution.shape, width=8, depth=1), own, prediction)
    return Teacher("gaussian", ExactDenoiser(distribution, own), distribution.shape, "gaussian", start=start).on(
        FlowMatching()
    )


def method(**settings) -> Shortcut:
    return Shortcut(Shortcut.Config(**settings), teacher())


def batch(size: int = 200, seed: int = 0) -> Batch:
    """Images of the distribution, and the random numbers of a step."""
    generator = torch.Generator().manual_seed(seed + 100)
    read = lambda n: (M + V**0.5 * torch.randn(n, 1, 1, 1, generator=generator), None)
    return Batch(size, (1, 1, 1), torch.Generator().manual_seed(seed), "cpu", read)


def loss_of(shortcut: Shortcut, size: int = 200) -> Tensor:
    ((network, loss),) = shortcut.train_step(batch(size))
    assert network is shortcut.student
    return loss


def variance(t: Tensor) -> Tensor:
    return V * (1 - t) ** 2 + t**2


def on_trajectory(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """x_s, exactly."""
    return (1 - s) * M + (variance(s) / variance(t)).sqrt() * (x_t - (1 - t) * M)


def velocity(x_t: Tensor, t: Tensor) -> Tensor:
    """The derivative of `on_trajectory` in s at s = t: -m + V_t' / (2 V_t) (x_t - (1 - t) m)."""
    return -M + (t - V * (1 - t)) / variance(t) * (x_t - (1 - t) * M)


def average_velocity(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    length = torch.where(t > s, t - s, 1.0)
    return torch.where(t > s, (x_t - on_trajectory(x_t, t, s)) / length, velocity(x_t, t))


class Exact(nn.Module):
    """The network of the exact student; with `only_v` the teacher's velocity for every s."""

    def __init__(self, only_v: bool = False, error: float = 0.0) -> None:
        super().__init__()
        self.only_v, self.error = only_v, error  # of u

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, c=UNCONDITIONAL) -> Tensor:
        return x_t - t * (average_velocity(x_t, t, t if self.only_v else s) + self.error)


def test_it_conforms():
    torch.set_default_dtype(torch.float32)
    assert_conforms(Shortcut, distribution_images=DISTRIBUTION_IMAGES)


def test_the_loss_of_the_exact_student_is_zero():
    shortcut = method()
    shortcut.student = shortcut.target = Exact()
    assert loss_of(shortcut) < 1e-20


def test_an_error_of_the_velocity_costs_its_square():
    """Against an exact target, whether s = t or not."""
    shortcut = method()
    shortcut.student, shortcut.target = Exact(error=0.3), Exact()
    assert loss_of(shortcut).item() == pytest.approx(0.09, rel=1e-9)


def test_a_share_of_the_images_learns_from_the_teacher():
    """With a target network that is off by .3, only images with s < t have a loss."""
    losses = []
    for share in (0.0, 0.5):
        shortcut = method(shortest=share)
        shortcut.student, shortcut.target = Exact(), Exact(error=0.3)
        losses.append(loss_of(shortcut, 4000).item())
    assert losses[0] > 0.05 and losses[1] / losses[0] == pytest.approx(0.5, abs=0.03)


def test_two_halves_of_the_exact_student_are_a_whole():
    shortcut = method()
    shortcut.target = Exact()
    x_t = batch().noise()
    t = torch.linspace(0.1, 1 - 1e-4, 200).view(-1, 1, 1, 1)
    s = t * torch.linspace(0.9, 0.01, 200).view(-1, 1, 1, 1)
    torch.testing.assert_close(
        shortcut.two_halves(x_t, t, s, UNCONDITIONAL), average_velocity(x_t, t, s), rtol=0, atol=1e-12
    )


def test_two_halves_of_the_teacher_are_two_steps_of_euler():
    shortcut = method()
    shortcut.target = Exact(only_v=True)
    x_t, t, s = batch(5).noise(), torch.full((5, 1, 1, 1), 0.8), torch.full((5, 1, 1, 1), 0.2)
    x_r = x_t - 0.3 * velocity(x_t, t)
    expected = x_r - 0.3 * velocity(x_r, torch.full_like(t, 0.5))
    found = x_t - 0.6 * shortcut.two_halves(x_t, t, s, UNCONDITIONAL)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_at_first_every_step_is_the_teachers():
    """The embedding of s starts at zero. Student and target are networks of the same weights."""
    shortcut = method()
    x_t, t = batch(20).noise(), torch.full((20, 1, 1, 1), 0.7)
    f = shortcut.teacher.student()(x_t, t)
    for network in (shortcut.student, shortcut.target):
        for s in (0.7, 0.3, 1e-4):
            u = shortcut.u(network, x_t, t, torch.full_like(t, s), UNCONDITIONAL)
            torch.testing.assert_close(u, (x_t - f) / t, rtol=0, atol=1e-10)


@pytest.mark.parametrize("nfe", [1, 2, 7])
def test_the_exact_student_needs_one_step(nfe):
    """From T eps to t_min = 1e-4, where noise of that size is left."""
    shortcut, noise = method(), Noise(0, range(20), (1, 1, 1))
    shortcut.student = Exact()
    ends = torch.tensor([1 - 1e-4, 1e-4])
    exact = on_trajectory(ends[0] * noise(0), *ends)
    torch.testing.assert_close(shortcut.sample(noise, nfe, UNCONDITIONAL), exact, rtol=0, atol=1e-12)
    assert shortcut.supports(nfe) and shortcut.keeps_noise(nfe) and not shortcut.supports(0)


def test_steps_of_the_teacher_are_eulers():
    shortcut, noise = method(), Noise(0, range(20), (1, 1, 1))
    shortcut.student = Exact(only_v=True)
    times = torch.linspace(1 - 1e-4, 1e-4, 6)
    x = times[0] * noise(0)
    for t, s in pairwise(times):
        x = x + (s - t) * velocity(x, t)
    torch.testing.assert_close(shortcut.sample(noise, 5, UNCONDITIONAL), x, rtol=0, atol=1e-12)


def test_the_target_follows_the_student():
    shortcut = method(mu=0.9)
    with torch.no_grad():
        for weight in shortcut.student.parameters():
            weight += 1.0
    before = [weight.clone() for weight in shortcut.target.parameters()]
    shortcut.after_step()
    for old, new in zip(before, shortcut.target.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)
    loss_of(shortcut).backward()
    assert all(weight.grad is None for weight in shortcut.target.parameters())


def test_settings():
    for name, value in {"schedule": "ve", "shortest": 1.0, "mu": -0.1}.items():
        with pytest.raises(UserError, match=name):
            Shortcut.Config(**{name: value})
    with pytest.raises(UserError, match="eps does not give a velocity"):
        Shortcut(Shortcut.Config(), teacher("eps"))


def test_it_is_one_short_file():
    source = Path(__file__).parent.parent / "src" / "distillbench_shortcut.py"
    assert len(source.read_text().splitlines()) <= 150
