"""Checkpoints during training, to be evaluated afterwards. Writing them is not charged to the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from distillbench.errors import UserError
from distillbench.metering.energy import Energy
from distillbench.storage.files import sha256_file, write_atomically
from distillbench.training.budget import TrainingCost
from distillbench.training.method import Method


@dataclass(frozen=True)
class Checkpoint:
    """The method during training, with the averaged weights in its student."""

    fraction: float  # of the budget, just reached
    images: int
    cost: TrainingCost
    energy: Energy  # joules until then
    ready: list[int]  # numbers of evaluations that it can sample with
    file: str  # name of the safetensors file
    sha256: str


@dataclass(frozen=True)
class Checkpoints:
    """When and where checkpoints are written."""

    fractions: Sequence[float]  # of the budget, rising, in (0, 1)
    folder: Path
    nfe: Sequence[int] = ()  # numbers of evaluations to list in Checkpoint.ready if possible

    def __post_init__(self) -> None:
        if not all(a < b for a, b in pairwise([0.0, *self.fractions, 1.0])):
            raise UserError(f"checkpoints must be rising shares of the budget between 0 and 1, got {self.fractions}")

    def write(
        self, number: int, method: Method, tensors: Mapping[str, Tensor], phase: int, cost: TrainingCost, used: Energy
    ) -> Checkpoint:
        """Write checkpoint `number` = 0, 1, ... of `method` with these full `tensors`, and its cost until then."""
        path = self.folder / f"checkpoint-{number + 1}.safetensors"
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        write_atomically(path, lambda temporary: save_file(copies, temporary))
        ready = [n for n in self.nfe if method.ready(n, phase)]
        return Checkpoint(self.fractions[number], cost.images, cost, used, ready, path.name, sha256_file(path))


def averaged_state(method: Method, average: nn.Module) -> dict[str, Tensor]:
    """The state dict of `method` with the student's tensors replaced by those of `average`."""
    averaged = average.state_dict()
    students = {id(tensor): averaged[name] for name, tensor in method.student.state_dict(keep_vars=True).items()}
    state = method.state_dict(keep_vars=True)  # tensors, not copies: the student may occur under two names
    return {name: students.get(id(tensor), tensor) for name, tensor in state.items()}
