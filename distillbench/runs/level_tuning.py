"""The search for levels at which a finished student of several steps is sampled: ``distillbench tune-levels``.

run folder -> settings -> student -> for 2, 3, ... evaluations the best next level -> the setting ``sampling_levels``

The levels for n evaluations are those for n - 1, and a lower one, found by :func:`ternary_search` among the levels of
the method's grid. All candidates are sampled from the same noise, so that chance moves all their scores together. This
noise is a stream of its own: no sample of a search is in any evaluation, and the scores of a run stay unbiased.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distillbench.errors import DivergedError, UserError, first_of, unknown
from distillbench.evaluation.level_search import is_unimodal, ternary_search
from distillbench.records.records import LevelsRecord, TrainRecord, TriedLevels, read_record, write_record
from distillbench.registry import Registry
from distillbench.runs.cell_keys import evaluation_inputs
from distillbench.runs.cell_result import CellDescription, describe_cell
from distillbench.runs.cell_training import STUDENT, TRAIN
from distillbench.runs.config import RunConfig
from distillbench.runs.metric_choice import chosen_metrics, metric_to_optimise, references_of
from distillbench.runs.plan import USUAL_NFE, cell_of, plan
from distillbench.runs.saved_settings import read_config, text_of_run
from distillbench.runs.shared_context import Cell, SharedContexts, restored
from distillbench.storage.files import key_of, sha256_file
from distillbench.system.environment import device_name, environment
from distillbench.system.progress import Progress
from distillbench.teachers.teacher import Teacher
from distillbench.training.multistep import MultistepMethod

SEARCH = "search of levels"  # the purpose of its samples; those of an evaluation have another, so other noise
DIGITS = 4  # significant ones, of levels
MOST_NAMED = 4  # numbers in a message


@dataclass(frozen=True)
class Wanted:
    """What to tune; None: the default that the command describes."""

    method: str | None = None  # its name, or NAME-seedS-KEY
    seed: int | None = None
    nfe: int | None = None  # the most evaluations
    metric: str | None = None
    images: int | None = None
    candidates: int = 40  # levels of the grid, at most
    sampling_seed: int = 0


@dataclass(frozen=True)
class Tuning:
    """A finished search."""

    method: str
    label: str  # of the student's cell
    metric: str
    direction: str
    images: int
    present: list[list[float]]  # the levels of the run for 2, 3, ... evaluations
    chosen: list[list[float]]  # the best
    tried: list[TriedLevels]
    fresh: int  # how many of them were not in the record of an earlier search
    configs: list[RunConfig]  # of the run
    tuned: list[RunConfig]  # those of the same settings, with the method alone and the chosen levels

    @property
    def setting(self) -> str:
        """The setting with the chosen levels, as on the command line."""
        levels = self.tuned[0].methods[self.method].sampling_levels
        lists = ",".join(f"[{','.join(map(_written, one))}]" for one in levels)
        return f"methods.{self.method}.sampling_levels=[{lists}]"

    def is_unimodal(self, nfe: int) -> bool:
        """Whether the scores with `nfe` evaluations fall and then rise with the last level, as the search assumes."""
        prefix = self.chosen[nfe - 2][:-1]
        found = sorted((one.levels[-1], _lower_is_better(one.score, self.direction)) for one in self.of(nfe, prefix))
        return is_unimodal([score for _, score in found])

    def of(self, nfe: int, prefix: Sequence[float]) -> list[TriedLevels]:
        """What was tried with `nfe` evaluations after the levels `prefix`."""
        return [one for one in self.tried if one.nfe == nfe and one.levels[:-1] == list(prefix)]


def tune_levels(run_folder: Path, wanted: Wanted, registry: Registry, progress: Progress) -> Tuning:
    """Search the best levels for a student of the run, up to ``wanted.nfe`` evaluations.

    Scores are recorded one by one, so an interrupted search continues. Raises UserError if the run has no such student.
    """
    configs = _configs_of(run_folder, registry)
    name = _method_of(configs, wanted, run_folder, registry)
    student = _find_student(configs, name, wanted, registry, progress)
    torch.set_num_threads(student.config.threads)
    shared, settings = student.cell.shared, student.config.methods[name]
    method = restored(student.cell, shared.load_teacher(progress), student.weights)
    assert isinstance(method, MultistepMethod)
    most = _most_evaluations(method, student.config, wanted)
    grid = _candidates(method, wanted.candidates)
    scorer = _Scorer.of(student, method, progress)
    chosen: list[list[float]] = []
    present = [[_rounded(level) for level in method.levels_at(nfe)] for nfe in range(2, most + 1)]
    for nfe, now in enumerate(present, start=2):
        prefix = chosen[-1] if chosen else []
        below = [level for level in grid if not prefix or level < prefix[-1]]
        if not below:
            raise UserError(f"{name}: its grid has no level below {prefix[-1]:g} for {nfe} evaluations")
        scorer(now)
        ternary_search(lambda k, prefix=prefix, below=below: scorer([*prefix, below[k]]), len(below))  # type: ignore[misc]
        chosen.append(min((one.levels for one in scorer.used if one.nfe == nfe), key=scorer))
    same = [config for config in configs if config == dataclasses.replace(student.config, seed=config.seed)]
    others = [levels for levels in settings.sampling_levels if len(levels) + 1 > most]
    best = dataclasses.replace(settings, sampling_levels=[*chosen, *others])
    tuned = [dataclasses.replace(config, methods={name: best}) for config in same]
    metric = shared.metrics[scorer.metric]
    return Tuning(
        name, student.cell.label, metric.name, metric.direction, shared.config.evaluation.images,
        present, chosen, scorer.used, scorer.fresh, configs, tuned,
    )  # fmt: skip


def check_trained(run_folder: Path, registry: Registry, progress: Progress) -> None:
    """Raise UserError if the run of `run_folder`, started again, would train anything."""
    cells = [cell for cell in plan(_configs_of(run_folder, registry), registry) if cell.entry is not None]
    again = [cell.label for cell in cells if _trained(describe_cell(cell, _teacher(cell, progress))) is None]
    if again:
        raise UserError(
            f"{', '.join(again)} would be trained again: not finished, or of other versions of plugins, data or "
            "teacher. Run the run's own command first"
        )


def _configs_of(run_folder: Path, registry: Registry) -> list[RunConfig]:
    """The settings of the run, which is where its folder is now."""
    here = run_folder.absolute()
    configs = read_config(text_of_run(run_folder, "config.yaml"), registry)
    return [dataclasses.replace(config, results_dir=str(here.parent), run_name=here.name) for config in configs]


# --- the student -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Student:
    """A finished student. `cell` is that of the search, `config` the run's settings."""

    config: RunConfig
    cell: Cell
    description: CellDescription
    weights_sha256: str

    @property
    def weights(self) -> Path:
        return self.description.folder / STUDENT

    @property
    def name(self) -> str:
        return f"{self.cell.name}-seed{self.cell.seed}-{self.description.train_key}"


