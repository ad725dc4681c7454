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
from distillbench.budget import Meter, Price
from distillbench.energy import Energy, energy
from distillbench.environment import device_name, environment
from distillbench.errors import DivergedError, Unavailable, UserError
from distillbench.evaluate import Sampler, teacher_sampler
from distillbench.files import key_of, sha256_file, write_atomically
from distillbench.flops import NetworkFlops, family_flops, training_flops
from distillbench.memory import peak_gpu_mib, peak_rss_mib
from distillbench.method import Method
from distillbench.pairs import Workspace
from distillbench.plan import Cell, Scene, build, plain_settings
from distillbench.progress import Progress
from distillbench.results import (
    FINAL,
    CheckpointRecord,
    CheckpointScores,
    Cost,
    CurvePoint,
    EvaluationRecord,
    RowRecord,
    SpeedRecord,
    SpeedRow,
    TrainRecord,
    read_record,
    stack_shown,
    unstack_shown,
    write_record,
)
from distillbench.speed import SpeedError, measure, measure_in_fresh_process, speed_job
from distillbench.teachers import Teacher
from distillbench.train import Checkpoints, DataStream, train, warm_up

TRAIN_PROTOCOL = 3  # raise when the loop, the samplers or the networks change what a training gives
EVALUATION_PROTOCOL = 3  # raise when evaluation changes a number that no metric's protocol names
SPEED_PROTOCOL = 1  # raise when speed is measured in another way


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
    evaluation, shown = _evaluated(cell, training, key, folder, progress)
    speed = _timed(cell, training, evaluation, key, folder, progress)
    return Finished(cell, training, evaluation, speed, folder, shown)


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
        "metrics": {name: cls.identity(scene.weights) for name, cls in scene.metrics.items()},
        "references": {file.provenance["network"]: file.sha256 for file in scene.references},
        "reference": {"sampler": config.solvers()[0].name, "steps": max(config.teacher_steps)},
    }


def protocol_key(scene: Scene, teacher: Teacher) -> str:
    """The name of everything that must be equal in rows that are compared: data, teacher, guidance and protocol."""
    dataset = {"name": scene.dataset.name, "sha256": scene.dataset.sha256}
    asked = {"conditional": scene.config.conditional, "guidance": scene.config.guidance}
    return key_of([dataset, teacher.sha256, asked, _protocol(scene)])[:8]


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
    return inputs | _sampled(cell)


def _sampled(cell: Cell) -> dict[str, Any]:
    """How a cell's samples are made."""
    inputs: dict[str, Any] = {}
    if cell.solver is not None:
        inputs["sampler"] = cell.solver.name
    if cell.scene.config.conditional:
        inputs["guidance"] = cell.scene.config.guidance
    return inputs


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
    data = DataStream(scene.trained_on(progress), cell.seed, scene.device) if cell.entry.cls.needs_data else None
    try:
        with (
            progress.step(f"{cell.label}: training") as step,
            peak_rss_mib() as rss,
            peak_gpu_mib(scene.device) as gpu,
            energy(scene.device, config.energy) as joules,
        ):
            method = build(cell, teacher)
            meter = Meter(config.budget, teacher, scene.device, watches=(rss, gpu), energy=joules)
            parts = method.teacher, meter, cache, scene.device, cell.seed, progress
            workspace = Workspace(*parts, energy_source=config.energy)
            read = None if data is None else data.read
            points = config.evaluation.checkpoints
            fractions = tuple((k + 1) / (points + 1) for k in range(points))
            checkpoints = Checkpoints(fractions, folder, tuple(cell.nfe))
            trained = train(method, cell.method_config, workspace, read, config.batch_size, step, checkpoints)
    except DivergedError as error:
        return _keep(folder, TrainRecord(**about, status="diverged", reason=str(error)))
    except Exception as error:  # a method is a stranger's code; the other cells go on
        return _keep(folder, TrainRecord(**about, status="failed", reason=_reason(error, folder, progress)))
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in method.state_dict().items()}
    write_atomically(folder / "student.safetensors", lambda path: save_file(tensors, path))
    used = meter.energy()
    peaks = {"peak_gpu_mib": gpu, "peak_gpu_reserved_mib": gpu.reserved, "peak_device_mib": gpu.device}
    missing = {name: peak.reason for name, peak in peaks.items() if peak.reason}
    missing |= {"joules": used.reason} if used.reason else {}
    try:
        if method.teacher.conditioning.small is not None:
            raise Unavailable("the evaluations of an upscaler's base model are not told apart from its own")
        flops = family_flops(method.teacher, scene.device)
        not_counted = sorted({name for counted in flops for name in counted.not_counted})
    except Unavailable as reason:
        flops, not_counted = None, []
        missing["tflops"] = str(reason)
    except Exception as error:  # a network is a stranger's code
        flops, not_counted = None, []
        missing["tflops"] = f"its FLOPs cannot be counted: {type(error).__name__}"
    return _keep(
        folder,
        TrainRecord(
            **about,
            status="ok",
            cost=_cost(trained.price, used, flops),
            **{name: peak.mib for name, peak in peaks.items()},
            peak_rss_mib=rss.mib,
            parameters=sum(p.numel() for p in method.student.parameters()),
            weights_sha256=sha256_file(folder / "student.safetensors"),
            curve=[CurvePoint(**dataclasses.asdict(point)) for point in trained.curve],
            checkpoints=[
                CheckpointRecord(
                    fraction=c.fraction,
                    file=c.file,
                    sha256=c.sha256,
                    ready=list(c.ready),
                    cost=_cost(c.price, c.energy, flops),
                )
                for c in trained.checkpoints
            ],
            flops_not_counted=not_counted,
            missing=missing,
        ),
    )


