"""Thousands of cells: what is done once and not for each cell (counted, not timed), and what is shown of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import yaml
from PIL import Image
from rich.console import Console

from distillbench.cli.terminal import MOST_LINES, print_plan, print_rows, print_table
from distillbench.errors import UserError
from distillbench.execution import run_folder
from distillbench.execution.run import run
from distillbench.execution.run_folder import RunTable, ThrottledWriter, merged_columns
from distillbench.execution.workers import InProcessWorker
from distillbench.options import option, plain_settings
from distillbench.records import settings_file
from distillbench.records.sample_grid import MOST_ROWS, sample_grid
from distillbench.records.settings_file import BUT, read_settings, write_settings
from distillbench.records.statistics import summarise
from distillbench.registry import Entry, Plugin, load_registry
from distillbench.reports.labels import Labels
from distillbench.reports.runs import read_run
from distillbench.runs import config, config_grid, plan, shared_context, training_cost
from distillbench.runs.cell import AS_IS
from distillbench.runs.config import compose_runs, to_yaml
from distillbench.runs.saved_settings import read_config
from distillbench.runs.time_plan import Part, TimePlan
from distillbench.storage import hash_cache, links
from distillbench.storage.hash_cache import HashCache
from distillbench.system.progress import Progress
from distillbench.system.signals import Stop
from distillbench.training.method import MethodConfig
from distillbench.training.optimizer_config import OptimizerConfig

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "many_cells.py"
SEEDS, SETTINGS = 100, 3


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("many_cells", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["many_cells"] = module
    spec.loader.exec_module(module)
    return module


class Counted:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *given, **named):
        self.calls += 1
        return self.function(*given, **named)


@pytest.fixture
def count(monkeypatch):
    def put(where, name):
        counted = Counted(getattr(where, name))
        monkeypatch.setattr(where, name, counted)
        return counted

    return put


# --- settings --------------------------------------------------------------------------------------------------------

GIVEN = ["methods=[boot]", "dataset=digits"]


@pytest.mark.parametrize(
    "words",
    [
        ["seed=0,1,2", "methods.boot.lr=1e-3,2e-3"],
        ["methods=[boot,cm],[pd]", "seed=range(3,6)", "budget.limit=images,nfe"],
        pytest.param(
            ["isolate=true,false", "evaluation.nfe=[1],[1,2]", "run_name=a,'b c'", "seed=1", "seed=2,3"],
            marks=pytest.mark.nightly,
        ),
        ["dataset=digits,gmm", "teacher=gmm", "teacher.width=16,32", "conditional=true", "guidance=1,2.5"],
        pytest.param(
            ["experiment=smoke", "methods=[direct]", "methods.direct.steps=4,8", "teacher.budget.images=10,20"],
            marks=pytest.mark.nightly,
        ),
        ["seed=4,5", "batch_size=${seed},9"],
        ["executor=submitit", "executor.parameters={slurm_qos: low},{}", "seed=0"],
    ],
)
def test_built_points_equal_composed_points(registry, words, monkeypatch):
    def settings():
        try:
            return compose_runs([*GIVEN, *words], registry)
        except UserError as error:
            return str(error)

    made = settings()
    monkeypatch.setattr(config_grid, "recipe_of", lambda node: (_ for _ in ()).throw(config_grid.NotBuildable("never")))
    composed = settings()
    assert made == composed
    assert isinstance(made, str) or [to_yaml(one) for one in made] == [to_yaml(one) for one in composed]


@pytest.mark.parametrize("words", [["microbatch=1,64,-1"], ["methods.boot.lr=0.1,-1"], ["seed=0,99999999999999999999"]])
def test_an_invalid_point_has_the_same_message_in_a_grid_as_alone(registry, words):
    said = []
    for given in (words, [words[0].partition("=")[0] + "=" + words[0].rpartition(",")[2]]):
        with pytest.raises(UserError) as caught:
            compose_runs([*GIVEN, "batch_size=64", *given], registry)
        said.append(str(caught.value))
    assert said[0] == said[1]


@dataclass
class Doubling(MethodConfig):
    """Third-party settings that change themselves when they are built: building twice would change them twice."""

    width: int = option(1, "is doubled")
    sizes: list[int] = option([1, 2], "some")

    def __post_init__(self):
        super().__post_init__()
        self.width *= 2


def test_settings_of_methods_are_built_once_and_not_shared_by_points(registry):
    cls = type("Mine", (), {"name": "mine", "Config": Doubling})
    known = dataclasses.replace(registry, methods=registry.methods | {"mine": Entry(cls, Plugin("mine", "x", "1"))})
    runs = compose_runs(["methods=[mine,boot]", "dataset=digits", "seed=0,1,2", "methods.mine.lr=1,2"], known)
    assert {run.methods["mine"].width for run in runs} == {2}
    for name in ("mine", "boot"):
        assert len({id(run.methods[name]) for run in runs}) == 6
    assert len({id(run.methods["mine"].sizes) for run in runs}) == 6


def test_one_point_is_composed_and_the_others_are_built_from_it(registry, count):
    composed = count(config, "_compose")
    rates = ",".join(str(k) for k in range(1, SETTINGS + 1))
    assert len(compose_runs([*GIVEN, f"seed=range(0,{SEEDS})", f"methods.boot.lr={rates}"], registry)) == 300
    assert composed.calls == 1


def test_the_file_of_many_settings_says_what_differs_and_reads_as_if_it_said_all(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(settings_file, "FULL", 3)
    names = ",".join(["plain", "'1e-3'", "'it is: odd # [x] \"y\" ü'", "'null'"])
    runs = compose_runs([*GIVEN, "seed=range(0,2)", f"run_name={names}", "methods.boot.lr=1e-5,0.25"], registry)
    text, whole = write_settings(runs, to_yaml), "---\n".join(map(to_yaml, runs))
    assert len(text) < len(whole) / 8 and text.count(BUT) == len(runs) - 1
    load = lambda part: list(yaml.safe_load_all(part))
    assert read_settings(text, load) == read_settings(whole, load) == load(whole)
    assert [one[BUT].get("run_name", "plain") for one in load(text)[1:]] == [run.run_name for run in runs[1:]]
    assert read_config(text, registry) == runs
    (tmp_path / "config.yaml").write_text(text)
    assert read_run(tmp_path).configs == load(whole)
    assert write_settings(runs[:3], to_yaml) == "---\n".join(map(to_yaml, runs[:3]))


def test_points_with_other_settings_are_written_whole(registry, monkeypatch):
    monkeypatch.setattr(settings_file, "FULL", 3)
    runs = compose_runs(["methods=[boot],[cm]", "dataset=digits", "seed=0,1"], registry)
    text = write_settings(runs, to_yaml)
    assert text.count(BUT) == 1
    load = lambda part: list(yaml.safe_load_all(part))
    assert read_settings(text, load) == load("---\n".join(map(to_yaml, runs)))


@pytest.mark.parametrize("change", ['{"a.b": 1}', '{"seed.x": 1}'])
def test_a_point_that_differs_in_what_there_is_not_is_damage(change):
    with pytest.raises(yaml.YAMLError, match="changes settings that the first one does not have"):
        read_settings(f"seed: 1\n---\n{BUT}: {change}\n", lambda part: list(yaml.safe_load_all(part)))


def test_few_words_do_not_stand_for_a_billion():
    text = f"a: {'x' * 10**6}\n" + f'---\n{BUT}: {{"a": 1}}\n' * 200
    with pytest.raises(yaml.YAMLError, match="expands to more than"):
        read_settings(text, lambda part: list(yaml.safe_load_all(part)))


# --- the plan --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(registry, benchmark, tmp_path_factory):
    """300 cells without results, and how often a cost was estimated and a shared context made."""
    results_dir = tmp_path_factory.mktemp("many") / "results"
    configs = compose_runs(benchmark.words(SEEDS, SETTINGS, results_dir), registry)
    with pytest.MonkeyPatch.context() as patch:
        places = {"_estimate": training_cost, "_make_context": shared_context}
        counted = {name: Counted(getattr(module, name)) for name, module in places.items()}
        for name, function in counted.items():
            patch.setattr(places[name], name, function)
        cells = plan.plan(configs, registry)
    return configs, cells, {name: function.calls for name, function in counted.items()}


def test_a_cost_is_estimated_for_each_setting_and_not_for_each_seed(planned):
    _, cells, calls = planned
    assert len(cells) == 301 and calls == {"_estimate": SETTINGS, "_make_context": 1}
    assert len({(str(cell.cost), tuple(cell.nfe)) for cell in cells[1:]}) == 1 and cells[1].cost.student_nfe > 0


def test_a_plan_of_many_cells_is_printed_in_few_lines(planned):
    _, cells, _ = planned
    said = io.StringIO()
    print_plan(Console(file=said, width=150), cells)
    lines = said.getvalue().splitlines()
    assert len(lines) < 15
    (first,) = [line for line in lines if "lr=" not in line and "boot" in line] or [""]
    assert len([line for line in lines if "boot (100 seeds)" in line]) == SETTINGS, first
    (total,) = [line for line in lines if line.startswith("sum")]
    assert "sum (301 cells)" in total and f"{256 * 300:,}" in total


def test_the_sum_of_a_plan_has_what_is_done_once(planned):
    _, cells, _ = planned
    times = TimePlan([{Part.training: 60.0}] * 3, {Part.teacher: 3600.0, Part.real: 0.0})
    said = io.StringIO()
    print_plan(Console(file=said, width=150), cells[:3], times)
    lines = said.getvalue().splitlines()
    teacher = next(line for line in lines if line.startswith("training the teacher"))
    (total,) = [line for line in lines if line.startswith("sum")]
    assert teacher.rstrip().endswith("1 h") and total.rstrip().endswith("1 h")
    assert not [line for line in lines if line.startswith("features of")]
    cells_alone = io.StringIO()
    print_plan(Console(file=cells_alone, width=150), cells[:3], TimePlan([{Part.training: 60.0}] * 3))
    (total,) = [line for line in cells_alone.getvalue().splitlines() if line.startswith("sum")]
    assert total.rstrip().endswith("3 min")


def test_plain_settings_equal_a_round_trip_through_json(registry):
    """But for the defaults of settings that were added (test_network_settings.py)."""
    import json

    (one,) = compose_runs([*GIVEN, "evaluation.nfe=[1,2]"], registry)
    expected = json.loads(json.dumps(dataclasses.asdict(one)))
    added = dataclasses.asdict(OptimizerConfig()).keys() - plain_settings(OptimizerConfig()).keys()
    for group in (expected["methods"]["boot"], expected["teacher"]["optimizer"]):
        for name in added:
            del group[name]
    assert plain_settings(one) == expected


# --- looking and the table -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(planned, benchmark):
    """The same cells, all done: one trained, the others' records made from its."""
    configs, cells, _ = planned
    scan = InProcessWorker(Progress(None), Stop()).scan(cells, AS_IS)
    assert not any(scan.results)
    records = benchmark.train_one(cells, scan.descriptions)
    files = HashCache(Path(configs[0].results_dir) / "cells")
    for cell, one in zip(cells[2:], scan.descriptions[2:], strict=True):
        benchmark.fabricate(cell, one, files, *records)
    files.keep()
    return configs, cells, scan.descriptions