def _method_of(configs: list[RunConfig], wanted: Wanted, run_folder: Path, registry: Registry) -> str:
    """The method of the run that is wanted, or the only one whose levels can be chosen."""
    classes = {
        name: registry.get("methods", settings.kind).cls for c in configs for name, settings in c.methods.items()
    }
    able = [name for name, cls in classes.items() if issubclass(cls, MultistepMethod)]
    asked = wanted.method and re.sub(r"-seed\d+-[0-9a-f]+$", "", wanted.method)
    if asked is not None and asked not in classes:
        raise unknown("method", asked, classes, f" in the run {run_folder.name!r}")
    if asked in able or (asked is None and len(able) == 1):
        return asked or able[0]
    listed = ", ".join(able) or "none"
    if asked is not None:
        raise UserError(
            f"{asked} has no levels of sampling to choose: it has no setting sampling_levels. Methods of the run that "
            f"have: {listed}"
        )
    raise UserError(f"name a method of the run with levels of sampling to choose (--method): {listed}")


def _find_student(
    configs: list[RunConfig], name: str, wanted: Wanted, registry: Registry, progress: Progress
) -> _Student:
    seeds = sorted({config.seed for config in configs if name in config.methods})
    if wanted.seed is not None and wanted.seed not in seeds:
        raise unknown("seed", str(wanted.seed), map(str, seeds), f" of {name} in the run")
    contexts = SharedContexts()
    found: dict[str, _Student] = {}
    fixed: list[UserError] = []
    for config in configs:
        if name in config.methods and wanted.seed in (None, config.seed):
            try:
                dataclasses.replace(config.methods[name], sampling_levels=[[1.0]])
            except UserError as error:  # another setting fixes the levels
                fixed.append(error)
                continue
            cell = cell_of(_search_settings(config, wanted, registry), name, [], registry, contexts)
            cell.shared.noise = SEARCH
            description = describe_cell(cell, _teacher(cell, progress))
            if (training := _trained(description)) is not None:
                student = _Student(config, cell, description, training.weights_sha256)
                found.setdefault(student.name, student)
    if wanted.method in found:
        return found[wanted.method]
    if fixed and not found:
        raise fixed[0]
    if not found or wanted.method not in (None, name):
        seed = "" if wanted.seed is None else f" (seed {wanted.seed})"
        raise UserError(
            f"the run has no finished student {wanted.method or name}{seed} of its settings and of the plugins, data "
            f"and teacher that are here now. Students that it has: {', '.join(found) or 'none'}"
        )
    first = min(student.cell.seed or 0 for student in found.values())
    fitting = [student for student in found.values() if student.cell.seed == first]
    if len(fitting) > 1:
        raise UserError(
            f"the run has {len(fitting)} students of {name} with seed {first}; name one by --method: "
            f"{', '.join(student.name for student in fitting)}"
        )
    return fitting[0]


