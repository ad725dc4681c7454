"""Speeds of this device in a run, from a few steps, samples and feature extractions that are timed when first needed.

Networks have random weights, and everything that is timed is a copy of its own: no record, generator or counter of the
run is touched. A trial has as many images as its share of the allowed time permits, up to those of the run.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch

from distillbench.evaluation.evaluator import teacher_sampler
from distillbench.evaluation.features import FeatureNetwork, Networks
from distillbench.evaluation.metric import Metric
from distillbench.evaluation.timing import timer_of
from distillbench.metering.memory import release_memory
from distillbench.runs.method_trials import (
    MethodTimes,
    seconds_of_teacher_training,
    times_of_method,
    times_of_sampling,
)
from distillbench.runs.remains import Remains
from distillbench.runs.score_trials import NetworkTimes, seconds_of_metric, times_of_network
from distillbench.runs.shared_context import Cell, SharedContext, plain_settings
from distillbench.runs.time_estimate import Speeds, estimate
from distillbench.runs.time_plan import TimePlan
from distillbench.runs.trials import Allowance, Line
from distillbench.storage.files import canonical_json
from distillbench.system.subprocesses import in_words
from distillbench.teachers.teacher import TeacherPlan

PIECES = 4  # shares of the time for a method, and for the training of the teacher, which matter most
MOST_SETTINGS = 8  # of one method that are timed; others are scaled by their evaluations
NOT_OF_SPEED = ("methods", "seed", "budget", "results_dir", "run_name", "executor", "isolate", "cell_seconds", "states")


def estimate_by_trials(cells: Sequence[Cell], remains: Sequence[Remains], seconds: float) -> TimePlan:
    """The time of a run of `cells`, of which `remains` are left, from trials in this process of about `seconds`."""
    with torch.random.fork_rng(devices=[]):
        planned = _estimate(cells, remains, seconds)
    gc.collect()
    release_memory()
    return planned


def _estimate(cells: Sequence[Cell], remains: Sequence[Remains], seconds: float) -> TimePlan:
    left = [cell for cell, what in zip(cells, remains, strict=True) if what.any]
    allowance = Allowance(seconds, _pieces(left))
    known: dict[Hashable, Trials] = {}

    def speeds_of(shared: SharedContext, teacher_sha256: str) -> Speeds:
        settings = _settings(shared)
        if settings not in known:
            if known and not allowance.left:
                return next(reversed(known.values()))
            known[settings] = Trials(shared, teacher_sha256, allowance)
        return known[settings]

    return estimate(cells, remains, speeds_of)


def _pieces(cells: Sequence[Cell]) -> int:
    """How many shares of the time the trials of `cells` need."""
    pieces = PIECES * len({(_settings(cell.shared), _key(cell)) for cell in cells if cell.entry is not None})
    for shared in {_settings(cell.shared): cell.shared for cell in cells}.values():
        networks = {cls.network for cls in shared.metrics.values() if cls.network is not None}
        pieces += 1 + PIECES * bool(shared.source.plan().images) + len(networks) + len(shared.metrics)
    return pieces


def _settings(shared: SharedContext) -> Hashable:
    """Equal for contexts of the same speed."""
    plain = {name: value for name, value in plain_settings(shared.config).items() if name not in NOT_OF_SPEED}
    return canonical_json(plain)


def _key(cell: Cell) -> Hashable:
    """Equal for cells that differ in the seed alone."""
    return cell.name, canonical_json(plain_settings(cell.method_config)), tuple(cell.nfe)


class Trials:
    """The speeds of one context, each measured once. What raises an error is left out, and a note says so."""

    def __init__(self, shared: SharedContext, teacher_sha256: str, allowance: Allowance) -> None:
        self.shared, self.allowance, self.timer = shared, allowance, timer_of(shared.device)
        torch.set_num_threads(shared.config.threads)
        self.untrained = shared.source.untrained()
        teacher = self.untrained.conditioned(shared.conditioning).with_students(shared.students)
        self.teacher = dataclasses.replace(teacher, sha256=teacher_sha256 or teacher.sha256)
        self.networks = Networks(shared.weights, shared.device)
        self.notes: list[str] = []
        self.scaled: list[str] = []  # what was timed with fewer images than the run has
        self._methods: dict[Hashable, tuple[Cell, MethodTimes | None]] = {}
        self._networks: dict[type[FeatureNetwork], NetworkTimes] = {}
        self._metrics: dict[Hashable, float] = {}
        self._evaluation: Line | None = None

    @contextmanager
    def _attempt(self, what: str) -> Iterator[None]:
        """If the block raises, a note says that `what` is left out."""
        try:
            yield
        except Exception as error:  # third-party code may raise anything; the run will report it
            self.notes.append(f"{what} ({in_words(error)})")

    def method(self, cell: Cell) -> MethodTimes | None:
        key = _key(cell)
        if key not in self._methods:
            same = [known for known in self._methods.values() if known[0].name == cell.name]
            times = _scaled(*same[-1], cell) if len(same) >= MOST_SETTINGS else self._timed(cell)
            self._methods[key] = cell, times
        return self._methods[key][1]

    def _timed(self, cell: Cell) -> MethodTimes | None:
        share = sum(self.allowance.share() for _ in range(PIECES))
        if cell.cost_error:
            self.notes.append(f"{cell.name}, which would fail")
            return None
        with self._attempt(cell.name):
            times = times_of_method(cell, self.teacher, self.timer, share)
            if not times.timed:
                self.scaled.append(f"{cell.name} by its forward passes alone")
            elif times.timed < self.shared.config.batch_size:
                self.scaled.append(f"{cell.name} by steps of {times.timed}")
            return times
        return None

    def teacher_training(self, plan: TeacherPlan) -> float:
        with self._attempt("the training of the teacher"):
            share = sum(self.allowance.share() for _ in range(PIECES))
            given = self.shared, plan, self.untrained, self.timer, share
            seconds, timed = seconds_of_teacher_training(*given)
            if timed < plan.batch_size:
                self.scaled.append(f"the teacher's training by steps of {timed}")
            return seconds
        return 0.0

    def teacher_evaluation(self) -> Line:
        if self._evaluation is None:
            self._evaluation = Line()
            config, conditioning = self.shared.config.evaluation, self.teacher.conditioning
            solver = config.solvers()[0]
            nfe = solver.evaluations(min(config.teacher_steps)) * conditioning.evaluations
            sampler, share = teacher_sampler(self.teacher, solver), self.allowance.share()
            with self._attempt("the teacher's samples"):
                self._evaluation = times_of_sampling(sampler, nfe, self.shared, self.teacher, self.timer, share)
        return self._evaluation

    def network(self, network: type[FeatureNetwork]) -> NetworkTimes:
        if network not in self._networks:
            self._networks[network] = NetworkTimes(0.0, Line(), network.batch)
            with self._attempt(f"features of {network.name}"):
                given = self.networks, self.teacher.image_shape, self.timer, self.allowance.share()
                self._networks[network] = times_of_network(network, *given)
        return self._networks[network]

    def metric(self, metric: type[Metric], samples: int, real: int) -> float:
        key = metric, samples, real
        if key not in self._metrics:
            self._metrics[key] = 0.0
            with self._attempt(metric.name):
                given = self.networks, self.teacher.image_shape, (samples, real), self.timer, self.allowance.share()
                self._metrics[key] = seconds_of_metric(metric, *given)
        return self._metrics[key]


def _scaled(known: Cell, times: MethodTimes | None, cell: Cell) -> MethodTimes | None:
    """The times of `cell`, as fast for each network evaluation as another cell of its method."""
    if times is None or not (known.cost.images and cell.cost.images):
        return times

    def evaluations(one: Cell) -> float:
        return (one.cost.teacher_nfe + one.cost.student_nfe) / one.cost.images

    return dataclasses.replace(times, step=times.step * evaluations(cell) / evaluations(known))
