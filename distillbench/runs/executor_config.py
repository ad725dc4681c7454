"""Settings of the executors, which decide where cells run. ``executor=NAME`` chooses one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distillbench.errors import UserError
from distillbench.options import option, require_between, require_positive

EXCLUSIVE_GPUS = 1  # a job with at least so many GPUs shares none


@dataclass
class ExecutorConfig:
    """Base of all executor settings."""

    kind: str = ""

    @property
    def elsewhere(self) -> bool:
        """Whether cells run on other machines, or as if they did."""
        return False

    @property
    def shares(self) -> str:
        """The settings by which cells share a device; empty if they do not."""
        return ""


@dataclass
class LocalConfig(ExecutorConfig):
    """Processes on this machine."""

    workers: int = option(0, "cells at a time; 0: one for each of executor.devices, or one")
    devices: list[str] = option([], "devices of the workers, such as [cuda:0,cuda:1]; empty: the run's device")

    def __post_init__(self) -> None:
        require_between(self, 0, 1024, "workers")
        if len(self.devices) > self.count:
            listed = f"executor.devices lists {len(self.devices)}"
            raise UserError(f"{listed}, more than executor.workers={self.workers} can use")

    @property
    def count(self) -> int:
        """Cells at a time."""
        return self.workers or max(1, len(self.devices))

    @property
    def shares(self) -> str:
        own = len(set(self.devices)) or 1
        return f"executor.workers={self.count} on {own} device{'s' * (own > 1)}" if self.count > own else ""


@dataclass
class SubmititConfig(ExecutorConfig):
    """Jobs of a Slurm cluster, through submitit. Needs distillbench[slurm]."""

    cluster: str = option("slurm", "slurm, or local: processes on this machine, to try it")
    partition: str = option("", "Slurm partition; empty: the cluster's default")
    gpus: int = option(1, "GPUs of each job; 0: cells run on the CPU")
    cpus: int = option(4, "CPU cores of each job")
    memory_gb: float = option(0.0, "memory of each job; 0: the cluster's default")
    hours: float = option(24.0, "time limit of a job; at the limit it saves its state and is queued again")
    parallel: int = option(256, "jobs that run at a time")
    requeues: int = option(10, "how often a job is queued again after its time limit or a preemption")
    setup: list[str] = option([], "shell commands before each job, such as ['module load cuda']")
    parameters: dict[str, Any] = option({}, "more parameters of submitit: {slurm_account: us, slurm_qos: low}")

    def __post_init__(self) -> None:
        require_between(self, 0, 1024, "gpus", "requeues")
        require_between(self, 1, 4096, "cpus", "parallel")
        require_between(self, 0, math.inf, "memory_gb")
        require_positive(self, "hours")
        if self.cluster not in ("slurm", "local"):
            raise UserError(f"cluster must be slurm or local, got {self.cluster!r}")

    @property
    def elsewhere(self) -> bool:
        return True

    @property
    def shares(self) -> str:
        alone = self.cluster == "slurm" or self.parallel == 1
        return "" if alone else f"executor.cluster=local with executor.parallel={self.parallel}"


@dataclass
class RayConfig(ExecutorConfig):
    """Tasks of a ray cluster. Needs distillbench[ray]."""

    address: str = option("", "of a ray cluster; auto: one that runs here; empty: one is started for the run")
    gpus: float = option(1.0, "GPUs of each task; 0: cells run on the CPU; 0.5: two tasks share a GPU")
    cpus: float = option(1.0, "CPU cores of each task")
    parallel: int = option(1000, "tasks that are submitted to ray at a time")
    retries: int = option(3, "how often a task is resumed after its worker or machine was lost")

    def __post_init__(self) -> None:
        require_between(self, 0, 1024, "gpus", "retries")
        require_between(self, 0, 4096, "cpus")
        require_between(self, 1, 100_000, "parallel")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise UserError(f"gpus must be a whole number if it is above 1, got {self.gpus:g}")

    @property
    def elsewhere(self) -> bool:
        return True

    @property
    def shares(self) -> str:
        alone = self.gpus >= EXCLUSIVE_GPUS or self.parallel == 1
        return "" if alone else f"executor=ray with executor.gpus={self.gpus:g}"


EXECUTORS: dict[str, type[ExecutorConfig]] = {"local": LocalConfig, "submitit": SubmititConfig, "ray": RayConfig}


def kinds_with(setting: str) -> Sequence[str]:
    """The executors that have this setting."""
    return [name for name, config in EXECUTORS.items() if setting in config.__dataclass_fields__]
