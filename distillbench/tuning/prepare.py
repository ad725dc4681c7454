"""What a tuning will do, from its settings: the score that is optimised, and a cell of each method to search from.

Nothing is trained or written here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillbench.errors import UserError
from distillbench.options import Among, Between, plain_settings, search_space, setting_of
from distillbench.registry import Registry
from distillbench.runs.cell_names import UNNAMED
from distillbench.runs.config import RunConfig, compose_group, compose_runs
from distillbench.runs.metric_choice import chosen_metrics, metric_to_optimise, references_of
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import Cell
from distillbench.storage.files import key_of
from distillbench.training.budget import Limit
from distillbench.training.method import MethodConfig
from distillbench.tuning.settings import TuneConfig

GROUP = "tune"
JOURNALS = "tuning"  # folder in that of the results
SEARCH = "search of settings"  # the purpose of its samples; those of an evaluation have another, so other noise


@dataclass(frozen=True)
class Goal:
    """The score that is optimised. `direction`: lower or higher."""

    metric: str
    direction: str
    nfe: int


@dataclass(frozen=True)
class Tuning:
    """A tuning before it begins. `final`: its last trainings, with the methods' defaults in place of the best."""

    tune: TuneConfig
    goal: Goal
    final: list[RunConfig]  # one for each final seed
    final_cells: list[Cell]
    cells: dict[float, list[Cell]]  # by share of the budget: for each method a cell of the search, with its defaults
    spaces: dict[str, dict[str, Between | Among]]  # by method
    trains: bool = True  # False: settings of sampling are searched, of students that are trained

    def journal(self, method: str, identity: str) -> Path:
        """The file with the trials of a method. A search after training has one for each student."""
        return self.folder / JOURNALS / f"{method}{'' if self.trains else f'-sampling-{identity[:8]}'}.journal"

    @property
    def config(self) -> RunConfig:
        return self.final[0]

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.config.results_dir) / self.config.run_name

    @property
    def at_once(self) -> int:
        """Trials of a method that are chosen together. How many jobs a cluster runs at a time is not known."""
        where = self.config.executor
        if self.tune.at_once or where.elsewhere:
            return self.tune.at_once or 1
        return -(-where.count // len(self.config.methods))

    def most_images(self, share: float = 1.0) -> int:
        """The training images of a trial that ends with the training of `share` of the budget."""
        parts = (cells[0].shared.config.budget.images for part, cells in self.cells.items() if part <= share)
        return len(self.tune.search_seeds) * sum(parts)

    def defaults(self, method: str) -> dict[str, Any]:
        """The values with which the search of a method begins: its defaults, or those on the command line."""
        return {name: setting_of(self.config.methods[method], name) for name in self.spaces[method]}


def read_settings(words: Sequence[str], registry: Registry) -> tuple[RunConfig, TuneConfig]:
    """The settings `words` of a run, and those of its tuning. Raises UserError for invalid ones."""
    mine = [word for word in words if word.partition("=")[0].split(".")[0] == GROUP]
    others = [word for word in words if word not in mine]
    if given := [word for word in others if word.partition("=")[0] == "seed"]:
        raise UserError(f"tune has seeds of its own, tune.search_seeds and tune.final_seeds; got {given[0]!r}")
    tune = compose_group(mine, GROUP, TuneConfig, registry)
    configs = compose_runs(others, registry)
    if len(configs) > 1:
        raise UserError(f"tune takes one value of each setting; these span {len(configs)} runs")
    return configs[0], tune


def prepare(config: RunConfig, tune: TuneConfig, registry: Registry) -> Tuning:
    """The tuning with these settings. Raises UserError if a method or the score does not fit."""
    config = dataclasses.replace(config, run_name=config.run_name or _folder_name(config, tune))
    final = [dataclasses.replace(config, seed=seed) for seed in tune.final_seeds]
    final_cells = plan(final, registry)
    goal = _goal(config, tune, final_cells, registry)
    spaces = {name: search_space(_config_of(name, registry)) for name in config.methods}
    cells: dict[float, list[Cell]] = {}
    if tune.searches:
        for share in tune.shares:
            cells[share] = _search_cells(_search_settings(config, goal, share, registry), tune, registry)
    tuning = Tuning(tune, goal, final, final_cells, cells, spaces)
    if tune.after and not sampling_spaces(tuning, registry):
        known = {name for kind in config.methods for name in search_space(_config_of(kind, registry), sampling=True)}
        raise UserError(
            f"tune.after={tune.after}: no method has one of these settings of sampling and a row with "
            f"tune.after_nfe={tune.after_nfe} evaluations. Settings: {', '.join(sorted(known)) or 'none'}"
        )
    return tuning


def _config_of(method: str, registry: Registry) -> type:
    return registry.get("methods", method).cls.Config


def sampling_spaces(tuning: Tuning, registry: Registry) -> dict[str, dict[str, Between | Among]]:
    """By method: what the search after training tries; without the methods that have nothing of it."""
    able = {cell.name for cell in tuning.final_cells if cell.entry is not None and tuning.tune.after_nfe in cell.nfe}
    spaces: dict[str, dict[str, Between | Among]] = {}
    for name in tuning.config.methods:
        every = search_space(_config_of(name, registry), sampling=True)
        chosen = {setting: entry for setting, entry in every.items() if setting in tuning.tune.after}
        if name in able and chosen:
            spaces[name] = chosen
    return spaces


def after_training(tuning: Tuning, methods: Mapping[str, MethodConfig], registry: Registry) -> Tuning:
    """The search of settings of sampling, for the students of `methods` that the first search has trained."""
    spaces = {name: space for name, space in sampling_spaces(tuning, registry).items() if name in methods}
    tune = dataclasses.replace(tuning.tune, protocol="equal_trials", trials=tuning.tune.after_trials, pruning="none")
    goal = dataclasses.replace(tuning.goal, nfe=tune.after_nfe)
    config = dataclasses.replace(tuning.config, methods={name: methods[name] for name in spaces})
    cells = {1.0: _search_cells(_search_settings(config, goal, 1.0, registry), tune, registry)} if spaces else {}
    return dataclasses.replace(tuning, tune=tune, goal=goal, final=[config], cells=cells, spaces=spaces, trains=False)


def _folder_name(config: RunConfig, tune: TuneConfig) -> str:
    """A name made from the settings, by which the same command finds its folder again."""
    unnamed = (*UNNAMED, "run_name", "estimate_seconds")
    named = {name: value for name, value in plain_settings(config).items() if name not in unnamed}
    return f"{config.dataset.kind}-tuned-{key_of([named, plain_settings(tune)])[:8]}"


def _goal(config: RunConfig, tune: TuneConfig, cells: Sequence[Cell], registry: Registry) -> Goal:
    """The score that the settings name, or the run's first, with the fewest evaluations that all methods can do."""
    metrics = chosen_metrics(config.evaluation, registry)
    metric = metric_to_optimise(metrics, tune.metric, config.evaluation, "no score", " in evaluation.metrics")
    students = [cell for cell in cells if cell.entry is not None]
    if failing := [cell for cell in students if cell.cost_error]:
        raise UserError(f"{failing[0].name} fails with its defaults: {failing[0].cost_error}")
    common = set.intersection(*(set(cell.nfe) for cell in students))
    each = "; ".join(f"{cell.name}: {', '.join(map(str, cell.nfe))}" for cell in students[: len(config.methods)])
    if not common:
        raise UserError(f"tune.nfe: these methods sample with no number of evaluations in common ({each})")
    if tune.nfe and tune.nfe not in common:
        raise UserError(f"tune.nfe={tune.nfe} must be a row of each method. Rows ({each}); others: evaluation.nfe")
    return Goal(metric, metrics[metric].direction, tune.nfe or min(common))


def _search_settings(config: RunConfig, goal: Goal, share: float, registry: Registry) -> RunConfig:
    """The settings of the trials that train `share` of the budget. They have one row, which is not timed."""
    metric = chosen_metrics(config.evaluation, registry)[goal.metric]
    evaluation = dataclasses.replace(
        config.evaluation, metrics=[goal.metric], references=references_of(config.evaluation, metric), nfe=[goal.nfe],
        timing="off", checkpoints=0,
    )  # fmt: skip
    budget, size = config.budget, config.batch_size
    if share < 1:
        whole = max(size, int(share * budget.images) // size * size)  # batches, for methods with groups of images
        parts: dict[Limit, Any] = {
            Limit.images: {"images": whole},
            Limit.seconds: {"seconds": share * budget.seconds},
            Limit.nfe: {"nfe": max(1, int(share * budget.nfe))},
        }
        budget = dataclasses.replace(budget, **parts[budget.limit])
    return dataclasses.replace(config, evaluation=evaluation, budget=budget)


def _search_cells(config: RunConfig, tune: TuneConfig, registry: Registry) -> list[Cell]:
    planned = plan([dataclasses.replace(config, seed=tune.search_seeds[0])], registry)
    cells = [cell for cell in planned if cell.entry is not None]
    cells[0].shared.noise = SEARCH  # all cells share it
    return cells
