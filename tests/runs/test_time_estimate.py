"""The time of a run before it begins: arithmetic from given seconds, and trials that leave everything as it was."""

import dataclasses
import io
import itertools

import pytest
import torch
from rich.console import Console

from distillbench.evaluation.features import Networks
from distillbench.evaluation.reference_statistics import RealImages
from distillbench.evaluation.settings import EvaluationConfig
from distillbench.execution.announcement import announce
from distillbench.execution.cell_times import CellTimes
from distillbench.execution.run import run
from distillbench.registry import load_registry
from distillbench.runs import speeds
from distillbench.runs.cell import AS_IS, Policy
from distillbench.runs.config import compose_runs
from distillbench.runs.executor_config import SubmititConfig
from distillbench.runs.forecast import forecast, forecast_of_run, why_none
from distillbench.runs.method_trials import MethodTimes
from distillbench.runs.plan import plan
from distillbench.runs.predicted_timing import seconds_of_timing
from distillbench.runs.remains import NOTHING, Remains, remains_by_records, untouched
from distillbench.runs.score_trials import NetworkTimes, _extended
from distillbench.runs.speeds import estimate_by_trials
from distillbench.runs.time_estimate import PROCESS_SECONDS, estimate
from distillbench.runs.time_plan import Lever, Part, TimePlan, about
from distillbench.runs.trials import LEAST_SECONDS, Allowance, Line, fit
from distillbench.system.progress import Progress

WORDS = ["dataset=digits", "budget.images=12800", "evaluation.images=600", "evaluation.nfe=[1]", "device=cpu"]
WORDS += ["evaluation.teacher_steps=[1,64]", "evaluation.timing=off", "evaluation.progress_every=0"]
SMALL = ["experiment=smoke", "budget.images=256", "batch_size=64", "evaluation.images=24", "evaluation.timing=off"]
SMALL += ["dataset=digits", "evaluation.metrics=[teacher_rmse]", "device=cpu", "methods=[cm]"]


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def planned(registry, folder, *words):
    configs = compose_runs([*words, f'results_dir="{folder}"'], registry)
    return configs, plan(configs, registry)


@pytest.fixture(scope="module")
def cells(registry, tmp_path_factory):
    """The teacher's cell and one of boot, of which nothing is done."""
    return planned(registry, tmp_path_factory.mktemp("nothing"), *WORDS, "methods=[boot]")[1]


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "-"), (0.2, "1 s"), (7.4, "7 s"), (23, "25 s"), (91, "90 s"), (95, "2 min"), (700, "12 min"), (1600, "25 min"),
     (3500, "1 h"), (7700, "2 h 10 min"), (35_900, "10 h"), (50_000, "14 h"), (400_000, "5 days")],
)  # fmt: skip
def test_a_time_has_two_digits_at_most(seconds, words):
    assert about(seconds) == words


# --- trials ----------------------------------------------------------------------------------------------------------


class Clock:
    """A timer of work that says how long it takes."""

    def __init__(self):
        self.trials = []

    def seconds(self, call):
        self.trials.append(call())
        return self.trials[-1]


@pytest.mark.parametrize(
    ("fixed", "each", "allowed", "most"),
    [
        (0.01, 0.001, 100.0, 256),
        (0.01, 0.001, 0.3, 128),
        (0.3, 0.001, 0.001, 8),
        (0.0, 0.5, 1.0, 8),
        (0.0, 0.01, 0.5, 32),
    ],
)
def test_a_line_is_found_in_the_time_that_is_allowed(fixed, each, allowed, most):
    clock = Clock()
    line = fit(lambda n: fixed + each * n, 8, 256, clock, allowed)
    assert line.timed == most
    if most > 8:
        assert (line.fixed, line.each) == pytest.approx((fixed, each))
    else:  # one size: everything is taken to be in proportion
        assert line(16) == pytest.approx(2 * (fixed + 8 * each))
    assert sum(clock.trials[2:]) <= max(allowed, LEAST_SECONDS)  # after a first trial and a short second one


def test_a_warm_up_does_not_count_and_less_memory_is_enough():
    calls = itertools.count()

    def work(images):
        if images > 32:
            raise torch.OutOfMemoryError
        return 5.0 if next(calls) == 0 else 0.1 + 0.01 * images

    line = fit(work, 8, 512, Clock(), 100.0)
    assert line.timed == 32 and line(1000) == pytest.approx(10.1)


