"""Slurm jobs through submitit. A job that is preempted or reaches its time limit goes back into the queue."""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillbench.errors import UserError
from distillbench.execution.jobs import Job, JobResult
from distillbench.execution.workers import SECONDS_OF_GRACE
from distillbench.runs.executor_config import SubmititConfig
from distillbench.system.signals import stopping

FOLDER = "jobs"  # in the cache: the files of submitit; those of finished jobs are removed
LARGEST_ARRAY = 1000  # jobs; Slurm takes 1001 where nothing else is set
SECONDS_UNTIL_SIGNAL = 5.0  # between SIGTERM and the signal that announces preemption
LONGEST_REASON = 300  # characters
POLLS_PER_SECOND = 500  # of result files
STATUS = {"OUT_OF_MEMORY": "oom", "TIMEOUT": "timeout", "DEADLINE": "timeout"}  # by Slurm's state; otherwise failed


@dataclass
class SubmittedJob:
    """A job as submitit calls it.

    submitit would exit at once at its signal. Here the run is interrupted as by SIGTERM and saves its training state.
    Then the signal is raised again for submitit, which calls :meth:`checkpoint` and puts the job back into the queue.
    """

    job: Job

    def __call__(self) -> JobResult:
        from submitit.core.job_environment import JobEnvironment
        from submitit.core.utils import UncompletedJobError

        where = JobEnvironment()
        preempted = where._usr_sig()
        with stopping((signal.SIGINT, signal.SIGTERM, preempted)) as stop:
            result = self.job.run(stop)
            if result.kind == "interrupted" and where.cluster == "slurm":
                with stop.patiently():
                    end = time.monotonic() + SECONDS_UNTIL_SIGNAL
                    while preempted.name not in stop.names and time.monotonic() < end:
                        time.sleep(0.1)
        if result.kind == "interrupted" and preempted.name in stop.names:
            try:
                signal.raise_signal(preempted)  # does not return if the job may be queued again
            except UncompletedJobError as error:
                return JobResult("failed", ("timeout", str(error)), result.lines)
        return result

    def checkpoint(self) -> Any:
        """The job to run when it starts again: the same, which resumes from the saved training state."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class SubmititBackend:
    """Submits Slurm jobs, or with ``cluster=local`` processes on this machine that are treated in the same way.

    `folder`: for the files of submitit.
    """

    def __init__(self, where: SubmititConfig, folder: Path) -> None:
        try:
            import submitit
        except ImportError as error:
            raise UserError("executor=submitit needs submitit: pip install 'distillbench[slurm]'") from error
        self.where, self.folder = where, folder.absolute()
        self.job_name = "Slurm jobs" if where.cluster == "slurm" else "local jobs"
        self.max_jobs = where.parallel if where.cluster == "local" else 10**6
        self.notes: list[str] = []
        self.numbers = itertools.count()
        self.running: dict[int, Any] = {}
        try:
            limit = {f"{where.cluster}_max_num_timeout": where.requeues}
            self.executor = submitit.AutoExecutor(self.folder, cluster=where.cluster, **limit)
        except RuntimeError as error:
            raise UserError(f"executor=submitit: {error} (executor.cluster=local tries it on this machine)") from error

    def _parameters(self, jobs: int) -> dict[str, Any]:
        where, arrays = self.where, math.ceil(jobs / LARGEST_ARRAY)
        parameters: dict[str, Any] = {
            "name": "distillbench",
            "timeout_min": math.ceil(60 * where.hours),
            "gpus_per_node": where.gpus,
            "cpus_per_task": where.cpus,
            "slurm_array_parallelism": max(1, where.parallel // arrays),
            "slurm_setup": list(where.setup) or None,
            "local_setup": list(where.setup) or None,
            "slurm_partition": where.partition or None,
            "mem_gb": where.memory_gb or None,
        }
        return parameters | where.parameters

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        submitted: list[Any] = []
        try:
            self.executor.update_parameters(**self._parameters(len(jobs)))
            for first in range(0, len(jobs), LARGEST_ARRAY):
                array = [SubmittedJob(job) for job in jobs[first : first + LARGEST_ARRAY]]
                with self._ctrl_c_ignored():
                    submitted += self.executor.submit_array(array)
        except (NameError, ValueError, AssertionError, TypeError) as error:
            raise UserError(f"executor.parameters: {_on_one_line(error)}") from error
        except (FailedJobError, FailedSubmissionError, OSError) as error:
            raise UserError(f"Slurm refuses the jobs: {_on_one_line(error)}") from error
        finally:
            numbers = list(itertools.islice(self.numbers, len(submitted)))
            self.running.update(zip(numbers, submitted, strict=True))
        return numbers

    def results(self, running: Sequence[int], seconds: float) -> list[tuple[int, JobResult]]:
        time.sleep(max(seconds, len(running) / POLLS_PER_SECOND))
        ended = [number for number in running if self.running[number].done()]
        return [(number, self._result(self.running.pop(number))) for number in ended]

    def _result(self, job: Any) -> JobResult:
        from submitit.core.utils import UncompletedJobError

        try:
            result = job.result()
        except UncompletedJobError:
            state = str(job.state)
            log = f"see {job.paths.stderr}"
            reason = f"the job returned no result (state {state}; {log})"
            return JobResult("failed", (STATUS.get(state, "failed"), reason))
        _remove(job)
        return result

    def cancel(self, running: Sequence[int]) -> None:
        """Cancel through Slurm. Processes on this machine get SIGTERM from here, and are waited for."""
        jobs = [self.running.pop(number) for number in running]
        if self.where.cluster == "slurm":
            for job in jobs:
                job.cancel(check=False)
            return
        for job in jobs:
            with suppress(ProcessLookupError):
                os.kill(int(job.job_id), signal.SIGTERM)
        end = time.monotonic() + SECONDS_OF_GRACE
        while not all(job.done() for job in jobs) and time.monotonic() < end:
            time.sleep(0.1)
        for job in jobs:
            _remove(job)

    @contextmanager
    def _ctrl_c_ignored(self) -> Iterator[None]:
        """Make processes that are started in the block ignore Ctrl-C: this process handles it and ends them."""
        if self.where.cluster == "slurm" or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def close(self) -> None:
        with suppress(OSError):  # jobs without a result keep their logs
            for left in self.folder.glob(".submission_file_*"):
                left.unlink()
            self.folder.rmdir()


def _remove(job: Any) -> None:
    for path in (job.paths.submitted_pickle, job.paths.result_pickle, job.paths.stdout, job.paths.stderr):
        path.unlink(missing_ok=True)


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:LONGEST_REASON]
