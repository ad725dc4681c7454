"""Cells in processes of their own: crashes, time limits, signals and orphans hurt what they must, and nothing else."""

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

from distillbench.claims import claimed, is_claimed, waiting
from distillbench.hands import Ended, OtherHands
from distillbench.processes import ProcessError, Worker
from distillbench.progress import Progress
from distillbench.signals import Interrupted, Stop

PLUGIN = """
import os, time
import torch
from distillbench import Method, MethodConfig, hookimpl


class Fine(Method):
    "One step."
    name, paper, needs_data = "fine", "none", False
    Config = MethodConfig

    def at_T(self, eps):
        return torch.full((len(eps), 1, 1, 1), self.teacher.schedule.t_max, dtype=torch.float64)

    def train_step(self, batch):
        eps = batch.noise()
        yield self.student, (self.student(eps, self.at_T(eps)) - eps).square().mean()

    def sample(self, noise, nfe, c):
        return self.student(noise(0), self.at_T(noise(0)))


class Dies(Fine):
    "Aborts in its third step."
    name = "dies"
    steps = 0

    def after_step(self):
        self.steps += 1
        if self.steps == 3:
            print("so long", flush=True)
            os.abort()


class Slow(Fine):
    "Takes its time."
    name = "slow"

    def after_step(self):
        time.sleep(0.05)


@hookimpl(api=1)
def register_methods(register):
    for cls in (Fine, Dies, Slow):
        register(cls)
"""
WORDS = ["dataset=gmm", "teacher=gmm", "teacher.width=16", "budget.images=800", "batch_size=10", "run_name=run"]
WORDS += ["evaluation.images=16", "evaluation.metrics=[teacher_rmse]", "evaluation.teacher_steps=[1,4]"]
WORDS += ["evaluation.timing=off", "device=cpu"]


def command(folder: Path, *words: str) -> list[str]:
    (folder / "plugins").mkdir(exist_ok=True)
    (folder / "plugins" / "hands_plugin.py").write_text(PLUGIN)
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
def test_a_crash_hurts_one_row(tmp_path):
    words = ["methods=[dies,fine]"]
    done = subprocess.run(command(tmp_path, *words), capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = rows(tmp_path)
    assert found.loc["fine", "status"] == "ok" and (found.loc["teacher:ddim", "status"] == "ok").all()
    assert found.loc["dies", "status"] == "failed"
    assert found.loc["dies", "reason"].startswith("the process died (killed by SIGABRT); its last words: so long")
    assert "so long" in (cell(tmp_path, "dies") / "log.txt").read_text()
    assert "fine (seed 0): training" in (cell(tmp_path, "fine") / "log.txt").read_text()
    again = subprocess.run(command(tmp_path, *words), capture_output=True, text=True)
    assert again.returncode == 1 and "not ok in an earlier run: dies (seed 0)" in again.stdout
    pd.testing.assert_frame_equal(rows(tmp_path), found)


@pytest.mark.slow
def test_a_terminated_run_keeps_a_state_and_goes_on(tmp_path):
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
    assert found.loc["slow", "reason"].startswith("SIGTERM: the same command goes on from there")
    (state,) = log[0].parent.glob("resume/1/state-*.safetensors")
    images = int(state.name.split("-")[1])
    assert 0 < images < 800
    done = subprocess.run(command(tmp_path, *words), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on after {images:,} images" in done.stdout
    assert rows(tmp_path).loc["slow", ["status", "train_images"]].to_list() == ["ok", 800]
    assert not (log[0].parent / "resume").exists()


@pytest.mark.slow
def test_when_the_run_is_killed_the_cells_process_ends_with_a_state(tmp_path):
    running = subprocess.Popen(
        command(tmp_path, "methods=[slow]"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = wait_for(lambda: [f for f in (tmp_path / "results").glob("cells/*/log.txt") if "training" in f.read_text()])
    (worker,) = (child for child in psutil.Process(running.pid).children() if "spawn_main" in " ".join(child.cmdline()))
    assert is_claimed(log[0].parent)
    running.kill()
    running.wait()
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    assert not is_claimed(log[0].parent)
    assert list(log[0].parent.glob("resume/1/state-*.safetensors"))


# --- workers ---------------------------------------------------------------------------------------------------------


def tells(argument, tell):
    tell("say", argument)
    tell("answer", argument * 2)


def raises(argument, tell):
    raise ValueError("no luck\nin two lines")


def dies(argument, tell):
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_worker_tells_how_it_goes_and_answers(tmp_path):
    with Worker(tells, 21, tmp_path / "log.txt") as worker:
        assert (worker.news(), worker.news()) == (("say", 21), ("answer", 42))


@pytest.mark.parametrize(
    ("function", "reason"),
    [(raises, "ValueError: no luck"), (dies, r"the process died \(killed by SIGSEGV\); its last words: last words")],
)
def test_a_worker_that_fails_says_why(tmp_path, function, reason):
    with Worker(function, 1, tmp_path / "log.txt") as worker, pytest.raises(ProcessError, match=reason):
        worker.news()


def hangs(argument, tell):
    tell("say", "here I am")
    time.sleep(1000)


def stops(argument, tell):
    """Dies of the signal, as a process does that has not come far enough to keep anything."""
    tell("say", "here I am")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(1000)


def test_a_worker_that_hangs_is_killed_when_its_time_is_up(tmp_path):
    hands = OtherHands(Progress(None), Stop(), 0.0)
    with pytest.raises(Ended, match=r"killed after cell_seconds=15") as ended:
        hands._answer(hangs, None, tmp_path / "log.txt", 15.0)
    assert ended.value.status == "timeout"


def test_a_worker_that_dies_of_the_signal_was_interrupted(tmp_path):
    stop = Stop()
    hands = OtherHands(Ask(stop), stop, 0.0)
    with pytest.raises(Interrupted, match="SIGTERM"):
        hands._answer(stops, None, tmp_path / "log.txt", 0.0)


class Ask(Progress):
    """Asks to stop as soon as something is said."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(None)
        self.stop = stop

    def say(self, line: str) -> None:
        self.stop.ask("SIGTERM")


def test_what_cannot_be_handed_over_is_said(tmp_path):
    with pytest.raises(ProcessError, match="cannot be handed to another process"):
        Worker(lambda argument, tell: None, 1, tmp_path / "log.txt")


# --- claims and signals ----------------------------------------------------------------------------------------------


def test_a_claim_is_held_by_one(tmp_path):
    folder = tmp_path / "cell"
    assert not is_claimed(folder)
    with claimed(folder) as mine:
        assert mine and is_claimed(folder)
        with claimed(folder) as again:
            assert not again
    assert not is_claimed(folder)
    with waiting(folder, "it", Progress(None)):
        assert is_claimed(folder)


def test_a_signal_ends_what_does_not_ask_and_is_told_to_what_does():
    stop = Stop()
    with pytest.raises(Interrupted, match="SIGTERM"):
        stop.ask("SIGTERM")
    stop = Stop()
    with stop.patiently():
        stop.ask("SIGTERM")
        stop.ask("SIGTERM")  # to the whole group, and passed on
        assert stop() and stop.name == "SIGTERM"
        stop.since -= 60
        with pytest.raises(Interrupted):
            stop.ask("SIGTERM")
