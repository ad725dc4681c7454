"""Executors: the rows, statuses and files of a run do not depend on where its cells run."""

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

from distillbench.errors import UserError
from distillbench.execution import executors
from distillbench.execution.executors import PoolExecutor, RemoteExecutor, SerialExecutor, executor_of
from distillbench.execution.jobs import Job, JobResult
from distillbench.execution.run import run
from distillbench.execution.workers import WorkerError
from distillbench.registry import Selection, load_registry
from distillbench.runs.cell import AS_IS, Policy
from distillbench.runs.cell_result import CellDescription, CellResult
from distillbench.runs.config import compose_runs, describe_options
from distillbench.runs.executor_config import EXECUTORS, LocalConfig, RayConfig, SubmititConfig
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import device_of
from distillbench.storage.locks import try_lock
from distillbench.system.progress import Progress
from distillbench.system.signals import Interrupted, Stop, stopping
from plugin_code import FINE_DIES_SLOW

WORDS = ["dataset=gmm", "teacher=gmm", "teacher.width=16", "budget.images=40", "batch_size=10", "run_name=run"]
WORDS += ["evaluation.images=8", "evaluation.metrics=[teacher_rmse]", "evaluation.teacher_steps=[1]"]
WORDS += ["evaluation.timing=off"]
MEASURED = "seconds|joules|rss|machine_load"  # columns of what is never the same twice


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def plugins(tmp_path_factory):
    """The registry with the methods of FINE_DIES_SLOW and of PLUGIN, from files in a folder."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "executed_plugin.py").write_text(FINE_DIES_SLOW)
    (folder / "preempted_plugin.py").write_text(PLUGIN)
    return Selection((folder,)).load()


def go(registry, results, *words, stop=None, policy=AS_IS):
    """A run in this process; its outcome and what it said."""
    configs = compose_runs([*WORDS, f'results_dir="{results}"', *words], registry)
    said = io.StringIO()
    progress = Progress(Console(file=said, width=300))
    return run(plan(configs, registry), configs, progress, lambda rows: None, policy, stop), said.getvalue()


def reproducible(table):
    """The columns that must not depend on where cells run, nor on interruptions."""
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
def test_settings_choose_the_executor(registry, words, expected):
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
        (["executor=ray", "executor.gpus=1.5"], "executor.gpus must be a whole number if it is above 1"),
        (["executor=local,ray"], "executor cannot be swept"),
        (["executor=ray", "executor.kind=local"], "executor.kind is 'ray' by choice"),
        (
            ["executor.workers=2"],
            "executor.workers=2 on 1 device: .* disturb each other's timing. Write evaluation.timin",
        ),
        (["executor=ray", "executor.gpus=0"], "executor.gpus=0: parallel cells disturb each other's timing"),
        (
            ["executor=submitit", "executor.cluster=local"],
            "executor.cluster=local with executor.parallel=256: parallel",
        ),
        (["executor.workers=2", OFF, "budget.limit=seconds"], "slow each other down. Use another budget.limit"),
        (["executor.workers=2", OFF, "isolate=false"], "executor.workers=2 needs isolate=true"),
        (
            ["executor.workers=1", "executor.devices=[cpu,cpu]"],
            "executor.devices lists 2, more than executor.workers",
        ),
        (["device=cpu", "executor.devices=[cpu]"], "device=cpu and executor.devices exclude each other"),
        (["executor=submitit", "device=cuda:1"], "device=cuda:1 has no meaning with executor=submitit"),
    ],
)
def test_settings_that_do_not_fit_are_user_errors(registry, words, told):
    with pytest.raises(UserError, match=told):
        compose_runs([*GIVEN, *words], registry)


def test_devices_are_assigned_to_workers_in_turn(registry):
    compose = lambda *words: compose_runs([*GIVEN, OFF, *words], registry)[0]
    pool = executor_of(compose("executor.workers=3", "executor.devices=[cpu,cuda:1]"), Progress(None), Stop())
    assert [worker.device for worker in pool.workers] == ["cpu", "cuda:1", "cpu"]
    assert executor_of(compose("executor.workers=3"), Progress(None), Stop()).workers[2].device == ""
    assert isinstance(executor_of(compose(), Progress(None), Stop()), SerialExecutor)
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


def test_keys_and_planned_costs_do_not_depend_on_the_executor(registry, tmp_path):
    from distillbench.runs.cell_keys import evaluation_inputs, train_inputs

    given = ["methods=[boot]", *WORDS, "device=cpu", f'results_dir="{tmp_path}"']
    several = (["executor.workers=2"], ["executor=submitit"], ["executor=ray", "executor.cpus=2"])
    found = []
    for words in ([], *several):
        _, cell = plan(compose_runs([*given, *words], registry), registry)
        inputs = train_inputs(cell, cell.shared.load_teacher(Progress(None)))
        found.append((inputs, evaluation_inputs(cell, "key"), cell.cost))
    assert all(one == found[0] for one in found)


# --- threads and backends, with cells that do nothing ----------------------------------------------------------------


def a_result(index, ok=True):
    description = CellDescription(f"cell {index}", {"device": "a GPU"}, [(1, 0)], Path(f"/nowhere/{index}"), {}, {})
    return CellResult(description, [{"status": "ok" if ok else "failed"}], ok=ok)


def a_todo(count):
    return {index: (f"cell {index}", a_result(index).description) for index in range(count)}


class FakeCells:
    """Counts the cells that run. `run` stands in for `run_or_record`."""

    def __init__(self, failing=(), refused=()):
        self.lock, self.running, self.most, self.begun = threading.Lock(), 0, 0, []
        self.failing, self.refused, self.interrupted = failing, refused, []

    def run(self, worker, cell, description, policy):
        index = int(cell.split()[1])
        with self.lock:
            self.running += 1
            self.most, self.begun = max(self.most, self.running), [*self.begun, index]
        try:
            end = time.monotonic() + (0.05 if index in (*self.failing, *self.refused) else 0.2)
            while time.monotonic() < end:
                time.sleep(0.01)
                if worker.stop():
                    self.interrupted.append(index)
                    raise Interrupted(worker.stop.name)
            if index in self.refused:
                raise UserError("this cannot be used")
            return a_result(index, index not in self.failing)
        finally:
            with self.lock:
                self.running -= 1


@pytest.fixture
def pool(monkeypatch):
    def make(workers=2, stop=None, **given):
        cells = FakeCells(**given)
        monkeypatch.setattr(executors, "run_or_record", cells.run)
        return cells, PoolExecutor(Progress(None), stop or Stop(), 0.0, LocalConfig("local", workers=workers))

    return make


def test_pool_runs_every_cell_once_and_as_many_at_a_time_as_it_has_workers(pool):
    cells, executor = pool(workers=3)
    came = dict(executor.run(a_todo(8), AS_IS))
    assert {index: done.description.label for index, done in came.items()} == {k: f"cell {k}" for k in range(8)}
    assert (sorted(cells.begun), cells.most) == (list(range(8)), 3)


def test_pool_with_fail_fast_starts_no_more_cells_and_finishes_running_ones(pool):
    cells, executor = pool(failing=[1])
    came = dict(executor.run(a_todo(8), Policy(fail_fast=True)))
    assert len(cells.begun) < 8 and sorted(came) == sorted(cells.begun) and not cells.interrupted
    assert [index for index, done in came.items() if not done.ok] == [1]


def test_pool_stops_the_others_on_an_error_and_can_run_again(pool):
    cells, executor = pool(refused=[1])
    with pytest.raises(UserError, match="this cannot be used"):
        list(executor.run(a_todo(8), AS_IS))
    assert (cells.running, cells.interrupted) == (0, [0])
    assert [index for index, _ in executor.run({5: a_todo(6)[5]}, AS_IS)] == [5]


def test_pool_stops_on_a_signal_and_keeps_finished_cells(pool):
    with stopping() as stop:
        cells, executor = pool(stop=stop)
        came = []
        with pytest.raises(Interrupted, match="SIGINT"):
            for index, _ in executor.run(a_todo(8), AS_IS):
                came.append(index)
                signal.raise_signal(signal.SIGINT)
        assert (cells.running, stop.patient) == (0, False)
        assert sorted(came + cells.interrupted) == sorted(cells.begun) and len(cells.begun) < 8


def test_pool_stops_when_closed(pool):
    cells, executor = pool()
    came = executor.run(a_todo(8), AS_IS)
    next(came)
    came.close()
    assert cells.running == 0 and len(cells.begun) < 8


class FakeBackend:
    """A backend with prepared results: lists, by the label of the cell."""

    job_name, max_jobs, notes = "jobs", 2, ["a note"]

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

    def results(self, running, seconds):
        assert sorted(running) == sorted(self.running)
        came = [number for number in running if self.script[self.running[number]] != "silent"]
        return [(number, self.script[self.running.pop(number)].pop(0)) for number in came[:1]]

    def cancel(self, running):
        self.cancelled = [self.running.pop(number) for number in running]

    def close(self):
        pass


@pytest.fixture
def remote(monkeypatch):
    """Jobs are the labels of their cells."""
    monkeypatch.setattr(executors.CellTask, "of", lambda cell: cell)
    monkeypatch.setattr(executors.Job, "of", lambda function, task, *rest: task)

    def make(script, retries=1, stop=None):
        backend = FakeBackend({f"cell {index}": results for index, results in enumerate(script)})
        said = io.StringIO()
        return backend, said, RemoteExecutor(backend, retries, Progress(Console(file=said, width=200)), stop or Stop())

    return make


def ok(index):
    return JobResult("ok", a_result(index), [f"line of {index}"])


def test_remote_results_arrive_in_any_order_and_no_more_jobs_run_than_the_backend_allows(remote):
    backend, said, executor = remote([[ok(0)], [ok(1)], [JobResult("ok", None)], [ok(3)]])
    came = dict(executor.run(a_todo(4), AS_IS))
    assert {index: done and done.description.label for index, done in came.items()} == {
        0: "cell 0", 1: "cell 1", 2: None, 3: "cell 3",
    }  # fmt: skip
    assert (backend.largest, backend.cancelled) == (2, [])
    assert "a note" in said.getvalue() and "line of 3" in said.getvalue()


def test_remote_interrupted_jobs_are_submitted_again_up_to_a_limit(remote, monkeypatch):
    cut = JobResult("interrupted", "SIGTERM")
    failures = []
    monkeypatch.setattr(
        executors, "record_failure", lambda cell, description, error: failures.append(error) or a_result(1, ok=False)
    )
    monkeypatch.setattr(executors, "try_lock", lambda folder: contextlib.nullcontext(True))
    backend, said, executor = remote([[cut, ok(0)], [cut, cut, cut]])
    came = dict(executor.run(a_todo(2), AS_IS))
    assert (came[0].ok, came[1].ok, backend.number) == (True, False, 4)
    assert [(e.status, str(e)) for e in failures] == [("failed", "ended by SIGTERM")]
    assert said.getvalue().count("ended by SIGTERM; it is submitted again") == 2


def test_remote_a_lost_job_fails_one_row(remote, monkeypatch):
    failures = []
    monkeypatch.setattr(
        executors, "record_failure", lambda cell, description, error: failures.append(error) or a_result(0, ok=False)
    )
    monkeypatch.setattr(executors, "try_lock", lambda folder: contextlib.nullcontext("1" not in folder.name))
    lost = JobResult("failed", ("oom", "the job returned no result"))
    _, _, executor = remote([[lost], [lost], [ok(2)]])
    came = dict(executor.run(a_todo(3), AS_IS))
    assert (came[0].ok, came[1], came[2].ok) == (False, None, True)  # a process of the second job still runs
    assert [(e.status, str(e)) for e in failures] == [("oom", "the job returned no result")]


def test_remote_a_signal_cancels_the_running_jobs(remote):
    stop = Stop()
    backend, said, executor = remote([[ok(0)], "silent", "silent"], stop=stop)
    with pytest.raises(Interrupted, match="SIGINT"):
        for _ in executor.run(a_todo(3), AS_IS):
            stop.ask("SIGINT")
    assert backend.cancelled == ["cell 1"]
    assert (
        "jobs that are cancelled: 1; their training states are saved, and the same command resumes them"
        in said.getvalue()
    )


def test_remote_fail_fast_and_user_errors_cancel_the_rest(remote):
    failed = JobResult("ok", a_result(0, ok=False))
    backend, _, executor = remote([[failed], "silent"])
    assert [index for index, _ in executor.run(a_todo(2), Policy(fail_fast=True))] == [0]
    assert backend.cancelled == ["cell 1"]
    backend, _, executor = remote([[JobResult("user error", "no such file")], "silent"])
    with pytest.raises(UserError, match="no such file"):
        list(executor.run(a_todo(2), AS_IS))
    assert backend.cancelled == ["cell 1"]


def test_remote_cells_that_another_process_runs_are_not_submitted(remote, tmp_path):
    backend, _, executor = remote([[ok(0)]])
    todo = a_todo(1)
    description = dataclasses.replace(todo[0][1], folder=tmp_path / "cell")
    with try_lock(description.folder):
        assert list(executor.run({0: ("cell 0", description)}, AS_IS)) == [(0, None)]
    assert backend.number == 0


# --- jobs ------------------------------------------------------------------------------------------------------------


def call(ending, progress, stop):
    """The function of a job."""
    progress.say("a line")
    if ending == "user error":
        raise UserError("not with this file")
    if ending == "interrupted":
        raise Interrupted("SIGTERM")
    if ending == "worker error":
        raise WorkerError("timeout", "too long")
    if ending == "error":
        raise ValueError("no luck\nin two lines")
    return os.getcwd()


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("user error", ("user error", "not with this file")),
        ("interrupted", ("interrupted", "SIGTERM")),
        ("worker error", ("failed", ("timeout", "too long"))),
        ("error", ("failed", ("failed", "ValueError: no luck"))),
    ],
)
def test_errors_of_a_job_are_results(ending, expected):
    result = pickle.loads(pickle.dumps(Job.of(call, ending))).run(Stop())
    assert ((result.kind, result.value), result.lines) == (expected, ["a line"])


def test_a_job_has_the_working_directory_and_import_path_of_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plugins").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, "plugins"])
    job = Job.of(call, "ok")
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != "plugins"])
    assert job.run(Stop()).value == str(tmp_path)
    assert str(tmp_path / "plugins") in sys.path


def test_a_cell_that_cannot_be_pickled_is_a_user_error():
    with pytest.raises(UserError, match="a cell cannot be sent to another machine"):
        Job.of(lambda: None)


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Fake Slurm commands, which record their arguments. No job runs."""
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


