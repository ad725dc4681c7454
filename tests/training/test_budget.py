"""The meter: counts, seconds, pauses, and the used share of the budget."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

import distillbench.metering.stopwatch
from analytic import gaussian_teacher, mlp_teacher, time
from distillbench.errors import UserError
from distillbench.metering.energy import Energy
from distillbench.metering.stopwatch import MOST_MARKS, Account, Stopwatch
from distillbench.training.budget import BudgetConfig, Limit, Meter
from distillbench.training.network_rows import NetworkRows


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(distillbench.metering.stopwatch, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def evaluate(network, images: int) -> None:
    network(torch.zeros(images, 2, 1, 1), time([0.5]).expand(images, 1, 1, 1))


def test_meter_counts_evaluations_from_its_construction_on(clock):
    teacher = gaussian_teacher()
    evaluate(teacher.denoise, 7)
    evaluate(teacher.student(), 5)
    clock.now += 50
    meter = Meter(BudgetConfig(), teacher, "cpu")
    evaluate(teacher.denoise, 3)
    evaluate(teacher.frozen_copy(), 4)
    evaluate(teacher.student(), 10)
    evaluate(teacher.student(), 20)
    meter.images += 8
    clock.now += 2.5
    cost = meter.cost()
    assert (cost.images, cost.seconds, cost.teacher_nfe, cost.student_nfe) == (8, 2.5, 7, 30)


def test_two_meters_are_independent():
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
    cost = meter.cost()
    assert (cost.seconds, cost.teacher_nfe, cost.student_nfe, cost.images) == (20.0, 300, 0, 0)
    assert meter.progress() == 0.5


def test_a_charge_may_be_of_a_student():
    rows = NetworkRows("student", "some.Network", 10, 0, forward=40)
    meter = Meter(BudgetConfig(limit=Limit.nfe, nfe=400), gaussian_teacher(), "cpu")
    for _ in range(2):
        meter.charge(3.0, 0, student_nfe=40, student_seconds=2.0, networks=[rows])
    cost = meter.cost()
    assert (cost.teacher_nfe, cost.student_nfe, meter.student_nfe, meter.progress()) == (0, 80, 80, 0.2)
    assert cost.student_seconds == 4.0 and cost.networks == (rows.plus(rows),)


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


# --- rows with gradient --------------------------------------------------------------------------------------------


def test_rows_with_gradient_are_counted_apart():
    """Gradients of weights, or only of the input of a frozen network."""
    teacher = mlp_teacher()
    student, t = teacher.student(), time([0.5] * 4)
    meter = Meter(BudgetConfig(), teacher, "cpu")
    x = torch.zeros(4, 2, 1, 1)
    with torch.no_grad():
        student(x, t)
    student(x, t)
    teacher.denoise(x, t)
    teacher.denoise(x.clone().requires_grad_(), t)
    teacher.frozen_copy()(x.clone().requires_grad_(), t)
    student.requires_grad_(False)(x.clone().requires_grad_(), t)
    cost = meter.cost()
    assert (cost.student_nfe, cost.student_backward, cost.student_backward_input) == (12, 8, 4)
    assert (cost.teacher_nfe, cost.teacher_backward, cost.stand_in_nfe) == (12, 8, 0)


# --- seconds --------------------------------------------------------------------------------------------------------


class Slow(torch.nn.Module):
    """A network that takes `seconds` of a clock, and may fail."""

    def __init__(self, clock, seconds: float, inner=None) -> None:
        super().__init__()
        self.clock, self.seconds, self.inner, self.fails = clock, seconds, inner, False

    def forward(self, x, time, embedding=None, c=None):
        self.clock.now += self.seconds
        if self.inner is not None:
            self.inner()
        if self.fails:
            raise ValueError("no")
        return x


def slow_family(clock):
    teacher = gaussian_teacher()
    student = teacher.student()
    teacher.denoiser.counted.network, student.counted.network = Slow(clock, 2.0), Slow(clock, 3.0)
    return teacher, student


def split(cost) -> tuple[float, float, float]:
    assert cost.teacher_seconds + cost.student_seconds + cost.other_seconds == pytest.approx(cost.seconds, abs=1e-9)
    return cost.teacher_seconds, cost.student_seconds, cost.other_seconds


def test_seconds_are_split_into_teacher_student_and_the_rest(clock):
    teacher, student = slow_family(clock)
    evaluate(teacher.denoise, 1)  # before training
    meter = Meter(BudgetConfig(), teacher, "cpu")
    evaluate(teacher.denoise, 1)
    clock.now += 0.25
    with torch.no_grad():
        evaluate(student, 1)
    with meter.stopwatch.charging(Account.student):
        clock.now += 5
    meter.charge(10.0, 7, teacher_seconds=9.0)
    assert split(meter.cost()) == pytest.approx((11.0, 8.0, 1.25))
    meter.stop()
    evaluate(teacher.denoise, 1)  # after it
    assert split(meter.cost()) == pytest.approx((11.0, 8.0, 3.25))
    assert teacher.teacher_rows.timed is teacher.student_rows.timed is nullcontext


def test_time_of_a_nested_network_is_charged_once(clock):
    teacher, student = slow_family(clock)
    meter = Meter(BudgetConfig(), teacher, "cpu")
    student.network.inner = lambda: evaluate(teacher.denoise, 1)
    evaluate(student, 1)
    assert split(meter.cost()) == pytest.approx((2.0, 3.0, 0.0))


def test_a_network_that_fails_leaves_the_account_as_it_was(clock):
    teacher, student = slow_family(clock)
    meter = Meter(BudgetConfig(), teacher, "cpu")
    student.network.inner = lambda: evaluate(teacher.denoise, 1)
    teacher.denoiser.network.fails = True
    with pytest.raises(ValueError):
        evaluate(student, 1)
    clock.now += 1
    assert split(meter.cost()) == pytest.approx((2.0, 3.0, 1.0))


class Watch:
    """Records its pauses."""

    def __init__(self, diary: list[str]) -> None:
        self.diary = diary

    @contextmanager
    def paused(self):
        self.diary.append("off")
        yield
        self.diary.append("on")


def test_a_pause_is_not_charged(clock):
    teacher, student = slow_family(clock)
    diary: list[str] = []
    budget = BudgetConfig(limit=Limit.seconds, seconds=8.0)
    meter = Meter(budget, teacher, "cpu", watches=[Watch(diary)])
    evaluate(teacher.denoise, 3)
    with pytest.raises(KeyError), meter.pause():
        assert diary == ["off"]
        clock.now += 100
        evaluate(teacher.denoise, 3)
        evaluate(student, 5)
        raise KeyError
    with meter.pause():
        clock.now += 100
        evaluate(teacher.denoise, 3)
        assert diary == ["off", "off"]
    evaluate(student, 1)
    cost = meter.cost()
    assert split(cost) == pytest.approx((2.0, 3.0, 0.0))
    assert (cost.teacher_nfe, cost.student_nfe, meter.progress()) == (3, 1, 5 / 8)


def test_energy_is_measured_plus_charged():
    teacher = gaussian_teacher()
    assert Meter(BudgetConfig(), teacher, "cpu").energy() == Energy(None, "not measured")
    watch = Watch([])
    watch.used = Energy(100.0)
    meter = Meter(BudgetConfig(), teacher, "cpu", energy=watch)
    meter.charge(1.0, 0, energy=Energy(11.0))
    assert meter.energy() == Energy(111.0)
    meter.charge(1.0, 0, energy=Energy(None, "too short"))
    assert meter.energy() == Energy(None, "too short")
    with meter.pause():
        assert watch.diary == ["off"]


# --- on a simulated clock of a GPU ----------------------------------------------------------------------------------


class Gpu:
    """Work is queued and done later; events pass when the work before them is done."""

    def __init__(self, monkeypatch) -> None:
        self.host, self.device, self.waits, self.made = 0.0, 0.0, 0, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing
                gpu.made += 1

            def record(self, stream) -> None:
                assert stream == "stream of cuda:1"
                self.at = gpu.device = max(gpu.device, gpu.host)

            def query(self) -> bool:
                return gpu.host >= self.at

            def elapsed_time(self, other) -> float:
                return 1000 * (other.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        clock = SimpleNamespace(perf_counter=lambda: self.host)
        monkeypatch.setattr(distillbench.metering.stopwatch, "time", clock)

    def synchronize(self, device) -> None:
        assert device == "cuda:1"
        self.waits += 1
        self.host = max(self.host, self.device)

    def work(self, seconds: float, launching: float = 0.0) -> None:
        self.host += launching
        self.device = max(self.device, self.host) + seconds


def test_time_of_a_gpu_is_split_without_waiting(monkeypatch):
    gpu = Gpu(monkeypatch)
    meter = Meter(BudgetConfig(), gaussian_teacher(), "cuda:1")
    waits = gpu.waits
    for _ in range(3):
        with meter.stopwatch.charging(Account.teacher):
            gpu.work(2.0, launching=0.125)
        gpu.work(0.5)
        with meter.stopwatch.charging(Account.student):
            gpu.work(3.0)
            with meter.stopwatch.charging(Account.teacher):
                gpu.work(1.0)
    assert gpu.waits == waits and gpu.host == 0.375
    teacher, student, other = split(meter.cost())
    assert (teacher, student, other) == pytest.approx((9.125, 9.0, 1.5))  # the first launch found the GPU idle
    assert meter.cost().seconds == gpu.device == pytest.approx(19.625)


def test_a_gpus_pause(monkeypatch):
    gpu = Gpu(monkeypatch)
    meter = Meter(BudgetConfig(), gaussian_teacher(), "cuda:1")
    with meter.stopwatch.charging(Account.teacher):
        gpu.work(2.0)
        with meter.pause():
            with meter.stopwatch.charging(Account.student):
                gpu.work(50.0)
            gpu.host += 70
        gpu.work(4.0)
    assert split(meter.cost()) == pytest.approx((6.0, 0.0, 0.0))


def test_passed_events_are_read_and_reused(monkeypatch):
    gpu = Gpu(monkeypatch)
    watch = Stopwatch.of("cuda:1")
    for _ in range(5 * MOST_MARKS):
        with watch.charging(Account.teacher):
            gpu.work(0.25)
        gpu.host = gpu.device - 0.25  # the GPU is one piece of work behind
    assert gpu.waits == 0 and gpu.made < MOST_MARKS + 10
    assert watch.read()[Account.teacher] == pytest.approx(5 * MOST_MARKS / 4)
