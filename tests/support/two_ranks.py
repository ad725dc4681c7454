"""Trainings by two processes on the CPU: their size, a port for them, and the comparison with one process."""

from __future__ import annotations

import faulthandler
import os
import socket

import torch
from torch import Tensor

from adversarial import Adversarial
from continuous_time import ContinuousTime
from distillbench import Method
from distillbench.registry import load_registry

SHAPE, BATCH = (1, 4, 4), 8  # of an image; images of a step of both ranks together
SETTINGS = {
    "direct": {"pairs": 16, "steps": 2, "held_out": 12, "checks": 2},
    "reflow": {"pairs": 16, "steps": 2, "distil_share": 0.5, "distil_pairs": "own"},
    "imm": {"group_size": 2},
    "tract": {"steps": [4, 2, 1]},
    "pd": {"steps": 4},
    "adversarial": {"layer": "blocks.0.inner", "weight": 0.5},
    "continuous_time, exact": {"exact": True},
}
OF_TESTS = {  # by the features of a network, and by the derivative along a trajectory
    "adversarial": Adversarial,
    "continuous_time": ContinuousTime,
    "continuous_time, exact": ContinuousTime,
}
METHODS = [*sorted(load_registry().methods), *OF_TESTS]


def method_class(name: str) -> type[Method]:
    """Of one of METHODS."""
    return OF_TESTS[name] if name in OF_TESTS else load_registry().methods[name].cls


def start_rank(rank: int, port: int) -> None:
    """Set up a process as one of two ranks. It ends after four minutes, instead of waiting for another for ever."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(240, exit=True)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()})


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Equal except for the order of float32 sums, whose rounding Adam's first steps magnify."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