def submitit_backend(folder, **settings):
    from distillbench.execution.submitit_backend import SubmititBackend

    return SubmititBackend(SubmititConfig("submitit", **settings), folder)


def test_settings_become_slurm_options(slurm, tmp_path):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    given = {"partition": "gpu", "gpus": 2, "cpus": 8, "memory_gb": 64, "hours": 1.5, "parallel": 3}
    given |= {"setup": ["module load cuda"], "parameters": {"slurm_account": "us", "slurm_signal_delay_s": 120}}
    backend = submitit_backend(tmp_path, **given)
    numbers = backend.submit([Job.of(call, "ok")] * 5)
    lines = slurm.read_text().splitlines()
    expected = {"array=0-4%3", "partition=gpu", "gpus-per-node=2", "cpus-per-task=8", "mem=64GB", "time=90"}
    expected |= {"account=us", "signal=USR2@120", "job-name=distillbench"}
    assert {f"#SBATCH --{line}" for line in expected} <= set(lines)
    assert "module load cuda" in lines and any("submitit.core._submit" in line for line in lines)
    backend.cancel(numbers[:2])
    assert slurm.read_text().split()[-4:] == ["scancel", job_id(numbers[0]), "scancel", job_id(numbers[1])]


def job_id(number):
    return f"11_{number}"


