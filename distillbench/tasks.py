"""A cell as it can be handed to another process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from distillbench.config import RunConfig
from distillbench.executor_settings import LocalConfig
from distillbench.plan import cell_of
from distillbench.registry import Registry, Selection
from distillbench.shared_context import Cell, Scenes


@dataclass(frozen=True)
class Task:
    """A cell as it can be handed to another process: its settings, with its own method only, and its name."""

    config: RunConfig
    name: str
    nfe: list[int]
    selection: Selection

    @staticmethod
    def of(cell: Cell, device: str = "") -> Task:
        """`device`: another than the run's."""
        methods = {} if cell.method_config is None else {cell.name: cell.method_config}
        seed = cell.scene.config.seed if cell.seed is None else cell.seed
        given, where = cell.scene.config, LocalConfig(kind="local")
        device = device or given.device
        config = dataclasses.replace(given, methods=methods, seed=seed, device=device, executor=where)
        return Task(config, cell.name, cell.nfe, cell.scene.registry.selection)

    def cell(self, registry: Registry, scenes: Scenes) -> Cell:
        return cell_of(self.config, self.name, self.nfe, registry, scenes)


def cells_of(tasks: Sequence[Task]) -> list[Cell]:
    """The cells of `tasks`, which share what they can."""
    registries = {selection: selection.load() for selection in {task.selection for task in tasks}}
    scenes = Scenes()
    return [task.cell(registries[task.selection], scenes) for task in tasks]
