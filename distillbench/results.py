"""Records and tables. A record is one JSON file, whole or absent; a table is what pandas makes of records.

results_dir/
  cells/<train key>/train.json, student.safetensors        price and weights of one training
  cells/<train key>/evaluation-<key>.json, .safetensors    rows of one evaluation, and its first samples
  cache/                                                   teachers and noise-image pairs, by content
  <run>/table.csv, table.parquet, samples.png, config.yaml, environment.json, weights/
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from distillbench.files import key_of, write_atomically

if TYPE_CHECKING:
    import pandas as pd

SCHEMA: Literal[1] = 1
Status = Literal["ok", "failed", "diverged"]
FINAL: tuple[Status, ...] = ("ok", "diverged")  # a failed cell is tried again by the next run


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CurvePoint(_Record):
    """A point of the training curve."""

    images: int
    seconds: float
    loss: float


class TrainRecord(_Record):
    """What one training cost. `inputs` is what `key` is the hash of."""

    schema_version: Literal[1] = SCHEMA
    key: str
    inputs: dict[str, Any]
    status: Status
    reason: str = ""
    images: int | None = None
    seconds: float | None = None
    teacher_nfe: int | None = None
    student_nfe: int | None = None
    peak_gpu_mib: float | None = None
    peak_rss_mib: float | None = None
    parameters: int | None = None
    weights_sha256: str = ""
    curve: list[CurvePoint] = []
    missing: dict[str, str] = {}
    device: str
    environment: dict[str, Any]


class RowRecord(_Record):
    """One row of an evaluation."""

    nfe: int
    status: Status = "ok"
    reason: str = ""
    scores: dict[str, float | None] = {}
    sample_latency_ms: float | None = None
    sample_images_per_second: float | None = None
    sample_peak_gpu_mib: float | None = None
    missing: dict[str, str] = {}


class EvaluationRecord(_Record):
    """The rows of one evaluation of one training (or of the teacher)."""

    schema_version: Literal[1] = SCHEMA
    key: str
    inputs: dict[str, Any]
    rows: list[RowRecord]
    weights_sha256: str = ""  # of the student that was evaluated; empty for the teacher
    device: str
    environment: dict[str, Any]

    @property
    def status(self) -> Status:
        return next((row.status for row in self.rows if row.status not in FINAL), "ok")


AnyRecord = TypeVar("AnyRecord", TrainRecord, EvaluationRecord)


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record atomically."""
    text = record.model_dump_json(indent=1)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text))


def read_record(path: Path, kind: type[AnyRecord], inputs: dict[str, Any]) -> AnyRecord | None:
    """The record at `path`, or None if there is none. Raises ValueError if it is damaged or belongs to other inputs."""
    try:
        record = kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValidationError, OSError) as error:
        raise ValueError(f"the record {path.name} is damaged") from error
    if record.inputs != json.loads(json.dumps(inputs)):
        raise ValueError(f"the record {path.name} belongs to other inputs")
    if record.key != key_of(inputs):
        raise ValueError(f"the record {path.name} is damaged: its key is not that of its inputs")
    return record


FIRST = ["dataset", "teacher", "guidance", "method", "seed", "nfe", "status", "reason"]
LAST: dict[str, str] = {  # column: pandas type
    "train_seconds": "Float64",
    "train_images": "Int64",
    "train_teacher_nfe": "Int64",
    "train_student_nfe": "Int64",
    "train_peak_gpu_mib": "Float64",
    "train_peak_rss_mib": "Float64",
    "sample_latency_ms": "Float64",
    "sample_images_per_second": "Float64",
    "sample_peak_gpu_mib": "Float64",
    "parameters": "Int64",
    "settings": "string",
    "device": "string",
    "key": "string",
}


def table_row(
    names: dict[str, Any], row: RowRecord, training: TrainRecord | None, key: str, device: str, metrics: Sequence[str],
    parameters: int | None,
) -> dict[str, Any]:  # fmt: skip
    """One row of the table. `names`: what it is a row of. No training: the teacher itself."""
    missing = dict(row.missing)
    cost: dict[str, Any] = dict.fromkeys(c for c in LAST if c.startswith("train_"))
    if training is None:
        missing["train_*"] = "the teacher is the baseline, nothing is distilled"
    else:
        cost = {column: getattr(training, column.removeprefix("train_")) for column in cost}
        missing |= {f"train_{name}": why for name, why in training.missing.items()}
    reasons = [row.reason] if row.reason else []
    for why in dict.fromkeys(missing.values()):
        reasons.append(f"{', '.join(c for c in missing if missing[c] == why)} empty: {why}")
    return {
        **names,
        "nfe": row.nfe,
        "status": row.status,
        "reason": "; ".join(reasons),
        **{metric: row.scores.get(metric) for metric in metrics},
        **cost,
        "sample_latency_ms": row.sample_latency_ms,
        "sample_images_per_second": row.sample_images_per_second,
        "sample_peak_gpu_mib": row.sample_peak_gpu_mib,
        "parameters": parameters,
        "device": device,
        "key": key,
    }


def make_table(rows: list[dict[str, Any]], metrics: Sequence[str]) -> pd.DataFrame:
    """The table, one row for each of `rows`: the same columns and types whatever happened."""
    import pandas as pd  # not above: the registry needs the columns' names, and listing plugins needs no tables

    types = dict.fromkeys(FIRST, "string") | {"guidance": "Float64", "seed": "Int64", "nfe": "Int64"}
    types |= dict.fromkeys(metrics, "Float64") | LAST
    return pd.DataFrame(rows, columns=list(types)).astype(types)


def write_table(table: pd.DataFrame, folder: Path) -> None:
    """table.csv and table.parquet."""
    write_atomically(folder / "table.csv", lambda path: table.to_csv(path, index=False))
    write_atomically(folder / "table.parquet", lambda path: table.to_parquet(path, index=False))


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link where the file system has them, otherwise a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sample_grid(rows: list[tuple[str, Tensor]], columns: int = 16, cell: int = 48) -> Image.Image:
    """A picture: one line for each (label, images (N,C,H,W) uint8), the same noise in each column."""
    if not rows:
        return Image.new("RGB", (cell, cell), "white")
    font = ImageFont.load_default(size=15)
    label = max(int(font.getlength(text)) for text, _ in rows) + 20
    count = min(columns, min(len(images) for _, images in rows))
    side = max(cell, rows[0][1].shape[-1])
    picture = Image.new("RGB", (label + count * (side + 4), len(rows) * (side + 4) + 4), "white")
    draw = ImageDraw.Draw(picture)
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
    return torch.cat([image, torch.zeros_like(image[:1])])[:3]


def stack_shown(shown: list[Tensor]) -> dict[str, Tensor]:
    """Samples of an evaluation's rows as named tensors, ready for safetensors."""
    return {str(index): images.contiguous() for index, images in enumerate(shown)}


def unstack_shown(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The inverse of :func:`stack_shown`."""
    return [tensors[str(index)].to(torch.uint8) for index in range(len(tensors))]
