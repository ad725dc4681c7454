"""Cells side by side and elsewhere: the rows, statuses and files of a run are those of cells done one by one."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import os
import pickle
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

import test_hands
from distillbench import executors
from distillbench.cell import AS_IS, Policy
from distillbench.claims import claimed
from distillbench.config import compose_runs, describe_options
from distillbench.done import About, Done
from distillbench.engines import Answer, Job
from distillbench.errors import UserError
from distillbench.executor_settings import EXECUTORS, LocalConfig, RayConfig, SubmititConfig
from distillbench.executors import Elsewhere, OneByOne, SideBySide, executor_of
from distillbench.hands import Ended, Seen
from distillbench.plan import plan
from distillbench.progress import Progress
from distillbench.registry import Selection, load_registry
from distillbench.run import run
from distillbench.shared_context import device_of
from distillbench.signals import Interrupted, Stop, stopping

WORDS = ["dataset=gmm", "teacher=gmm", "teacher.width=16", "budget.images=40", "batch_size=10", "run_name=run"]
WORDS += ["evaluation.images=8", "evaluation.metrics=[teacher_rmse]", "evaluation.teacher_steps=[1]"]
WORDS += ["evaluation.timing=off"]
MEASURED = "seconds|joules|rss"  # columns of what is never the same twice


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """The registry with the methods of tests/test_hands.py, from a file of a folder."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "executed_plugin.py").write_text(test_hands.PLUGIN)
    (folder / "preempted_plugin.py").write_text(PLUGIN)
    return Selection((folder,)).load()


def go(registry, results, *words, stop=None, policy=AS_IS):
    """A run in this process; its outcome and what it said."""
    configs = compose_runs([*WORDS, f'results_dir="{results}"', *words], registry)
    said = io.StringIO()
    progress = Progress(Console(file=said, width=300))
    return run(plan(configs, registry), configs, progress, lambda rows: None, policy, stop), said.getvalue()


def counted(table):
    """What must be equal, whoever did the work and however often he was stopped."""
    return table[[name for name in table if not any(part in name for part in MEASURED.split("|"))]]


# --- settings --------------------------------------------------------------------------------------------------------

GIVEN = ["methods=[boot]", "dataset=digits"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], LocalConfig("local")),
        (["executor=local", "executor.devices=[cpu]"], LocalConfig("local", devices=["cpu"])),
        (["executor=submitit", "executor.hours=2"], SubmititConfig("submitit", hours=2)),
        (
            ["executor=submitit", "executor.parameters={slurm_account: us, slurm_qos: low}"],
            SubmititConfig("submitit", parameters={"slurm_account": "us", "slurm_qos": "low"}),
        ),
        (["executor=ray", "executor.address=auto"], RayConfig("ray", address="auto")),
    ],
)
def test_a_word_chooses_the_executor(registry, words, expected):
    (config,) = compose_runs([*GIVEN, *words], registry)
    assert config.executor == expected


OFF = "evaluation.timing=off"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["executor=slurm"], "no executor 'slurm'. Possible: local, ray, submitit"),
        (
            ["executor.partition=gpu"],
            r"no setting 'partition' in 'executor' \(executor=local\). It is one of executor=",
        ),
        (["executor=ray", "executor.gpu=1"], "no setting 'gpu' in 'executor' .executor=ray.. Did you mean 'gpus'"),
        (["executor=submitit", "executor.cluster=pbs"], "executor.cluster must be slurm or local, got 'pbs'"),
        (["executor=submitit", "executor.gpus=-1"], "executor.gpus must lie between 0 and 1024, got -1"),
        (["executor=ray", "executor.gpus=1.5"], "executor.gpus must be a whole number where it is above 1"),
        (["executor=local,ray"], "executor cannot be swept"),
        (["executor=ray", "executor.kind=local"], "executor.kind is 'ray' by choice"),
        (
            ["executor.workers=2"],
            "executor.workers=2 on 1 device: .* disturb each other's timing. Write evaluation.timin",
        ),
        (["executor=ray", "executor.gpus=0"], "executor.gpus=0: cells side by side disturb each other's timing"),
        (["executor=submitit", "executor.cluster=local"], "executor.cluster=local with executor.parallel=256: cells"),
        (["executor.workers=2", OFF, "budget.limit=seconds"], "take time from each other. Use another budget.limit"),
        (["executor.workers=2", OFF, "isolate=false"], "executor.workers=2 needs isolate=true"),
        (["executor.workers=1", "executor.devices=[cpu,cpu]"], "executor.devices lists 2, of which executor.workers=1"),
        (["device=cpu", "executor.devices=[cpu]"], "device=cpu and executor.devices exclude each other"),
        (["executor=submitit", "device=cuda:1"], "device=cuda:1 has no meaning with executor=submitit"),
    ],
)
def test_what_does_not_fit_is_said(registry, words, told):
    with pytest.raises(UserError, match=told):
        compose_runs([*GIVEN, *words], registry)


