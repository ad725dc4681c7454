"""A disk that is full at any write: the run ends with a message, leaves no partial file, and can be resumed."""

from __future__ import annotations

import errno
import io
import os
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.console import Console

import distillbench.storage.files
from distillbench.cli import commands
from distillbench.execution.run import run
from distillbench.records.table import LAST
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.storage.files import TEMPORARY
from distillbench.system.progress import Progress

WORDS = ["methods=[pd,direct]", "dataset=gmm", "teacher=gmm", "teacher.width=16", "isolate=false", "run_name=run"]
WORDS += ["batch_size=32", "budget.images=320", "methods.direct.pairs=64", "methods.direct.steps=4", "states.seconds=0"]
WORDS += ["evaluation.images=16", "evaluation.metrics=[teacher_rmse]", "evaluation.teacher_steps=[1,4]", "device=cpu"]
WORDS += ["evaluation.timing=off", "evaluation.checkpoints=1"]
UNSTEADY = [name for name in LAST if "seconds" in name or "mib" in name or "machine_load" in name]


class Disk:
    """Counts calls of fsync and is full after `room` of them."""

    def __init__(self, room: int) -> None:
        self.room, self.count = room, 0

    def fsync(self, handle: int) -> None:
        self.count += 1
        if self.count > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def go(registry, results, monkeypatch, room: int = 10**9) -> tuple[Disk, pd.DataFrame | None]:
    disk = Disk(room)
    with monkeypatch.context() as patch:
        patch.setattr(distillbench.storage.files, "os", SimpleNamespace(**vars(os) | {"fsync": disk.fsync}))
        configs = compose_runs([*WORDS, f'results_dir="{results}"'], registry)
        try:
            table = run(
                plan(configs, registry), configs, Progress(Console(file=io.StringIO())), lambda rows: None
            ).table
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return disk, None
    return disk, table.drop(columns=UNSTEADY)


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write_loses_nothing(registry, tmp_path, monkeypatch):
    disk, expected = go(registry, tmp_path / "whole", monkeypatch)
    assert expected is not None and disk.count > 30
    stopped = 0
    for room in range(0, disk.count, disk.count // 4):
        folder = tmp_path / str(room)
        _, table = go(registry, folder, monkeypatch, room)
        stopped += table is None
        assert not list(folder.rglob(f"{TEMPORARY}*"))
        _, again = go(registry, folder, monkeypatch)
        pd.testing.assert_frame_equal(again, expected)
    assert stopped >= 3


def test_a_run_whose_samples_do_not_fit_on_the_disk_does_not_begin(tmp_path, monkeypatch, capsys):
    """16 samples of two float32 values are 128 bytes."""
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=127))
    with pytest.raises(SystemExit) as exit:
        commands.main(["run", *WORDS, f"results_dir={tmp_path / 'results'}"])
    assert exit.value.code == 2 and not list(tmp_path.rglob("train.json"))
    assert "scoring a row, whose samples are stored in float32, takes 0.0 GiB on disk" in capsys.readouterr().err


def test_the_command_line_reports_a_full_disk(tmp_path, monkeypatch, capsys):
    disk = Disk(0)
    monkeypatch.setattr(distillbench.storage.files, "os", SimpleNamespace(**vars(os) | {"fsync": disk.fsync}))
    with pytest.raises(SystemExit) as exit:
        commands.main(["run", *WORDS, f"results_dir={tmp_path}"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
