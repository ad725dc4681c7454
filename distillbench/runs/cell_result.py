"""What a cell contributes to a run: table rows, samples and weights, as plain values that can be pickled."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from distillbench.records.influences import cell_file
from distillbench.records.records import CheckpointScores, EvaluationRecord, SpeedRecord, TrainRecord
from distillbench.records.table import cost_columns, table_row
from distillbench.runs.cell_keys import cell_folder, evaluation_inputs, protocol_key, train_inputs
from distillbench.runs.cell_training import STUDENT
from distillbench.runs.plan import changed_settings, student_settings
from distillbench.runs.shared_context import Cell
from distillbench.storage.files import key_of
from distillbench.system.environment import device_name
from distillbench.teachers.students import AS_TEACHER
from distillbench.teachers.teacher import Teacher
from distillbench.training.compute import changed, in_words


@dataclass(frozen=True)
class CellDescription:
    """Identifies a cell: its cache keys, its folder, and the columns that all its rows share."""

    label: str
    columns: dict[str, Any]
    nfe_and_seeds: list[tuple[int, int]]  # (nfe, sampling seed) of each row
    folder: Path
    train_inputs: dict[str, Any]
    evaluation_inputs: dict[str, Any]
    differs: str = ""  # as in Cell
    stale: str | None = None  # with --force: SHA-256 of the training's record at the scan ("": none), to be done again

    @property
    def train_key(self) -> str:
        return self.folder.name

    @property
    def evaluation_key(self) -> str:
        return key_of(self.evaluation_inputs)

    def status_rows(self, status: str, reason: str) -> list[dict[str, Any]]:
        """The cell's rows with a status and no scores."""
        ending = {"status": status, "reason": reason}
        return [self.columns | ending | {"nfe": nfe, "sampling_seed": seed} for nfe, seed in self.nfe_and_seeds]


@dataclass(frozen=True)
class CellResult:
    """A finished cell."""

    description: CellDescription
    rows: list[dict[str, Any]]
    along: list[dict[str, Any]] = field(default_factory=list)  # scores at checkpoints during training
    ok: bool = False  # every row has scores
    weights: tuple[Path, str] | None = None  # the student's file, and its name in the run's folder
    weights_sha256: str = ""
    influences: Path | None = None  # the file of its images' influences on scores
    shown: list[tuple[str, int, Tensor]] = field(default_factory=list)  # samples: label, nfe, (N,C,H,W) uint8


def describe_cell(cell: Cell, teacher: Teacher) -> CellDescription:
    """The description of `cell` with this teacher."""
    inputs = train_inputs(cell, teacher)
    key = key_of(inputs)
    rows = [(nfe, seed) for nfe in cell.nfe for seed in cell.shared.config.evaluation.seeds]
    evaluation = evaluation_inputs(cell, key)
    columns = _shared_columns(cell, teacher)
    columns |= {"reference": "", "device": device_name(cell.shared.device), "key": key_of(evaluation)}
    return CellDescription(cell.label, columns, rows, cell_folder(cell, key), inputs, evaluation, cell.differs)


def result_of(
    cell: Cell, description: CellDescription, training: TrainRecord | None, evaluation: EvaluationRecord,
    speed: SpeedRecord, shown: list[Tensor],
) -> CellResult:  # fmt: skip
    """The result of a cell from its records. `training` is None for the teacher itself.

    `shown`: samples of the rows that are ok, of the first sampling seed.
    """
    weights = None
    if training is not None and training.status == "ok":
        weights = (description.folder / STUDENT, f"{cell.name}-seed{cell.seed}-{training.key}.safetensors")
    influences = cell_file(description.folder, evaluation.key)
    return CellResult(
        description,
        _table_rows(cell, training, evaluation, speed),
        _along_rows(cell, training, evaluation),
        all(row.status == "ok" for row in [*evaluation.rows, *evaluation.along]),
        weights,
        "" if training is None else training.weights_sha256,
        influences if influences.is_file() else None,
        _picture_lines(cell, evaluation, shown),
    )


