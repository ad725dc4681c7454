"""The environment variables by which torchrun and accelerate say that a process is one of several ranks."""

from __future__ import annotations

import os

from distillbench.errors import UserError

SET_BY_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # in every process that it starts
MPI = [(f"{name}_RANK", f"{name}_SIZE") for name in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")]


def rank_and_count() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a launcher.

    accelerate starts ranks on CPUs by MPI. The variables of MPI count only together with those of accelerate: Slurm
    sets them too, for processes that are independent.
    """
    given = os.environ
    names = [("RANK", "WORLD_SIZE"), *(MPI if SET_BY_ACCELERATE in given else ())]
    for rank, count in names:
        if given.get(rank) and int(given.get(count) or 1) > 1:
            return int(given[rank]), int(given[count])
    return 0, 1


def started_together() -> bool:
    """Whether a launcher has started this process as one of several ranks."""
    return rank_and_count()[1] > 1


def by_mpi() -> bool:
    """Whether the launcher was accelerate with MPI, which is for CPUs."""
    return started_together() and "RANK" not in os.environ


def follows() -> bool:
    """Whether this process is a rank other than 0."""
    return rank_and_count()[0] > 0


def check_alone() -> None:
    """Raise UserError if accelerate was asked for several ranks (it has set MASTER_PORT) and has started a single one.

    On CPUs it starts several only with a hostfile for MPI.
    """
    given = os.environ
    if SET_BY_ACCELERATE in given and "MASTER_PORT" in given and "WORLD_SIZE" not in given and not started_together():
        raise UserError(
            "accelerate launch was asked for several processes and has started one: without GPUs it starts several by "
            "MPI only (--mpirun_hostfile). Start them by `torchrun --nproc-per-node=2 -m distillbench run ... "
            "device=cpu`, or one process without accelerate"
        )
