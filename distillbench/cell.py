"""One cell: train and evaluate, or read what an earlier run left. Its key is made from all that decides its numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distillbench.cell_keys import cell_folder, evaluation_inputs, speed_inputs, train_inputs
from distillbench.cell_training import ERROR, STUDENT, TRAIN, keep_traceback, status_of, train_cell
from distillbench.environment import device_name, environment
from distillbench.errors import DivergedError, UserError
from distillbench.evaluate import Sampler, teacher_sampler
from distillbench.files import key_of, sha256_file, write_atomically
from distillbench.method import Method
from distillbench.progress import Progress
from distillbench.results import (
    FINAL,
    CheckpointScores,
    EvaluationRecord,
    RowRecord,
    SpeedRecord,
    SpeedRow,
    Status,
    TrainRecord,
    read_record,
    write_record,
)
from distillbench.sample_grid import stack_shown, unstack_shown
from distillbench.seen_files import SeenFiles
from distillbench.shared_context import Cell, build
from distillbench.sharing import SampleOrder
from distillbench.signals import Stop
from distillbench.speed import SpeedError, measure, measure_in_fresh_process
from distillbench.speed_job import speed_job
from distillbench.tasks import Task


@dataclass(frozen=True)
class Policy:
    """What is made again, and when a run ends early."""

    retry_failed: bool = False  # cells that failed, ran out of memory or of time in an earlier run
    force: bool = False  # every cell
    fail_fast: bool = False  # leave out what comes after a cell that is not ok


AS_IS = Policy()


@dataclass
class Finished:
    """A cell's records, made now or found."""

    cell: Cell
    training: TrainRecord | None
    evaluation: EvaluationRecord
    speed: SpeedRecord
    folder: Path
    shown: list[Tensor]  # samples of the rows that are ok, of the first sampling seed

    @property
    def failed(self) -> bool:
        return any(row.status != "ok" for row in [*self.evaluation.rows, *self.evaluation.along])


def run_cell(cell: Cell, progress: Progress, policy: Policy, stop: Stop) -> Finished:
    """Train and evaluate `cell`, or read what an earlier run left of it.

    A training in progress goes on from its last state. Told to stop, it keeps one and raises Interrupted.
    """
    torch.set_num_threads(cell.scene.config.threads)
    teacher = cell.scene.loaded(progress)
    inputs = train_inputs(cell, teacher)
    key = key_of(inputs)
    folder = cell_folder(cell, key)
    training = None
    if cell.entry is not None:
        training = _found_training(cell, inputs, folder, policy, progress, _intact)
        if training is None:
            training = train_cell(cell, inputs, folder, progress, stop, policy.force)
    found = _found_evaluation(cell, training, key, folder, policy, progress)
    evaluation, shown = found or _evaluated(cell, training, key, folder, progress)
    speed = _found_speed(cell, evaluation, key, folder, policy, progress)
    speed = speed or _timed(cell, training, evaluation, key, folder, progress)
    done = Finished(cell, training, evaluation, speed, folder, shown)
    if not done.failed:
        (folder / ERROR).unlink(missing_ok=True)
    return done


def found_cell(
    cell: Cell, inputs: dict[str, Any], folder: Path, files: SeenFiles, progress: Progress, policy: Policy
) -> Finished | None:
    """What an earlier run left of `cell` in `folder`, by the inputs of its training; None: something is to be done."""
    key, training = folder.name, None
    if cell.entry is not None:
        training = _found_training(cell, inputs, folder, policy, progress, files.intact)
        if training is None:
            return None
    found = _found_evaluation(cell, training, key, folder, policy, progress)
    speed = _found_speed(cell, found[0], key, folder, policy, progress) if found else None
    return Finished(cell, training, found[0], speed, folder, found[1]) if found and speed else None


def _found_training(
    cell: Cell, inputs: dict[str, Any], folder: Path, policy: Policy, progress: Progress,
    intact: Callable[[Path, str], bool],
) -> TrainRecord | None:  # fmt: skip
    """The record of the training, if it is not to be made (again)."""
    record: TrainRecord | None = None if policy.force else _known(folder / TRAIN, TrainRecord, inputs, progress)
    if record is None or _again(record.status, policy):
        return None
    if record.status == "ok" and not intact(folder / STUDENT, record.weights_sha256):
        progress.say(f"{cell.label}: the weights of the record are missing or damaged; training again")
        return None
    return record


def _again(status: Status, policy: Policy) -> bool:
    return policy.force or (policy.retry_failed and status not in FINAL)