def _shared_columns(cell: Cell, teacher: Teacher, training: TrainRecord | None = None) -> dict[str, Any]:
    config = cell.shared.config
    settings = [f"guidance_range={config.guidance_range}"] if cell.entry is not None and config.guidance_range else []
    student = cell.shared.students if cell.entry is not None else AS_TEACHER
    if cell.entry is not None:
        settings += student_settings(config.student)
        settings += [f"augment.{name}={value}" for name, value in cell.augmentation.items()]
    settings.append(changed_settings(cell.method_config))
    microbatch = config.microbatch if training is None else training.microbatch
    if cell.entry is not None and microbatch:
        more = " (memory ran out with more)" if microbatch != config.microbatch else ""
        settings.append(f"microbatch={microbatch}{more}")
    if cell.entry is not None and (processes := cell.shared.ranks.count) > 1:
        settings.append(f"processes={processes}")
    compute = config.compute if cell.entry is not None else None
    settings += changed(compute, config.evaluation.sampling)
    return {
        "dataset": cell.shared.dataset.name,
        "teacher": teacher.label,
        "guidance": config.guidance if config.conditional else None,
        "method": cell.name,
        "training_seed": cell.seed,
        "images": config.evaluation.images,
        "budget": f"{config.budget.in_words}, batch {config.batch_size}" if cell.entry is not None else "",
        "protocol": protocol_key(cell.shared, teacher),
        "settings": ", ".join(filter(None, settings)),
        "compute": in_words(compute, config.evaluation.sampling),
        "student_lora_rank": student.rank,
        "student_architecture": student.architecture_label,
    }


def _teacher(cell: Cell) -> Teacher:
    assert cell.shared.teacher is not None  # loaded before any record is read or written
    return cell.shared.teacher


def _table_rows(
    cell: Cell, training: TrainRecord | None, evaluation: EvaluationRecord, speed: SpeedRecord
) -> list[dict[str, Any]]:
    real = ", ".join(f"{network}: {words}" for network, words in evaluation.references.items())
    columns = _shared_columns(cell, _teacher(cell), training)
    columns |= {"reference": real, "device": _device(training, evaluation, speed), "key": evaluation.key}
    metrics = list(cell.shared.metrics)
    seen = "" if training is None else training.note
    notes = ["; ".join(filter(None, [_note(cell, row.nfe), seen])) for row in evaluation.rows]
    return [
        table_row(columns, row, training, speed, metrics, note)
        for row, note in zip(evaluation.rows, notes, strict=True)
    ]


def _note(cell: Cell, nfe: int) -> str:
    """What readers must know of the sampler of the row with `nfe` evaluations, and of the reference's sampler."""
    schedule, config = _teacher(cell).schedule, cell.shared.config.evaluation
    reference, most = config.solvers()[0], max(config.teacher_steps)
    notes = []
    if cell.solver is not None:
        steps = cell.solver.steps(nfe // cell.shared.conditioning.evaluations)
        notes.append(cell.solver.note(schedule, steps) if steps is not None else "")
    compared = reference.note(schedule, most)
    if compared and compared not in notes:
        notes.append(f"compared with the teacher's answers by {compared}")
    return "; ".join(filter(None, notes))


def _device(training: TrainRecord | None, evaluation: EvaluationRecord, speed: SpeedRecord) -> str:
    """The device whose seconds, joules and MiB the rows hold: cached records may come from another machine."""
    sampled = speed.device if speed.rows else ""
    device = evaluation.device if training is None else training.device
    if training is None and sampled:
        return sampled
    return device if sampled in ("", device) else f"{device}; sampling {sampled}"


def _along_rows(cell: Cell, training: TrainRecord | None, evaluation: EvaluationRecord) -> list[dict[str, Any]]:
    """The scores at checkpoints during training; the last rows are those of the finished student."""
    if training is None or not evaluation.along:
        return []
    costs = {checkpoint.fraction: checkpoint.cost for checkpoint in training.checkpoints}
    if training.cost is not None:
        costs[1.0] = training.cost
    columns = _shared_columns(cell, _teacher(cell), training)
    ends = [CheckpointScores(fraction=1.0, **dict(row)) for row in evaluation.rows]
    rows = []
    for row in [*evaluation.along, *ends]:
        own: dict[str, Any] = {"nfe": row.nfe, "sampling_seed": row.sampling_seed, "fraction": row.fraction}
        own |= {"status": row.status, "reason": row.reason}
        rows.append(columns | own | row.scores | cost_columns(costs[row.fraction]))
    return rows


def _picture_lines(cell: Cell, evaluation: EvaluationRecord, shown: list[Tensor]) -> list[tuple[str, int, Tensor]]:
    """One line for each row of the first sampling seed that is ok."""
    config = cell.shared.config
    first = config.evaluation.seeds[0]
    good = [row for row in evaluation.rows if row.status == "ok" and row.sampling_seed == first]
    guidance = f", w = {config.guidance:g}" if config.conditional else ""
    return [
        (f"{cell.label}{guidance}, {row.nfe} NFE", row.nfe, images) for row, images in zip(good, shown, strict=True)
    ]
