"""Several ranks that a launcher has started for one run: checks on rank 0, and the loop of the other ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from distillbench.errors import UserError
from distillbench.evaluation.distributed import SampleOrder, SharedNetworks
from distillbench.runs.cell import follow_sampling
from distillbench.runs.cell_training import TrainOrder, follow_training, free_memory
from distillbench.runs.config import RunConfig
from distillbench.runs.executor_config import LocalConfig
from distillbench.runs.feature_order import FeatureOrder
from distillbench.runs.shared_context import Cell, SharedContext, SharedContexts
from distillbench.system.progress import Progress
from distillbench.system.signals import Stop
from distillbench.training.budget import Limit
from distillbench.training.data_parallel import Ranks


def in_these_processes(
    cells: Sequence[Cell], configs: Sequence[RunConfig], ranks: Ranks, progress: Progress
) -> list[RunConfig]:
    """Let all `ranks` run each cell together, in the launcher's processes. Returns the settings with isolate=false.

    Raises UserError if the settings ask for other processes or machines.
    """
    where = configs[0].executor
    if where.elsewhere or (isinstance(where, LocalConfig) and where.count > 1):
        raise UserError(
            f"executor={where.kind} runs cells in parallel, but {ranks.count} processes run each of them together. "
            "Start distillbench without accelerate or torchrun, or use executor=local with executor.workers=1"
        )
    for cell in cells:
        check_rows(cell.shared.config, ranks.count, cell.group_size)
    for cell in cells:
        cell.shared.ranks = ranks
    progress.say(f"{ranks.count} processes train and sample together; isolate=false, they are the launcher's")
    return [dataclasses.replace(config, isolate=False) for config in configs]


def check_rows(config: RunConfig, count: int, group: int = 1) -> None:
    """Raise UserError if some batch, such as the last one, has fewer groups of images than there are processes."""
    smallest, why = config.batch_size, f"batch_size={config.batch_size}"
    if config.budget.limit is Limit.images and (rest := config.budget.images % config.batch_size):
        smallest, why = rest, f"budget.images={config.budget.images} leaves a last batch of {rest}"
    if smallest // group < count:
        needed = "an image" if group == 1 else f"a group of {group} images"
        raise UserError(f"{why}, and each of {count} processes must have {needed} of every batch. Change one of them")


def follow(ranks: Ranks, stop: Stop) -> None:
    """The loop of non-zero ranks: carry out the orders of rank 0 until it ends.

    Raises Interrupted, LostError, and errors after which the ranks cannot continue together. Rank 0 raises and records
    all other errors, too.
    """
    contexts = SharedContexts()
    while (order := ranks.next_order()) is not None:
        try:
            with ranks.follow(recovers=not (isinstance(order, TrainOrder) and order.task.config.compute.shard)):
                _obey(order, ranks, contexts, stop)
        except Exception:
            if ranks.busy:
                raise
            free_memory()


def _obey(order: TrainOrder | SampleOrder | FeatureOrder, ranks: Ranks, contexts: SharedContexts, stop: Stop) -> None:
    progress = Progress(None)
    if isinstance(order, FeatureOrder):
        shared = contexts.of(order.config, order.selection.load())
        shared.ranks = ranks
        _follow_extraction(shared, order, progress)
        return
    cell = order.task.cell(order.task.selection.load(), contexts)
    cell.shared.ranks = ranks
    if isinstance(order, TrainOrder):
        follow_training(cell, order, progress, stop)
    else:
        follow_sampling(cell, order, progress)


def _follow_extraction(shared: SharedContext, order: FeatureOrder, progress: Progress) -> None:
    networks = shared.get_evaluator(progress).networks
    assert isinstance(networks, SharedNetworks)  # since there are several ranks
    (network,) = {cls.network for cls in shared.metrics.values() if cls.network and cls.network.name == order.network}
    networks.follow_extraction(network)