def test_time_that_is_not_used_is_shared_by_the_rest():
    now = [0.0]
    allowance = Allowance(8.0, 4, lambda: now[0])
    assert allowance.share() == 2
    now[0] = 0.5
    assert allowance.share() == 2.5
    now[0] = 9.0
    assert allowance.share() == allowance.left == 0


def test_a_timing_is_followed_pass_by_pass():
    """With 1 ms for each call: memory, latency, and as the rate doubles each time all batches up to the largest."""
    config = EvaluationConfig(timing_seconds=0.1, largest_timed_batch=8)
    calls = (1 + 250) + (3 + 100) + 4 * (1 + 100)
    assert seconds_of_timing(Line(0.001), [1], config) == pytest.approx(0.001 * calls, rel=0.02)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_metric_grows_as_its_last_doubling_did(power):
    assert _extended([(64, 1.0), (128, 2.0**power)], 1024) == pytest.approx(16**power)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_parts_are_summed_and_workers_divide_the_time():
    cells = [{Part.training: 60.0, Part.scoring: 10.0}, {}, {Part.training: 20.0}, {Part.training: 30.0}]
    one = TimePlan(cells, {Part.teacher: 100.0})
    assert one.parts() == {Part.teacher: 100, Part.training: 110, Part.scoring: 10} and one.seconds == 220
    assert dataclasses.replace(one, at_once=2).seconds == 100 + 70  # 20 and 30 beside 60 + 10
    assert dataclasses.replace(one, at_once=9).seconds == 100 + 70
    assert one.of_cell(0) == 70 and one.of_cell(1) == 0
    said = dataclasses.replace(one, at_once=2).lines(on_cpu=True)
    assert said[0].startswith("time: about 3 min, ") and said[1].startswith("2 cells at a time")
    assert [line.split("  ")[1].strip() for line in said[2:]] == ["training", "training the teacher", "scoring"]


def test_a_long_run_on_a_cpu_names_what_shortens_it():
    levers = [Lever("evaluation.images=5", 1000.0), Lever("budget.images=7", 4000.0), Lever("small", 10.0)]
    times = TimePlan([{Part.training: 4000.0, Part.sampling: 1000.0}], levers=levers, left_out=["texts"])
    said = times.lines(on_cpu=True)
    assert "not in this time: texts" in said
    at = said.index("Over an hour on the CPU. These parts of it are in proportion to a setting:")
    assert [line.split() for line in said[at + 1 :]] == [["budget.images=7", "1", "h", "10", "min"],
                                                        ["evaluation.images=5", "15", "min"]]  # fmt: skip
    assert not any("CPU" in line for line in times.lines(on_cpu=False))
    assert not any("CPU" in line for line in dataclasses.replace(times, cells=[{Part.training: 3000.0}]).lines(True))


class Given:
    """Speeds in round numbers: a step takes 0.5 s, an evaluation 1 ms for each image, a network 2 ms."""

    def __init__(self, shared):
        self.teacher = shared.source.untrained()
        self.notes, self.scaled = [], []

    def method(self, cell):
        return MethodTimes(step=0.5, evaluation=Line(0.0, 0.002), pairs=(("pairs", 3000),), timed=128)

    def teacher_training(self, plan):
        return plan.images / 1000

    def teacher_evaluation(self):
        return Line(0.0, 0.001)

    def network(self, network):
        return NetworkTimes(4.0, Line(0.0, 0.002), 100)

    def metric(self, metric, samples, real):
        return 0.25


def given(cells, remains):
    return estimate(cells, remains, lambda shared, sha256: Given(shared))


def test_the_time_of_a_cell_is_that_of_its_steps_rows_and_scores(cells):
    """Two metrics, one of them with a network; rows of 600 images. By hand."""
    times = given(cells, [untouched(cell) for cell in cells])
    row = 2 * 0.25 + 600 * 0.002
    expected = [
        {Part.sampling: (1 + 64) * 600 * 0.001, Part.scoring: 2 * row + 4, Part.starting: PROCESS_SECONDS},
        {Part.preparation: 3.0, Part.training: 12800 / 128 * 0.5, Part.sampling: 600 * 0.002, Part.scoring: row + 4,
         Part.starting: PROCESS_SECONDS},
    ]  # fmt: skip
    assert [dict(cell) for cell in times.cells] == [pytest.approx(cell) for cell in expected]
    before = {Part.reference: 64 * 0.6, Part.real: 18 * 100 * 0.002, Part.scoring: 0.0}  # 1797 images in batches of 100
    assert times.before == pytest.approx(before)
    levers = {lever.setting: lever.seconds for lever in times.levers}
    assert levers["budget.images=12800"] == 50 and levers["evaluation.teacher_steps=[1,64]"] == pytest.approx(39 + 38.4)
    sampled = sum(cell[part] for cell in expected for part in (Part.sampling, Part.scoring))
    assert levers["evaluation.images=600"] == pytest.approx(sampled + 38.4)