def _search_settings(config: RunConfig, wanted: Wanted, registry: Registry) -> RunConfig:
    """The run's settings with the samples and the metric of the search."""
    metrics = chosen_metrics(config.evaluation, registry)
    none = "the run has no score that"
    name = metric_to_optimise(metrics, wanted.metric, config.evaluation, none, " in the run")
    references = references_of(config.evaluation, metrics[name])
    images = wanted.images or config.evaluation.images
    changes: dict[str, Any] = {"metrics": [name], "references": references, "seeds": [wanted.sampling_seed]}
    evaluation = dataclasses.replace(config.evaluation, images=images, timing="off", **changes)
    return dataclasses.replace(config, evaluation=evaluation)


def _teacher(cell: Cell, progress: Progress) -> Teacher:
    """The teacher, without training it."""
    if cell.shared.teacher is None and cell.shared.source.plan().images:
        raise UserError(
            f"the teacher of {cell.label} is no longer in {cell.shared.folder.root}: it would be trained again"
        )
    return cell.shared.load_teacher(progress)


def _trained(description: CellDescription) -> TrainRecord | None:
    """The record of a finished training with intact weights."""
    try:
        record = read_record(description.folder / TRAIN, TrainRecord, description.train_inputs)
    except ValueError:
        return None
    file = description.folder / STUDENT
    if record is None or record.status != "ok" or not file.is_file() or sha256_file(file) != record.weights_sha256:
        return None
    return record


# --- candidates and their scores -------------------------------------------------------------------------------------


def _most_evaluations(method: MultistepMethod, config: RunConfig, wanted: Wanted) -> int:
    able = [nfe for nfe in config.evaluation.nfe or USUAL_NFE if nfe > 1 and method.supports(nfe)]
    most = wanted.nfe or max(able, default=1)
    if most < 2:
        raise UserError(f"{method.name}: the run has no row with two or more evaluations. Give their number: --nfe 2")
    if lacking := [str(nfe) for nfe in range(2, most + 1) if not method.supports(nfe)]:
        raise UserError(
            f"{method.name} does not sample with {first_of(lacking, MOST_NAMED)} evaluations. Give fewer: --nfe"
        )
    return most