def keep_ending(
    cell: Cell, train: dict[str, Any], evaluation: dict[str, Any], folder: Path, device: str, status: str, reason: str
) -> None:
    """Keep that the process of a cell ended without an answer, so that it is not tried again unasked.

    `device` is the name of the one that it ran on, which may be another machine's.
    """
    here = environment(cell.scene.device, cell.scene.config.threads)
    about: dict[str, Any] = {"device": device, "environment": here}
    told: dict[str, Any] = {"status": status, "reason": reason}
    weights = ""
    if cell.entry is not None:
        training = _known(folder / TRAIN, TrainRecord, train, Progress(None))
        if training is None or training.status != "ok":
            write_record(folder / TRAIN, TrainRecord(key=key_of(train), inputs=train, **about, **told))
        else:
            weights = training.weights_sha256
    key = key_of(evaluation)
    seeds = cell.scene.config.evaluation.seeds
    rows = [RowRecord(nfe=n, sampling_seed=seed, **told) for n in cell.nfe for seed in seeds]
    path = folder / f"evaluation-{key}.json"
    write_atomically(path.with_suffix(".safetensors"), lambda temporary: save_file({}, temporary))
    write_record(path, EvaluationRecord(key=key, inputs=evaluation, **about, rows=rows, weights_sha256=weights))


def _known(path: Path, kind: Any, inputs: dict[str, Any], progress: Progress) -> Any:
    try:
        return read_record(path, kind, inputs)
    except ValueError as error:
        progress.say(f"{error}; it is made again")
        return None


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def _found_evaluation(
    cell: Cell, training: TrainRecord | None, train_key: str, folder: Path, policy: Policy, progress: Progress
) -> tuple[EvaluationRecord, list[Tensor]] | None:
    """The record of the evaluation and its samples, if it is not to be made (again)."""
    inputs = evaluation_inputs(cell, train_key)
    path = folder / f"evaluation-{key_of(inputs)}.json"
    record: EvaluationRecord | None = None if policy.force else _known(path, EvaluationRecord, inputs, progress)
    shown = _read_shown(path.with_suffix(".safetensors"))
    if record is None or shown is None or _again(record.status, policy):
        return None
    if training is None:
        return record, shown
    fits = record.weights_sha256 == training.weights_sha256  # otherwise the student was trained again
    fits = fits and (training.status == "ok" or all(row.status == training.status for row in record.rows))
    return (record, shown) if fits else None


def _evaluated(
    cell: Cell, training: TrainRecord | None, train_key: str, folder: Path, progress: Progress
) -> tuple[EvaluationRecord, list[Tensor]]:
    scene = cell.scene
    inputs = evaluation_inputs(cell, train_key)
    key = key_of(inputs)
    path = folder / f"evaluation-{key}.json"
    about = _about(cell, key, inputs, training.weights_sha256 if training is not None else "")
    if training is not None and training.status != "ok":
        rows = _rows_without_student(cell, training)
        record, shown = EvaluationRecord(**about, rows=rows), []
    else:
        rows, shown = _rows(cell, folder, progress)
        along = _along(cell, training, folder, progress) if training is not None else []
        record = EvaluationRecord(**about, rows=rows, along=along, references=scene.describe_references(progress))
        scene.evaluation(progress).release()
    tensors = stack_shown(shown)
    write_atomically(path.with_suffix(".safetensors"), lambda temporary: save_file(tensors, temporary))
    write_record(path, record)
    return record, shown


def _about(cell: Cell, key: str, inputs: dict[str, Any], weights_sha256: str) -> dict[str, Any]:
    """What records of evaluation and of speed share."""
    device = cell.scene.device
    about = {"key": key, "inputs": inputs, "weights_sha256": weights_sha256, "device": device_name(device)}
    return about | {"environment": environment(device, cell.scene.config.threads)}


def _rows_without_student(cell: Cell, training: TrainRecord) -> list[RowRecord]:
    told = {"status": training.status, "reason": training.reason}
    return [RowRecord(nfe=n, sampling_seed=s, **told) for n in cell.nfe for s in cell.scene.config.evaluation.seeds]


def _read_shown(path: Path) -> list[Tensor] | None:
    try:
        return unstack_shown(load_file(path)) if path.is_file() else None
    except (SafetensorError, KeyError, OSError):
        return None


def _rows(cell: Cell, folder: Path, progress: Progress) -> tuple[list[RowRecord], list[Tensor]]:
    """The rows of a trained student, or of the teacher, and the samples to be shown of those that are ok."""
    seeds = cell.scene.config.evaluation.seeds
    wanted = [(nfe, seed) for nfe in cell.nfe for seed in seeds]
    try:
        weights = folder / STUDENT if cell.entry is not None else None
        method = _restored_from(cell, weights, progress)
    except UserError:
        raise
    except Exception as error:
        told: dict[str, Any] = {"status": status_of(error), "reason": keep_traceback(error, folder, progress)}
        return [RowRecord(nfe=n, sampling_seed=seed, **told) for n, seed in wanted], []
    rows, shown = [], []
    for nfe, seed in wanted:
        row, images = _row(cell, method, weights, nfe, seed, cell.label, folder, progress)
        rows.append(row)
        if images is not None and seed == seeds[0]:
            shown.append(images)
    return rows, shown


def sample_along(cell: Cell, order: SampleOrder, progress: Progress) -> None:
    """A follower's part of a row, or of the teacher's many-step answers."""
    torch.set_num_threads(cell.scene.config.threads)
    sampler = None if order.answers else _sampler(cell, _restored_from(cell, order.weights, progress), progress)
    evaluator = cell.scene.evaluation(progress)
    evaluator.sample_along(sampler, order)
    evaluator.release()


