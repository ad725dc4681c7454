"""Worker processes: a crash, a time limit, a signal or a killed parent ends one cell and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from distillbench.cli import commands
from distillbench.execution.workers import SubprocessWorker, WorkerError
from distillbench.storage.locks import is_locked, try_lock, wait_for_lock
from distillbench.system.progress import Progress
from distillbench.system.signals import Interrupted, Stop
from distillbench.system.subprocesses import ProcessError, Worker
from plugin_code import FINE_DIES_SLOW

WORDS = ["dataset=gmm", "teacher=gmm", "teacher.width=16", "budget.images=800", "batch_size=10", "run_name=run"]
WORDS += ["evaluation.images=16", "evaluation.metrics=[teacher_rmse]", "evaluation.teacher_steps=[1,4]"]
WORDS += ["evaluation.timing=off", "device=cpu"]


def command(folder: Path, *words: str) -> list[str]:
    (folder / "plugins").mkdir(exist_ok=True)
    (folder / "plugins" / "hands_plugin.py").write_text(FINE_DIES_SLOW)
    results = f"results_dir={folder / 'results'}"
    return [
        sys.executable,
        "-m",
        "distillbench",
        "run",
        "--plugins-dir",
        str(folder / "plugins"),
        *WORDS,
        results,
        *words,
    ]


def rows(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "results" / "run" / "table.parquet").set_index("method")


def cell(folder: Path, method: str) -> Path:
    for file in (folder / "results").glob("cells/*/train.json"):
        if json.loads(file.read_bytes())["inputs"]["method"]["name"] == method:
            return file.parent
    raise LookupError(method)


def wait_for(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_crash_fails_one_row(tmp_path, capfd):
    words = ["methods=[dies,fine]"]
    done = subprocess.run(command(tmp_path, *words), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = rows(tmp_path)
    assert found.loc["fine", "status"] == "ok" and (found.loc["teacher:ddim", "status"] == "ok").all()
    assert found.loc["dies", "status"] == "failed"
    assert found.loc["dies", "reason"].startswith("the process died (killed by SIGABRT); its last words: so long")
    assert "so long" in (cell(tmp_path, "dies") / "log.txt").read_text()
    assert "fine (seed 0): training" in (cell(tmp_path, "fine") / "log.txt").read_text()
    with pytest.raises(SystemExit, match="1"):
        commands.main(command(tmp_path, *words)[3:])
    assert "not ok in an earlier run: dies (seed 0)" in capfd.readouterr().out
    pd.testing.assert_frame_equal(rows(tmp_path), found)


@pytest.mark.nightly
def test_a_terminated_run_saves_a_state_and_resumes(tmp_path):
    words = ["methods=[slow]"]
    running = subprocess.Popen(command(tmp_path, *words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = wait_for(lambda: [f for f in (tmp_path / "results").glob("cells/*/log.txt") if "training" in f.read_text()])
    time.sleep(1.5)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 143, out + err
    assert "interrupted; progress is saved: run the same command again to resume" in err
    found = rows(tmp_path)
    assert found.loc["slow", "status"] == "interrupted"
    assert found.loc["slow", "reason"].startswith("SIGTERM: the same command resumes it")
    (state,) = log[0].parent.glob("resume/0/state-*.safetensors")
    images = int(state.name.split("-")[1])
    assert 0 < images < 800
    done = subprocess.run(command(tmp_path, *words), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"continuing after {images:,} images" in done.stdout
    assert rows(tmp_path).loc["slow", ["status", "train_images"]].to_list() == ["ok", 800]
    assert not (log[0].parent / "resume").exists()


@pytest.mark.nightly
def test_the_process_of_a_cell_saves_a_state_when_the_run_is_killed(tmp_path):
    running = subprocess.Popen(
        command(tmp_path, "methods=[slow]"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = wait_for(lambda: [f for f in (tmp_path / "results").glob("cells/*/log.txt") if "training" in f.read_text()])
    started = psutil.Process(running.pid).children(recursive=True)
    (worker,) = (child for child in started if str(log[0]) in [file.path for file in child.open_files()])
    assert is_locked(log[0].parent)
    running.kill()
    running.wait()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    assert not is_locked(log[0].parent)
    assert list(log[0].parent.glob("resume/0/state-*.safetensors"))


# --- workers ---------------------------------------------------------------------------------------------------------


def tells(argument, tell):
    tell("say", argument)
    tell("answer", argument * 2)


def raises(argument, tell):
    raise ValueError("no luck\nin two lines")


def dies(argument, tell):
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_worker_sends_messages(tmp_path):
    with Worker(tells, 21, tmp_path / "log.txt") as worker:
        assert (worker.news(), worker.news()) == (("say", 21), ("answer", 42))


@pytest.mark.parametrize(
    ("function", "reason"),
    [(raises, "ValueError: no luck"), (dies, r"the process died \(killed by SIGSEGV\); its last words: last words")],
)
def test_a_worker_that_fails_gives_the_reason(tmp_path, function, reason):
    with Worker(function, 1, tmp_path / "log.txt") as worker, pytest.raises(ProcessError, match=reason):
        worker.news()


def hangs(progress, stop):
    time.sleep(1000)


def dies_of_the_signal(progress, stop):
    """Like a process that is too young to save anything."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    progress.say("ready")
    time.sleep(1000)


def test_a_process_that_hangs_is_killed_after_its_time_limit(tmp_path):
    worker = SubprocessWorker(Progress(None), Stop(), 0.0)
    with pytest.raises(WorkerError, match=r"killed after cell_seconds=3") as error:
        worker._call(hangs, (), tmp_path / "log.txt", 3.0)
    assert error.value.status == "timeout"


def test_a_process_that_dies_of_the_signal_was_interrupted(tmp_path):
    stop = Stop()
    worker = SubprocessWorker(StopOnFirstLine(stop), stop, 0.0)
    with pytest.raises(Interrupted, match="SIGTERM"):
        worker._call(dies_of_the_signal, (), tmp_path / "log.txt", 0.0)


class StopOnFirstLine(Progress):
    def __init__(self, stop: Stop) -> None:
        super().__init__(None)
        self.stop = stop

    def say(self, line: str) -> None:
        self.stop.ask("SIGTERM")


def test_a_function_that_cannot_be_pickled_is_an_error(tmp_path):
    with pytest.raises(ProcessError, match="cannot be sent to another process"):
        Worker(lambda argument, tell: None, 1, tmp_path / "log.txt")


# --- claims and signals ----------------------------------------------------------------------------------------------


def test_one_process_at_a_time_holds_a_claim(tmp_path):
    folder = tmp_path / "cell"
    assert not is_locked(folder)
    with try_lock(folder) as mine:
        assert mine and is_locked(folder)
        with try_lock(folder) as again:
            assert not again
    assert not is_locked(folder)
    with wait_for_lock(folder, "it", Progress(None)):
        assert is_locked(folder)


def test_a_signal_raises_unless_the_code_asks_for_it():
    stop = Stop()
    with pytest.raises(Interrupted, match="SIGTERM"):
        stop.ask("SIGTERM")
    stop = Stop()
    with stop.patiently():
        stop.ask("SIGTERM")
        stop.ask("SIGTERM")  # sent to the process group, and passed on by the parent
        assert stop() and stop.name == "SIGTERM"
        stop.since -= 60
        with pytest.raises(Interrupted):
            stop.ask("SIGTERM")
