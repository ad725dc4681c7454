"""Levels of sampling: where the steps begin, on every schedule, and what is refused."""

import math

import pytest
import torch

from analytic import gaussian_teacher, mlp_teacher
from distillbench import UserError
from distillbench.diffusion.noise import FixedNoise
from distillbench.diffusion.schedules import VE, VPCosine
from distillbench.runs.sampling_settings import as_trained, sampling_settings, training_settings
from distillbench_boot import Boot
from distillbench_cm import ConsistencyDistillation
from distillbench_ctm import ConsistencyTrajectory
from tiny_training import METHODS

WITH_LEVELS = ("cm", "ct", "ctm", "ect", "lcm", "scm")
TAU = [3.0, 0.5]  # for three evaluations


def built(name, schedule=None, **settings):
    cls, own = METHODS[name]
    teacher = mlp_teacher() if schedule is None else gaussian_teacher(schedule=schedule)
    return cls(cls.Config(**own | settings), teacher)


def begun(method, nfe):
    """The noise levels at which the student is evaluated in a sample of `nfe` evaluations, as it sees them."""
    levels = []
    schedule = method.teacher.schedule
    method.student.register_forward_pre_hook(lambda _, given: levels.append(schedule.noise_level(given[1])[0].item()))
    draws = FixedNoise([torch.randn(2, *method.teacher.shape) for _ in range(nfe)])
    with torch.no_grad():
        method.sample(draws, nfe, method.teacher.conditioning.of_images(range(2), "cpu"))
    return levels


@pytest.mark.parametrize("name", WITH_LEVELS)
def test_steps_begin_at_the_levels_that_are_chosen(name):
    """As the network is told them, in that order, after the highest; other numbers of evaluations stay as they were."""
    method, plain = built(name, sampling_levels=[TAU]), built(name)
    top = method.teacher.schedule.noise_level(method.sampling_grid[-1:]).item()
    assert begun(method, 3) == pytest.approx([top, *TAU], rel=1e-9)
    assert method.levels_at(3) == pytest.approx(TAU, rel=1e-9)
    spread = begun(plain, 4)
    assert begun(method, 4) == spread == pytest.approx([top, *plain.levels_at(4)], rel=1e-9)
    assert plain.levels_at(1) == [] and begun(method, 1) == [top]


@pytest.mark.parametrize("schedule", [VE(), VPCosine()])
def test_levels_are_sigma_over_alpha_on_any_schedule(schedule):
    method = built("cm", schedule, sampling_levels=[[0.5853]])
    t = method.sampling_times(2)[1:2]
    assert (schedule.sigma(t) / schedule.alpha(t)).item() == pytest.approx(0.5853, rel=1e-5)
    assert torch.equal(method.sampling_times(2)[[0, -1]], method.grid[[0, -1]])


@pytest.mark.parametrize(
    ("index", "steps", "tau"), [(11, 18, 0.5853), (22, 40, 1.382)]
)  # of the release's grids, from the top
def test_the_published_levels_are_those_of_the_released_grid(index, steps, tau):
    low, high, rho = 0.002, 80.0, 7
    ramp = high ** (1 / rho) + index / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))
    assert float(f"{ramp**rho:.4g}") == tau


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([[1.0], [2.0]], "one list for each number of evaluations"),
        ([[0.5, 3.0]], r"list positive noise levels that fall, got \[0.5, 3.0\]"),
        ([[1.0, 1.0]], "that fall"),
        ([[0.0]], "positive"),
        ([[math.nan]], "positive"),
        ([[math.inf]], "positive"),
        ([0.5], r"a list of lists of numbers, such as \[\[0.8\]\], got 0.5"),
        ([[]], "a list of lists of numbers"),
        ([[True]], "a list of lists of numbers"),
        ([["x"]], "a list of lists of numbers"),
    ],
)
def test_levels_that_make_no_sense_are_refused(levels, message):
    with pytest.raises(UserError, match=f"^sampling_levels must .*{message}"):
        ConsistencyDistillation.Config(sampling_levels=levels)


@pytest.mark.parametrize("name", ["cm", "lcm"])
def test_segments_fix_the_levels(name):
    cls, _ = METHODS[name]
    with pytest.raises(UserError, match=r"sampling_levels must be \[\] with segments=4, which fixes the levels"):
        cls.Config(segments=4, sampling_levels=[TAU])


def test_levels_outside_the_grid_and_for_too_many_evaluations_are_refused():
    for outside in ([[90.0]], [[1.0, 0.001]], [[80.0]]):
        with pytest.raises(UserError, match=r"cm: sampling_levels must lie between the ends of its grid, 0.002 and 80"):
            built("cm", VE(), sampling_levels=outside).check_levels()
    many = [[float(level) for level in range(20, 0, -1)]]
    with pytest.raises(
        UserError, match=r"levels for 21 evaluations, \[20.0, .*, and it samples with: 2, 3, 4, 5, 6, 7, 8$"
    ):
        built("cm", VE(), sampling_levels=many).check_levels()
    built("cm", VE(), sampling_levels=[TAU]).check_levels()


def test_a_training_sees_no_setting_of_sampling():
    """Two values have the same settings of training; only those that differ from the defaults are of an evaluation."""
    plain, chosen = (
        ConsistencyTrajectory.Config(),
        ConsistencyTrajectory.Config(gamma=0.5, sampling_levels=[TAU], lr=3e-4),
    )
    assert as_trained(chosen) == ConsistencyTrajectory.Config(lr=3e-4)
    assert sampling_settings(chosen) == {"gamma": 0.5, "sampling_levels": [TAU]} and not sampling_settings(plain)
    assert training_settings(chosen) == training_settings(plain) | {"lr": 3e-4}
    assert not {"gamma", "sampling_levels"} & training_settings(plain).keys()
    assert as_trained(Boot.Config()) == Boot.Config() and "steps" in training_settings(Boot.Config())