def _restored_from(cell: Cell, weights: Path | None, progress: Progress) -> Method | None:
    return None if weights is None else _restored(cell, weights, progress)


def _sampler(cell: Cell, method: Method | None, progress: Progress) -> Sampler:
    """Of the method, or of the teacher itself."""
    return method.sample if method is not None else teacher_sampler(cell.scene.loaded(progress), cell.sampler())


def _row(
    cell: Cell,
    method: Method | None,
    weights: Path | None,
    nfe: int,
    seed: int,
    label: str,
    folder: Path,
    progress: Progress,
) -> tuple[RowRecord, Tensor | None]:
    """One row, and its samples to be shown if it is ok."""
    about: dict[str, Any] = {"nfe": nfe, "sampling_seed": seed}
    try:
        evaluator = cell.scene.evaluation(progress)
        sampler = _sampler(cell, method, progress)
        keeps_noise = _keeps_noise(cell, nfe) if method is None else method.keeps_noise(nfe)
        order = SampleOrder(Task.of(cell), weights) if cell.scene.ranks.count > 1 else None
        measured = evaluator.measure(sampler, nfe, seed, keeps_noise, label, order)
    except UserError:
        raise
    except DivergedError as error:
        return RowRecord(**about, status="diverged", reason=str(error)), None
    except Exception as error:
        about |= {"status": status_of(error), "reason": keep_traceback(error, folder, progress)}
        return RowRecord(**about), None
    return RowRecord(**about, scores=measured.scores, missing=measured.missing), measured.shown


def _along(cell: Cell, training: TrainRecord, folder: Path, progress: Progress) -> list[CheckpointScores]:
    """The scores of the student as it was at its checkpoints; outside the budget and untimed."""
    rows = []
    for checkpoint in training.checkpoints:
        weights = folder / checkpoint.file
        method = _restored(cell, weights, progress)
        label = f"{cell.label} at {checkpoint.fraction:.0%}"
        for nfe in checkpoint.ready:
            for seed in cell.scene.config.evaluation.seeds:
                row, _ = _row(cell, method, weights, nfe, seed, label, folder, progress)
                rows.append(CheckpointScores(fraction=checkpoint.fraction, **dict(row)))
    return rows


def _keeps_noise(cell: Cell, nfe: int) -> bool:
    """Whether the teacher's row is an answer to its noise: with an ancestral sampler only its single step is."""
    return cell.sampler().deterministic or nfe == cell.scene.conditioning.evaluations


def _restored(cell: Cell, weights: Path, progress: Progress) -> Method:
    """The method with weights that training left, whether that was now or in an earlier run."""
    method = build(cell, cell.scene.loaded(progress))
    method.load_state_dict(load_file(weights, device=cell.scene.device))
    return method.eval()


def _found_speed(
    cell: Cell, evaluation: EvaluationRecord, train_key: str, folder: Path, policy: Policy, progress: Progress
) -> SpeedRecord | None:
    """The record of the cost of sampling, if it is not to be made (again)."""
    inputs = speed_inputs(cell, train_key)
    timing = cell.scene.config.evaluation.timing
    able = any(row.status == "ok" for row in evaluation.rows)
    if timing == "off" or not able:
        about = _about(cell, key_of(inputs), inputs, evaluation.weights_sha256)
        return SpeedRecord(**about, reason="evaluation.timing=off" if able else "")
    path = folder / f"speed-{key_of(inputs)}.json"
    record: SpeedRecord | None = None if policy.force else _known(path, SpeedRecord, inputs, progress)
    if record is None or _again(record.status, policy) or record.weights_sha256 != evaluation.weights_sha256:
        return None
    return record


def _timed(
    cell: Cell, training: TrainRecord | None, evaluation: EvaluationRecord, train_key: str, folder: Path,
    progress: Progress,
) -> SpeedRecord:  # fmt: skip
    """The cost of sampling, measured now."""
    config = cell.scene.config.evaluation
    inputs = speed_inputs(cell, train_key)
    key = key_of(inputs)
    about = _about(cell, key, inputs, evaluation.weights_sha256)
    able = sorted({row.nfe for row in evaluation.rows if row.status == "ok"})
    path = folder / f"speed-{key}.json"
    job = speed_job(cell, folder / STUDENT if training is not None else None, able)
    cell.scene.release_evaluator()
    try:
        with progress.step(f"{cell.label}: timing"):
            rows = (
                measure(job) if config.timing == "inline" else measure_in_fresh_process(job, 600.0 + 300.0 * len(able))
            )
        record = SpeedRecord(**about, rows=[SpeedRow(**dataclasses.asdict(row)) for row in rows])
    except SpeedError as error:
        progress.say(f"{cell.label}: {error}")
        record = SpeedRecord(**about, status="failed", reason=str(error))
    write_record(path, record)
    return record