def test_many_jobs_are_split_into_arrays_that_share_the_limit_of_running_jobs(slurm, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    monkeypatch.setattr("distillbench.execution.submitit_backend.LARGEST_ARRAY", 2)
    backend = submitit_backend(tmp_path, parallel=4)
    assert backend.submit([Job.of(call, "ok")] * 4) == [0, 1, 2, 3]
    assert slurm.read_text().count("#SBATCH --array=0-1%2") == 2


def test_a_job_that_slurm_lost_has_a_failed_result(slurm, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    backend = submitit_backend(tmp_path)
    numbers = backend.submit([Job.of(call, "ok")] * 2)
    ((number, result),) = backend.results(numbers, 0.0)
    assert (number, result.kind, result.value[0]) == (1, "failed", "failed")
    assert "state NODE_FAIL" in result.value[1]


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"us": 1}, "executor.parameters: .*need to be prefixed"),
        ({"slurm_acount": 1}, "Unknown argument 'acount"),
    ],
)
def test_an_unknown_parameter_is_a_user_error(slurm, tmp_path, parameters, told):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    with pytest.raises(UserError, match=told):
        submitit_backend(tmp_path, parameters=parameters).submit([Job.of(call, "ok")])


def test_a_machine_without_slurm_is_a_user_error(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"executor=submitit: Could not detect .srun"):
        submitit_backend(tmp_path)


