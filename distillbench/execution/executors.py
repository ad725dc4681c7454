"""Executors: cells run one after the other, in parallel on this machine, or as jobs of a cluster.

An executor receives cells and yields their results in the order in which they finish. A file lock keeps two
processes from running the same cell.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import Protocol

from distillbench.errors import UserError
from distillbench.execution.jobs import Backend, Job, JobResult, run_task_in_job
from distillbench.execution.workers import (
    CellWorker,
    InProcessWorker,
    Scan,
    SubprocessWorker,
    WorkerError,
    record_failure,
    run_or_record,
    scan_tasks,
)
from distillbench.records.layout import ResultsFolder
from distillbench.runs.cell import Policy
from distillbench.runs.cell_result import CellDescription, CellResult
from distillbench.runs.cell_task import CellTask
from distillbench.runs.config import RunConfig
from distillbench.runs.executor_config import LocalConfig, RayConfig, SubmititConfig
from distillbench.runs.shared_context import Cell
from distillbench.storage.locks import is_locked, try_lock
from distillbench.system.progress import Progress
from distillbench.system.signals import Interrupted, Stop

SECONDS_BETWEEN_POLLS = 0.2  # of threads
SECONDS_BETWEEN_RESULTS = 0.5  # of jobs

Todo = Mapping[int, tuple[Cell, CellDescription]]  # by the cell's index
Results = Generator[tuple[int, CellResult | None], None, None]


class Executor(Protocol):
    """Distributes cells, `at_once` at a time.

    `poll_seconds`: how long to wait before asking again for cells that other processes run.
    """

    poll_seconds: float
    at_once: int

    def scan(self, cells: Sequence[Cell], policy: Policy) -> Scan:
        """Read what earlier runs left. Raises UserError if the teacher does not fit, Interrupted."""

    def run(self, todo: Todo, policy: Policy) -> Results:
        """The result of each cell; None: another process runs it. Ends early after a failure with --fail-fast.

        Raises UserError or Interrupted after all running cells have ended. They are also ended when this is closed.
        """

    def close(self) -> None:
        """Free what the executor holds."""


def executor_of(config: RunConfig, progress: Progress, stop: Stop) -> Executor:
    """The executor that the settings choose. Raises UserError if its package is missing."""
    where = config.executor
    if isinstance(where, LocalConfig):
        if where.count > 1:
            return PoolExecutor(progress, stop, config.cell_seconds, where)
        if not config.isolate:
            return SerialExecutor(InProcessWorker(progress, stop))
        device = where.devices[0] if where.devices else ""
        return SerialExecutor(SubprocessWorker(progress, stop, config.cell_seconds, device))
    if isinstance(where, SubmititConfig):
        from distillbench.execution.submitit_backend import FOLDER, SubmititBackend

        jobs = ResultsFolder.of(config.results_dir).cache(FOLDER)
        return RemoteExecutor(SubmititBackend(where, jobs), where.requeues, progress, stop)
    assert isinstance(where, RayConfig)
    from distillbench.execution.ray_backend import RayBackend

    return RemoteExecutor(RayBackend(where), where.retries, progress, stop)


def _stops_the_run(result: CellResult | None, policy: Policy) -> bool:
    return policy.fail_fast and result is not None and not result.ok


class SerialExecutor:
    """Runs the cells in order, one at a time."""

    poll_seconds = 1.0
    at_once = 1

    def __init__(self, worker: CellWorker) -> None:
        self.worker = worker

    def scan(self, cells: Sequence[Cell], policy: Policy) -> Scan:
        return self.worker.scan(cells, policy)

    def run(self, todo: Todo, policy: Policy) -> Results:
        for index, (cell, description) in todo.items():
            result = run_or_record(self.worker, cell, description, policy)
            yield index, result
            if _stops_the_run(result, policy):
                return

    def close(self) -> None:
        pass


class PoolExecutor:
    """Runs several cells at a time on this machine: one thread for each, which watches a process on one device.

    The threads share a Stop, so that an error in one ends the others as a signal would.
    """

    poll_seconds = 1.0

    def __init__(self, progress: Progress, stop: Stop, seconds: float, where: LocalConfig) -> None:
        self.stop, self.own_stop, self.at_once = stop, Stop(), where.count
        devices = where.devices or [""]
        self.workers = [
            SubprocessWorker(progress, self.own_stop, seconds, devices[k % len(devices)]) for k in range(where.count)
        ]
        self.scanner = SubprocessWorker(progress, stop, seconds, devices[0])

    def scan(self, cells: Sequence[Cell], policy: Policy) -> Scan:
        return self.scanner.scan(cells, policy)

    def run(self, todo: Todo, policy: Policy) -> Results:
        self.own_stop.name, self.own_stop.again = "", False
        waiting, free = collections.deque(todo.items()), list(self.workers)
        running: dict[Future[CellResult | None], tuple[int, SubprocessWorker]] = {}
        with self.stop.patiently(), ThreadPoolExecutor(len(self.workers)) as threads:
            try:
                while running or (waiting and not self.stop()):
                    self.own_stop.name = self.stop.name
                    while waiting and free and not self.stop():
                        index, (cell, description) = waiting.popleft()
                        worker = free.pop(0)
                        running[threads.submit(run_or_record, worker, cell, description, policy)] = index, worker
                    for future in wait(running, SECONDS_BETWEEN_POLLS, FIRST_COMPLETED).done:
                        index, worker = running.pop(future)
                        free.append(worker)
                        if isinstance(future.exception(), Interrupted):
                            continue
                        result = future.result()
                        yield index, result
                        if _stops_the_run(result, policy):
                            waiting.clear()
            finally:
                self.own_stop.name = self.own_stop.name or self.stop.name or "another cell's error"
                self._wait_for_all(running)
        if self.stop():
            raise Interrupted(self.stop.name)

    def _wait_for_all(self, running: Iterable[Future[CellResult | None]]) -> None:
        """Wait for cells that were asked to stop. A second signal kills them."""
        left = set(running)
        while left:
            self.own_stop.again = self.stop.again
            left = wait(left, SECONDS_BETWEEN_POLLS).not_done

    def close(self) -> None:
        pass


class RemoteExecutor:
    """Runs the cells as jobs on other machines. The scan is a job, too: cache keys depend on the machine's device.

    A job that was ended by a signal on its machine, and not here, is submitted again, at most `retries` times.
    """

    poll_seconds = 30.0

    def __init__(self, backend: Backend, retries: int, progress: Progress, stop: Stop) -> None:
        self.backend, self.retries, self.progress, self.stop = backend, retries, progress, stop
        self.at_once = backend.max_jobs
        for note in backend.notes:
            progress.say(note)

    def scan(self, cells: Sequence[Cell], policy: Policy) -> Scan:
        self.progress.say(f"reading the records of earlier runs, in one of the {self.backend.job_name}")
        tasks = [CellTask.of(cell) for cell in cells]
        with closing(self._results([0], lambda _: Job.of(scan_tasks, tasks, policy))) as results:
            ((_, result),) = results
        if result.kind != "ok":
            raise UserError(f"the teacher cannot be made: {_failure(result)}")
        return result.value

    def run(self, todo: Todo, policy: Policy) -> Results:
        def job_of(index: int) -> Job:
            cell, description = todo[index]
            return Job.of(run_task_in_job, CellTask.of(cell), description, policy)

        claimed_elsewhere = {index for index, (_, description) in todo.items() if is_locked(description.folder)}
        yield from ((index, None) for index in claimed_elsewhere)
        with closing(self._results([index for index in todo if index not in claimed_elsewhere], job_of)) as results:
            for index, job_result in results:
                result = job_result.value if job_result.kind == "ok" else _record_failure(*todo[index], job_result)
                yield index, result
                if _stops_the_run(result, policy):
                    return

    def _results(
        self, indices: Sequence[int], job_of: Callable[[int], Job]
    ) -> Generator[tuple[int, JobResult], None, None]:
        """Results as they arrive. Jobs that were interrupted are submitted again and yield nothing."""
        waiting, running, begun = collections.deque(indices), dict[int, int](), collections.Counter[int]()
        name, count = self.backend.job_name, len(indices)
        with self.stop.patiently(), self.progress.step(f"{name} ({count:,})") as step:
            try:
                while waiting or running:
                    if self.stop():
                        raise Interrupted(self.stop.name)
                    batch = [waiting.popleft() for _ in range(min(len(waiting), self.backend.max_jobs - len(running)))]
                    begun.update(batch)
                    numbers = self.backend.submit([job_of(index) for index in batch]) if batch else []
                    running |= zip(numbers, batch, strict=True)
                    for number, result in self.backend.results(list(running), SECONDS_BETWEEN_RESULTS):
                        index = running.pop(number)
                        for line in result.lines:
                            self.progress.say(line)
                        if result.kind == "user error":
                            raise UserError(result.value)
                        if result.kind == "interrupted" and begun[index] <= self.retries:
                            self.progress.say(f"one of the {name} was ended by {result.value}; it is submitted again")
                            waiting.append(index)
                            continue
                        yield index, result
                    left = len(running) + len(waiting)
                    step.advance(1 - left / count, f"{count - left:,} done")
            finally:
                self._cancel(list(running))

    def _cancel(self, running: list[int]) -> None:
        if running:
            saved = "their training states are saved, and the same command resumes them"
            self.progress.say(f"{self.backend.job_name} that are cancelled: {len(running):,}; {saved}")
            self.backend.cancel(running)

    def close(self) -> None:
        self.backend.close()


def _failure(result: JobResult) -> WorkerError:
    status, reason = ("failed", f"ended by {result.value}") if result.kind == "interrupted" else result.value
    return WorkerError(status, reason)


def _record_failure(cell: Cell, description: CellDescription, result: JobResult) -> CellResult | None:
    """The rows of a cell whose job returned none; None if a process of the job still runs it."""
    with try_lock(description.folder) as mine:
        return record_failure(cell, description, _failure(result)) if mine else None