def test_a_worker_has_a_device_and_devices_a_worker(registry):
    compose = lambda *words: compose_runs([*GIVEN, OFF, *words], registry)[0]
    side_by_side = executor_of(compose("executor.workers=3", "executor.devices=[cpu,cuda:1]"), Progress(None), Stop())
    assert [hands.device for hands in side_by_side.hands] == ["cpu", "cuda:1", "cpu"]
    assert executor_of(compose("executor.workers=3"), Progress(None), Stop()).hands[2].device == ""
    assert isinstance(executor_of(compose(), Progress(None), Stop()), OneByOne)
    assert compose("executor.devices=[cuda:0,cuda:1]").executor.count == 2
    assert device_of(compose("executor.devices=[cpu]")) == device_of(compose("executor=ray", "device=cuda")) == "cpu"
    with pytest.raises(UserError, match="cuda:9"):
        device_of(compose("executor.devices=[cpu,cuda:9]"))


@pytest.mark.parametrize(("kind", "package", "extra"), [("submitit", "submitit", "slurm"), ("ray", "ray", "ray")])
def test_a_missing_package_says_how_to_get_it(registry, kind, package, extra, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    (config,) = compose_runs([*GIVEN, f"executor={kind}", f'results_dir="{tmp_path}"'], registry)
    with pytest.raises(UserError, match=rf"pip install 'distillbench\[{extra}\]'"):
        executor_of(config, Progress(None), Stop())


def test_keys_and_planned_prices_do_not_depend_on_the_executor(registry, tmp_path):
    from distillbench.cell_keys import evaluation_inputs, train_inputs

    given = ["methods=[boot]", *WORDS, "device=cpu", f'results_dir="{tmp_path}"']
    several = (["executor.workers=2"], ["executor=submitit"], ["executor=ray", "executor.cpus=2"])
    found = []
    for words in ([], *several):
        _, cell = plan(compose_runs([*given, *words], registry), registry)
        inputs = train_inputs(cell, cell.scene.loaded(Progress(None)))
        found.append((inputs, evaluation_inputs(cell, "key"), cell.price))
    assert all(one == found[0] for one in found)


# --- threads and engines, without any work ---------------------------------------------------------------------------


def a_done(index, ok=True):
    about = About(f"cell {index}", {"device": "a GPU"}, [(1, 0)], Path(f"/nowhere/{index}"), {}, {})
    return Done(about, [{"status": "ok" if ok else "failed"}], ok=ok)


def a_todo(count):
    return {index: (f"cell {index}", Seen(a_done(index).about, None)) for index in range(count)}


class Hall:
    """Counts who is in it. `work` takes the place of `worked`."""

    def __init__(self, failing=(), refused=()):
        self.lock, self.present, self.most, self.begun = threading.Lock(), 0, 0, []
        self.failing, self.refused, self.interrupted = failing, refused, []

    def work(self, hands, cell, seen, policy):
        index = int(cell.split()[1])
        with self.lock:
            self.present += 1
            self.most, self.begun = max(self.most, self.present), [*self.begun, index]
        try:
            end = time.monotonic() + (0.05 if index in (*self.failing, *self.refused) else 0.2)
            while time.monotonic() < end:
                time.sleep(0.01)
                if hands.stop():
                    self.interrupted.append(index)
                    raise Interrupted(hands.stop.name)
            if index in self.refused:
                raise UserError("this cannot be used")
            return a_done(index, index not in self.failing)
        finally:
            with self.lock:
                self.present -= 1


@pytest.fixture
def hall(monkeypatch):
    def enter(workers=2, stop=None, **given):
        hall = Hall(**given)
        monkeypatch.setattr(executors, "worked", hall.work)
        return hall, SideBySide(Progress(None), stop or Stop(), 0.0, LocalConfig("local", workers=workers))

    return enter


def test_side_by_side_every_cell_is_done_once_and_so_many_at_a_time(hall):
    room, side_by_side = hall(workers=3)
    came = dict(side_by_side.work(a_todo(8), AS_IS))
    assert {index: done.about.label for index, done in came.items()} == {k: f"cell {k}" for k in range(8)}
    assert (sorted(room.begun), room.most) == (list(range(8)), 3)


def test_side_by_side_fail_fast_begins_nothing_more_and_ends_what_it_began(hall):
    room, side_by_side = hall(failing=[1])
    came = dict(side_by_side.work(a_todo(8), Policy(fail_fast=True)))
    assert len(room.begun) < 8 and sorted(came) == sorted(room.begun) and not room.interrupted
    assert [index for index, done in came.items() if not done.ok] == [1]


def test_side_by_side_an_error_of_one_ends_the_others_and_work_can_begin_again(hall):
    room, side_by_side = hall(refused=[1])
    with pytest.raises(UserError, match="this cannot be used"):
        list(side_by_side.work(a_todo(8), AS_IS))
    assert (room.present, room.interrupted) == (0, [0])
    assert [index for index, _ in side_by_side.work({5: a_todo(6)[5]}, AS_IS)] == [5]


def test_side_by_side_a_signal_ends_all_and_what_was_done_counts(hall):
    with stopping() as stop:
        room, side_by_side = hall(stop=stop)
        came = []
        with pytest.raises(Interrupted, match="SIGINT"):
            for index, _ in side_by_side.work(a_todo(8), AS_IS):
                came.append(index)
                signal.raise_signal(signal.SIGINT)
        assert (room.present, stop.patient) == (0, False)
        assert sorted(came + room.interrupted) == sorted(room.begun) and len(room.begun) < 8


def test_side_by_side_what_is_closed_ends(hall):
    room, side_by_side = hall()
    came = side_by_side.work(a_todo(8), AS_IS)
    next(came)
    came.close()
    assert room.present == 0 and len(room.begun) < 8


class Desk:
    """An engine that has answers up its sleeve: lists, by the label of the cell."""

    jobs, most, notes = "jobs", 2, ["a note"]

    def __init__(self, script):
        self.script, self.running, self.number, self.cancelled, self.largest = script, {}, 0, [], 0

    def submit(self, jobs):
        numbers = []
        for job in jobs:
            self.number += 1
            self.running[self.number] = job
            numbers.append(self.number)
        self.largest = max(self.largest, len(self.running))
        return numbers

    def answers(self, running, seconds):
        assert sorted(running) == sorted(self.running)
        came = [number for number in running if self.script[self.running[number]] != "silent"]
        return [(number, self.script[self.running.pop(number)].pop(0)) for number in came[:1]]

    def cancel(self, running):
        self.cancelled = [self.running.pop(number) for number in running]

    def close(self):
        pass


@pytest.fixture
def desk(monkeypatch):
    """Jobs are the labels of their cells."""
    monkeypatch.setattr(executors.Task, "of", lambda cell: cell)
    monkeypatch.setattr(executors, "Work", lambda task, seen, policy: task)
    monkeypatch.setattr(executors.Job, "of", lambda work: work)

    def open_(script, again=1, stop=None):
        desk = Desk({f"cell {index}": answers for index, answers in enumerate(script)})
        said = io.StringIO()
        return desk, said, Elsewhere(desk, again, Progress(Console(file=said, width=200)), stop or Stop())

    return open_


def ok(index):
    return Answer("answer", a_done(index), [f"line of {index}"])


def test_elsewhere_answers_come_in_any_order_and_no_more_jobs_run_than_the_engine_takes(desk):
    engine, said, elsewhere = desk([[ok(0)], [ok(1)], [Answer("answer", None)], [ok(3)]])
    came = dict(elsewhere.work(a_todo(4), AS_IS))
    assert {index: done and done.about.label for index, done in came.items()} == {
        0: "cell 0", 1: "cell 1", 2: None, 3: "cell 3",
    }  # fmt: skip
    assert (engine.largest, engine.cancelled) == (2, [])
    assert "a note" in said.getvalue() and "line of 3" in said.getvalue()


def test_elsewhere_what_was_interrupted_there_begins_again_and_not_for_ever(desk, monkeypatch):
    cut = Answer("interrupted", "SIGTERM")
    given_up = []
    monkeypatch.setattr(executors, "given_up", lambda cell, about, ended: given_up.append(ended) or a_done(1, ok=False))
    monkeypatch.setattr(executors, "claimed", lambda folder: contextlib.nullcontext(True))
    engine, said, elsewhere = desk([[cut, ok(0)], [cut, cut, cut]])
    came = dict(elsewhere.work(a_todo(2), AS_IS))
    assert (came[0].ok, came[1].ok, engine.number) == (True, False, 4)
    assert [(e.status, str(e)) for e in given_up] == [("failed", "ended by SIGTERM")]
    assert said.getvalue().count("ended by SIGTERM; it begins again") == 2


def test_elsewhere_a_lost_job_hurts_one_row(desk, monkeypatch):
    given_up = []
    monkeypatch.setattr(executors, "given_up", lambda cell, about, ended: given_up.append(ended) or a_done(0, ok=False))
    monkeypatch.setattr(executors, "claimed", lambda folder: contextlib.nullcontext("1" not in folder.name))
    lost = Answer("ended", ("oom", "the job gave no answer"))
    _, _, elsewhere = desk([[lost], [lost], [ok(2)]])
    came = dict(elsewhere.work(a_todo(3), AS_IS))
    assert (came[0].ok, came[1], came[2].ok) == (False, None, True)  # of the second a process is still at work
    assert [(e.status, str(e)) for e in given_up] == [("oom", "the job gave no answer")]


def test_elsewhere_a_signal_here_cancels_what_runs_there_and_says_so(desk):
    stop = Stop()
    engine, said, elsewhere = desk([[ok(0)], "silent", "silent"], stop=stop)
    with pytest.raises(Interrupted, match="SIGINT"):
        for _ in elsewhere.work(a_todo(3), AS_IS):
            stop.ask("SIGINT")
    assert engine.cancelled == ["cell 1"]
    assert "jobs that are cancelled: 1; what they reached is kept, and the same command goes on" in said.getvalue()


def test_elsewhere_fail_fast_and_a_refusal_cancel_the_rest(desk):
    failed = Answer("answer", a_done(0, ok=False))
    engine, _, elsewhere = desk([[failed], "silent"])
    assert [index for index, _ in elsewhere.work(a_todo(2), Policy(fail_fast=True))] == [0]
    assert engine.cancelled == ["cell 1"]
    engine, _, elsewhere = desk([[Answer("refused", "no such file")], "silent"])
    with pytest.raises(UserError, match="no such file"):
        list(elsewhere.work(a_todo(2), AS_IS))
    assert engine.cancelled == ["cell 1"]


def test_elsewhere_what_another_process_has_is_not_submitted(desk, tmp_path):
    engine, _, elsewhere = desk([[ok(0)]])
    todo = a_todo(1)
    about = dataclasses.replace(todo[0][1].about, folder=tmp_path / "cell")
    with claimed(about.folder):
        assert list(elsewhere.work({0: ("cell 0", Seen(about, None))}, AS_IS)) == [(0, None)]
    assert engine.number == 0


# --- jobs ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Errand:
    """Stands for the work of a job."""

    what: str

    def do(self, progress, stop):
        progress.say("a line")
        if self.what == "refused":
            raise UserError("not with this file")
        if self.what == "interrupted":
            raise Interrupted("SIGTERM")
        if self.what == "ended":
            raise Ended("timeout", "too long")
        if self.what == "error":
            raise ValueError("no luck\nin two lines")
        return os.getcwd()


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("refused", ("refused", "not with this file")),
        ("interrupted", ("interrupted", "SIGTERM")),
        ("ended", ("ended", ("timeout", "too long"))),
        ("error", ("ended", ("failed", "ValueError: no luck"))),
    ],
)
def test_errors_of_a_job_are_answers(what, expected):
    answer = pickle.loads(pickle.dumps(Job.of(Errand(what)))).answer(Stop())
    assert ((answer.kind, answer.value), answer.said) == (expected, ["a line"])


