"""A cell as it is sent to another process or machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from distillbench.evaluation.evaluator import EVALUATION
from distillbench.registry import Registry, Selection
from distillbench.runs.config import RunConfig
from distillbench.runs.executor_config import LocalConfig
from distillbench.runs.plan import cell_of
from distillbench.runs.shared_context import Cell, SharedContexts


@dataclass(frozen=True)
class CellTask:
    """A picklable cell: its name, the settings with its own method only, and which plugins to load."""

    config: RunConfig
    name: str
    nfe: list[int]
    selection: Selection
    differs: str = ""  # as in Cell
    group_size: int = 1  # the same
    noise: str = EVALUATION  # the purpose of its samples

    @staticmethod
    def of(cell: Cell, device: str = "") -> CellTask:
        """`device`: to be used instead of the run's."""
        methods = {} if cell.method_config is None else {cell.name: cell.method_config}
        given = cell.shared.config
        config = dataclasses.replace(
            given,
            methods=methods,
            seed=given.seed if cell.seed is None else cell.seed,
            device=device or given.device,
            executor=LocalConfig(kind="local"),
        )
        own = cell.nfe, cell.shared.registry.selection, cell.differs, cell.group_size, cell.shared.noise
        return CellTask(config, cell.name, *own)

    def cell(self, registry: Registry, contexts: SharedContexts) -> Cell:
        cell = cell_of(self.config, self.name, self.nfe, registry, contexts)
        cell.shared.noise = self.noise
        cell.differs, cell.group_size = self.differs, self.group_size
        return cell


def cells_of(tasks: Sequence[CellTask]) -> list[Cell]:
    """The cells of `tasks`, with one shared context for all that can share it."""
    registries = {selection: selection.load() for selection in {task.selection for task in tasks}}
    contexts = {noise: SharedContexts() for noise in {task.noise for task in tasks}}
    return [task.cell(registries[task.selection], contexts[task.noise]) for task in tasks]
