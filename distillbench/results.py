"""Records and tables. A record is one JSON file, whole or absent; a table is what pandas makes of records.

results_dir/
  cells/<train key>/train.json, student.safetensors        price and weights of one training; log.txt, error.txt
  cells/<train key>/checkpoint-*.safetensors               students on the way, to be scored
  cells/<train key>/resume/<parts>/state-*.safetensors     states of a training in progress
  cells/<train key>/evaluation-<key>.json, .safetensors    rows of one evaluation, and its first samples
  cells/<train key>/speed-<key>.json                       the cost of sampling
  cache/                                                   teachers, noise-image pairs, reference statistics, by content
  <run>/table.*, summary.*, along.*, columns.json, samples.png, config.yaml, environment.json, weights/
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, ConfigDict

from distillbench.files import canonical_json, key_of_text, signed, write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

SCHEMA: Literal[3] = 3
MIGRATED = (2,)  # older schemas that are read: 2 had no checksum
LARGEST_RECORD = 2**28  # bytes
MOST_LINES = 200  # of a picture of samples
Status = Literal["ok", "failed", "diverged", "oom", "timeout"]
FINAL: tuple[Status, ...] = ("ok", "diverged")  # what to try again would not change


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CurvePoint(_Record):
    """A point of the training curve."""

    images: int
    seconds: float
    loss: float


class Cost(_Record):
    """What training has cost: all of it, or up to a checkpoint. `teacher_`, `student_`, `compile_` and `other_` seconds
    are all.

    `backward` counts images whose evaluation was differentiated. FLOPs are those that torch has formulas for.
    """

    images: int
    seconds: float
    teacher_seconds: float
    student_seconds: float
    compile_seconds: float | None = 0.0
    other_seconds: float
    teacher_nfe: int
    student_nfe: int
    teacher_backward: int
    student_backward: int
    student_backward_input: int = 0  # of student_backward: to the input alone, through weights that are held
    stand_in_nfe: int = 0  # of teacher_nfe: by networks of another kind than the teacher's
    stand_in_backward: int = 0  # of teacher_backward
    tflops: float | None = None
    joules: float | None = None


class CheckpointRecord(_Record):
    """A student as it was at `fraction` of the budget; it could sample with the numbers of evaluations in `ready`."""

    fraction: float
    file: str
    sha256: str
    ready: list[int]
    cost: Cost


class TrainRecord(_Record):
    """What one training cost. `inputs` is what `key` is the hash of."""

    schema_version: Literal[3] = SCHEMA
    key: str
    inputs: dict[str, Any]
    status: Status
    reason: str = ""
    cost: Cost | None = None
    peak_gpu_mib: float | None = None
    peak_gpu_reserved_mib: float | None = None
    peak_device_mib: float | None = None
    peak_rss_mib: float | None = None
    parameters: int | None = None
    accumulate: int = 1  # parts in which each step was computed
    processes: int = 1  # that trained together, each on a share of every batch
    weights_sha256: str = ""
    curve: list[CurvePoint] = []
    checkpoints: list[CheckpointRecord] = []
    flops_not_counted: list[str] = []
    missing: dict[str, str] = {}
    device: str
    environment: dict[str, Any]


class RowRecord(_Record):
    """The scores at one number of evaluations, on the noise of one sampling seed."""

    nfe: int
    sampling_seed: int
    status: Status = "ok"
    reason: str = ""
    scores: dict[str, float | None] = {}
    missing: dict[str, str] = {}


class CheckpointScores(RowRecord):
    """The scores of a student as it was at `fraction` of its training."""

    fraction: float


class EvaluationRecord(_Record):
    """The rows of one evaluation of one training (or of the teacher)."""

    schema_version: Literal[3] = SCHEMA
    key: str
    inputs: dict[str, Any]
    rows: list[RowRecord]
    along: list[CheckpointScores] = []
    references: dict[str, str] = {}  # by network: which real images
    weights_sha256: str = ""  # of the student that was evaluated; empty for the teacher
    device: str
    environment: dict[str, Any]

    @property
    def status(self) -> Status:
        return next((row.status for row in [*self.rows, *self.along] if row.status not in FINAL), "ok")


class SpeedRow(_Record):
    """What sampling with `nfe` evaluations costs; a value that is None has its reason in `missing`."""

    nfe: int
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    images_per_second: float | None = None
    best_batch: int | None = None
    gflops: float | None = None
    decoder_latency_ms: float | None = None
    text_encoder_latency_ms: float | None = None
    peak_gpu_mib: float | None = None
    peak_gpu_reserved_mib: float | None = None
    peak_device_mib: float | None = None
    peak_rss_mib: float | None = None
    parameters: int | None = None
    flops_not_counted: list[str] = []
    missing: dict[str, str] = {}
    notes: dict[str, str] = {}


class SpeedRecord(_Record):
    """The cost of sampling from one training (or from the teacher), measured apart."""

    schema_version: Literal[3] = SCHEMA
    key: str
    inputs: dict[str, Any]
    status: Status = "ok"
    reason: str = ""
    rows: list[SpeedRow] = []
    weights_sha256: str = ""
    device: str
    environment: dict[str, Any]


T = TypeVar("T")
AnyRecord = TypeVar("AnyRecord", TrainRecord, EvaluationRecord, SpeedRecord)


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record atomically, with its checksum."""
    text = json.dumps(signed(json.loads(record.model_dump_json())), indent=1)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def load_record(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """The record at `path`. Raises FileNotFoundError, or ValueError where it is damaged or of another version."""
    try:
        if path.stat().st_size > LARGEST_RECORD:
            raise ValueError("too large")
        plain = json.loads(path.read_bytes())
        version = plain.get("schema_version") if isinstance(plain, dict) else SCHEMA
        if version in MIGRATED:
            plain = signed(plain | {"schema_version": SCHEMA})
        elif version != SCHEMA and isinstance(version, int):
            known = ", ".join(map(str, (*MIGRATED, SCHEMA)))
            raise OtherVersion(f"the record {path.name} is of version {version}, this distillbench reads {known}")
        if plain != signed(plain):
            raise ValueError("its checksum is wrong")
        del plain["sha256"]
        return kind.model_validate(plain)
    except (FileNotFoundError, OtherVersion):
        raise
    except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f"the record {path.name} is damaged") from error