def test_a_job_finds_the_paths_and_the_modules_of_the_run_that_began_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, "plugins"])
    job = Job.of(Errand("answer"))
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != "plugins"])
    assert job.answer(Stop()).value == str(tmp_path)
    assert str(tmp_path / "plugins") in sys.path


def test_what_cannot_be_handed_over_is_said():
    with pytest.raises(UserError, match="a cell cannot be handed to another machine"):
        Job.of(lambda: None)


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands by the names of Slurm's, which write down what they are told. No job ever runs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    told = tmp_path / "told"
    texts = {"srun": "", "sbatch": f'cat "$1" >> {told}; echo "Submitted batch job 1$(grep -c -e --array {told})"'}
    texts |= {"scancel": f"echo scancel $1 >> {told}", "sacct": "echo 'JobID|State|NodeList'; echo '11_1|NODE_FAIL|n'"}
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return told


def submitit_engine(results, **settings):
    from distillbench.engine_submitit import Submitit

    return Submitit(SubmititConfig("submitit", **settings), results)


def test_slurm_is_asked_for_what_the_settings_say(slurm, tmp_path):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    given = {"partition": "gpu", "gpus": 2, "cpus": 8, "memory_gb": 64, "hours": 1.5, "parallel": 3}
    given |= {"setup": ["module load cuda"], "parameters": {"slurm_account": "us", "slurm_signal_delay_s": 120}}
    engine = submitit_engine(tmp_path, **given)
    numbers = engine.submit([Job.of(Errand("answer"))] * 5)
    lines = slurm.read_text().splitlines()
    expected = {"array=0-4%3", "partition=gpu", "gpus-per-node=2", "cpus-per-task=8", "mem=64GB", "time=90"}
    expected |= {"account=us", "signal=USR2@120", "job-name=distillbench"}
    assert {f"#SBATCH --{line}" for line in expected} <= set(lines)
    assert "module load cuda" in lines and any("submitit.core._submit" in line for line in lines)
    engine.cancel(numbers[:2])
    assert slurm.read_text().split()[-4:] == ["scancel", engine_id(numbers[0]), "scancel", engine_id(numbers[1])]


