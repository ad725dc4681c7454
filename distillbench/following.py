"""Several processes that a launcher has started for one run: what the main one changes, and what the others do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from distillbench.budget import Limit
from distillbench.cell import sample_along
from distillbench.cell_training import TrainOrder, free_memory, train_along
from distillbench.config import RunConfig
from distillbench.errors import UserError
from distillbench.executor_settings import LocalConfig
from distillbench.feature_order import FeatureOrder
from distillbench.progress import Progress
from distillbench.ranks import Ranks
from distillbench.shared_context import Cell, Scene, Scenes
from distillbench.sharing import SampleOrder
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
    for config in configs:
        check_rows(config, ranks.count)
    for cell in cells:
        cell.scene.ranks = ranks
    progress.say(f"{ranks.count} processes train and sample together; isolate=false, they are the launcher's")
    return [dataclasses.replace(config, isolate=False) for config in configs]


def check_rows(config: RunConfig, count: int) -> None:
    """Raise UserError where a batch, such as the last one, has fewer images than there are processes."""
    smallest, why = config.batch_size, f"batch_size={config.batch_size}"
    if config.budget.limit is Limit.images and (rest := config.budget.images % config.batch_size):
        smallest, why = rest, f"budget.images={config.budget.images} leaves a last batch of {rest}"
    if smallest < count:
        raise UserError(f"{why}, and each of {count} processes must have an image of every batch. Change one of them")


def follow(ranks: Ranks, stop: Stop) -> None:
    """Do along with the main process what it orders, until it ends. Raises Interrupted, LostError, and errors after
    which the processes cannot go on together; the others are raised in the main process too, and are its to record.
    """
    scenes = Scenes()
    while (order := ranks.take()) is not None:
        try:
            with ranks.together(recovers=not (isinstance(order, TrainOrder) and order.task.config.compute.shard)):
                _obey(order, ranks, scenes, stop)
        except Exception:
            if ranks.busy:
                raise
            free_memory()


def _obey(order: TrainOrder | SampleOrder | FeatureOrder, ranks: Ranks, scenes: Scenes, stop: Stop) -> None:
    progress = Progress(None)
    if isinstance(order, FeatureOrder):
        scene = scenes.of(order.config, order.selection.load())
        scene.ranks = ranks
        look_along(scene, order, progress)
        return
    cell = order.task.cell(order.task.selection.load(), scenes)
    cell.scene.ranks = ranks
    if isinstance(order, TrainOrder):
        train_along(cell, order, progress, stop)
    else:
        sample_along(cell, order, progress)


def look_along(scene: Scene, order: FeatureOrder, progress: Progress) -> None:
    """A follower's share of images that a feature network looks at."""
    networks = scene.evaluation(progress).networks
    (network,) = {cls.network for cls in scene.metrics.values() if cls.network and cls.network.name == order.network}
    networks.look_along(network)
