"""The plan of a run: its cells, checked without training, each with its estimated cost.

A cell is one training of one method and its evaluation, or the evaluation of the teacher itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distillbench.diffusion.samplers import Solver
from distillbench.errors import UserError, printable
from distillbench.registry import Registry
from distillbench.runs.cell_names import name_differences
from distillbench.runs.config import RunConfig
from distillbench.runs.shared_context import Cell, SharedContext, SharedContexts
from distillbench.runs.training_cost import CostCache
from distillbench.teachers.students import StudentConfig
from distillbench.teachers.teacher import TeacherPlan
from distillbench.training.method import MethodConfig
from distillbench.training.optimizer_config import check_optimizers

USUAL_NFE = (1, 2, 4)  # network evaluations of rows where evaluation.nfe is empty


def plan(configs: list[RunConfig], registry: Registry) -> list[Cell]:
    """The cells of all settings, checked without training, each with its estimated cost. Writes nothing."""
    cells: list[Cell] = []
    contexts, costs = SharedContexts(), CostCache()
    seen: set[Hashable] = set()
    for config in configs:
        shared = contexts.of(config, registry)
        todo = [_teacher_cell(shared, config, solver) for solver in config.evaluation.solvers()]
        for name, method_config in config.methods.items():
            todo.append(Cell(shared, name, registry.get("methods", method_config.kind), method_config, config.seed))
        for cell in todo:
            identity = contexts.identity(cell)
            if identity not in seen:
                seen.add(identity)
                if cell.entry is not None:
                    _check_data(cell)
                    _check_start(cell)
                    _check_optimizers(cell)
                    cell.nfe = sorted(config.evaluation.nfe or USUAL_NFE)
                    costs.fill_in(cell, contexts.text(cell.method_config))
                cells.append(cell)
        _check_nfe(config, todo)
    name_differences(cells)
    return cells


def cell_of(config: RunConfig, name: str, nfe: list[int], registry: Registry, contexts: SharedContexts) -> Cell:
    """A cell of an earlier plan, by its name, without its estimated cost. Contexts are shared through `contexts`."""
    shared = contexts.of(config, registry)
    if name in config.methods:
        settings = config.methods[name]
        return Cell(shared, name, registry.get("methods", settings.kind), settings, config.seed, nfe=nfe)
    (solver,) = (solver for solver in config.evaluation.solvers() if _name_of(solver) == name)
    return Cell(shared, name, solver=solver, nfe=nfe)


def _teacher_cell(shared: SharedContext, config: RunConfig, solver: Solver) -> Cell:
    nfe = [solver.evaluations(steps) * shared.conditioning.evaluations for steps in config.evaluation.teacher_steps]
    return Cell(shared, _name_of(solver), nfe=sorted(nfe), solver=solver)


def _name_of(solver: Solver) -> str:
    """The name of the teacher's cell with this sampler."""
    return f"teacher:{solver.name}"


def _check_data(cell: Cell) -> None:
    """Refuse a method that needs real images if the dataset has none, or none that fit the teacher."""
    assert cell.entry is not None
    shared = cell.shared
    if not cell.reads_data or (len(shared.dataset) and shared.source.fits_data):
        return
    methods = shared.registry.methods
    free = ", ".join(sorted(name for name, entry in methods.items() if not entry.cls.needs_data))
    settings = " with these settings" if not cell.entry.cls.needs_data else ""
    why = f"dataset={shared.dataset.name} has none"
    if len(shared.dataset):
        why = f"teacher={shared.source.name} is an upscaler of images from its own base model, not of real ones"
    raise UserError(f"{cell.name} needs real images{settings}, and {why}. Methods that need none: {free}")


def _check_start(cell: Cell) -> None:
    """Refuse another architecture for a method whose student starts from the teacher's weights."""
    assert cell.entry is not None
    if cell.shared.students.architecture is None or cell.entry.cls.can_start_fresh:
        return
    methods = cell.shared.registry.methods
    able = ", ".join(sorted(name for name, entry in methods.items() if entry.cls.can_start_fresh))
    raise UserError(
        f"student.architecture: the student of {cell.name} starts from the teacher's weights, which another "
        f"architecture does not have. Methods that work from random weights: {able}. For the others: student.lora_rank"
    )


def _check_optimizers(cell: Cell) -> None:
    assert cell.method_config is not None
    compute = cell.shared.config.compute
    layout = {"compute.shard": compute.shard, "compute.channels_last": compute.channels_last}
    check_optimizers(cell.method_config, f"methods.{cell.name}.", layout)


def _check_nfe(config: RunConfig, cells: list[Cell]) -> None:
    """Refuse a number of evaluations in evaluation.nfe with which no method of the run can sample."""
    students = [cell for cell in cells if cell.entry is not None and not cell.cost_error]
    for nfe in config.evaluation.nfe:
        if students and len(students) == len(config.methods) and not any(nfe in cell.nfe for cell in students):
            able = "; ".join(f"{cell.name}: {', '.join(map(str, cell.nfe))}" for cell in students)
            raise UserError(f"evaluation.nfe: no method of this run samples with {nfe} evaluations. Possible: {able}")


def teacher_plan(cells: list[Cell]) -> list[tuple[str, str, TeacherPlan]]:
    """(dataset, teacher, plan) of every context of the cells."""
    contexts = {id(cell.shared): cell.shared for cell in cells}.values()
    return [(shared.dataset.name, shared.source.name, shared.source.plan()) for shared in contexts]


def notes_of(cells: Sequence[Cell]) -> list[str]:
    """What a user should know about how the datasets and teachers of these cells are read."""
    contexts = {id(cell.shared): cell.shared for cell in cells}.values()
    notes = [f"dataset {shared.dataset.name}: {note}" for shared in contexts for note in shared.dataset.notes]
    notes += [f"teacher {shared.source.name}: {note}" for shared in contexts for note in shared.source.notes()]
    return [printable(note) for note in dict.fromkeys(notes)]


def changed_settings(config: MethodConfig | None) -> str:
    """The settings of a method that differ from its defaults, as "name=value, ...". They tell grid rows apart."""
    return ", ".join(f"{name}={value}" for name, value in _changed(config)) if config is not None else ""


def student_settings(config: StudentConfig) -> list[str]:
    """The settings of students that differ from the default, as "student.name=value"; of a file only its name."""
    changed = {name: Path(value).name if name == "architecture" else value for name, value in _changed(config)}
    return [f"student.{name}={value}" for name, value in changed.items()]


def _changed(config: Any, default: Any = None) -> Iterator[tuple[str, Any]]:
    """(name, value) of settings that differ from `default` or, without one, from the fields' own defaults."""
    for f in dataclasses.fields(config):
        own = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        value, usual = getattr(config, f.name), own if default is None else getattr(default, f.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{f.name}.{name}", inner) for name, inner in _changed(value, usual))
        elif f.name != "kind" and value != usual:
            yield f.name, value
