"""Records: JSON files that are written atomically, with a checksum.

results_dir/
  cells/<train key>/train.json, student.safetensors        cost and weights of one training; log.txt, error.txt
  cells/<train key>/checkpoint-*.safetensors               students during training, to be scored
  cells/<train key>/resume/<microbatch>/state-*.safetensors  from which an interrupted training resumes
  cells/<train key>/evaluation-<key>.json, .safetensors    rows of one evaluation, and its first samples
  cells/<train key>/influences-<key>.safetensors           how much each image moves each score of the evaluation
  cells/<train key>/speed-<key>.json                       the sampling cost
  cells/<train key>/levels-<key>.json                      a search for levels of sampling
  cache/                                                   teachers, noise-image pairs, reference statistics, ...
  <run>/table.*, summary.*, along.*, columns.json, samples.png, samples/, config.yaml, command.txt,
    environment.json, weights/, influences/
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from distillbench.storage.files import canonical_json, key_of_text, signed, write_atomically

SCHEMA: Literal[3] = 3
MIGRATED = (2,)  # older versions that can be read; 2 had no checksum
LARGEST_RECORD = 2**28  # bytes
Status = Literal["ok", "failed", "diverged", "oom", "timeout"]
FINAL: tuple[Status, ...] = ("ok", "diverged")  # a second try would not change it


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CurvePoint(_Record):
    """A point of the training curve."""

    images: int
    seconds: float
    loss: float


class ProgressPoint(_Record):
    """A cheap score at `fraction` of the budget, of samples with `nfe` evaluations; None if they were not finite."""

    fraction: float
    images: int
    nfe: int
    fd_8x8: float | None  # Fréchet distance of images averaged to 8x8 pixels
    spread: float | None  # standard deviation of samples over that of the reference, means over pixels


class NetworkRows(_Record):
    """Evaluations (images) of networks of one kind: what `tflops` is computed from.

    `counted`: "teacher", "student", or "distance": LPIPS, whose rows are no evaluations of a budget. `weights` is how
    many numbers are in all weights of the network (its class, with the module), `trained` in those that got a gradient;
    0: these rows were evaluated without a gradient to weights.
    `to_weights` and `to_input` of the `forward` rows had a backward pass, the second to the input only; `along` had a
    derivative along a direction (forward mode). `features`: the submodules, joined by ", ", whose outputs alone had a
    backward pass; "": the network's output had it.
    """

    counted: str
    network: str
    weights: int
    trained: int
    forward: int
    to_weights: int = 0
    to_input: int = 0
    along: int = 0
    features: str = ""


class Cost(_Record):
    """The cost of a training, or of the part up to a checkpoint.

    `seconds` is the sum of `teacher_`, `student_`, `compile_` and `other_seconds`. `*_nfe` count images that a network
    evaluated, `*_backward` those whose evaluation was differentiated. FLOPs are those that torch has formulas for.
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
    student_backward_input: int = 0  # of student_backward: to the input only, through frozen weights
    stand_in_nfe: int = 0  # of teacher_nfe: by networks of another kind than the teacher's
    stand_in_backward: int = 0  # of teacher_backward
    teacher_along: int = 0  # of teacher_nfe: with a derivative along a direction (forward mode)
    student_along: int = 0  # of student_nfe
    networks: list[NetworkRows] = []  # the same evaluations by kind of network; [] in records of earlier versions
    tflops: float | None = None
    joules: float | None = None


class CheckpointRecord(_Record):
    """The student at `fraction` of the budget. It can sample with the numbers of evaluations in `ready`."""

    fraction: float
    file: str
    sha256: str
    ready: list[int]
    cost: Cost


class TrainRecord(_Record):
    """The outcome and the cost of one training. `key` is the hash of `inputs`."""

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
    machine_load: float | None = None  # processor time of other processes over that of all cores; None in older records
    parameters: int | None = None  # of the student in training, with its adapters
    trained_parameters: int | None = None  # of these, in weights that get a gradient; None in older records
    student_inputs: str = ""  # what the student was trained on, such as data or noise; "": an earlier version
    accumulate: int = 1  # parts of a step of the whole batch (gradient accumulation)
    microbatch: int = 0  # most images that a process computed at once; 0: its share of a batch
    processes: int = 1  # ranks, each of which trained on a share of every batch
    weights_sha256: str = ""
    updates: int | None = None  # of all networks together; None in records of earlier versions
    clipped_steps: int | None = None  # updates whose gradients had a norm above grad_clip
    nonfinite_steps: int | None = None  # updates whose gradients were not finite
    curve: list[CurvePoint] = []
    progress: list[ProgressPoint] = []
    progress_reference: str = ""  # what its scores compare with
    note: str = ""  # for the rows: what the method notes, and what was seen along training
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
    """The scores of a student at `fraction` of its training."""

    fraction: float


class EvaluationRecord(_Record):
    """The rows of one evaluation of one training (or of the teacher)."""

    schema_version: Literal[3] = SCHEMA
    key: str
    inputs: dict[str, Any]
    rows: list[RowRecord]
    along: list[CheckpointScores] = []
    references: dict[str, str] = {}  # by feature network: the real images
    weights_sha256: str = ""  # of the student that was evaluated; empty for the teacher
    device: str
    environment: dict[str, Any]

    @property
    def status(self) -> Status:
        return next((row.status for row in [*self.rows, *self.along] if row.status not in FINAL), "ok")


class SpeedRow(_Record):
    """The cost of sampling with `nfe` evaluations; `missing` has the reasons for values that are None."""

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
    machine_load: float | None = None  # of all rows together; None in older records
    parameters: int | None = None
    flops_not_counted: list[str] = []
    missing: dict[str, str] = {}
    notes: dict[str, str] = {}


class SpeedRecord(_Record):
    """The sampling cost of one student (or of the teacher)."""

    schema_version: Literal[3] = SCHEMA
    key: str
    inputs: dict[str, Any]
    status: Status = "ok"
    reason: str = ""
    rows: list[SpeedRow] = []
    weights_sha256: str = ""
    device: str
    environment: dict[str, Any]


class TriedLevels(_Record):
    """The score of a student at `levels`, at which its steps after the first begin; None: not finite."""

    levels: list[float]
    score: float | None
    evaluations: int  # of networks, also the teacher's if the metric compares with its samples
    seconds: float  # of sampling and scoring, with what the first candidate prepares for all

    @property
    def nfe(self) -> int:
        """Network evaluations of an image."""
        return len(self.levels) + 1


class LevelsRecord(_Record):
    """A search for levels of sampling. Its samples are no others' and its scores are in no table."""

    schema_version: Literal[3] = SCHEMA
    key: str
    inputs: dict[str, Any]
    tried: list[TriedLevels] = []
    device: str
    environment: dict[str, Any]


AnyRecord = TypeVar("AnyRecord", TrainRecord, EvaluationRecord, SpeedRecord, LevelsRecord)


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record atomically, with its checksum."""
    text = json.dumps(signed(json.loads(record.model_dump_json())), indent=1)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def load_record(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """The record at `path`. Raises FileNotFoundError; ValueError if it is damaged or of another version."""
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

    Raises ValueError if it is damaged, of another version, or has other inputs.
    """
    try:
        record = load_record(path, kind)
    except FileNotFoundError:
        return None
    text = canonical_json(inputs)
    if record.inputs != inputs and canonical_json(record.inputs) != text:
        raise ValueError(f"the record {path.name} has other inputs")
    if record.key != key_of_text(text):
        raise ValueError(f"the record {path.name} is damaged: its key is not that of its inputs")
    return record
