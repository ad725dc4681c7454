"""Pairs of times at the ends of what is drawn, and the distances that consistency methods share."""

from __future__ import annotations

import math

import pytest
import torch

from analytic import close, schedules, time
from distillbench.diffusion.consistency_times import CURRICULA, GRID_LEVELS, continuous_pair, inverse_length
from distillbench.diffusion.distances import pseudo_huber
from distillbench.diffusion.samplers import karras_times
from distillbench.diffusion.schedules import SCHEDULES

ENDS = (0.0, 0.5, 1 - 2**-53)  # of what batch.uniform() draws, and its middle


@pytest.mark.parametrize("n", [2.0, 256.0, 2.0**20])
@pytest.mark.parametrize("name", schedules())
def test_pairs_stay_within_the_schedule_and_their_weights_are_finite(name, n):
    for schedule in (SCHEDULES[name](), SCHEDULES[name]().restricted(math.log(0.05), math.log(10.0))):
        u = time(torch.tensor([*ENDS, 0.01, 0.9], dtype=torch.float64))
        t, s, tau_s = continuous_pair(schedule, u, n, -1.1, 2.0)
        assert (schedule.t_min <= s).all() and (s <= t).all() and (t <= schedule.t_max).all()
        tau_t, lowest = schedule.noise_level(t), math.exp(schedule.lam_range[0])
        assert ((tau_s == 0) | (tau_s >= lowest)).all() and (tau_s < tau_t).all()
        assert tau_s[0] == 0  # from the lowest level there is only the end
        assert (inverse_length(tau_t, tau_s) > 0).all() and inverse_length(tau_t, tau_s).isfinite().all()
        assert t.dtype == s.dtype == tau_s.dtype == torch.float64
        assert inverse_length(tau_t, tau_s).dtype == torch.float32
        kept = tau_s > 0
        close(schedule.noise_level(s)[kept], tau_s[kept], rtol=1e-6)


def test_steps_are_longer_at_low_noise():
    """1 - tau_s / tau_t is 1/n far above 1/b, and (1 + k/2) / n far below."""
    schedule = SCHEDULES["ve"]()
    u = torch.special.ndtr(time(torch.tensor([0.003, 60.0], dtype=torch.float64).log()))
    t, _, tau_s = continuous_pair(schedule, u, 100.0, 0.0, 1.0, k=6.0, b=2.0)
    close((1 - tau_s / t).flatten(), torch.tensor([0.04, 0.01], dtype=torch.float64), rtol=0.003)


@pytest.mark.parametrize("levels", GRID_LEVELS)
@pytest.mark.parametrize("n", [1, 7, 1280])
def test_every_draw_is_a_step_of_the_grid(levels, n):
    schedule = SCHEDULES["vp_cosine"]()
    total = GRID_LEVELS[levels](schedule, karras_times(schedule, n + 1, 0.002, 80.0), -1.1, 2.0)
    assert len(total) == n and total[-1] == 1 and (total.diff() >= 0).all()
    found = torch.searchsorted(total, torch.tensor(ENDS, dtype=torch.float64), right=True)
    assert found.min() == 0 and found.max() == n - 1


@pytest.mark.parametrize("curriculum", CURRICULA)
def test_curricula_rise_from_s0_to_s1(curriculum):
    stages = [n for n, share in CURRICULA[curriculum](3, 40) if share > 0]
    assert stages == sorted(set(stages)) and (stages[0], stages[-1]) == (3, 40)


@pytest.mark.parametrize("c", [None, 0.0, 0.3])
def test_pseudo_huber(c):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 3, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    w = time(torch.tensor([1.0, 2.0, 0.0, 3.0, 0.5]))
    constant = 0.00054 * math.sqrt(12) if c is None else c
    lengths = [math.sqrt(sum(p * p for p in row.flatten().tolist()) + constant**2) - constant for row in a - b]
    expected = sum(length * weight for length, weight in zip(lengths, w.flatten().tolist(), strict=True)) / 5
    assert pseudo_huber(a, b, w, c).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("c", [None, 0.0, 0.3])
def test_pseudo_huber_of_equal_images_has_no_gradient(c):
    a = torch.ones(2, 1, 2, 2, requires_grad=True)
    pseudo_huber(a, torch.ones(2, 1, 2, 2), 500.0, c).backward()
    assert (a.grad == 0).all()
