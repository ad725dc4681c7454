"""One cell: train and evaluate, or read what an earlier run left. Its key is made from all that decides its numbers."""

from __future__ import annotations

import dataclasses
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import distillbench
from distillbench.budget import Meter
from distillbench.environment import device_name, environment
from distillbench.errors import DivergedError, UserError
from distillbench.evaluate import Sampler, teacher_sampler
from distillbench.files import key_of, sha256_file, write_atomically
from distillbench.memory import peak_gpu_mib, peak_rss_mib
from distillbench.method import Method
from distillbench.pairs import Workspace
from distillbench.plan import Cell, build, plain_settings
from distillbench.progress import Progress
from distillbench.results import (
    FINAL,
    CurvePoint,
    EvaluationRecord,
    RowRecord,
    TrainRecord,
    read_record,
    stack_shown,
    unstack_shown,
    write_record,
)
from distillbench.teachers import Teacher
from distillbench.train import DataStream, train, warm_up

TRAIN_PROTOCOL = 2  # raise when the loop, the samplers or the networks change what a training gives
EVALUATION_PROTOCOL = 2  # raise when evaluation changes a number that no metric's protocol names


@dataclass
class Finished:
    """A cell's records, made now or found."""

    cell: Cell
    training: TrainRecord | None
    evaluation: EvaluationRecord
    folder: Path
    shown: list[Tensor]

    @property
    def failed(self) -> bool:
        return any(row.status != "ok" for row in self.evaluation.rows)


def run_cell(cell: Cell, progress: Progress) -> Finished:
    """Train and evaluate `cell`, or read what an earlier run left of it."""
    torch.set_num_threads(cell.scene.config.threads)
    teacher = cell.scene.loaded(progress)
    inputs = train_inputs(cell, teacher)
    key = key_of(inputs)
    folder = Path(cell.scene.config.results_dir) / "cells" / key
    training = None
    if cell.entry is not None:
        training = _known(folder / "train.json", TrainRecord, inputs, progress)
        weights = folder / "student.safetensors"
        if training is not None and training.status == "ok" and not _intact(weights, training.weights_sha256):
            progress.say(f"{cell.label}: the weights of the record are missing or damaged; training again")
            training = None
        if training is None or training.status not in FINAL:
            training = _train(cell, teacher, key, inputs, folder, progress)
    return _evaluated(cell, training, key, folder, progress)


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
    return inputs | {
        "method": cell.entry.identity(),
        "config": plain_settings(cell.method_config),
        "budget": {"limit": config.budget.limit.value, "amount": config.budget.amount},
        "batch_size": config.batch_size,
        "seed": cell.seed,
    }


def evaluation_inputs(cell: Cell, train_key: str) -> dict[str, Any]:
    """Everything else that decides the numbers of a cell's rows."""
    names = cell.scene.config.evaluation.metrics
    protocols = {name: cell.scene.registry.get("metrics", name).cls.protocol for name in names}
    config = plain_settings(cell.scene.config.evaluation) | {"metrics": protocols, "nfe": cell.nfe}
    sampler = cell.scene.config.evaluation.solvers()[0].name
    reference = {"sampler": sampler, "steps": max(config.pop("teacher_steps"))}
    del config["teacher_samplers"]
    if cell.solver is not None:
        config["sampler"] = cell.solver.name
    if cell.scene.config.conditional:
        config["guidance"] = cell.scene.config.guidance
    return {"protocol": EVALUATION_PROTOCOL, "train_key": train_key, "reference": reference, **config}


def _known(path: Path, kind: Any, inputs: dict[str, Any], progress: Progress) -> Any:
    try:
        return read_record(path, kind, inputs)
    except ValueError as error:
        progress.say(f"{error}; it is made again")
        return None


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def _train(
    cell: Cell, teacher: Teacher, key: str, inputs: dict[str, Any], folder: Path, progress: Progress
) -> TrainRecord:
    scene, config = cell.scene, cell.scene.config
    assert cell.entry is not None and cell.method_config is not None and cell.seed is not None
    about = {"key": key, "inputs": inputs, "device": device_name(scene.device)}
    about["environment"] = environment(scene.device, config.threads)
    cache = Path(config.results_dir) / "cache" / "pairs"
    warm_up(scene.device)
    try:
        label = f"{cell.label}: training"
        with progress.step(label) as step, peak_rss_mib() as rss, peak_gpu_mib(scene.device) as gpu:
            method = build(cell, teacher)
            meter = Meter(config.budget, teacher, scene.device)
            workspace = Workspace(method.teacher, meter, cache, scene.device, cell.seed, progress)
            data = DataStream(scene.dataset, cell.seed, scene.device)
            read = data.read if method.needs_data else None
            trained = train(method, cell.method_config, workspace, read, config.batch_size, step)
    except DivergedError as error:
        return _keep(folder, TrainRecord(**about, status="diverged", reason=str(error)))
    except Exception as error:  # a method is a stranger's code; the other cells go on
        return _keep(folder, TrainRecord(**about, status="failed", reason=_reason(error, folder, progress)))
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in method.state_dict().items()}
    write_atomically(folder / "student.safetensors", lambda path: save_file(tensors, path))
    return _keep(
        folder,
        TrainRecord(
            **about,
            status="ok",
            **dataclasses.asdict(trained.price),
            peak_gpu_mib=gpu.mib,
            peak_rss_mib=rss.mib,
            parameters=sum(p.numel() for p in method.student.parameters()),
            weights_sha256=sha256_file(folder / "student.safetensors"),
            curve=[CurvePoint(**dataclasses.asdict(point)) for point in trained.curve],
            missing={"peak_gpu_mib": gpu.reason} if gpu.reason else {},
        ),
    )