# --- whole runs ------------------------------------------------------------------------------------------------------

PLUGIN = """
import os, signal
from pathlib import Path
from distillbench import hookimpl
from executed_plugin import Fine


class Preempted(Fine):
    "In a job of submitit its process receives the preemption signal in the third step, once."
    name = "preempted"
    steps = 0

    def after_step(self):
        self.steps += 1
        before = Path(__file__).with_suffix(".preempted")
        if self.steps == 3 and "SUBMITIT_EXECUTOR" in os.environ and not before.exists():
            before.touch()
            os.kill(os.getpid(), signal.SIGUSR2)


@hookimpl(api=2)
def register_methods(register):
    register(Preempted)
"""


@pytest.fixture(scope="module")
def alone(plugins, tmp_path_factory):
    """The run that all others are compared with: serial, in this process."""
    words = ["methods=[fine,preempted]", "device=cpu", "isolate=false"]
    return go(plugins, tmp_path_factory.mktemp("alone"), *words)[0]


def same(table, alone, *methods):
    """Whether the rows of these methods are those of `alone`."""
    methods = ["teacher:ddim", *methods]
    expected, found = (one[one["method"].isin(methods)].reset_index(drop=True) for one in (alone.table, table))
    pd.testing.assert_frame_equal(reproducible(found), reproducible(expected))
    return True


