"""One cell: train and evaluate it, or read the records that an earlier run left."""

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

from distillbench.errors import DivergedError, UserError
from distillbench.evaluation.distributed import SampleOrder
from distillbench.evaluation.evaluator import Measured, Sampler, teacher_sampler
from distillbench.evaluation.sampling_speed import SpeedError, measure, measure_in_fresh_process
from distillbench.records.influences import cell_file
from distillbench.records.records import (
    FINAL,
    AnyRecord,
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
from distillbench.records.sample_grid import stack_shown, unstack_shown
from distillbench.runs.cell_keys import speed_inputs
from distillbench.runs.cell_result import CellDescription, CellResult, result_of
from distillbench.runs.cell_task import CellTask
from distillbench.runs.cell_training import ERROR, STUDENT, TRAIN, keep_traceback, status_of, train_cell
from distillbench.runs.scored_rows import ScoredRows
from distillbench.runs.shared_context import Cell, restored
from distillbench.runs.speed_job import speed_job
from distillbench.storage.files import key_of, sha256_file, write_atomically
from distillbench.storage.hash_cache import HashCache
from distillbench.system.environment import device_name, environment
from distillbench.system.progress import Progress
from distillbench.system.signals import Stop
from distillbench.training.method import Method


@dataclass(frozen=True)
class Policy:
    """Which cells are run again, and when a run ends early."""

    retry_failed: bool = False  # run cells again that failed, ran out of memory or reached their time limit
    force: bool = False  # run every cell again
    fail_fast: bool = False  # end the run after the first cell that is not ok

    def runs_again(self, status: Status) -> bool:
        return self.force or (self.retry_failed and status not in FINAL)


AS_IS = Policy()


def run_cell(cell: Cell, description: CellDescription, progress: Progress, policy: Policy, stop: Stop) -> CellResult:
    """Train and evaluate `cell`, or read the records of an earlier run.

    An interrupted training resumes from its last state. On a request to stop it saves one and raises Interrupted.
    """
    torch.set_num_threads(cell.shared.config.threads)
    runner = CellRunner(cell, description, policy, progress)
    training = None
    if cell.entry is not None:
        training = runner.found_training(_intact)
        if training is None:
            training = train_cell(cell, description.train_inputs, description.folder, progress, stop, policy.force)
    evaluation, shown = runner.found_evaluation(training) or runner.evaluate(training)
    speed = runner.found_speed(evaluation) or runner.measure_speed(training, evaluation)
    result = result_of(cell, description, training, evaluation, speed, shown)
    if result.ok:
        (description.folder / ERROR).unlink(missing_ok=True)
    return result


def found_cell(
    cell: Cell, description: CellDescription, files: HashCache, progress: Progress, policy: Policy
) -> CellResult | None:
    """The result of an earlier run; None if the cell is not finished."""
    runner, training = CellRunner(cell, description, policy, progress), None
    if cell.entry is not None:
        training = runner.found_training(files.intact)
        if training is None:
            return None
    found = runner.found_evaluation(training)
    if found is None:
        return None
    evaluation, shown = found
    speed = runner.found_speed(evaluation)
    return None if speed is None else result_of(cell, description, training, evaluation, speed, shown)


def write_failure(cell: Cell, description: CellDescription, status: str, reason: str) -> None:
    """Record that the process of a cell returned no result, so that the next run does not try it again."""
    here = environment(cell.shared.device, cell.shared.config.threads)
    where: dict[str, Any] = {"device": description.columns["device"], "environment": here}
    ending: dict[str, Any] = {"status": status, "reason": reason}
    inputs, path = description.train_inputs, description.folder / TRAIN
    weights = ""
    if cell.entry is not None:
        training = _read(path, TrainRecord, inputs, Progress(None))
        if training is None or training.status != "ok":
            write_record(path, TrainRecord(key=key_of(inputs), inputs=inputs, **where, **ending))
        else:
            weights = training.weights_sha256
    rows = [RowRecord(nfe=nfe, sampling_seed=seed, **ending) for nfe, seed in description.nfe_and_seeds]
    record = EvaluationRecord(
        key=description.evaluation_key,
        inputs=description.evaluation_inputs,
        rows=rows,
        weights_sha256=weights,
        **where,
    )
    _write_evaluation(_evaluation_path(description), record, [])


def record_sha256(description: CellDescription) -> str:
    """The SHA-256 of the record of a cell's training; "" without one."""
    path = description.folder / TRAIN
    return sha256_file(path) if path.is_file() else ""


def follow_sampling(cell: Cell, order: SampleOrder, progress: Progress) -> None:
    """What non-zero ranks do for a row, or for the teacher's many-step samples."""
    torch.set_num_threads(cell.shared.config.threads)
    method = None if order.teacher_samples or order.weights is None else _restored(cell, order.weights, progress)
    sampler = None if order.teacher_samples else _sampler(cell, method, progress)
    evaluator = cell.shared.get_evaluator(progress)
    evaluator.follow_sampling(sampler, order)
    evaluator.release()


@dataclass
class CellRunner:
    """Finds the records of one cell that can be reused, and makes the others."""

    cell: Cell
    description: CellDescription
    policy: Policy
    progress: Progress

    @property
    def folder(self) -> Path:
        return self.description.folder

    # --- training

    def found_training(self, intact: Callable[[Path, str], bool]) -> TrainRecord | None:
        """The record of the training; None: train (again). `intact`: whether a file has a SHA-256."""
        stale = self.description.stale
        done_again = self.policy.force and stale is not None and record_sha256(self.description) != stale
        if self.policy.force and not done_again:
            return None
        record = _read(self.folder / TRAIN, TrainRecord, self.description.train_inputs, self.progress)
        if record is None or (not done_again and self.policy.runs_again(record.status)):
            return None
        if record.status == "ok" and not intact(self.folder / STUDENT, record.weights_sha256):
            self.progress.say(f"{self.cell.label}: the weights of the record are missing or damaged; training again")
            return None
        return record

    # --- evaluation

    def found_evaluation(self, training: TrainRecord | None) -> tuple[EvaluationRecord, list[Tensor]] | None:
        """The record of the evaluation and its samples; None: evaluate (again)."""
        path = _evaluation_path(self.description)
        record = self._found(path, EvaluationRecord, self.description.evaluation_inputs)
        shown = _read_shown(path.with_suffix(".safetensors"))
        if record is None or shown is None or self.policy.runs_again(record.status):
            return None
        if training is None:
            return record, shown
        fits = record.weights_sha256 == training.weights_sha256  # otherwise the student was trained again
        fits = fits and (training.status == "ok" or all(row.status == training.status for row in record.rows))
        return (record, shown) if fits else None

    def evaluate(self, training: TrainRecord | None) -> tuple[EvaluationRecord, list[Tensor]]:
        shared, inputs = self.cell.shared, self.description.evaluation_inputs
        common = self._common(inputs, training.weights_sha256 if training is not None else "")
        shown: list[Tensor] = []
        kept: ScoredRows | None = None
        if training is not None and training.status != "ok":
            record = EvaluationRecord(**common, rows=self._rows_with(training.status, training.reason))
        else:
            kept = ScoredRows(self.folder, EvaluationRecord(**common, rows=[]), self.policy.force)
            rows, shown = self._rows(kept)
            along = self._rows_along(training, kept) if training is not None else []
            references = shared.describe_references(self.progress)
            record = EvaluationRecord(**common, rows=rows, along=along, references=references)
            shared.get_evaluator(self.progress).release()
        file = cell_file(self.folder, record.key)
        file.unlink(missing_ok=True)  # of other weights
        if kept is not None and (influences := kept.influences()):
            write_atomically(file, lambda temporary: save_file(influences, temporary))
        _write_evaluation(_evaluation_path(self.description), record, shown)
        if kept is not None:
            kept.discard()
        return record, shown

    def _rows_with(self, status: Status, reason: str) -> list[RowRecord]:
        return [
            RowRecord(nfe=nfe, sampling_seed=seed, status=status, reason=reason)
            for nfe, seed in self.description.nfe_and_seeds
        ]

    def _rows(self, kept: ScoredRows) -> tuple[list[RowRecord], list[Tensor]]:
        """The rows of a trained student or of the teacher, and the samples to show of those that are ok."""
        weights = self.folder / STUDENT if self.cell.entry is not None else None
        try:
            method = None if weights is None else _restored(self.cell, weights, self.progress)
        except UserError:
            raise
        except Exception as error:
            return self._rows_with(status_of(error), keep_traceback(error, self.folder, self.progress)), []
        rows, shown = [], []
        first_seed = self.cell.shared.config.evaluation.seeds[0]
        for nfe, seed in self.description.nfe_and_seeds:
            found = kept.find(nfe, seed)
            if found is None or (seed == first_seed and found[1] is None):
                row, measured = self._row(method, weights, nfe, seed, self.cell.label, influences=True)
                images = measured.shown if measured is not None and seed == first_seed else None
                kept.keep(row, images, {} if measured is None else measured.influences)
            else:
                row, images = found
            rows.append(row)
            shown += [] if images is None else [images]
        return rows, shown

    def _row(
        self, method: Method | None, weights: Path | None, nfe: int, seed: int, label: str, influences: bool = False
    ) -> tuple[RowRecord, Measured | None]:
        """One row, and what was measured if it is ok."""
        cell = self.cell
        try:
            evaluator = cell.shared.get_evaluator(self.progress)
            sampler = _sampler(cell, method, self.progress)
            keeps_noise = _keeps_noise(cell, nfe) if method is None else method.keeps_noise(nfe)
            order = SampleOrder(CellTask.of(cell), weights) if cell.shared.ranks.count > 1 else None
            measured = evaluator.measure(sampler, nfe, seed, keeps_noise, label, order, influences)
        except UserError:
            raise
        except DivergedError as error:
            return RowRecord(nfe=nfe, sampling_seed=seed, status="diverged", reason=str(error)), None
        except Exception as error:
            reason = keep_traceback(error, self.folder, self.progress)
            return RowRecord(nfe=nfe, sampling_seed=seed, status=status_of(error), reason=reason), None
        row = RowRecord(nfe=nfe, sampling_seed=seed, scores=measured.scores, missing=measured.missing)
        return row, measured

    def _rows_along(self, training: TrainRecord, kept: ScoredRows) -> list[CheckpointScores]:
        """The scores of the student at its checkpoints; not part of the budget, and not timed."""
        rows = []
        for checkpoint in training.checkpoints:
            weights, method = self.folder / checkpoint.file, None
            label = f"{self.cell.label} at {checkpoint.fraction:.0%}"
            for nfe in checkpoint.ready:
                for seed in self.cell.shared.config.evaluation.seeds:
                    found = kept.find(nfe, seed, checkpoint.fraction)
                    if found is not None and isinstance(found[0], CheckpointScores):
                        rows.append(found[0])
                        continue
                    method = method or _restored(self.cell, weights, self.progress)
                    row, _ = self._row(method, weights, nfe, seed, label)
                    rows.append(CheckpointScores(fraction=checkpoint.fraction, **dict(row)))
                    kept.keep(rows[-1], None)
        return rows

    # --- sampling cost

    def found_speed(self, evaluation: EvaluationRecord) -> SpeedRecord | None:
        """The record of the sampling cost; None: measure (again)."""
        inputs = speed_inputs(self.cell, self.description.train_key)
        able = any(row.status == "ok" for row in evaluation.rows)
        if self.cell.shared.config.evaluation.timing == "off" or not able:
            common = self._common(inputs, evaluation.weights_sha256)
            return SpeedRecord(**common, reason="evaluation.timing=off" if able else "")
        record = self._found(self.folder / f"speed-{key_of(inputs)}.json", SpeedRecord, inputs)
        if record is None or self.policy.runs_again(record.status):
            return None
        return record if record.weights_sha256 == evaluation.weights_sha256 else None

    def measure_speed(self, training: TrainRecord | None, evaluation: EvaluationRecord) -> SpeedRecord:
        cell, config = self.cell, self.cell.shared.config.evaluation
        inputs = speed_inputs(cell, self.description.train_key)
        common = self._common(inputs, evaluation.weights_sha256)
        nfe = sorted({row.nfe for row in evaluation.rows if row.status == "ok"})
        job = speed_job(cell, self.folder / STUDENT if training is not None else None, nfe)
        cell.shared.release_evaluator()
        try:
            with self.progress.step(f"{cell.label}: timing"):
                limit = 600.0 + 300.0 * len(nfe)
                measured = measure(job) if config.timing == "inline" else measure_in_fresh_process(job, limit)
            rows = [SpeedRow.model_validate(dataclasses.asdict(row)) for row in measured]
            record = SpeedRecord(**common, rows=rows)
        except SpeedError as error:
            self.progress.say(f"{cell.label}: {error}")
            record = SpeedRecord(**common, status="failed", reason=str(error))
        write_record(self.folder / f"speed-{record.key}.json", record)
        return record

    def _found(self, path: Path, kind: type[AnyRecord], inputs: dict[str, Any]) -> AnyRecord | None:
        return None if self.policy.force else _read(path, kind, inputs, self.progress)

    def _common(self, inputs: dict[str, Any], weights_sha256: str) -> dict[str, Any]:
        """The fields that records of evaluation and of speed share."""
        device = self.cell.shared.device
        return {
            "key": key_of(inputs),
            "inputs": inputs,
            "weights_sha256": weights_sha256,
            "device": device_name(device),
            "environment": environment(device, self.cell.shared.config.threads),
        }


# --- samplers --------------------------------------------------------------------------------------------------------


def _sampler(cell: Cell, method: Method | None, progress: Progress) -> Sampler:
    """Of the method, or of the teacher itself."""
    return method.sample if method is not None else teacher_sampler(cell.shared.load_teacher(progress), cell.sampler())


def _restored(cell: Cell, weights: Path, progress: Progress) -> Method:
    """The method with the weights of a finished training or of a checkpoint, in evaluation mode."""
    return restored(cell, cell.shared.load_teacher(progress), weights)


def _keeps_noise(cell: Cell, nfe: int) -> bool:
    """Whether the teacher's sample depends on eps alone: an ancestral sampler adds noise unless it takes one step."""
    return cell.sampler().deterministic or nfe == cell.shared.conditioning.evaluations


# --- files -----------------------------------------------------------------------------------------------------------


def _evaluation_path(description: CellDescription) -> Path:
    return description.folder / f"evaluation-{description.evaluation_key}.json"


def _write_evaluation(path: Path, record: EvaluationRecord, shown: list[Tensor]) -> None:
    """Write the samples first: where the record is, they are."""
    tensors = stack_shown(shown)
    write_atomically(path.with_suffix(".safetensors"), lambda temporary: save_file(tensors, temporary))
    write_record(path, record)


def _read(path: Path, kind: type[AnyRecord], inputs: dict[str, Any], progress: Progress) -> AnyRecord | None:
    try:
        return read_record(path, kind, inputs)
    except ValueError as error:
        progress.say(f"{error}; it is made again")
        return None


def _read_shown(path: Path) -> list[Tensor] | None:
    try:
        return unstack_shown(load_file(path)) if path.is_file() else None
    except (SafetensorError, KeyError, OSError):
        return None


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256