def test_what_is_there_costs_nothing(cells):
    assert given(cells, [NOTHING, NOTHING]).lines(True) == ["time: nothing is left to do"]
    scored = given(cells, [NOTHING, Remains(training=False, evaluation=True, speed=False)])
    assert not scored.cells[0] and Part.training not in scored.cells[1] and scored.cells[1][Part.scoring] > 0
    timed = given(cells, [NOTHING, Remains(training=False, evaluation=False, speed=True)])
    assert not timed.before and set(timed.cells[1]) == {Part.speed, Part.starting}


def test_what_cells_share_is_counted_once(registry, tmp_path):
    """Two learning rates and two budgets: pairs for each seed, the teacher's samples and the real images once."""
    words = ["methods=[boot]", "seed=0,1", "methods.boot.lr=1e-4,2e-4", "budget.images=6400,12800", "teacher.seed=5"]
    _, cells = planned(registry, tmp_path, *WORDS, *words)
    times = given(cells, [untouched(cell) for cell in cells])
    assert sum(cell.get(Part.preparation, 0.0) for cell in times.cells) == pytest.approx(2 * 3.0)
    assert (times.before[Part.teacher], times.before[Part.reference]) == (2000, pytest.approx(64 * 0.6))
    assert times.before[Part.real] == pytest.approx(18 * 100 * 0.002)


def test_a_student_that_is_sampled_and_scored_in_several_ways_is_trained_once(registry, tmp_path):
    words = [
        "methods=[cm]",
        "methods.cm.sampling_levels=[],[[0.8]]",
        "evaluation.images=100,200",
        "budget.images=12800",
    ]
    _, cells = planned(registry, tmp_path, *WORDS, *words)
    times = given(cells, [untouched(cell) for cell in cells])
    assert sorted(cell[Part.training] for cell in times.cells if Part.training in cell) == [50]
    assert sum(Part.sampling in cell for cell in times.cells) == len(cells) == 6


def test_a_teacher_is_trained_once_and_a_budget_in_seconds_is_known(registry, tmp_path):
    words = ["methods=[boot]", "seed=0,1", "teacher.seed=5", "budget.limit=seconds", "budget.seconds=33"]
    _, cells = planned(registry, tmp_path, *WORDS, *words)
    times = given(cells, [untouched(cell) for cell in cells])
    assert times.before[Part.teacher] == 2000
    assert [cell.get(Part.training) for cell in times.cells] == [None, 33, 33]
    assert [cell.get(Part.preparation) for cell in times.cells] == [None, 0, 0]
    assert {"teacher.budget.images=2000000", "budget.seconds=33"} <= {lever.setting for lever in times.levers}


def test_where_there_is_no_estimate_the_reason_is_known(cells, monkeypatch):
    assert why_none(cells) == ""
    config = cells[0].shared.config
    monkeypatch.setattr(cells[0].shared, "config", dataclasses.replace(config, estimate_seconds=0.0))
    assert why_none(cells) == "estimate_seconds=0" and forecast(cells, AS_IS) is None
    elsewhere = dataclasses.replace(config, executor=SubmititConfig("submitit"))
    monkeypatch.setattr(cells[0].shared, "config", elsewhere)
    assert why_none(cells) == "with executor=submitit cells run on other machines"


# --- with the real thing ---------------------------------------------------------------------------------------------


