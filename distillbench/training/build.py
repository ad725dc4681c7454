"""Construction of a method."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parameter import is_lazy

from distillbench.diffusion.schedules import SCHEDULES
from distillbench.teachers.teacher import Teacher
from distillbench.training.method import Method


def build_method(cls: type[Method], config: Any, teacher: Teacher, seed: int, device: str) -> Method:
    """The untrained method, with its networks on `device`. Raises RuntimeError if a layer's size is not known yet."""
    torch.manual_seed(seed)  # for weights that a method adds to the teacher's network
    seen = teacher.on(SCHEDULES[config.schedule]()) if config.schedule else teacher
    method = cls(config, seen)
    _check_sizes(method)
    return method.to(device)


def _check_sizes(method: Method) -> None:
    """Raise RuntimeError for layers such as nn.LazyLinear, which get their weights only when they are first called."""
    weights = [*method.named_parameters(), *method.named_buffers()]
    if lazy := {name.rpartition(".")[0]: None for name, weight in weights if is_lazy(weight)}:
        kinds = ", ".join(f"self.{name} ({type(method.get_submodule(name)).__name__})" for name in lazy)
        raise RuntimeError(
            f"{kinds}: a layer has no weights before it is first called, so it can be neither copied nor saved. Create "
            "all layers in __init__ with known sizes"
        )
