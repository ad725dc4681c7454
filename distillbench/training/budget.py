"""The training budget, in images, seconds or network evaluations, and the meter that counts what is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any, Protocol

from distillbench.metering.energy import NO_ENERGY, Energy, EnergyWatch
from distillbench.metering.stopwatch import Account, CompileWatch, Stopwatch
from distillbench.options import option, require_positive
from distillbench.system.dtensors import class_of
from distillbench.teachers.teacher import Teacher
from distillbench.training.network_rows import SEPARATOR, NetworkRows, name_of, sum_of_rows


class Limit(StrEnum):
    """The quantity that a budget limits."""

    images = "images"
    seconds = "seconds"
    nfe = "nfe"


@dataclass
class BudgetConfig:
    """How long every method may train. Only the amount that `limit` names counts."""

    limit: Limit = option(Limit.images, "what stops training: images, seconds or nfe")
    images: int = option(300_000, "training images, each use of an image counted")
    seconds: float = option(60.0, "wall-clock seconds, preparation included")
    nfe: int = option(
        2_000_000,
        "network evaluations: forward passes per image, of all networks; a forward-mode derivative is one more",
    )

    def __post_init__(self) -> None:
        require_positive(self, "images", "seconds", "nfe")

    @property
    def amount(self) -> float:
        return {Limit.images: self.images, Limit.seconds: self.seconds, Limit.nfe: self.nfe}[self.limit]

    @property
    def in_words(self) -> str:
        """Such as "300000 images"."""
        return f"{self.amount:g} s" if self.limit is Limit.seconds else f"{self.amount} {self.limit.value}"


@dataclass(frozen=True)
class TrainingCost:
    """What training has cost so far. seconds = teacher_seconds + student_seconds + compile_seconds + other_seconds.

    Evaluations are images (rows) of forward passes; `_backward` counts those that a gradient was computed for. If the
    students' architecture differs from the teacher's (an analytic teacher has none), evaluations of frozen copies of
    students in place of the teacher are also counted apart (`stand_in`), since their FLOPs differ.
    """

    images: int = 0
    seconds: float = 0.0
    teacher_nfe: int = 0
    student_nfe: int = 0
    teacher_backward: int = 0  # to the input: the teacher's weights are frozen
    student_backward: int = 0
    student_backward_input: int = 0  # of student_backward: to the input only, through frozen weights
    stand_in_nfe: int = 0  # of teacher_nfe: by networks of another architecture
    stand_in_backward: int = 0  # of teacher_backward
    teacher_along: int = 0  # of teacher_nfe: with a derivative along a direction (forward mode, torch.func.jvp)
    student_along: int = 0  # of student_nfe
    networks: tuple[NetworkRows, ...] = ()  # the same evaluations, by kind of network, and those of LPIPS
    teacher_seconds: float = 0.0  # forward passes of the teacher and of its frozen copies
    student_seconds: float = 0.0  # forward passes of students, all backward passes, optimiser steps
    compile_seconds: float | None = 0.0  # torch's compiler; None if torch does not report it: then it is in the others
    other_seconds: float = 0.0

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> TrainingCost:
        """From ``dataclasses.asdict``, as training states have it; those of older versions lack `networks`."""
        return cls(**{**plain, "networks": tuple(NetworkRows(**each) for each in plain.get("networks", ()))})


class Watch(Protocol):
    """A measurement during training that can be paused: energy, peaks of memory."""

    def paused(self) -> AbstractContextManager[None]: ...


class Meter:
    """Counts evaluations of the teacher's and students' networks, and seconds, from its construction on.

    Until :meth:`stop` it times their forward passes; a newer meter for the same teacher replaces it. `watches` and
    `energy` are paused together with the meter.
    """

    def __init__(
        self,
        budget: BudgetConfig,
        teacher: Teacher,
        device: str,
        watches: Sequence[Watch] = (),
        energy: EnergyWatch | None = None,
    ) -> None:
        self.budget, self.teacher, self.device = budget, teacher, device
        self._watches, self._energy = [*watches, *([energy] if energy else [])], energy
        self.images = 0
        self.charged = TrainingCost()  # computed earlier, not by this meter's networks
        self.charged_energy = NO_ENERGY
        self.stopwatch = Stopwatch.of(device)
        self._compiler = CompileWatch(self.stopwatch)
        accounts = {Account.teacher: teacher.teacher_rows, Account.student: teacher.student_rows}
        self._timed = {counter: partial(self.stopwatch.charging, account) for account, counter in accounts.items()}
        for counter, timed in self._timed.items():
            counter.timed = timed
        self._others: tuple[NetworkRows, ...] = ()
        self._uncharged_rows, self._uncharged_networks = self._rows(), self._networks()
        self.stopwatch.wait()
        self._start = self.stopwatch.now()

    def stop(self) -> None:
        """Stop timing forward passes and the compiler: training is over."""
        self._compiler.stop()
        for counter, timed in self._timed.items():
            if counter.timed is timed:
                counter.timed = nullcontext

    @property
    def no_compile_seconds(self) -> str:
        """Reason for ``compile_seconds=None``; empty if there is a value."""
        return self._compiler.reason

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Charge nothing in the block: no seconds, evaluations, energy or peaks of memory."""
        self.stopwatch.wait()
        begin, before, networks = self.stopwatch.now(), self._rows(), self._networks()
        try:
            with ExitStack() as stack:
                stack.enter_context(self.stopwatch.paused())
                for watch in self._watches:
                    stack.enter_context(watch.paused())
                yield
        finally:
            for name, rows in self._rows().items():
                self._uncharged_rows[name] += rows - before[name]
            self._uncharged_networks = sum_of_rows((*self._uncharged_networks, *self._networks()), networks)
            self.stopwatch.wait()
            self._start += self.stopwatch.now() - begin

    def charge(
        self,
        seconds: float,
        teacher_nfe: int,
        teacher_seconds: float = 0.0,
        energy: Energy = NO_ENERGY,
        compile_seconds: float = 0.0,
        student_nfe: int = 0,
        student_seconds: float = 0.0,
        networks: Sequence[NetworkRows] | None = None,
    ) -> None:
        """Add the cost of work that was done earlier and is used again, such as cached pairs.

        `teacher_seconds`, `student_seconds` and `compile_seconds` are the parts of `seconds` spent in the networks and
        in torch's compiler. `networks`: the evaluations by kind of network; None if all are of the teacher's own.
        """
        rows = (self._of_teacher(teacher_nfe),) if networks is None else networks
        self.charged = replace(
            self.charged,
            seconds=self.charged.seconds + seconds,
            teacher_nfe=self.charged.teacher_nfe + teacher_nfe,
            student_nfe=self.charged.student_nfe + student_nfe,
            teacher_seconds=self.charged.teacher_seconds + teacher_seconds,
            student_seconds=self.charged.student_seconds + student_seconds,
            compile_seconds=(self.charged.compile_seconds or 0.0) + compile_seconds,
            networks=sum_of_rows((*self.charged.networks, *rows)),
        )
        self.charged_energy += energy

    def add(self, rows: NetworkRows) -> None:
        """Count rows of a network that is neither a teacher nor a student: they are no evaluations of the budget."""
        self._others = sum_of_rows((*self._others, rows))

    def restart(self, cost: TrainingCost, energy: Energy) -> None:
        """Continue from the cost of an earlier process; what this meter has counted so far is dropped."""
        self.stopwatch.reset()
        self._start, self._uncharged_rows = self.stopwatch.now(), self._rows()
        self._uncharged_networks = self._networks()
        if self._energy is not None:
            self._energy.restart()
        self.images, self.charged, self.charged_energy = cost.images, cost, energy

    def _rows(self) -> dict[str, int]:
        """The counters, by the names of the fields of TrainingCost."""
        teacher, student = self.teacher.teacher_rows, self.teacher.student_rows
        own = class_of(self.teacher.denoiser.network)
        others = [rows for kind, rows in teacher.kinds.items() if kind.network is not own]
        return {
            "teacher_nfe": teacher.rows,
            "student_nfe": student.rows,
            "teacher_backward": teacher.rows_with_gradient,
            "student_backward": student.rows_with_gradient,
            "student_backward_input": student.rows_to_input,
            "stand_in_nfe": sum(rows.forward for rows in others),
            "stand_in_backward": sum(rows.to_weights + rows.to_input for rows in others),
            "teacher_along": teacher.rows_along,
            "student_along": student.rows_along,
        }

    def _networks(self) -> tuple[NetworkRows, ...]:
        """The counters, by kind of network."""
        counters = {"teacher": self.teacher.teacher_rows, "student": self.teacher.student_rows}
        counted = (
            NetworkRows(
                side,
                name_of(kind.network),
                kind.weights,
                kind.trained,
                features=SEPARATOR.join(kind.features),
                **asdict(rows),
            )
            for side, counter in counters.items()
            for kind, rows in counter.kinds.items()
        )
        return (*counted, *self._others)

    def _of_teacher(self, rows: int) -> NetworkRows:
        """Evaluations of the teacher's own network, without gradient."""
        kind = self.teacher.teacher_rows.kind(self.teacher.denoiser.network, trained=False)
        return NetworkRows("teacher", name_of(kind.network), kind.weights, 0, rows)

    def look_again(self) -> None:
        """Look again which weights of each network get a gradient: a phase begins."""
        for counter in self._timed:
            counter.forget_kinds()

    @property
    def evaluations(self) -> int:
        """Network evaluations so far, those charged included; with a derivative along a direction one counts as two."""
        rows = self._rows()
        fields = "teacher_nfe", "student_nfe", "teacher_along", "student_along"
        return sum(rows[name] - self._uncharged_rows[name] + getattr(self.charged, name) for name in fields)

    @property
    def teacher_nfe(self) -> int:
        return self.teacher.teacher_rows.rows - self._uncharged_rows["teacher_nfe"] + self.charged.teacher_nfe

    @property
    def student_nfe(self) -> int:
        return self.teacher.student_rows.rows - self._uncharged_rows["student_nfe"] + self.charged.student_nfe

    def energy(self) -> Energy:
        """Joules so far, including those charged; waits for the device."""
        own = Energy(None, "not measured") if self._energy is None else self._energy.used
        return own + self.charged_energy

    def _seconds(self) -> float:
        return self.stopwatch.now() - self._start + self.charged.seconds

    def cost(self) -> TrainingCost:
        """The cost so far; waits for the device."""
        accounts, charged = self.stopwatch.read(), self.charged
        seconds = self._seconds()
        teacher = accounts[Account.teacher] + charged.teacher_seconds
        student = accounts[Account.student] + charged.student_seconds
        compiler = accounts[Account.compile] + (charged.compile_seconds or 0.0)
        rows = self._rows()
        return TrainingCost(
            images=self.images,
            seconds=seconds,
            **{name: rows[name] - self._uncharged_rows[name] + getattr(charged, name) for name in rows},
            networks=sum_of_rows((*charged.networks, *self._networks()), self._uncharged_networks),
            teacher_seconds=teacher,
            student_seconds=student,
            compile_seconds=None if self.no_compile_seconds else compiler,
            other_seconds=seconds - teacher - student - compiler,
        )

    def spent(self) -> float:
        """The amount used of the limited quantity, without waiting for the device."""
        if self.budget.limit is Limit.images:
            return self.images
        if self.budget.limit is Limit.nfe:
            return self.evaluations
        return self._seconds()

    def progress(self) -> float:
        """Used share of the budget; training stops at 1."""
        return self.spent() / self.budget.amount

    def next_batch(self, batch_size: int) -> int:
        """The size of the next batch; the last one is smaller if that matches a budget in images."""
        if self.budget.limit is not Limit.images:
            return batch_size
        return min(batch_size, self.budget.images - self.images)
