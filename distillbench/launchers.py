"""Whether torchrun or accelerate has started this process as one of several, by the environment that they set."""

from __future__ import annotations

import os

from distillbench.errors import UserError

OF_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # which accelerate sets in every process that it starts
MPI = [(f"{name}_RANK", f"{name}_SIZE") for name in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD")]


def rank_and_count() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) where it is alone.

    accelerate starts processes on CPUs by MPI, whose variables count only where accelerate has set its own: Slurm sets
    them too, for processes that have nothing to do with one another.
    """
    given = os.environ
    names = [("RANK", "WORLD_SIZE"), *(MPI if OF_ACCELERATE in given else ())]
    for rank, count in names:
        if given.get(rank) and int(given.get(count) or 1) > 1:
            return int(given[rank]), int(given[count])
    return 0, 1


def started_together() -> bool:
    """Whether a launcher has started this process as one of several."""
    return rank_and_count()[1] > 1


def by_mpi() -> bool:
    """Whether it was accelerate by MPI: on CPUs."""
    return started_together() and "RANK" not in os.environ


def follows() -> bool:
    """Whether a launcher has started this process as another than the first of several."""
    return rank_and_count()[0] > 0


def check_alone() -> None:
    """Raise UserError where accelerate was asked for several processes and has started this one alone.

    It tells them how to find each other (MASTER_PORT), and starts several on CPUs only with a hostfile for MPI.
    """
    given = os.environ
    if OF_ACCELERATE in given and "MASTER_PORT" in given and "WORLD_SIZE" not in given and not started_together():
        raise UserError(
            "accelerate launch was asked for several processes and has started one: without GPUs it starts several by "
            "MPI only (--mpirun_hostfile). Start them by `torchrun --nproc-per-node=2 -m distillbench run ... "
            "device=cpu`, or one process without accelerate"
        )
