"""Where cells are worked on: the settings of each kind of executor. The word ``executor=NAME`` chooses one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distillbench.errors import UserError
from distillbench.options import option, require_between, require_positive

DEVICE_OF_ITS_OWN = 1  # GPUs of a job from which on it shares none


@dataclass
class ExecutorConfig:
    """What all kinds share."""

    kind: str = ""

    @property
    def elsewhere(self) -> bool:
        """Whether cells are worked on by other machines than this one, or as if they were."""
        return False

    @property
    def shares(self) -> str:
        """How cells come to share a device, in the words of the settings; nothing where they do not."""
        return ""


@dataclass
class LocalConfig(ExecutorConfig):
    """Processes of this machine."""

    workers: int = option(0, "cells side by side; 0: one for each of executor.devices, or one")
    devices: list[str] = option([], "of the workers, in turn, such as [cuda:0,cuda:1]; empty: the run's device")

    def __post_init__(self) -> None:
        require_between(self, 0, 1024, "workers")
        if len(self.devices) > self.count:
            listed = f"executor.devices lists {len(self.devices)}"
            raise UserError(f"{listed}, of which executor.workers={self.workers} would use no more than that")

    @property
    def count(self) -> int:
        """Cells side by side."""
        return self.workers or max(1, len(self.devices))

    @property
    def shares(self) -> str:
        own = len(set(self.devices)) or 1
        return f"executor.workers={self.count} on {own} device{'s' * (own > 1)}" if self.count > own else ""


@dataclass
class SubmititConfig(ExecutorConfig):
    """Jobs of a cluster that runs Slurm, through submitit. Needs distillbench[slurm]."""

    cluster: str = option("slurm", "slurm, or local: processes of this machine, to try it")
    partition: str = option("", "of Slurm; empty: the cluster's default")
    gpus: int = option(1, "GPUs of each job; 0: cells are worked on by the CPU")
    cpus: int = option(4, "CPU cores of each job")
    memory_gb: float = option(0.0, "memory of each job; 0: the cluster's default")
    hours: float = option(24.0, "longest that a job takes before it keeps its state and goes back into the queue")
    parallel: int = option(256, "jobs at the same time")
    requeues: int = option(10, "how often a job goes back into the queue for want of time, or because it was stopped")
    setup: list[str] = option([], "commands of the shell before each job, such as ['module load cuda']")
    parameters: dict[str, Any] = option({}, "more of submitit's, by its names: {slurm_account: us, slurm_qos: low}")

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

    address: str = option("", "of a ray cluster, or auto: one that runs here; empty: one is started for the run")
    gpus: float = option(1.0, "GPUs of each task; 0: cells are worked on by the CPU; 0.5: two share one")
    cpus: float = option(1.0, "CPU cores of each task")
    parallel: int = option(1000, "tasks that ray is given at the same time")
    retries: int = option(3, "how often a task whose worker or machine is lost begins again, from its state")

    def __post_init__(self) -> None:
        require_between(self, 0, 1024, "gpus", "retries")
        require_between(self, 0, 4096, "cpus")
        require_between(self, 1, 100_000, "parallel")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise UserError(f"gpus must be a whole number where it is above 1, got {self.gpus:g}")

    @property
    def elsewhere(self) -> bool:
        return True

    @property
    def shares(self) -> str:
        alone = self.gpus >= DEVICE_OF_ITS_OWN or self.parallel == 1
        return "" if alone else f"executor=ray with executor.gpus={self.gpus:g}"


EXECUTORS: dict[str, type[ExecutorConfig]] = {"local": LocalConfig, "submitit": SubmititConfig, "ray": RayConfig}


def kinds_with(setting: str) -> Sequence[str]:
    """The kinds of executor that have this setting."""
    return [name for name, config in EXECUTORS.items() if setting in config.__dataclass_fields__]
