"""A method's class and settings made into an object on the device."""

from __future__ import annotations

from typing import Any

import torch

from distillbench.method import Method
from distillbench.schedules import SCHEDULES
from distillbench.teachers import Teacher


def build_method(cls: type[Method], config: Any, teacher: Teacher, seed: int, device: str) -> Method:
    """A method with its networks on the device, as they are before training."""
    torch.manual_seed(seed)  # what a method adds to the teacher's network starts from this
    seen = teacher.on(SCHEDULES[config.schedule]()) if config.schedule else teacher
    return cls(config, seen).to(device)