class OtherVersion(ValueError):
    """A record was written by another version of distillbench, which this one cannot read."""


def read_record(path: Path, kind: type[AnyRecord], inputs: dict[str, Any]) -> AnyRecord | None:
    """The record at `path`, or None if there is none.

    Raises ValueError, in words, if it is damaged, of another version, or belongs to other inputs.
    """
    try:
        record = load_record(path, kind)
    except FileNotFoundError:
        return None
    text = canonical_json(inputs)
    if record.inputs != inputs and canonical_json(record.inputs) != text:
        raise ValueError(f"the record {path.name} belongs to other inputs")
    if record.key != key_of_text(text):
        raise ValueError(f"the record {path.name} is damaged: its key is not that of its inputs")
    return record


FIRST: dict[str, str] = {  # column: pandas type
    "dataset": "string",
    "teacher": "string",
    "guidance": "Float64",
    "method": "string",
    "training_seed": "Int64",
    "sampling_seed": "Int64",
    "nfe": "Int64",
    "images": "Int64",
    "budget": "string",
    "protocol": "string",
    "status": "string",
    "reason": "string",
    "note": "string",
}
LATER = ("note",)  # columns that tables of older versions lack, and mean by that that they are empty
COST: dict[str, str] = {
    "train_images": "Int64",
    "train_seconds": "Float64",
    "train_teacher_seconds": "Float64",
    "train_student_seconds": "Float64",
    "train_compile_seconds": "Float64",
    "train_other_seconds": "Float64",
    "train_teacher_nfe": "Int64",
    "train_student_nfe": "Int64",
    "train_tflops": "Float64",
    "train_joules": "Float64",
}
LAST: dict[str, str] = {
    **COST,
    "train_peak_gpu_mib": "Float64",
    "train_peak_gpu_reserved_mib": "Float64",
    "train_peak_device_mib": "Float64",
    "train_peak_rss_mib": "Float64",
    "sample_latency_p50_ms": "Float64",
    "sample_latency_p95_ms": "Float64",
    "sample_images_per_second": "Float64",
    "sample_best_batch": "Int64",
    "sample_gflops": "Float64",
    "sample_decoder_latency_ms": "Float64",
    "sample_text_encoder_latency_ms": "Float64",
    "sample_peak_gpu_mib": "Float64",
    "sample_peak_gpu_reserved_mib": "Float64",
    "sample_peak_device_mib": "Float64",
    "sample_peak_rss_mib": "Float64",
    "parameters": "Int64",
    "settings": "string",
    "compute": "string",
    "reference": "string",
    "device": "string",
    "key": "string",
}


