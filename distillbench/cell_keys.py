"""Cache keys of a cell: everything that decides its weights, its scores and its sampling cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distillbench
from distillbench.compute import sampling_identity, training_identity
from distillbench.files import key_of
from distillbench.shared_context import Cell, Scene, plain_settings
from distillbench.teachers import Teacher

TRAIN_PROTOCOL = 5  # raise when the loop, the samplers or the networks change what a training gives
EVALUATION_PROTOCOL = 4  # raise when evaluation changes a number that no metric's protocol names
SPEED_PROTOCOL = 1  # raise when speed is measured in another way


def cell_folder(cell: Cell, train_key: str) -> Path:
    """Where the records of a cell are."""
    return Path(cell.scene.config.results_dir) / "cells" / train_key


def train_inputs(cell: Cell, teacher: Teacher) -> dict[str, Any]:
    """Everything that decides the weights and the price of a cell, as plain values."""
    config = cell.scene.config
    inputs: dict[str, Any] = {
        "protocol": TRAIN_PROTOCOL,
        "distillbench": distillbench.__version__,
        "teacher": teacher.name,
        "teacher_sha256": teacher.sha256,
        "dataset": cell.scene.dataset.name,
        "dataset_sha256": cell.scene.dataset.sha256,
        **(cell.scene.conditioning.plain() if cell.entry is not None else {}),
        "device": cell.scene.device.split(":")[0],
        "threads": config.threads,
    }
    if cell.entry is None:
        return inputs | {"method": None}
    in_parts = config.accumulate > 1 or config.on_oom != "fail"
    along = {"checkpoints": config.evaluation.checkpoints} if config.evaluation.checkpoints else {}
    return (
        inputs
        | along
        | {
            "method": cell.entry.identity(),
            "config": plain_settings(cell.method_config),
            "budget": {"limit": config.budget.limit.value, "amount": config.budget.amount},
            "batch_size": config.batch_size,
            "seed": cell.seed,
            "energy": config.energy,
        }
        | ({"accumulate": config.accumulate, "on_oom": config.on_oom} if in_parts else {})
        | ({"processes": ranks.count} if (ranks := cell.scene.ranks).count > 1 else {})
        | ({"compute": compute} if (compute := training_identity(config.compute, cell.scene.device)) else {})
    )


def evaluation_inputs(cell: Cell, train_key: str) -> dict[str, Any]:
    """Everything else that decides the scores of a cell's rows."""
    seeds = cell.scene.config.evaluation.seeds
    return _protocol(cell.scene) | _sampled(cell) | {"train_key": train_key, "nfe": cell.nfe, "seeds": seeds}


def _protocol(scene: Scene) -> dict[str, Any]:
    """How samples are scored: must be equal wherever scores are compared."""
    config = scene.config.evaluation
    return {
        "protocol": EVALUATION_PROTOCOL,
        "images": config.images,
        "batch_size": config.batch_size,
        "metrics": scene.metric_identities(),
        "references": {file.provenance["network"]: file.sha256 for file in scene.references},
        "reference": {"sampler": config.solvers()[0].name, "steps": max(config.teacher_steps)},
        **({"precision": config.precision} if config.precision != "fp32" else {}),
    }


def protocol_key(scene: Scene, teacher: Teacher) -> str:
    """The name of everything that must be equal in rows that are compared: data, teacher, guidance and protocol."""
    dataset = {"name": scene.dataset.name, "sha256": scene.dataset.sha256}
    asked = {"conditional": scene.config.conditional, "guidance": scene.config.guidance}
    key = scene.protocol or key_of([dataset, teacher.sha256, asked, _protocol(scene)])[:8]
    scene.protocol = key if scene.scored is not None else ""
    return key


def speed_inputs(cell: Cell, train_key: str) -> dict[str, Any]:
    """Everything else that decides the cost of sampling."""
    config = cell.scene.config.evaluation
    inputs = {
        "protocol": SPEED_PROTOCOL,
        "train_key": train_key,
        "nfe": cell.nfe,
        "batch_size": config.batch_size,
        "timing": config.timing,
        "timing_seconds": config.timing_seconds,
        "largest_timed_batch": config.largest_timed_batch,
    }
    if cell.scene.device != "cpu":  # records from before it was so had all that was on the GPU in their peaks
        inputs["memory"] = "what sampling takes"
    return inputs | _sampled(cell)


def _sampled(cell: Cell) -> dict[str, Any]:
    """How a cell's samples are made."""
    compute = sampling_identity(cell.scene.config.evaluation.sampling, cell.scene.device)
    inputs: dict[str, Any] = {"compute": compute} if compute else {}
    if cell.solver is not None:
        inputs["sampler"] = cell.solver.name
    if cell.scene.config.conditional:
        inputs["guidance"] = cell.scene.config.guidance
    return inputs