def test_trials_leave_everything_as_it_was(registry, tmp_path):
    """Random numbers, files, keys and weights: the run after an estimate is the run without one."""
    weights = []
    for folder in ("plain", "estimated"):
        configs, cells = planned(registry, tmp_path / folder, *SMALL)
        if folder == "estimated":
            remains, before = remains_by_records(cells, AS_IS), torch.get_rng_state()
            times = estimate_by_trials(cells, remains, 1.0)
            assert torch.equal(torch.get_rng_state(), before)
            assert not (tmp_path / folder).exists()
            assert set(times.cells[1]) >= {Part.training, Part.sampling} and times.seconds > 0 and not times.left_out
        done = run(cells, configs, Progress(None), lambda rows: None)
        files = sorted((tmp_path / folder).glob("cells/*/student.safetensors"))
        weights.append([(file.parent.name, file.read_bytes()) for file in files])
        weights[-1].append(done.table[["key", "teacher_rmse"]].values.tolist())
    assert weights[0] == weights[1]
    assert not any(what.any for what in remains_by_records(cells, AS_IS)) and cells[0].shared.teacher is None
    assert remains_by_records(cells, Policy(force=True))[1].training
    assert forecast(cells, AS_IS).lines(True) == ["time: nothing is left to do"]
    known = remains_by_records(cells, AS_IS)[0].teacher_sha256
    for sha256, there in [(known, True), ("", False)]:  # the teacher's samples are cached
        rescored = estimate_by_trials(cells, [Remains(False, True, False, sha256), NOTHING], 0.1)
        assert (rescored.before[Part.reference] == 0) is there and rescored.cells[0][Part.sampling] > 0


def test_a_teacher_that_is_to_be_trained_is_timed_and_what_fails_is_named(registry, tmp_path, monkeypatch):
    def fails(*given):
        raise ValueError("no luck")

    monkeypatch.setattr(speeds, "times_of_method", fails)
    _, cells = planned(
        registry, tmp_path, *SMALL, "teacher.width=16", "teacher.depth=1", "teacher.budget.images=512000"
    )
    times = estimate_by_trials(cells, [untouched(cell) for cell in cells], 0.5)
    assert times.left_out == ["cm (ValueError: no luck)"] and times.cells[1] == {}
    assert 0.5 < times.before[Part.teacher] < 5000  # 2000 steps of a tiny network
    assert "not in this time: cm (ValueError: no luck)" in times.lines(on_cpu=True)
    nothing = dataclasses.replace(times, cells=[{}, {}], before={})  # what is left was not timed, and is not done
    assert nothing.lines(on_cpu=True) == ["time: not known", "not in this time: cm (ValueError: no luck)"]


def test_the_first_lines_of_a_run(registry, tmp_path):
    _, cells = planned(registry, tmp_path, *SMALL, "isolate=true")
    records = cells[0].shared.folder.cells
    for remains, expected in [
        ([NOTHING, NOTHING], [f"2 of 2 cells found in {records}, nothing is trained or sampled", "results: here"]),
        ([NOTHING, untouched(cells[1])], [f"1 of 2 cells found in {records}, 1 to do", "results: here",
                                          "to do: cm (seed 0)", "time: less than about 2 min"]),
    ]:  # fmt: skip
        said = io.StringIO()
        announce(cells, remains, "here", Progress(Console(file=said, width=200)))
        assert said.getvalue().splitlines() == expected
    assert forecast_of_run(cells, [untouched(cell) for cell in cells]) is None  # short: no trials


def test_real_features_that_are_cached_are_found(cells, tmp_path):
    shared, metric = cells[0].shared, cells[0].shared.metrics["fd_efficientnet_lite0"]
    real = RealImages(shared.dataset, Networks(shared.weights, "cpu"), tmp_path)
    path, _ = real._place(metric.network)
    assert not real.has(metric.network)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    assert real.has(metric.network)


def test_the_time_left_of_a_run_follows_the_cells_that_are_done(monkeypatch):
    now = 0.0
    monkeypatch.setattr("distillbench.execution.cell_times.time.perf_counter", lambda: now)
    unplanned = CellTimes([0, 1, 2], None)
    assert unplanned.left is None
    plan = TimePlan([{Part.training: 10.0}, {Part.training: 40.0}, {Part.training: 50.0}])
    exact, slow = CellTimes([0, 1, 2], plan), CellTimes([1, 2], plan)
    assert exact.left == 100 and slow.left == 90
    now = 10.0
    exact.finish(0), unplanned.finish(0)
    assert exact.left == pytest.approx(90) and unplanned.left == pytest.approx(20) and slow.left == 80
    now = 80.0
    slow.finish(1)  # twice as long as planned: 50 more count like 40 + 50 that took 80 + 50
    assert slow.left == pytest.approx(50 * 130 / 90) and exact.left == pytest.approx(20)
    now = 100.0
    assert slow.left == pytest.approx(50 * 130 / 90 - 20) and unplanned.left == 0