def _candidates(method: MultistepMethod, most: int) -> list[float]:
    """Noise levels between the ends of the method's grid, falling: all, or `most` evenly spread over its indices."""
    levels = method.teacher.schedule.noise_level(method.sampling_grid[1:-1]).flip(0).tolist()
    if not levels:
        raise UserError(f"{method.name}: its grid has no level between its ends")
    kept = torch.linspace(0, len(levels) - 1, min(most, len(levels))).round().long().tolist()
    return list(dict.fromkeys(_rounded(levels[k]) for k in kept))


def _rounded(level: float) -> float:
    return float(f"{level:.{DIGITS}g}")


def _written(level: float) -> str:
    """A level as on the command line, with all its digits: levels that the search leaves are the user's."""
    return short if float(short := f"{level:g}") == level else repr(level)


def _lower_is_better(score: float | None, direction: str) -> float:
    """The score such that lower is better; infinite if the samples were not finite."""
    return math.inf if score is None else score if direction == "lower" else -score


@dataclass
class _Scorer:
    """Scores the student at levels. Each score is recorded, and read from the record in a later search."""

    student: _Student
    method: MultistepMethod
    metric: str
    record: LevelsRecord
    path: Path
    progress: Progress
    used: list[TriedLevels] = field(default_factory=list)
    fresh: int = 0

    @staticmethod
    def of(student: _Student, method: MultistepMethod, progress: Progress) -> _Scorer:
        cell, config = student.cell, student.cell.shared.config
        (metric,) = cell.shared.metrics
        if why := cell.shared.unavailable_metrics().get(metric):
            raise UserError(f"{metric} cannot be measured: {why}")
        plain = dataclasses.replace(cell, method_config=dataclasses.replace(method.config, sampling_levels=[]))
        inputs = evaluation_inputs(plain, student.description.train_key)
        inputs |= {"weights_sha256": student.weights_sha256}
        path = student.description.folder / f"levels-{key_of(inputs)}.json"
        try:
            record = read_record(path, LevelsRecord, inputs)
        except ValueError as error:
            progress.say(f"{error}; it is made again")
            record = None
        device = cell.shared.device
        where: dict[str, Any] = {"device": device_name(device), "environment": environment(device, config.threads)}
        record = record or LevelsRecord(key=key_of(inputs), inputs=inputs, **where)
        return _Scorer(student, method, metric, record, path, progress)

    def __call__(self, levels: list[float]) -> float:
        """The score at `levels`, such that lower is better."""
        one = next((one for one in self.record.tried if one.levels == levels), None)
        if one is None:
            one, self.fresh = self._measured(levels), self.fresh + 1
            self.record = self.record.model_copy(update={"tried": [*self.record.tried, one]})
            write_record(self.path, self.record)
        if one not in self.used:
            self.used.append(one)
        return _lower_is_better(one.score, self.student.cell.shared.metrics[self.metric].direction)

    def _measured(self, levels: list[float]) -> TriedLevels:
        shared, nfe, teacher = self.student.cell.shared, len(levels) + 1, self.method.teacher
        evaluations = lambda: teacher.teacher_rows.rows + teacher.student_rows.rows
        before, begin = evaluations(), time.perf_counter()
        self.method.config = dataclasses.replace(self.method.config, sampling_levels=[levels])
        label = f"{self.student.cell.label} at {', '.join(f'{level:g}' for level in levels)}"
        evaluator = shared.get_evaluator(self.progress)
        seed = shared.config.evaluation.seeds[0]
        try:
            keeps_noise = self.method.keeps_noise(nfe)
            measured = evaluator.measure(self.method.sample, nfe, seed, keeps_noise, label)
            score, reason = measured.scores[self.metric], measured.missing.get(self.metric)
        except DivergedError:
            score, reason = None, None
        if reason is not None:
            raise UserError(f"{self.metric} has no value with {nfe} evaluations: {reason}")
        seconds = time.perf_counter() - begin
        return TriedLevels(levels=levels, score=score, evaluations=evaluations() - before, seconds=seconds)