def engine_id(number):
    return f"11_{number}"


def test_many_jobs_are_arrays_that_slurm_takes_and_share_what_may_run(slurm, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    monkeypatch.setattr("distillbench.engine_submitit.LARGEST_ARRAY", 2)
    engine = submitit_engine(tmp_path, parallel=4)
    assert engine.submit([Job.of(Errand("answer"))] * 4) == [0, 1, 2, 3]
    assert slurm.read_text().count("#SBATCH --array=0-1%2") == 2


def test_a_job_that_slurm_lost_is_an_answer(slurm, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    engine = submitit_engine(tmp_path)
    numbers = engine.submit([Job.of(Errand("answer"))] * 2)
    ((number, answer),) = engine.answers(numbers, 0.0)
    assert (number, answer.kind, answer.value[0]) == (1, "ended", "failed")
    assert "state NODE_FAIL" in answer.value[1]


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"us": 1}, "executor.parameters: .*need to be prefixed"),
        ({"slurm_acount": 1}, "Unknown argument 'acount"),
    ],
)
def test_a_wrong_parameter_is_said(slurm, tmp_path, parameters, told):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    with pytest.raises(UserError, match=told):
        submitit_engine(tmp_path, parameters=parameters).submit([Job.of(Errand("answer"))])


def test_without_slurm_the_executor_says_so(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"executor=submitit: Could not detect .srun"):
        submitit_engine(tmp_path)


