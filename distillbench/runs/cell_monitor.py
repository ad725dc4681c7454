"""The scores along the training of a cell."""

from __future__ import annotations

from distillbench.evaluation.progress_scores import PixelScores
from distillbench.runs.shared_context import Cell
from distillbench.system.progress import Progress
from distillbench.teachers.teacher import Teacher
from distillbench.training.compute import Sampling
from distillbench.training.monitor import Monitor


def monitor_of(cell: Cell, teacher: Teacher, microbatch: int, progress: Progress) -> Monitor | None:
    """What looks at the samples of `cell` while it trains, `microbatch` images at once (0: all); None: nothing does.

    Batches are as large as what a rank computes at once in a step, which takes more memory.
    """
    config = cell.shared.config
    settings, ranks = config.evaluation, cell.shared.ranks
    if not settings.progress_every:
        return None
    if config.compute.shard or teacher.conditioning.small is not None:
        why = "compute.shard=true: all ranks would have to sample" if config.compute.shard else "an upscaler"
        progress.say(f"{cell.label}: no scores along training ({why})")
        return None
    data = cell.shared.dataset
    real = teacher.to_latents is None and len(data) > 1 and tuple(data.shape) == tuple(teacher.shape)
    share = max(1, config.batch_size // ranks.count)
    batch = min(microbatch, share) if microbatch else share
    asked = Sampling(settings.precision)  # CUDA graphs would hold memory that the training needs
    scores = PixelScores(data if real else None, settings.progress_images, batch, asked, cell.shared.device)
    return Monitor(scores, settings.progress_every, cell.nfe, lambda line: progress.say(f"{cell.label}: {line}"))
