"""What is left of a cell once it is done: rows for tables, pictures, weights, all plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from distillbench.cell import Finished
from distillbench.cell_keys import cell_folder, evaluation_inputs, protocol_key, train_inputs
from distillbench.cell_training import STUDENT
from distillbench.compute import changed, in_words
from distillbench.environment import device_name
from distillbench.files import key_of
from distillbench.plan import changed_settings
from distillbench.results import CheckpointScores, TrainRecord
from distillbench.shared_context import Cell
from distillbench.table import cost_columns, table_row
from distillbench.teachers import Teacher


@dataclass(frozen=True)
class About:
    """Which cell it is: what its rows are rows of, and the names of its records."""

    label: str
    names: dict[str, Any]  # columns that all its rows share
    rows: list[tuple[int, int]]  # (nfe, sampling seed) of each
    folder: Path
    train_inputs: dict[str, Any]
    evaluation_inputs: dict[str, Any]

    @property
    def evaluation_key(self) -> str:
        return key_of(self.evaluation_inputs)

    def without_scores(self, status: str, reason: str) -> list[dict[str, Any]]:
        """Its rows, where they have nothing but a status."""
        told = {"status": status, "reason": reason}
        return [self.names | told | {"nfe": nfe, "sampling_seed": seed} for nfe, seed in self.rows]


@dataclass(frozen=True)
class Done:
    """A cell's part of a run."""

    about: About
    rows: list[dict[str, Any]]
    along: list[dict[str, Any]] = field(default_factory=list)
    ok: bool = False
    weights: tuple[Path, str] | None = None  # the file of the student, and its name in the run's folder
    weights_sha256: str = ""
    shown: list[tuple[str, Tensor]] = field(default_factory=list)  # lines of the picture: label, (N,C,H,W) uint8


def about(cell: Cell, teacher: Teacher) -> About:
    """Which cell `cell` is, for this teacher."""
    inputs = train_inputs(cell, teacher)
    key = key_of(inputs)
    config = cell.scene.config
    rows = [(nfe, seed) for nfe in cell.nfe for seed in config.evaluation.seeds]
    evaluation = evaluation_inputs(cell, key)
    names = _names(cell, teacher)
    names |= {"reference": "", "device": device_name(cell.scene.device), "key": key_of(evaluation)}
    return About(cell.label, names, rows, cell_folder(cell, key), inputs, evaluation)


def done(finished: Finished, about: About) -> Done:
    """What the tables, the picture and the folder of a run need of `finished`."""
    cell, training, weights = finished.cell, finished.training, None
    if training is not None and training.status == "ok":
        weights = (finished.folder / STUDENT, f"{cell.name}-seed{cell.seed}-{training.key}.safetensors")
    return Done(
        about,
        _table_rows(finished),
        _along_rows(finished),
        not finished.failed,
        weights,
        "" if training is None else training.weights_sha256,
        _lines(finished),
    )


def _names(cell: Cell, teacher: Teacher, training: TrainRecord | None = None) -> dict[str, Any]:
    """What a cell's rows are rows of."""
    config = cell.scene.config
    settings = [f"guidance_range={config.guidance_range}"] if cell.entry is not None and config.guidance_range else []
    settings.append(changed_settings(cell.method_config))
    parts = config.accumulate if training is None else training.accumulate
    if cell.entry is not None and parts > 1:
        settings.append(
            f"accumulate={parts}" + (" (memory ran out in fewer parts)" if parts > config.accumulate else "")
        )
    if cell.entry is not None and (processes := cell.scene.ranks.count) > 1:
        settings.append(f"processes={processes}")
    compute = config.compute if cell.entry is not None else None
    settings += changed(compute, config.evaluation.sampling)
    return {
        "dataset": cell.scene.dataset.name,
        "teacher": teacher.label,
        "guidance": config.guidance if config.conditional else None,
        "method": cell.name,
        "training_seed": cell.seed,
        "images": config.evaluation.images,
        "budget": f"{config.budget.in_words}, batch {config.batch_size}" if cell.entry is not None else "",
        "protocol": protocol_key(cell.scene, teacher),
        "settings": ", ".join(filter(None, settings)),
        "compute": in_words(compute, config.evaluation.sampling),
    }


def _table_rows(finished: Finished) -> list[dict[str, Any]]:
    record, cell = finished.evaluation, finished.cell
    assert cell.scene.teacher is not None
    real = ", ".join(f"{network}: {words}" for network, words in record.references.items())
    names = _names(cell, cell.scene.teacher, finished.training)
    names |= {"reference": real, "device": _device(finished), "key": record.key}
    metrics = list(cell.scene.metrics)
    told = finished.training, finished.speed, metrics
    return [table_row(names, row, *told, _note(cell, row.nfe)) for row in record.rows]


def _note(cell: Cell, nfe: int) -> str:
    """What a reader of a row with `nfe` evaluations must know of the sampler, and of that of the teacher's answers."""
    assert cell.scene.teacher is not None
    schedule, config = cell.scene.teacher.schedule, cell.scene.config.evaluation
    reference, most = config.solvers()[0], max(config.teacher_steps)
    notes = []
    if cell.solver is not None:
        steps = cell.solver.steps(nfe // cell.scene.conditioning.evaluations)
        notes.append(cell.solver.note(schedule, steps) if steps is not None else "")
    compared = reference.note(schedule, most)
    if compared and compared not in notes:
        notes.append(f"compared with the teacher's answers by {compared}")
    return "; ".join(filter(None, notes))


def _device(finished: Finished) -> str:
    """Whose seconds, joules and MiB are in the rows: records that were found may be of another machine."""
    training, speed = finished.training, finished.speed
    sampled = speed.device if speed.rows else ""
    device = finished.evaluation.device if training is None else training.device
    if training is None and sampled:
        return sampled
    return device if sampled in ("", device) else f"{device}; sampling {sampled}"


def _along_rows(finished: Finished) -> list[dict[str, Any]]:
    """The scores along training, the last of them those of the finished student."""
    training, cell = finished.training, finished.cell
    if training is None or not finished.evaluation.along:
        return []
    assert cell.scene.teacher is not None
    costs = {checkpoint.fraction: checkpoint.cost for checkpoint in training.checkpoints}
    if training.cost is not None:
        costs[1.0] = training.cost
    names = _names(cell, cell.scene.teacher, training)
    ends = [CheckpointScores(fraction=1.0, **dict(row)) for row in finished.evaluation.rows]
    rows = []
    for row in [*finished.evaluation.along, *ends]:
        told = {"nfe": row.nfe, "sampling_seed": row.sampling_seed, "fraction": row.fraction}
        told |= {"status": row.status, "reason": row.reason}
        rows.append(names | told | row.scores | cost_columns(costs[row.fraction]))
    return rows


def _lines(finished: Finished) -> list[tuple[str, Tensor]]:
    """Lines of the picture: every row of the first sampling seed that is ok."""
    config = finished.cell.scene.config
    first = config.evaluation.seeds[0]
    good = [row for row in finished.evaluation.rows if row.status == "ok" and row.sampling_seed == first]
    guidance = f", w = {config.guidance:g}" if config.conditional else ""
    labels = [f"{finished.cell.label}{guidance}, {row.nfe} NFE" for row in good]
    return list(zip(labels, finished.shown, strict=True))