@pytest.mark.slow
def test_several_workers_make_the_same_table_as_one(plugins, alone, tmp_path):
    outcome, _ = go(plugins, tmp_path, "methods=[dies,fine]", "executor.devices=[cpu,cpu]", "executor.workers=2")
    assert same(outcome.table, alone, "fine")
    assert outcome.table["method"].to_list() == ["teacher:ddim", "dies", "fine"]  # in the order of the run
    assert outcome.failed == ["dies (seed 0)"] and "SIGABRT" in outcome.table["reason"].iloc[1]


@pytest.mark.nightly
def test_a_preempted_job_saves_its_state_and_is_queued_again(plugins, alone, tmp_path):
    pytest.importorskip("submitit", reason="jobs of Slurm need submitit: the extra slurm")
    words = ["methods=[preempted]", "isolate=false", "executor=submitit", "executor.cluster=local", "executor.gpus=0"]
    outcome, said = go(plugins, tmp_path, *words, "executor.parallel=2")
    assert "continuing after 30 images" in said
    assert same(outcome.table, alone, "preempted")
    (weights,) = (outcome.folder / "weights").iterdir()
    assert weights.read_bytes() == (alone.folder / "weights" / weights.name).read_bytes()
    assert not (tmp_path / "cache" / "jobs").exists()


@pytest.mark.nightly
def test_a_lost_ray_worker_fails_one_row(plugins, alone, tmp_path):
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
    page = (Path(__file__).resolve().parents[2] / "docs" / "machines.md").read_text()
    rows = page.split(f"| `executor={kind}` | default | meaning |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    written = [tuple(part.strip() for part in row.strip("|").split("|")) for row in rows]
    expected = [(f"`executor.{name}`", default, text) for name, default, text in describe_options(EXECUTORS[kind])]
    assert written == expected