def table_row(
    names: dict[str, Any], row: RowRecord, training: TrainRecord | None, speed: SpeedRecord, metrics: Sequence[str],
    note: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One row of the table. `names`: what it is a row of. No training: the teacher itself."""
    missing = dict(row.missing)
    if training is None:
        missing["train_*"] = "the teacher is the baseline, nothing is distilled"
    else:
        missing |= {f"train_{name}": why for name, why in training.missing.items()}
    timed = next((found for found in speed.rows if found.nfe == row.nfe), SpeedRow(nfe=row.nfe))
    missing |= {f"sample_{name}": why for name, why in timed.missing.items()}
    if speed.reason:
        missing["sample_*"] = speed.reason
    reasons = [row.reason] if row.reason else []
    for why in dict.fromkeys(missing.values()):
        reasons.append(f"{', '.join(c for c in missing if missing[c] == why)} empty: {why}")
    measured = {f"sample_{name}": value for name, value in timed if f"sample_{name}" in LAST}
    return {
        **names,
        "sampling_seed": row.sampling_seed,
        "nfe": row.nfe,
        "status": row.status,
        "reason": "; ".join(reasons),
        "note": note,
        **{metric: row.scores.get(metric) for metric in metrics},
        **(_train_columns(training) if training is not None else {}),
        **measured,
        "parameters": timed.parameters,
    }


def _train_columns(training: TrainRecord) -> dict[str, Any]:
    peaks = {f"train_{name}": value for name, value in training if f"train_{name}" in LAST}
    return peaks | (cost_columns(training.cost) if training.cost is not None else {})


def cost_columns(cost: Cost) -> dict[str, Any]:
    """What training cost, by column."""
    return {f"train_{name}": value for name, value in cost if f"train_{name}" in COST}


def make_table(rows: list[dict[str, Any]], metrics: Sequence[str]) -> pd.DataFrame:
    """The table, one row for each of `rows`: the same columns and types whatever happened."""
    return _typed(rows, FIRST | dict.fromkeys(metrics, "Float64") | LAST)


def make_along(rows: list[dict[str, Any]], metrics: Sequence[str]) -> pd.DataFrame:
    """The table of scores along training: `fraction` of the budget, what it had cost by then, and the scores."""
    return _typed(
        rows,
        FIRST
        | {"fraction": "Float64"}
        | COST
        | dict.fromkeys(metrics, "Float64")
        | {"settings": "string", "compute": "string"},
    )


def _typed(rows: list[dict[str, Any]], types: dict[str, str]) -> pd.DataFrame:
    import pandas as pd  # not above: the registry needs the columns' names, and listing plugins needs no tables

    usual = dict.fromkeys(LATER, "")
    given = {name: [row.get(name, usual.get(name)) for row in rows] for name in types}
    columns = {name: pd.array(values, dtype=types[name]) for name, values in given.items()}  # type: ignore[call-overload]
    return pd.DataFrame(columns)


def write_table(table: pd.DataFrame, folder: Path, name: str = "table") -> None:
    """<name>.csv and <name>.parquet."""
    write_atomically(folder / f"{name}.csv", lambda path: table.to_csv(path, index=False))
    write_atomically(
        folder / f"{name}.parquet", lambda path: table.to_parquet(path, index=False, write_page_checksum=True)
    )


def sample_grid(rows: list[tuple[str, Tensor]], columns: int = 16, cell: int = 48) -> Image.Image:
    """A picture: a line for each of the first (label, images (N,C,H,W) uint8), the same noise in each column."""
    if not rows:
        return Image.new("RGB", (cell, cell), "white")
    font = ImageFont.load_default(size=15)
    more, rows = max(0, len(rows) - MOST_LINES), rows[:MOST_LINES]
    label = max(int(font.getlength(text)) for text, _ in rows) + 20
    count = min(columns, min(len(images) for _, images in rows))
    side = max(cell, rows[0][1].shape[-1])
    height = (len(rows) + (more > 0)) * (side + 4) + 4
    picture = Image.new("RGB", (label + count * (side + 4), height), "white")
    draw = ImageDraw.Draw(picture)
    if more:
        draw.text((10, height - side / 2), f"and {more:,} more", fill="black", font=font, anchor="lm")
    for j, (text, images) in enumerate(rows):
        top = 4 + j * (side + 4)
        draw.text((10, top + side / 2), text, fill="black", font=font, anchor="lm")
        for k in range(count):
            image = Image.fromarray(_rgb(images[k]).permute(1, 2, 0).contiguous().numpy().astype("uint8"))
            image = image.resize((side, side), Image.Resampling.NEAREST)
            picture.paste(image, (label + k * (side + 4), top))
    return picture


def _rgb(image: Tensor) -> Tensor:
    """(C,H,W) to (3,H,W): grey is repeated, two channels are red and green, of more the first three are shown."""
    if len(image) == 1:
        return image.expand(3, -1, -1)
    import torch  # not above: reports read records and need no torch, which takes seconds to import

    return torch.cat([image, torch.zeros_like(image[:1])])[:3]


def stack_shown(shown: list[Tensor]) -> dict[str, Tensor]:
    """Samples of an evaluation's rows as named tensors, ready for safetensors."""
    return {str(index): images.contiguous() for index, images in enumerate(shown)}


def unstack_shown(tensors: dict[str, T]) -> list[T]:
    """The inverse of :func:`stack_shown`, of tensors or of arrays."""
    return [tensors[str(index)] for index in range(len(tensors))]
