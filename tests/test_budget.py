"""The meter: what is counted, from when, and when the budget is used."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import distillbench.budget
from analytic import gaussian_teacher, time
from distillbench.budget import BudgetConfig, Limit, Meter
from distillbench.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(distillbench.budget, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def evaluate(network, images: int) -> None:
    network(torch.zeros(images, 2, 1, 1), time([0.5]).expand(images, 1, 1, 1))


def test_meter_counts_teacher_and_students_from_when_it_was_made(clock):
    teacher = gaussian_teacher()
    evaluate(teacher.denoise, 7)
    evaluate(teacher.student(), 5)
    clock.now += 50
    meter = Meter(BudgetConfig(), teacher, "cpu")
    evaluate(teacher.denoise, 3)
    evaluate(teacher.deputy(), 4)
    evaluate(teacher.student(), 10)
    evaluate(teacher.student(), 20)
    meter.images += 8
    clock.now += 2.5
    price = meter.price()
    assert (price.images, price.seconds, price.teacher_nfe, price.student_nfe) == (8, 2.5, 7, 30)


def test_two_meters_do_not_disturb_each_other():
    teacher = gaussian_teacher()
    first = Meter(BudgetConfig(), teacher, "cpu")
    evaluate(teacher.denoise, 3)
    second = Meter(BudgetConfig(), teacher, "cpu")
    evaluate(teacher.denoise, 4)
    assert (first.teacher_nfe, second.teacher_nfe) == (7, 4)


def test_a_charge_is_added_to_seconds_and_teacher_evaluations(clock):
    meter = Meter(BudgetConfig(limit=Limit.seconds, seconds=40.0), gaussian_teacher(), "cpu")
    meter.charge(10.0, 300)
    meter.charge(5.0, 0)
    clock.now += 5
    price = meter.price()
    assert (price.seconds, price.teacher_nfe, price.student_nfe, price.images) == (20.0, 300, 0, 0)
    assert meter.progress() == 0.5


def test_progress_is_the_share_of_what_the_budget_limits(clock):
    teacher = gaussian_teacher()
    limits = {
        Limit.images: BudgetConfig(limit=Limit.images, images=40),
        Limit.seconds: BudgetConfig(limit=Limit.seconds, seconds=4.0),
        Limit.nfe: BudgetConfig(limit=Limit.nfe, nfe=64),
    }
    meters = {limit: Meter(budget, teacher, "cpu") for limit, budget in limits.items()}
    evaluate(teacher.denoise, 6)
    evaluate(teacher.student(), 10)
    clock.now += 3
    for meter in meters.values():
        meter.images += 20
    progress = {limit: meter.progress() for limit, meter in meters.items()}
    assert progress == {Limit.images: 20 / 40, Limit.seconds: 3 / 4, Limit.nfe: 16 / 64}


def test_only_a_budget_in_images_cuts_the_last_batch():
    teacher = gaussian_teacher()
    meter = Meter(BudgetConfig(limit=Limit.images, images=100), teacher, "cpu")
    sizes = []
    while meter.progress() < 1:
        sizes.append(meter.next_batch(32))
        meter.images += sizes[-1]
    assert sizes == [32, 32, 32, 4]
    for limit in (Limit.seconds, Limit.nfe):
        assert Meter(BudgetConfig(limit=limit, images=1, nfe=1, seconds=1e-3), teacher, "cpu").next_batch(32) == 32


@pytest.mark.parametrize("name", ["images", "seconds", "nfe"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_a_budget_must_be_positive_and_finite(name, value):
    with pytest.raises(UserError, match=name):
        BudgetConfig(**{name: value})
