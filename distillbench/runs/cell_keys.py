"""Cache keys of a cell: everything that decides its weights, its scores and its sampling cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distillbench
from distillbench.evaluation.evaluator import EVALUATION
from distillbench.runs.sampling_settings import sampling_settings, training_settings
from distillbench.runs.shared_context import Cell, SharedContext
from distillbench.storage.files import key_of
from distillbench.teachers.teacher import Teacher
from distillbench.training.compute import sampling_identity, training_identity

TRAIN_PROTOCOL = 6  # raise when a change of the loop, the samplers or the networks changes the weights
EVALUATION_PROTOCOL = 4  # raise when a change of evaluation changes a score, unless a metric's own protocol says so
SPEED_PROTOCOL = 1  # raise when the measurement of speed changes


def cell_folder(cell: Cell, train_key: str) -> Path:
    """The folder of a cell's records."""
    return cell.shared.folder.cells / train_key


def train_inputs(cell: Cell, teacher: Teacher) -> dict[str, Any]:
    """Everything that decides the weights and the training cost of a cell, as plain values."""
    config = cell.shared.config
    inputs: dict[str, Any] = {
        "protocol": TRAIN_PROTOCOL,
        "distillbench": distillbench.__version__,
        "teacher": teacher.name,
        "teacher_sha256": teacher.sha256,
        "dataset": cell.shared.dataset.name,
        "dataset_sha256": cell.shared.dataset.sha256,
        **(cell.shared.conditioning.plain() if cell.entry is not None else {}),
        "device": cell.shared.device.split(":")[0],
        "threads": config.threads,
    }
    if cell.entry is None or cell.method_config is None:
        return inputs | {"method": None}
    accumulates = config.microbatch > 0 or config.on_oom != "fail"
    along = {"checkpoints": config.evaluation.checkpoints} if config.evaluation.checkpoints else {}
    return (
        inputs
        | along
        | {
            "method": cell.entry.identity(),
            "config": training_settings(cell.method_config),
            "budget": {"limit": config.budget.limit.value, "amount": config.budget.amount},
            "batch_size": config.batch_size,
            "seed": cell.seed,
            "energy": config.energy,
        }
        | ({"microbatch": config.microbatch, "on_oom": config.on_oom} if accumulates else {})
        | ({"processes": ranks.count} if (ranks := cell.shared.ranks).count > 1 else {})
        | ({"augment": augmentation} if (augmentation := cell.augmentation) else {})
        | ({"latents": "drawn"} if cell.reads_data and teacher.to_posterior is not None else {})
        | ({"student": student} if (student := cell.shared.students.plain()) else {})
        | ({"compute": compute} if (compute := training_identity(config.compute, cell.shared.device)) else {})
    )


def evaluation_inputs(cell: Cell, train_key: str) -> dict[str, Any]:
    """Everything else that decides the scores of a cell's rows."""
    seeds = cell.shared.config.evaluation.seeds
    noise = {"noise": cell.shared.noise} if cell.shared.noise != EVALUATION else {}
    inputs = _protocol(cell.shared) | _sampled(cell) | noise
    return inputs | {"train_key": train_key, "nfe": cell.nfe, "seeds": seeds}


def _protocol(shared: SharedContext) -> dict[str, Any]:
    """How samples are scored. Scores are comparable only if this is equal."""
    config = shared.config.evaluation
    return {
        "protocol": EVALUATION_PROTOCOL,
        "images": config.images,
        "batch_size": config.batch_size,
        "metrics": shared.metric_identities(),
        "references": {file.provenance["network"]: file.sha256 for file in shared.references},
        "reference": {"sampler": config.solvers()[0].name, "steps": max(config.teacher_steps)},
        **({"precision": config.precision} if config.precision != "fp32" else {}),
    }


def protocol_key(shared: SharedContext, teacher: Teacher) -> str:
    """A hash of what must be equal in rows that are compared: dataset, teacher, guidance and protocol."""
    dataset = {"name": shared.dataset.name, "sha256": shared.dataset.sha256}
    asked = {"conditional": shared.config.conditional, "guidance": shared.config.guidance}
    key = shared.cached_protocol or key_of([dataset, teacher.sha256, asked, _protocol(shared)])[:8]
    shared.cached_protocol = key if shared.cached_identities is not None else ""
    return key


def speed_inputs(cell: Cell, train_key: str) -> dict[str, Any]:
    """Everything else that decides the sampling cost."""
    config = cell.shared.config.evaluation
    inputs = {
        "protocol": SPEED_PROTOCOL,
        "train_key": train_key,
        "nfe": cell.nfe,
        "batch_size": config.batch_size,
        "timing": config.timing,
        "timing_seconds": config.timing_seconds,
        "largest_timed_batch": config.largest_timed_batch,
    }
    if cell.shared.device != "cpu":  # older records counted all memory in use on the GPU
        inputs["memory"] = "what sampling takes"
    return inputs | _sampled(cell)


def _sampled(cell: Cell) -> dict[str, Any]:
    """How a cell's samples are computed."""
    compute = sampling_identity(cell.shared.config.evaluation.sampling, cell.shared.device)
    inputs: dict[str, Any] = {"compute": compute} if compute else {}
    if cell.solver is not None:
        inputs["sampler"] = cell.solver.name
    if cell.method_config is not None and (chosen := sampling_settings(cell.method_config)):
        inputs["sampling"] = chosen
    if cell.shared.config.conditional:
        inputs["guidance"] = cell.shared.config.guidance
    return inputs
