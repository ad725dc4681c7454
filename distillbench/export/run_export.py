"""Finding the student for `distillbench export` in a run's folder.

<results>/<run>/config.yaml, table.csv              settings, one document for each point of a grid; rows
<results>/<run>/weights/NAME-seedS-KEY.safetensors  the students
<results>/cells/KEY/train.json                      their records
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distillbench.diffusion.samplers import Solver
from distillbench.errors import UserError, unknown
from distillbench.options import plain_settings
from distillbench.records.layout import ResultsFolder
from distillbench.records.records import TrainRecord, load_record
from distillbench.records.settings_file import FULL
from distillbench.registry import Registry
from distillbench.runs.config import RunConfig
from distillbench.runs.sampling_settings import sampling_settings, training_settings
from distillbench.runs.saved_settings import plain_documents, text_of_run, typed_settings
from distillbench.runs.shared_context import Cell, SharedContext, choose_device, make_source, restored
from distillbench.storage.files import sha256_file
from distillbench.system.progress import Progress
from distillbench.teachers.students import AS_TEACHER, StudentForm
from distillbench.teachers.teacher import Teacher
from distillbench.training.method import Method

TEACHER = "teacher:"  # and a sampler: the method of the teacher's rows
WEIGHTS = re.compile(r"(?P<method>.+)-seed(?P<seed>\d+)-(?P<key>[0-9a-f]{16})\.safetensors")


@dataclass(frozen=True)
class Weights:
    """A file in a run's weights/."""

    method: str
    seed: int
    key: str

    @property
    def name(self) -> str:
        return f"{self.method}-seed{self.seed}-{self.key}"


@dataclass(frozen=True)
class Student:
    """A trained student and its origin."""

    run: Path
    cell: Cell
    teacher: Teacher
    method: Method  # its adapters are merged into the weights
    record: TrainRecord
    state: Mapping[str, Tensor]  # its state dict in training, with adapters


def find_student(
    run_folder: Path, method: str, seed: int | None, registry: Registry, progress: Progress, nfe: int = 1,
    device: str = "cpu",
) -> Student:  # fmt: skip
    """The student of `method` and `seed` with its weights, on `device` ("": the run's).

    Raises UserError if there is none, or if it does not sample with `nfe` evaluations.
    """
    documents = plain_documents(text_of_run(run_folder, "config.yaml"))
    table = list(csv.DictReader(io.StringIO(text_of_run(run_folder, "table.csv"), newline="")))
    if len(documents) <= FULL:
        typed_settings(documents, registry)  # unreadable settings are the first error
    weights = _chosen(run_folder, method, seed, documents, table)
    configs = typed_settings([document for document in documents if document["seed"] == weights.seed], registry)
    results = run_folder.absolute().parent
    cell_folder = ResultsFolder(results).cells / weights.key
    record = _record(cell_folder / "train.json", weights)
    described = [config for config in configs if _describes(config, weights.method, record)]
    if not described:
        raise UserError(f"the config.yaml of {str(run_folder)!r} does not describe the training {weights.name}")
    students = StudentForm.from_plain(record.inputs.get("student", {}))
    config = _first(described, weights.name, weights.method if nfe > 1 else "", progress)
    shared = _context(config, registry, results, weights.name, device, students)
    method_config = shared.config.methods[weights.method]
    cell = Cell(shared, weights.method, registry.get("methods", method_config.kind), method_config, weights.seed)
    teacher = shared.load_teacher(progress)
    if teacher.sha256 != record.inputs["teacher_sha256"]:
        raise UserError(f"the teacher {teacher.label} is not the one that {weights.name} was distilled from")
    if cell.entry is not None and cell.entry.identity() != record.inputs["method"]:
        progress.say(f"{weights.name}: was trained by another version of the plugin of {weights.method}")
    file = _intact(run_folder, cell_folder, weights, record)
    student = _restored(cell, teacher, file)
    if not student.supports(nfe):
        able = ", ".join(str(n) for n in range(1, 1025) if student.supports(n)) or "none up to 1024"
        asked = "in one step, which is what is exported" if nfe == 1 else f"with {nfe} evaluations"
        raise UserError(f"{weights.method} does not sample {asked}. It does {able}")
    return Student(run_folder, cell, teacher, student, record, load_file(file) if students.adapters else {})


def find_teacher(run_folder: Path, name: str, registry: Registry, progress: Progress) -> tuple[Cell, Teacher]:
    """The cell of the teacher's rows `name`, such as "teacher:ddim", and the teacher, on the run's device."""
    configs = typed_settings(plain_documents(text_of_run(run_folder, "config.yaml")), registry)
    named: dict[str, list[tuple[RunConfig, Solver]]] = {}
    for config in configs:
        for solver in config.evaluation.solvers():
            named.setdefault(f"{TEACHER}{solver.name}", []).append((config, solver))
    if name not in named:
        raise unknown("row of the teacher", name, named, f" in the run {run_folder.name!r}")
    config = _first([config for config, _ in named[name]], name, "", progress)
    _, solver = named[name][0]
    shared = _context(config, registry, run_folder.absolute().parent, run_folder.name, "")
    return Cell(shared, name, solver=solver), shared.load_teacher(progress)