def test_weights_are_hashed_once_and_again_after_changes(done, count):
    _, cells, descriptions = done
    worker = InProcessWorker(Progress(None), Stop())
    hashed = count(hash_cache, "sha256_file")
    assert all(result is not None and result.ok for result in worker.scan(cells, AS_IS).results)
    assert hashed.calls <= 1  # the one that was trained, by nobody who noted it
    worker.scan(cells, AS_IS)
    assert hashed.calls <= 1
    path = descriptions[-1].folder / "student.safetensors"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert worker.scan(cells, AS_IS).results[-1] is None
    path.write_bytes(data)
    assert worker.scan(cells, AS_IS).results[-1] is not None
    assert hashed.calls <= 3


def test_a_damaged_hash_cache_is_ignored(tmp_path):
    path = tmp_path / "cells" / "a" / "student.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    right = "9abbf2b33d5d0f55a9d5e4ac1bcbb0d5"
    files = HashCache(tmp_path / "cells")
    assert not files.intact(path, right) and not files.intact(path.with_name("b"), right)
    (tmp_path / "cells" / hash_cache.NAME).write_text('{"format": 1, "files": [')
    assert HashCache(tmp_path / "cells").known == {}


def go(done, said):
    configs, cells, _ = done
    progress = Progress(Console(file=said, width=200))
    return run(cells, configs, progress, lambda rows: print_rows(progress, rows, Labels()))


