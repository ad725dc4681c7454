"""Tasks of a ray cluster: a running one, or one that is started on this machine for the run."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distillbench.errors import UserError
from distillbench.execution.jobs import Job, JobResult
from distillbench.execution.workers import SECONDS_OF_GRACE
from distillbench.runs.executor_config import RayConfig
from distillbench.system.signals import stopping
from distillbench.system.subprocesses import in_words


def run_job(job: Job) -> JobResult:
    """The body of a task. ray cancels it with SIGINT."""
    with stopping() as stop:
        return job.run(stop)


class RayBackend:
    """Submits jobs as ray tasks."""

    job_name = "ray tasks"

    def __init__(self, where: RayConfig) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics are sent
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run`, workers use this environment
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # tasks without GPUs see none
        try:
            import ray
        except ImportError as error:
            raise UserError("executor=ray needs ray: pip install 'distillbench[ray]'") from error
        self.ray, self.max_jobs = ray, where.parallel
        self.numbers = itertools.count()
        self.running: dict[int, Any] = {}
        with _signal_handlers_kept():
            try:
                ray.init(
                    address=where.address or "local", log_to_driver=False, logging_level=logging.ERROR,
                    include_dashboard=False if not where.address else None,
                )  # fmt: skip
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(f"executor.address={where.address!r}: {in_words(error)}") from error
        self.notes = []
        resources = ray.cluster_resources()
        for name, wanted in (("gpus", where.gpus), ("cpus", where.cpus)):
            available = resources.get(name.upper()[:-1], 0)
            if wanted > available and not where.address:
                self.close()
                raise UserError(f"executor.{name}={wanted:g} is more than this machine has: {available:g}")
            if wanted > available:
                note = f"executor.{name}={wanted:g}, the ray cluster has {available:g} now: tasks wait for more"
                self.notes.append(note)
        task = ray.remote(run_job)
        self.task = task.options(num_cpus=where.cpus, num_gpus=where.gpus, max_retries=where.retries)

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        numbers = list(itertools.islice(self.numbers, len(jobs)))
        for number, job in zip(numbers, jobs, strict=True):
            self.running[number] = self.task.remote(job)
        return numbers

    def results(self, running: Sequence[int], seconds: float) -> list[tuple[int, JobResult]]:
        by_reference = {self.running[number]: number for number in running}
        ready, _ = self.ray.wait(list(by_reference), num_returns=1, timeout=seconds)
        if ready and len(by_reference) > 1:
            ready, _ = self.ray.wait(list(by_reference), num_returns=len(by_reference), timeout=0)
        return [(by_reference[reference], self._result(by_reference[reference])) for reference in ready]

    def _result(self, number: int) -> JobResult:
        errors = self.ray.exceptions
        try:
            return self.ray.get(self.running.pop(number))
        except errors.OutOfMemoryError as error:
            return JobResult("failed", ("oom", f"ray ended the task for its memory: {in_words(error)}"))
        except errors.TaskCancelledError:
            return JobResult("interrupted", "cancelled")
        except errors.RayError as error:
            return JobResult("failed", ("failed", f"ray lost the task: {in_words(error)}"))

    def cancel(self, running: Sequence[int]) -> None:
        """Interrupt the tasks and wait for them: a cluster that was started for the run ends with it."""
        references = [self.running.pop(number) for number in running]
        for reference in references:
            self.ray.cancel(reference, force=False)
        end = time.monotonic() + SECONDS_OF_GRACE
        while references and time.monotonic() < end:
            _, references = self.ray.wait(references, num_returns=len(references), timeout=0.5)

    def close(self) -> None:
        with _signal_handlers_kept():
            self.ray.shutdown()


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Restore the signal handlers after the block: ray sets its own."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
