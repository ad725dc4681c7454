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
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from distillbench.files import canonical_json, key_of_text, signed, sync, write_atomically

if TYPE_CHECKING:
    pass

SCHEMA: Literal[3] = 3
MIGRATED = (2,)  # older schemas that are read: 2 had no checksum
LARGEST_RECORD = 2**28  # bytes
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


def link_all(links: Mapping[Path, Path]) -> None:
    """:func:`link_or_copy` each source to its target, the key. In one folder, which is read once."""
    there: dict[Path, dict[str, int]] = {}
    for target, source in links.items():
        folder = target.parent
        if folder not in there:
            there[folder] = {entry.name: entry.inode() for entry in os.scandir(folder)} if folder.is_dir() else {}
        if target.name not in there[folder] and _linked(source, target):
            continue
        if there[folder].get(target.name) != source.stat().st_ino:
            link_or_copy(source, target)
    for folder in there:
        sync(folder)


def _linked(source: Path, target: Path) -> bool:
    """Whether a hard link could be made, where there is nothing yet: it is whole at once."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    except OSError:
        return False
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link where the file system has them, otherwise a copy."""
    if target.exists() and target.samefile(source):
        return

    def write(path: str) -> None:
        Path(path).unlink()
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)

    write_atomically(target, write)
