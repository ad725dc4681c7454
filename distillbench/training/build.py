"""Construction of a method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from distillbench.diffusion.schedules import SCHEDULES
from distillbench.errors import UserError
from distillbench.networks.adapters import merged
from distillbench.teachers.students import AS_TEACHER
from distillbench.teachers.teacher import Teacher
from distillbench.training.method import Method


def build_method(cls: type[Method], config: Any, teacher: Teacher, seed: int, device: str) -> Method:
    """The untrained method, with its networks on `device`.

    Raises UserError if its student cannot be of the architecture that is asked for, RuntimeError if the size of a layer
    is not known yet.
    """
    if teacher.students.architecture is not None and not cls.can_start_fresh:
        raise UserError(
            f"student.architecture: the student of {cls.name} starts from the teacher's weights, which another "
            "architecture does not have (its class does not declare can_start_fresh = True)"
        )
    torch.manual_seed(seed)  # for weights that a method adds to the teacher's network
    seen = teacher.on(SCHEDULES[config.schedule]()) if config.schedule else teacher
    method = cls(config, seen)
    _check_sizes(method)
    return method.to(device)


def restored_method(
    cls: type[Method], config: Any, teacher: Teacher, seed: int, device: str, state: Mapping[str, Tensor]
) -> Method:
    """The method with the weights `state` of a training, in evaluation mode.

    Adapters are merged into the weights, so that its networks are as large and as fast as the teacher's.
    """
    adapters = teacher.students.adapters
    if adapters is not None:
        state, teacher = merged(state, adapters.scale), dataclasses.replace(teacher, students=AS_TEACHER)
    method = build_method(cls, config, teacher, seed, device)
    method.load_state_dict(state)
    return method.eval()


def _check_sizes(method: Method) -> None:
    """Raise RuntimeError for layers such as nn.LazyLinear, which get their weights only when they are first called."""
    weights = [*method.named_parameters(), *method.named_buffers()]
    if lazy := {name.rpartition(".")[0]: None for name, weight in weights if is_lazy(weight)}:
        kinds = ", ".join(f"self.{name} ({type(method.get_submodule(name)).__name__})" for name in lazy)
        raise RuntimeError(
            f"{kinds}: a layer has no weights before it is first called, so it can be neither copied nor saved. Create "
            "all layers in __init__ with known sizes"
        )