# --- whole runs ------------------------------------------------------------------------------------------------------

PLUGIN = """
import os, signal
from pathlib import Path
from distillbench import hookimpl
from executed_plugin import Fine


class Preempted(Fine):
    "In a job of submitit its process is told in the third step that it is preempted, once."
    name = "preempted"
    steps = 0

    def after_step(self):
        self.steps += 1
        before = Path(__file__).with_suffix(".preempted")
        if self.steps == 3 and "SUBMITIT_EXECUTOR" in os.environ and not before.exists():
            before.touch()
            os.kill(os.getpid(), signal.SIGUSR2)


@hookimpl(api=1)
def register_methods(register):
    register(Preempted)
"""


@pytest.fixture(scope="module")
def alone(plugins, tmp_path_factory):
    """The run that all others must be like: one cell after the other, in this process."""
    words = ["methods=[fine,preempted]", "device=cpu", "isolate=false"]
    return go(plugins, tmp_path_factory.mktemp("alone"), *words)[0]


def same(table, alone, *methods):
    """Whether the rows of these methods are those of `alone`."""
    methods = ["teacher:ddim", *methods]
    expected, found = (one[one["method"].isin(methods)].reset_index(drop=True) for one in (alone.table, table))
    pd.testing.assert_frame_equal(counted(found), counted(expected))
    return True


