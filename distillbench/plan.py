"""The plan: cells made from settings, checked as far as can be without training, each with its price foreseen.

A cell is one training of one method (or the teacher itself) and its evaluation. Planning writes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from distillbench.config import RunConfig
from distillbench.errors import UserError, printable
from distillbench.method import MethodConfig
from distillbench.price import Foresight
from distillbench.registry import Registry
from distillbench.samplers import Solver
from distillbench.shared_context import Cell, Scene, Scenes
from distillbench.teachers import TeacherPlan

USUAL_NFE = (1, 2, 4)  # of the rows of a run that names none


def plan(configs: list[RunConfig], registry: Registry) -> list[Cell]:
    """The cells of all settings, checked as far as can be without training, each with its price. Writes nothing."""
    cells: list[Cell] = []
    scenes, foresight = Scenes(), Foresight()
    seen: set[Hashable] = set()
    for config in configs:
        scene = scenes.of(config, registry)
        todo = [_teacher_cell(scene, config, solver) for solver in config.evaluation.solvers()]
        for name, method_config in config.methods.items():
            todo.append(Cell(scene, name, registry.get("methods", method_config.kind), method_config, config.seed))
        for cell in todo:
            identity = scenes.identity(cell)
            if identity not in seen:
                seen.add(identity)
                if cell.entry is not None:
                    _check_data(cell)
                    cell.nfe = sorted(config.evaluation.nfe or USUAL_NFE)
                    foresight.foresee(cell, scenes.text(cell.method_config))
                cells.append(cell)
        _check_nfe(config, todo)
    return cells


def cell_of(config: RunConfig, name: str, nfe: list[int], registry: Registry, scenes: Scenes) -> Cell:
    """A cell that was planned before, by its name; scenes are shared through `scenes`. Its price is not foreseen."""
    scene = scenes.of(config, registry)
    if name in config.methods:
        settings = config.methods[name]
        return Cell(scene, name, registry.get("methods", settings.kind), settings, config.seed, nfe=nfe)
    (solver,) = (solver for solver in config.evaluation.solvers() if _name_of(solver) == name)
    return Cell(scene, name, solver=solver, nfe=nfe)


def _teacher_cell(scene: Scene, config: RunConfig, solver: Solver) -> Cell:
    nfe = [solver.evaluations(steps) * scene.conditioning.evaluations for steps in config.evaluation.teacher_steps]
    return Cell(scene, _name_of(solver), nfe=sorted(nfe), solver=solver)


def _name_of(solver: Solver) -> str:
    """What the teacher with this sampler is called."""
    return f"teacher:{solver.name}"


def _check_data(cell: Cell) -> None:
    """Refuse a method that needs real images where there are none, or none that go with what is asked for."""
    assert cell.entry is not None
    scene = cell.scene
    if not cell.entry.cls.needs_data or (len(scene.dataset) and scene.source.fits_data):
        return
    methods = scene.registry.methods
    free = ", ".join(sorted(name for name, entry in methods.items() if not entry.cls.needs_data))
    why = f"dataset={scene.dataset.name} comes without"
    if len(scene.dataset):
        why = f"teacher={scene.source.name} enlarges images of its own base, with which real ones do not go"
    raise UserError(f"{cell.name} needs real images, and {why}. Possible without: {free}")


def _check_nfe(config: RunConfig, cells: list[Cell]) -> None:
    """Refuse a number of evaluations that was asked for and that no method of the run can do."""
    students = [cell for cell in cells if cell.entry is not None and not cell.trouble]
    for nfe in config.evaluation.nfe:
        if students and len(students) == len(config.methods) and not any(nfe in cell.nfe for cell in students):
            able = "; ".join(f"{cell.name}: {', '.join(map(str, cell.nfe))}" for cell in students)
            raise UserError(f"evaluation.nfe: no method of this run samples with {nfe} evaluations. Possible: {able}")


def teacher_plan(cells: list[Cell]) -> list[tuple[str, str, TeacherPlan]]:
    """(dataset, teacher, plan) of every scene among the cells."""
    scenes = {id(cell.scene): cell.scene for cell in cells}.values()
    return [(scene.dataset.name, scene.source.name, scene.source.plan()) for scene in scenes]


def notes_of(cells: Sequence[Cell]) -> list[str]:
    """What a user should know of how the datasets and teachers of these cells are read, each once."""
    scenes = {id(cell.scene): cell.scene for cell in cells}.values()
    notes = [f"dataset {scene.dataset.name}: {note}" for scene in scenes for note in scene.dataset.notes]
    notes += [f"teacher {scene.source.name}: {note}" for scene in scenes for note in scene.source.notes()]
    return [printable(note) for note in dict.fromkeys(notes)]


def changed_settings(config: MethodConfig | None) -> str:
    """The settings of a method that differ from its defaults, as "name=value, ...": what tells rows of a grid apart."""
    return ", ".join(f"{name}={value}" for name, value in _changed(config)) if config is not None else ""


def _changed(config: Any, default: Any = None) -> Iterator[tuple[str, Any]]:
    """(name, value) of settings that differ from `default` or, without one, from the fields' own defaults."""
    for f in dataclasses.fields(config):
        own = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        value, usual = getattr(config, f.name), own if default is None else getattr(default, f.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{f.name}.{name}", inner) for name, inner in _changed(value, usual))
        elif f.name != "kind" and value != usual:
            yield f.name, value
