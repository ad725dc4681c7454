"""Workers: a cell is run by this process, or by a process started for it. Which cells run where: executors.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch

from distillbench.errors import UserError
from distillbench.records.layout import ResultsFolder
from distillbench.runs.cell import Policy, found_cell, record_sha256, run_cell, write_failure
from distillbench.runs.cell_result import CellDescription, CellResult, describe_cell
from distillbench.runs.cell_task import CellTask, cells_of
from distillbench.runs.shared_context import Cell
from distillbench.storage.hash_cache import HashCache
from distillbench.storage.locks import is_locked, try_lock, wait_for_lock
from distillbench.system.environment import environment
from distillbench.system.progress import Progress, Step
from distillbench.system.signals import Interrupted, Stop, stopping
from distillbench.system.subprocesses import ProcessError, Worker
from distillbench.teachers.teacher import Teacher

LOG = "log.txt"  # in the folder of a cell: the output of its worker processes
SECONDS_OF_GRACE = 60.0  # between the request to stop and the kill
SECONDS_BETWEEN_UPDATES = 0.2  # of progress


class WorkerError(Exception):
    """The process that ran a cell returned no result. `status` is the status of the cell's rows."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Scan:
    """The cells of a run as they are on the disk, and the environment in which they will run."""

    descriptions: list[CellDescription]
    results: list[CellResult | None]  # of earlier runs; None: something is left to do
    environment: dict[str, Any]


class CellWorker(Protocol):
    """Scans and runs cells."""

    def scan(self, cells: Sequence[Cell], policy: Policy) -> Scan:
        """Read what earlier runs left. Trains or loads the teacher if needed; raises UserError if it does not fit."""

    def run(self, cell: Cell, description: CellDescription, policy: Policy) -> CellResult | None:
        """Finish `cell`; None if another process runs it. Raises WorkerError, Interrupted, UserError."""


# --- functions for every worker --------------------------------------------------------------------------------------


def scan_cells(cells: Sequence[Cell], policy: Policy, progress: Progress) -> Scan:
    """Read what earlier runs left of `cells`. Each weights file is hashed once, and again only if it has changed."""
    with ExitStack() as stack:
        for shared in {id(cell.shared): cell.shared for cell in cells}.values():
            stack.enter_context(shared.identities_cached())
        folders = {cell.shared.config.results_dir for cell in cells}
        files = {folder: HashCache(ResultsFolder.of(folder).cells) for folder in folders}
        descriptions = [describe_cell(cell, load_teacher(cell, progress)) for cell in cells]
        if policy.force:  # cells that share a training do it again once, not once each
            descriptions = [replace(one, stale=record_sha256(one)) for one in descriptions]
        results = [
            found_cell(cell, description, files[cell.shared.config.results_dir], progress, policy)
            for cell, description in zip(cells, descriptions, strict=True)
        ]
    for one in files.values():
        one.keep()
    shared = cells[0].shared
    return Scan(descriptions, results, environment(shared.device, shared.config.threads))


def load_teacher(cell: Cell, progress: Progress) -> Teacher:
    """The teacher. If it has to be trained, one process trains it and the others wait."""
    shared = cell.shared
    torch.set_num_threads(shared.config.threads)
    if shared.teacher is None and shared.source.plan().images:
        with wait_for_lock(shared.folder.cache("teachers"), "the teacher", progress):
            return shared.load_teacher(progress)
    return shared.load_teacher(progress)


def claim_and_run(
    cell: Cell, description: CellDescription, policy: Policy, progress: Progress, stop: Stop
) -> CellResult | None:
    """Finish `cell` in this process; None if another process has its lock.

    Raises WorkerError if the cell has another key here than where `description` was made.
    """
    here = replace(describe_cell(cell, load_teacher(cell, progress)), stale=description.stale)
    if here.train_key != description.train_key:
        device = cell.shared.device.partition(":")[0]
        raise WorkerError(
            "failed", f"the worker process computes another key for this cell (device {device}, other plugins?)"
        )
    with try_lock(description.folder) as mine:
        return run_cell(cell, here, progress, policy, stop) if mine else None


def run_or_record(worker: CellWorker, cell: Cell, description: CellDescription, policy: Policy) -> CellResult | None:
    """The result of `cell`, or rows with the reason if its process returned none; None if another process runs it.

    Raises Interrupted or UserError.
    """
    if is_locked(description.folder):
        return None
    try:
        return worker.run(cell, description, policy)
    except WorkerError as error:
        return record_failure(cell, description, error)


def record_failure(cell: Cell, description: CellDescription, error: WorkerError) -> CellResult:
    """The rows of a cell whose process returned no result. Its records are written, so that it is not run again."""
    write_failure(cell, description, error.status, str(error))
    return CellResult(description, description.status_rows(error.status, str(error)))


def scan_tasks(tasks: list[CellTask], policy: Policy, progress: Progress, stop: Stop) -> Scan:
    return scan_cells(cells_of(tasks), policy, progress)