def _first(configs: Sequence[RunConfig], what: str, method: str, progress: Progress) -> RunConfig:
    """The first of the settings that a run has for `what`; says so if samples of the others differ.

    `method` is given where its settings of sampling matter.
    """
    every = []
    for config in configs:
        own = {f"dataset.{name}": value for name, value in plain_settings(config.dataset).items()}
        own |= {f"teacher.{name}": value for name, value in plain_settings(config.teacher).items()}
        own |= {"conditional": config.conditional, "guidance": config.guidance if config.conditional else ""}
        every.append(own | (sampling_settings(config.methods[method]) if method else {}))
    names = [name for name in {name: None for own in every for name in own} if _differs(name, every)]
    words = [", ".join(f"{name}={own[name]}" for name in names if name in own) or "defaults" for own in every]
    if names:
        progress.say(f"{what}: the run has {' and '.join(dict.fromkeys(words))}; the first is used")
    return configs[0]


def _differs(name: str, every: Sequence[dict[str, Any]]) -> bool:
    return any(own.get(name) != every[0].get(name) for own in every)


def _context(
    config: RunConfig, registry: Registry, results: Path, what: str, device: str, students: StudentForm = AS_TEACHER
) -> SharedContext:
    """Dataset and teacher of a run that is over. Raises UserError if its teacher would be trained again."""
    device = device or choose_device(config.device)
    config = dataclasses.replace(config, device=device, results_dir=str(results))
    dataset, source, conditioning = make_source(config, registry, device)
    if source.plan().images:
        raise UserError(f"the teacher of {what} is no longer in {str(results)!r}: it would be trained again")
    return SharedContext(config, registry, device, dataset, source, conditioning, {}, Path(), [], students=students)


def _chosen(
    run_folder: Path, method: str, seed: int | None, documents: list[Any], table: list[dict[str, str]]
) -> Weights:
    """The training that `method` and `seed` select."""
    names = sorted({name for document in documents for name in document["methods"]})
    files = sorted((run_folder / "weights").glob("*.safetensors"))
    found = [Weights(m["method"], int(m["seed"]), m["key"]) for f in files if (m := WEIGHTS.fullmatch(f.name))]
    exact = [weights for weights in found if weights.name == method]
    if exact:
        return exact[0]
    if method not in names:
        raise unknown("method", method, names, f" in the run {run_folder.name!r}")
    of_method = [weights for weights in found if weights.method == method]
    fitting = [weights for weights in of_method if seed is None or weights.seed == seed]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        listed = ", ".join(weights.name for weights in fitting)
        raise UserError(f"the run has {len(fitting)} students of {method}: name a seed, or one of {listed}")
    student = method if seed is None else f"{method} (seed {seed})"
    rows = [row for row in table if row["method"] == method and seed in (None, int(row["training_seed"] or -1))]
    bad = next((row for row in rows if row["status"] != "ok"), None)
    if bad is not None:
        raise UserError(f"{student} was not trained to the end: {bad['status']}: {bad['reason']}")
    others = ", ".join(str(weights.seed) for weights in of_method)
    raise UserError(f"the run {run_folder.name!r} has no weights of {student}. Seeds that it has: {others or 'none'}")


def _record(file: Path, weights: Weights) -> TrainRecord:
    try:
        record = load_record(file, TrainRecord)
    except FileNotFoundError as error:
        raise UserError(f"the record of {weights.name} is missing: no cells/{weights.key}/{file.name}") from error
    except ValueError as error:
        raise UserError(f"the record of {weights.name} cannot be read: {error} (cells/{weights.key})") from error
    if record.status != "ok":
        raise UserError(f"{weights.name} was not trained to the end: {record.status}: {record.reason}")
    return record


def _describes(config: RunConfig, name: str, record: TrainRecord) -> bool:
    """Whether the record is of a training of the method `name` with `config`."""
    if name not in config.methods:
        return False
    conditional: dict[str, Any] = {}
    if config.conditional:
        drawn = bool(config.guidance_range)
        conditional = {"guidance_range" if drawn else "guidance": config.guidance_range or [config.guidance]}
    wanted = {
        "dataset": config.dataset.kind,
        "teacher": config.teacher.kind,
        "config": training_settings(config.methods[name]),
        "budget": {"limit": config.budget.limit.value, "amount": config.budget.amount},
        "batch_size": config.batch_size,
        "seed": config.seed,
        **conditional,
    }
    if not all(record.inputs.get(key) == value for key, value in wanted.items()):
        return False
    student = record.inputs.get("student", {})
    if config.student.architecture:  # its file may have been moved or edited since
        return "architecture" in student
    return bool(student == StudentForm.of(config.student).plain())


def _intact(run_folder: Path, cell_folder: Path, weights: Weights, record: TrainRecord) -> Path:
    """The weights file of the record, with the recorded hash."""
    files = [cell_folder / "student.safetensors", run_folder / "weights" / f"{weights.name}.safetensors"]
    for file in files:
        if file.is_file() and sha256_file(file) == record.weights_sha256:
            return file
    raise UserError(f"the weights of {weights.name} are missing or damaged: the same run again would train it again")


def _restored(cell: Cell, teacher: Teacher, weights: Path) -> Method:
    try:
        return restored(cell, teacher, weights)
    except (SafetensorError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"the weights of {cell.label} do not fit the method as it is installed: {why}") from error