def test_a_run_that_finds_all_results_writes_its_folder_once(done, count):
    said = io.StringIO()
    written, linked = count(run_folder, "write_table"), count(links, "link_or_copy")
    outcome = go(done, said)
    assert written.calls == 2 and linked.calls == 0  # the table and its summary; links are made at once
    assert len(outcome.table) == 301 and len(list((outcome.folder / "weights").iterdir())) == 300
    assert "301 rows: 301 ok" in said.getvalue() and said.getvalue().count("\n") < 5
    with Image.open(outcome.folder / "samples.png") as picture:
        assert picture.height < (MOST_ROWS + 2) * 52
    assert read_run(outcome.folder).problems == []
    shown = io.StringIO()
    print_table(
        Console(file=shown, width=200), outcome.table, outcome.summary, Labels({"teacher_rmse": {"direction": "lower"}})
    )
    assert shown.getvalue().count("\n") < 20


def test_rows_that_arrive_one_by_one_are_all_in_the_final_table(done, tmp_path, count):
    """Each is shown at once. The folder is written for the first, and then when its time has come."""
    configs, cells, _ = done
    scan = InProcessWorker(Progress(None), Stop()).scan(cells, AS_IS)
    grown = []
    table = RunTable(tmp_path / "run", cells, configs, scan, grown.append, {})
    written = count(run_folder, "write_table")
    table.writer.due = time.monotonic() + 1000
    for index, result in enumerate(scan.results):
        table.add({index: result})
    assert written.calls == 0 and len(grown) == 301
    outcome = table.finish("skipped", "")
    assert written.calls == 2 and table.writer.timer is not None
    pd.testing.assert_frame_equal(pd.concat(grown, ignore_index=True), outcome.table)