@pytest.mark.slow
def test_workers_with_devices_make_the_table_of_one(plugins, alone, tmp_path):
    outcome, _ = go(plugins, tmp_path, "methods=[dies,fine]", "executor.devices=[cpu,cpu]", "executor.workers=2")
    assert same(outcome.table, alone, "fine")
    assert outcome.table["method"].to_list() == ["teacher:ddim", "dies", "fine"]  # in the order of the run
    assert outcome.failed == ["dies (seed 0)"] and "SIGABRT" in outcome.table["reason"].iloc[1]


@pytest.mark.slow
def test_a_job_that_is_preempted_keeps_its_state_and_goes_back_into_the_queue(plugins, alone, tmp_path):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    words = ["methods=[preempted]", "isolate=false", "executor=submitit", "executor.cluster=local", "executor.gpus=0"]
    outcome, said = go(plugins, tmp_path, *words, "executor.parallel=2")
    assert "going on after 30 images" in said
    assert same(outcome.table, alone, "preempted")
    (weights,) = (outcome.folder / "weights").iterdir()
    assert weights.read_bytes() == (alone.folder / "weights" / weights.name).read_bytes()
    assert not (tmp_path / "cache" / "jobs").exists()


@pytest.mark.slow
def test_a_lost_worker_of_ray_hurts_one_row(plugins, alone, tmp_path):
    if importlib.util.find_spec("ray") is None:  # it is not imported here: it reads its environment when it is
        pytest.skip("tasks of ray need ray: the extra ray")
    words = ["methods=[dies,fine]", "isolate=false", "executor=ray", "executor.gpus=0", "executor.retries=0"]
    outcome, _ = go(plugins, tmp_path, *words)
    assert same(outcome.table, alone, "fine")
    assert outcome.failed == ["dies (seed 0)"] and "WorkerCrashedError" in outcome.table["reason"].iloc[1]
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXECUTORS)
def test_the_page_has_every_setting_with_its_default_and_its_help(kind):
    page = (Path(__file__).resolve().parent.parent / "docs" / "machines.md").read_text()
    rows = page.split(f"| `executor={kind}` | default | |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    told = [tuple(part.strip() for part in row.strip("|").split("|")) for row in rows]
    expected = [(f"`executor.{name}`", default, text) for name, default, text in describe_options(EXECUTORS[kind])]
    assert told == expected