def run_task(
    task: CellTask, description: CellDescription, policy: Policy, progress: Progress, stop: Stop
) -> CellResult | None:
    (cell,) = cells_of([task])
    return claim_and_run(cell, description, policy, progress, stop)


# --- workers ---------------------------------------------------------------------------------------------------------


class InProcessWorker:
    """Runs cells in this process."""

    def __init__(self, progress: Progress, stop: Stop) -> None:
        self.progress, self.stop = progress, stop

    def scan(self, cells: Sequence[Cell], policy: Policy) -> Scan:
        return scan_cells(cells, policy, self.progress)

    def run(self, cell: Cell, description: CellDescription, policy: Policy) -> CellResult | None:
        return claim_and_run(cell, description, policy, self.progress, self.stop)


class SubprocessWorker:
    """Starts a process for each scan and each cell, asks it to stop when this one is, and kills it after a time limit.

    `seconds`: the limit of a cell (0: none). `device`: to be used instead of the run's.
    """

    def __init__(self, progress: Progress, stop: Stop, seconds: float, device: str = "") -> None:
        self.progress, self.stop, self.seconds, self.device = progress, stop, seconds, device

    def scan(self, cells: Sequence[Cell], policy: Policy) -> Scan:
        tasks = [CellTask.of(cell, self.device) for cell in cells]
        log = cells[0].shared.folder.cells / LOG
        try:
            return self._call(scan_tasks, (tasks, policy), log, 0.0)
        except WorkerError as error:
            raise UserError(f"the teacher cannot be made: {error} (see {log})") from error

    def run(self, cell: Cell, description: CellDescription, policy: Policy) -> CellResult | None:
        arguments = CellTask.of(cell, self.device), description, policy
        return self._call(run_task, arguments, description.folder / LOG, self.seconds)

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...], log: Path, seconds: float) -> Any:
        """``function(*arguments, progress, stop)`` in a separate process."""
        end = time.monotonic() + seconds if seconds else float("inf")
        steps: dict[int, tuple[Any, Step]] = {}
        try:
            with Worker(_in_subprocess, (function, arguments), log) as worker, self.stop.patiently():
                while True:
                    if self.stop():
                        worker.end(SECONDS_OF_GRACE, lambda: self.stop.again)
                        raise Interrupted(self.stop.name)
                    if time.monotonic() > end:
                        raise WorkerError("timeout", f"killed after cell_seconds={seconds:g}")
                    if not worker.poll(0.2):
                        continue
                    kind, *values = worker.news()
                    if kind == "result":
                        return values[0]
                    _handle(kind, values, steps, self.progress)
        except ProcessError as error:
            if self.stop():  # the signal came before the process could save anything
                raise Interrupted(self.stop.name) from error
            raise WorkerError("failed", str(error)) from error
        finally:
            for context, _ in steps.values():
                context.__exit__(None, None, None)


def _handle(kind: str, values: list[Any], steps: dict[int, tuple[Any, Step]], progress: Progress) -> None:
    """Show the progress of a worker process, or raise its error."""
    if kind == "say":
        progress.say(values[0])
    elif kind == "begin":
        context = progress.step(values[1])
        steps[values[0]] = (context, context.__enter__())
    elif kind == "advance":
        steps[values[0]][1].advance(*values[1:])
    elif kind == "end":
        steps.pop(values[0])[0].__exit__(None, None, None)
    elif kind == "user error":
        raise UserError(values[0])
    elif kind == "worker error":
        raise WorkerError(*values)
    elif kind == "interrupted":
        raise Interrupted(values[0])


# --- in the worker process -------------------------------------------------------------------------------------------


class PipeProgress(Progress):
    """Progress that is sent to the parent process; lines are printed, too, which puts them into the log."""

    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__(None)
        self.send, self.count = send, 0

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.send("say", line)

    @contextmanager
    def step(self, label: str) -> Iterator[Step]:
        self.count += 1
        number, last = self.count, 0.0

        def show(fraction: float, note: str) -> None:
            nonlocal last
            if time.monotonic() - last > SECONDS_BETWEEN_UPDATES:
                last = time.monotonic()
                self.send("advance", number, fraction, note)

        print(label, flush=True)
        self.send("begin", number, label)
        yield Step(show)
        self.send("end", number)


def _in_subprocess(call: tuple[Callable[..., Any], tuple[Any, ...]], send: Callable[..., None]) -> None:
    """Call the function and send its result or its error. Stops on a signal, and when the parent process is gone."""
    function, arguments = call
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        with stopping() as stop:
            send("result", function(*arguments, PipeProgress(send), stop))
    except UserError as error:
        send("user error", str(error))
    except Interrupted as interrupted:
        send("interrupted", interrupted.name)
    except WorkerError as error:
        send("worker error", error.status, str(error))
    sys.stdout.flush()


def _stop_with_parent() -> None:
    """Send SIGTERM to this process once its parent has died."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