def test_the_table_of_a_sweep_shows_the_best(done):
    table = go(done, io.StringIO()).table
    settings, scores = [f"lr={k}" for k in range(301)], [1 / (k + 1) for k in range(301)]
    table = table.assign(settings=settings, teacher_rmse=scores)
    shown = io.StringIO()
    summary = summarise(table, {"teacher_rmse": "lower"})
    print_table(Console(file=shown, width=200), table, summary, Labels({"teacher_rmse": {"direction": "lower"}}))
    text = shown.getvalue()
    assert f"the {MOST_LINES} best by teacher_rmse of 301" in text and text.count("\n") < MOST_LINES + 30
    assert re.search(r"lr=300\b", text) and not re.search(r"lr=1\b", text)


# --- how often it is written -----------------------------------------------------------------------------------------


class Slow:
    """Takes its time to write, by a clock that the test turns."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds, self.times = 0.0, seconds, []
        monkeypatch.setattr(run_folder.time, "monotonic", lambda: self.now)

    def __call__(self):
        self.times.append(self.now)
        self.now += self.seconds


def test_what_is_written_quickly_is_written_at_once(monkeypatch):
    slow = Slow(monkeypatch, 0.1)
    writer = ThrottledWriter(slow)
    for _ in range(5):
        writer.schedule()
    assert len(slow.times) == 5


def test_what_takes_long_is_written_in_a_twentieth_of_the_time_and_at_the_end(monkeypatch):
    slow = Slow(monkeypatch, 1.0)
    writer = ThrottledWriter(slow)
    monkeypatch.setattr(run_folder.threading, "Timer", NoTimer)
    for _ in range(1000):
        writer.schedule()
        slow.now += 0.1
    assert slow.times[0] == 0 and 4 <= len(slow.times) <= 6
    writer.flush()
    assert slow.times[-1] >= 100
    writer.flush()
    assert slow.times[-1] == max(slow.times) and len(slow.times) <= 7


class NoTimer:
    def __init__(self, seconds, function):
        self.daemon = False

    def start(self):
        pass

    def is_alive(self):
        return False

    def cancel(self):
        pass

    def join(self):
        pass


def test_a_delayed_write_happens_without_further_changes():
    written = threading.Event()
    writer = ThrottledWriter(written.set)
    writer.due = time.monotonic() + 0.05
    writer.schedule()
    assert not written.is_set()
    assert written.wait(5)


def test_what_goes_wrong_while_nobody_looks_is_raised_the_next_time():
    def full():
        raise OSError(28, "No space left on device")

    writer = ThrottledWriter(full)
    writer.due = time.monotonic() + 0.01
    writer.schedule()
    writer.timer.join()
    with pytest.raises(OSError, match="No space left"):
        writer.schedule()


def test_a_picture_of_many_rows_says_how_many_it_leaves_out():
    import torch

    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    few, many = (sample_grid([(f"row {k}", images) for k in range(count)]) for count in (MOST_ROWS, 5000))
    assert many.height == few.height + 52


def test_a_protocol_that_differs_between_the_rows_of_a_run_is_said_whole():
    few, every = ({"p": {"unit": "", "protocol": words}} for words in ("prdc/1; of 50 images", "prdc/1"))
    assert merged_columns([few, every, few]) == {"p": {"unit": "", "protocol": "prdc/1; of 50 images, or prdc/1"}}
