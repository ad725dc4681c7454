"""Several processes that a launcher has started for one run: what the main one changes, and what the others do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress

from distillbench.cell import sample_along
from distillbench.cell_training import TrainOrder, train_along
from distillbench.config import RunConfig
from distillbench.errors import DivergedError, UserError
from distillbench.executor_settings import LocalConfig
from distillbench.plan import Cell, Scene, Scenes
from distillbench.progress import Progress
from distillbench.ranks import Ranks
from distillbench.sharing import FeatureOrder
from distillbench.signals import Stop


def in_these_processes(
    cells: Sequence[Cell], configs: Sequence[RunConfig], ranks: Ranks, progress: Progress
) -> list[RunConfig]:
    """Let the cells be worked on by all `ranks`: in these processes, and not in others started for each cell.

    Raises UserError where the settings ask for others.
    """
    where = configs[0].executor
    if where.elsewhere or (isinstance(where, LocalConfig) and where.count > 1):
        raise UserError(
            f"executor={where.kind} spreads cells, and {ranks.count} processes share each of them: choose one. Start "
            "distillbench without accelerate or torchrun, or use executor=local with executor.workers=1"
        )
    for cell in cells:
        cell.scene.ranks = ranks
    progress.say(f"{ranks.count} processes train and sample together; isolate=false, they are the launcher's")
    return [dataclasses.replace(config, isolate=False) for config in configs]


def follow(ranks: Ranks, stop: Stop) -> None:
    """Train along with the main process until it ends. Raises Interrupted, and whatever goes wrong here alone."""
    progress, scenes = Progress(None), Scenes()
    while (order := ranks.take()) is not None:
        if isinstance(order, FeatureOrder):
            scene = scenes.of(order.config, order.selection.load())
            scene.ranks = ranks
            look_along(scene, order, progress)
            continue
        cell = order.task.cell(order.task.selection.load(), scenes)
        cell.scene.ranks = ranks
        if isinstance(order, TrainOrder):
            with suppress(DivergedError):  # of all of them
                train_along(cell, order, progress, stop)
        else:
            sample_along(cell, order, progress)


def look_along(scene: Scene, order: FeatureOrder, progress: Progress) -> None:
    """A follower's share of images that a feature network looks at."""
    networks = scene.evaluation(progress).networks
    (network,) = {cls.network for cls in scene.metrics.values() if cls.network and cls.network.name == order.network}
    networks.look_along(network)