def _cost(price: Price, used: Energy, flops: tuple[NetworkFlops, NetworkFlops] | None) -> Cost:
    tflops = None if flops is None else training_flops(price, *flops) / 1e12
    return Cost(**dataclasses.asdict(price), tflops=tflops, joules=used.joules)


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


def _evaluated(
    cell: Cell, training: TrainRecord | None, train_key: str, folder: Path, progress: Progress
) -> tuple[EvaluationRecord, list[Tensor]]:
    scene = cell.scene
    inputs = evaluation_inputs(cell, train_key)
    key = key_of(inputs)
    path = folder / f"evaluation-{key}.json"
    record = _known(path, EvaluationRecord, inputs, progress)
    shown = _read_shown(path.with_suffix(".safetensors"))
    weights_sha256 = training.weights_sha256 if training is not None else ""
    stale = record is not None and record.weights_sha256 != weights_sha256  # the student was trained again
    if record is not None and record.status in FINAL and shown is not None and not stale:
        return record, shown
    about = _about(cell, key, inputs, weights_sha256)
    if training is not None and training.status != "ok":
        rows = _rows_without_student(cell, training)
        record, shown = EvaluationRecord(**about, rows=rows), []
    else:
        rows, shown = _rows(cell, folder, progress)
        along = _along(cell, training, folder, progress) if training is not None else []
        record = EvaluationRecord(**about, rows=rows, along=along, references=scene.describe_references(progress))
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
        method = _restored(cell, folder / "student.safetensors", progress) if cell.entry is not None else None
    except UserError:
        raise
    except Exception as error:
        reason = _reason(error, folder, progress)
        return [RowRecord(nfe=n, sampling_seed=seed, status="failed", reason=reason) for n, seed in wanted], []
    rows, shown = [], []
    for nfe, seed in wanted:
        row, images = _row(cell, method, nfe, seed, cell.label, folder, progress)
        rows.append(row)
        if images is not None and seed == seeds[0]:
            shown.append(images)
    return rows, shown


def _row(
    cell: Cell, method: Method | None, nfe: int, seed: int, label: str, folder: Path, progress: Progress
) -> tuple[RowRecord, Tensor | None]:
    """One row, and its samples to be shown if it is ok."""
    about: dict[str, Any] = {"nfe": nfe, "sampling_seed": seed}
    try:
        evaluator = cell.scene.evaluation(progress)
        teacher = cell.scene.loaded(progress)
        sampler: Sampler = method.sample if method is not None else teacher_sampler(teacher, cell.sampler())
        keeps_noise = _keeps_noise(cell, nfe) if method is None else method.keeps_noise(nfe)
        measured = evaluator.measure(sampler, nfe, seed, keeps_noise, label)
    except UserError:
        raise
    except DivergedError as error:
        return RowRecord(**about, status="diverged", reason=str(error)), None
    except Exception as error:
        return RowRecord(**about, status="failed", reason=_reason(error, folder, progress)), None
    return RowRecord(**about, scores=measured.scores, missing=measured.missing), measured.shown


def _along(cell: Cell, training: TrainRecord, folder: Path, progress: Progress) -> list[CheckpointScores]:
    """The scores of the student as it was at its checkpoints; outside the budget and untimed."""
    rows = []
    for checkpoint in training.checkpoints:
        method = _restored(cell, folder / checkpoint.file, progress)
        label = f"{cell.label} at {checkpoint.fraction:.0%}"
        for nfe in checkpoint.ready:
            for seed in cell.scene.config.evaluation.seeds:
                row, _ = _row(cell, method, nfe, seed, label, folder, progress)
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


def _timed(
    cell: Cell, training: TrainRecord | None, evaluation: EvaluationRecord, train_key: str, folder: Path,
    progress: Progress,
) -> SpeedRecord:  # fmt: skip
    """The cost of sampling, measured now or found."""
    config = cell.scene.config.evaluation
    inputs = speed_inputs(cell, train_key)
    key = key_of(inputs)
    about = _about(cell, key, inputs, evaluation.weights_sha256)
    able = sorted({row.nfe for row in evaluation.rows if row.status == "ok"})
    if config.timing == "off" or not able:
        return SpeedRecord(**about, reason="evaluation.timing=off" if able else "")
    path = folder / f"speed-{key}.json"
    record = _known(path, SpeedRecord, inputs, progress)
    if record is not None and record.status == "ok" and record.weights_sha256 == evaluation.weights_sha256:
        return record
    job = speed_job(cell, folder / "student.safetensors" if training is not None else None, able)
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