def _keep(folder: Path, record: TrainRecord) -> TrainRecord:
    write_record(folder / "train.json", record)
    return record


def _reason(error: Exception, folder: Path, progress: Progress) -> str:
    """One line for the row; the traceback goes to a file beside the record."""
    text = traceback.format_exc()
    write_atomically(folder / "error.txt", lambda path: Path(path).write_text(text))
    line = (str(error).strip() or "no message").splitlines()[0]
    progress.say(f"{type(error).__name__}: {line} (traceback in {folder / 'error.txt'})")
    return f"{type(error).__name__}: {line}"


def _evaluated(cell: Cell, training: TrainRecord | None, train_key: str, folder: Path, progress: Progress) -> Finished:
    scene = cell.scene
    inputs = evaluation_inputs(cell, train_key)
    key = key_of(inputs)
    path = folder / f"evaluation-{key}.json"
    record = _known(path, EvaluationRecord, inputs, progress)
    shown = _read_shown(path.with_suffix(".safetensors"))
    weights_sha256 = training.weights_sha256 if training is not None else ""
    stale = record is not None and record.weights_sha256 != weights_sha256  # the student was trained again
    if record is not None and record.status in FINAL and shown is not None and not stale:
        return Finished(cell, training, record, folder, shown)
    about = {"key": key, "inputs": inputs, "weights_sha256": weights_sha256, "device": device_name(scene.device)}
    about["environment"] = environment(scene.device, scene.config.threads)
    if training is not None and training.status != "ok":
        rows = [RowRecord(nfe=nfe, status=training.status, reason=training.reason) for nfe in cell.nfe]
        record, shown = EvaluationRecord(**about, rows=rows), []
    else:
        rows, shown = _rows(cell, folder, progress)
        record = EvaluationRecord(**about, rows=rows)
    tensors = stack_shown(shown)
    write_atomically(path.with_suffix(".safetensors"), lambda temporary: save_file(tensors, temporary))
    write_record(path, record)
    return Finished(cell, training, record, folder, shown)


def _read_shown(path: Path) -> list[Tensor] | None:
    try:
        return unstack_shown(load_file(path)) if path.is_file() else None
    except (SafetensorError, KeyError, OSError):
        return None


def _rows(cell: Cell, folder: Path, progress: Progress) -> tuple[list[RowRecord], list[Tensor]]:
    """The rows of a trained student, or of the teacher, and the samples to be shown of those that are ok."""
    teacher = cell.scene.loaded(progress)
    rows, shown = [], []
    try:
        evaluator = cell.scene.evaluation(progress)
        method = _restored(cell, teacher, folder) if cell.entry is not None else None
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error, folder, progress)
        return [RowRecord(nfe=nfe, status="failed", reason=reason) for nfe in cell.nfe], []
    for nfe in cell.nfe:
        sampler: Sampler = method.sample if method is not None else teacher_sampler(teacher, cell.sampler())
        try:
            keeps_noise = _keeps_noise(cell, nfe) if method is None else method.keeps_noise(nfe)
            measured = evaluator.measure(sampler, nfe, keeps_noise, cell.label)
        except DivergedError as error:
            rows.append(RowRecord(nfe=nfe, status="diverged", reason=str(error)))
        except Exception as error:
            rows.append(RowRecord(nfe=nfe, status="failed", reason=_reason(error, folder, progress)))
        else:
            plain = {f.name: getattr(measured, f.name) for f in dataclasses.fields(measured) if f.name != "shown"}
            rows.append(RowRecord(**plain))
            shown.append(measured.shown)
    return rows, shown


def _keeps_noise(cell: Cell, nfe: int) -> bool:
    """Whether the teacher's row is an answer to its noise: with an ancestral sampler only its single step is."""
    return cell.sampler().deterministic or nfe == cell.scene.conditioning.evaluations


def _restored(cell: Cell, teacher: Teacher, folder: Path) -> Method:
    """The method with the weights that training left, whether that was now or in an earlier run."""
    method = build(cell, teacher)
    method.load_state_dict(load_file(folder / "student.safetensors", device=cell.scene.device))
    return method.eval()
