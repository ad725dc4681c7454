"""Construction of a method."""

from __future__ import annotations

from typing import Any

import torch

from distillbench.diffusion.schedules import SCHEDULES
from distillbench.teachers.teacher import Teacher
from distillbench.training.method import Method


def build_method(cls: type[Method], config: Any, teacher: Teacher, seed: int, device: str) -> Method:
    """The untrained method, with its networks on `device`."""
    torch.manual_seed(seed)  # for weights that a method adds to the teacher's network
    seen = teacher.on(SCHEDULES[config.schedule]()) if config.schedule else teacher
    return cls(config, seen).to(device)
