"""The server that worker processes are forked from, and signals that reach it."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from distillbench.system.subprocesses import ProcessError, Worker, _call, call_in_fresh_process

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are spawned")


def blocked(_: object) -> set[signal.Signals]:
    """The signals that are blocked in this process."""
    return {signal.Signals(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}


def test_signals_that_stop_a_run_do_not_end_the_server_and_reach_workers(tmp_path: Path) -> None:
    before = blocked(None)
    assert not {signal.SIGINT, signal.SIGTERM} & call_in_fresh_process(blocked, None, 60)
    assert blocked(None) == before
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    pid = server._forkserver_pid
    with Worker(_call, (blocked, None), tmp_path / "log.txt") as worker:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
        assert worker.poll(60) and worker.news()[0] == "answer"
        worker.process.join(60)
        assert worker.process.exitcode == 0  # 255: the server has died
    call_in_fresh_process(blocked, None, 60)
    assert server._forkserver_pid == pid


def test_a_server_that_dies_is_one_line_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> int:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(forkserver, "read_signed", die)
    with pytest.raises(ProcessError, match="server process that workers are forked from has died"):
        call_in_fresh_process(blocked, None, 60)
