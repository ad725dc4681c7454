"""Jobs for other machines, and backends that submit them and return their results.

Both machines must see the same results folder, and the same paths below the folder in which the run was started.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from distillbench.errors import UserError
from distillbench.execution.workers import CellWorker, InProcessWorker, SubprocessWorker, WorkerError, run_or_record
from distillbench.runs.cell import Policy
from distillbench.runs.cell_result import CellDescription, CellResult
from distillbench.runs.cell_task import CellTask, cells_of
from distillbench.system.progress import Progress
from distillbench.system.signals import Interrupted, Stop
from distillbench.system.subprocesses import in_words


def run_task_in_job(
    task: CellTask, description: CellDescription, policy: Policy, progress: Progress, stop: Stop
) -> CellResult | None:
    """Run a cell in a job: in the job's process, or with ``isolate`` in a separate process."""
    (cell,) = cells_of([task])
    worker: CellWorker = InProcessWorker(progress, stop)
    if task.config.isolate:
        worker = SubprocessWorker(progress, stop, task.config.cell_seconds)
    return run_or_record(worker, cell, description, policy)


@dataclass(frozen=True)
class JobResult:
    """How a job ended, and the lines that it printed.

    `value` by kind: "ok": what the function returned; "user error": the message; "interrupted": the name of the signal;
    "failed": (status, reason).
    """

    kind: Literal["ok", "user error", "interrupted", "failed"]
    value: Any
    lines: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A pickled call, the working directory, and the import path: plugins may be single files."""

    pickled: bytes
    folder: str
    path: tuple[str, ...]

    @staticmethod
    def of(function: Callable[..., Any], *arguments: Any) -> Job:
        """The job that calls ``function(*arguments, progress, stop)``."""
        try:
            pickled = pickle.dumps((function, arguments))
        except Exception as error:  # a third-party class may raise anything
            raise UserError(f"a cell cannot be sent to another machine: {in_words(error)}") from error
        return Job(pickled, os.getcwd(), tuple(os.path.abspath(folder) for folder in sys.path))

    def run(self, stop: Stop) -> JobResult:
        """Make the call. Errors are results."""
        progress = RecordingProgress()
        try:
            os.chdir(self.folder)
            sys.path += [folder for folder in self.path if folder not in sys.path]
            function, arguments = pickle.loads(self.pickled)
            return JobResult("ok", function(*arguments, progress, stop), progress.lines)
        except UserError as error:
            return JobResult("user error", str(error), progress.lines)
        except Interrupted as interrupted:
            return JobResult("interrupted", interrupted.name, progress.lines)
        except WorkerError as error:
            return JobResult("failed", (error.status, str(error)), progress.lines)
        except Exception as error:
            traceback.print_exc()
            return JobResult("failed", ("failed", in_words(error)), progress.lines)


class RecordingProgress(Progress):
    """Keeps the lines for the machine that started the run; they are printed into the job's log, too."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)


class Backend(Protocol):
    """Submits jobs to other machines. A running job is known by its number.

    `job_name`: what to call the jobs in messages; `max_jobs`: how many may be submitted at a time; `notes`: lines to
    show before the first job.
    """

    job_name: str
    max_jobs: int
    notes: list[str]

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        """Submit the jobs and return their numbers. Raises UserError if the cluster refuses them."""

    def results(self, running: Sequence[int], seconds: float) -> list[tuple[int, JobResult]]:
        """The results that have arrived; waits about `seconds` if there is none."""

    def cancel(self, running: Sequence[int]) -> None:
        """End these jobs; each saves the state of its training."""

    def close(self) -> None:
        """Free what the backend holds."""
