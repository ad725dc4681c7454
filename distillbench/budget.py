"""The budget: one limit for every method, in images, seconds or network evaluations, and the meter that holds to it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum

import torch

from distillbench.options import option, require_positive
from distillbench.teachers import Teacher


class Limit(StrEnum):
    """What a budget is counted in."""

    images = "images"
    seconds = "seconds"
    nfe = "nfe"


@dataclass
class BudgetConfig:
    """How long every method may train. Only the amount that `limit` names counts."""

    limit: Limit = option(Limit.images, "what stops training: images, seconds or nfe")
    images: int = option(300_000, "training images, each time it is used")
    seconds: float = option(60.0, "wall-clock seconds, what is made ahead included")
    nfe: int = option(2_000_000, "network evaluations of teacher and student, forward, one image each")

    def __post_init__(self) -> None:
        require_positive(self, "images", "seconds", "nfe")

    @property
    def amount(self) -> float:
        return {Limit.images: self.images, Limit.seconds: self.seconds, Limit.nfe: self.nfe}[self.limit]


@dataclass(frozen=True)
class Price:
    """What training has cost so far."""

    images: int = 0
    seconds: float = 0.0
    teacher_nfe: int = 0
    student_nfe: int = 0


class Meter:
    """Reads the counters of a teacher's family of networks, and the clock, from the moment it is made."""

    def __init__(self, budget: BudgetConfig, teacher: Teacher, device: str) -> None:
        self.budget, self.teacher, self.device = budget, teacher, device
        self.images = 0
        self.charged_seconds = 0.0
        self.charged_teacher_nfe = 0
        self._start_rows = teacher.teacher_rows.rows, teacher.student_rows.rows
        self._start = self._now()

    def _now(self) -> float:
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def charge(self, seconds: float, teacher_nfe: int) -> None:
        """Add work of this method that was done before and is used again, such as pairs found in the cache."""
        self.charged_seconds += seconds
        self.charged_teacher_nfe += teacher_nfe

    @property
    def teacher_nfe(self) -> int:
        return self.teacher.teacher_rows.rows - self._start_rows[0] + self.charged_teacher_nfe

    @property
    def student_nfe(self) -> int:
        return self.teacher.student_rows.rows - self._start_rows[1]

    def price(self) -> Price:
        """The price now; waits for the device."""
        return Price(self.images, self._now() - self._start + self.charged_seconds, self.teacher_nfe, self.student_nfe)

    def spent(self) -> float:
        """How much of the limited quantity is used (without waiting for the device)."""
        if self.budget.limit is Limit.images:
            return self.images
        if self.budget.limit is Limit.nfe:
            return self.teacher_nfe + self.student_nfe
        return time.perf_counter() - self._start + self.charged_seconds

    def progress(self) -> float:
        """Used share of the budget; 1 and above: stop."""
        return self.spent() / self.budget.amount

    def next_batch(self, batch_size: int) -> int:
        """The next batch's size: the last one is cut so that a budget in images is met exactly."""
        if self.budget.limit is not Limit.images:
            return batch_size
        return min(batch_size, self.budget.images - self.images)
