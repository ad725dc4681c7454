"""Checkpoints on the way of a training: students to be scored as they were. They cost the method nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from distillbench.budget import Price
from distillbench.energy import Energy
from distillbench.errors import UserError
from distillbench.files import sha256_file, write_atomically
from distillbench.method import Method


@dataclass(frozen=True)
class Checkpoint:
    """The method as it was on the way, with the averaged weights in its student."""

    fraction: float  # of the budget, that had just been reached
    images: int
    price: Price
    energy: Energy  # joules until then
    ready: list[int]  # numbers of evaluations that it could sample with
    file: str  # safetensors, in the folder of checkpoints
    sha256: str


@dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are to be written, and where. They cost the method nothing."""

    fractions: Sequence[float]  # of the budget, rising, each in (0, 1): the end is none of them
    folder: Path
    nfe: Sequence[int] = ()  # numbers of evaluations for which a checkpoint says whether it is ready

    def __post_init__(self) -> None:
        if not all(a < b for a, b in pairwise([0.0, *self.fractions, 1.0])):
            raise UserError(f"checkpoints must be rising shares of the budget between 0 and 1, got {self.fractions}")

    def write(
        self, number: int, method: Method, tensors: Mapping[str, Tensor], phase: int, price: Price, used: Energy
    ) -> Checkpoint:
        """Checkpoint `number` = 0, 1, ... of `method` with these whole `tensors`, at what it has cost until then."""
        path = self.folder / f"checkpoint-{number + 1}.safetensors"
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        write_atomically(path, lambda temporary: save_file(copies, temporary))
        ready = [n for n in self.nfe if method.ready(n, phase)]
        return Checkpoint(self.fractions[number], price.images, price, used, ready, path.name, sha256_file(path))


def averaged_state(method: Method, average: nn.Module) -> dict[str, Tensor]:
    """All tensors of `method`, with those of `average` wherever one of its student stands."""
    averaged = average.state_dict()
    students = {id(tensor): averaged[name] for name, tensor in method.student.state_dict(keep_vars=True).items()}
    state = method.state_dict(keep_vars=True)  # the tensors themselves: a student may stand there under two names
    return {name: students.get(id(tensor), tensor) for name, tensor in state.items()}
