"""Tables of results: columns, pandas types, CSV and Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench.records.records import Cost, RowRecord, SpeedRecord, SpeedRow, TrainRecord
from distillbench.storage.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

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
LOADS = ("machine_load_training", "machine_load_sampling")  # by other processes, while costs were measured
UPDATES = ("clipped_steps", "nonfinite_steps")  # of a training, but no costs
STUDENT = ("trained_parameters", "student_lora_rank", "student_architecture")
TUNING: dict[str, str] = {
    "tuning": "string",
    "tuning_trials": "Int64",
    "tuning_images": "Int64",
    "tuning_seconds": "Float64",
    "tuning_joules": "Float64",
    "tuning_sampling_nfe": "Int64",
}
# Columns that tables of older versions lack; they are empty there.
LATER = ("note", "inputs", *UPDATES, *STUDENT, *LOADS, *TUNING)
COST: dict[str, str] = {  # what is counted first: it is the same on any machine
    "train_images": "Int64",
    "train_teacher_nfe": "Int64",
    "train_student_nfe": "Int64",
    "train_tflops": "Float64",
    "train_seconds": "Float64",
    "train_teacher_seconds": "Float64",
    "train_student_seconds": "Float64",
    "train_compile_seconds": "Float64",
    "train_other_seconds": "Float64",
    "train_joules": "Float64",
}
LAST: dict[str, str] = {
    **COST,
    "train_peak_gpu_mib": "Float64",
    "train_peak_gpu_reserved_mib": "Float64",
    "train_peak_device_mib": "Float64",
    "train_peak_rss_mib": "Float64",
    **dict.fromkeys(UPDATES, "Int64"),
    **dict.fromkeys(LOADS, "Float64"),
    "sample_gflops": "Float64",
    "sample_latency_p50_ms": "Float64",
    "sample_latency_p95_ms": "Float64",
    "sample_images_per_second": "Float64",
    "sample_best_batch": "Int64",
    "sample_decoder_latency_ms": "Float64",
    "sample_text_encoder_latency_ms": "Float64",
    "sample_peak_gpu_mib": "Float64",
    "sample_peak_gpu_reserved_mib": "Float64",
    "sample_peak_device_mib": "Float64",
    "sample_peak_rss_mib": "Float64",
    "parameters": "Int64",
    "trained_parameters": "Int64",
    "student_lora_rank": "Int64",
    "student_architecture": "string",
    "inputs": "string",
    "settings": "string",
    **TUNING,
    "compute": "string",
    "reference": "string",
    "device": "string",
    "key": "string",
}


def table_row(
    columns: dict[str, Any], row: RowRecord, training: TrainRecord | None, speed: SpeedRecord, metrics: Sequence[str],
    note: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One row of the table. `columns`: those that all rows of the cell share. `training`: None for the teacher."""
    missing = dict(row.missing)
    if training is None:
        missing |= dict.fromkeys(("train_*", *UPDATES, LOADS[0]), "the teacher is the baseline, nothing is distilled")
    else:
        if training.status == "ok" and training.updates is None:
            missing |= dict.fromkeys(UPDATES, "not all of the training was done by a version that counts them")
        if training.status == "ok" and training.machine_load is None:
            missing[LOADS[0]] = "not recorded by the version that trained"
        names = {name: name for name in UPDATES} | {"machine_load": LOADS[0]}
        missing |= {names.get(name, f"train_{name}"): why for name, why in training.missing.items()}
    timed = next((found for found in speed.rows if found.nfe == row.nfe), SpeedRow(nfe=row.nfe))
    missing |= {f"sample_{name}": why for name, why in timed.missing.items()}
    if speed.reason:
        missing |= dict.fromkeys(("sample_*", LOADS[1]), speed.reason)
    elif speed.rows and timed.machine_load is None:
        missing[LOADS[1]] = "not recorded by the version that measured"
    reasons = [row.reason] if row.reason else []
    for why in dict.fromkeys(missing.values()):
        reasons.append(f"{', '.join(c for c in missing if missing[c] == why)} empty: {why}")
    measured = {f"sample_{name}": value for name, value in timed if f"sample_{name}" in LAST}
    return {
        **columns,
        "sampling_seed": row.sampling_seed,
        "nfe": row.nfe,
        "status": row.status,
        "reason": "; ".join(reasons),
        "note": note,
        **{metric: row.scores.get(metric) for metric in metrics},
        **(_train_columns(training) if training is not None else {}),
        **measured,
        LOADS[0]: None if training is None else training.machine_load,
        LOADS[1]: timed.machine_load,
        "parameters": timed.parameters,
        "trained_parameters": None if training is None else training.trained_parameters,
        "inputs": "" if training is None else training.student_inputs,
    }


def _train_columns(training: TrainRecord) -> dict[str, Any]:
    peaks = {f"train_{name}": value for name, value in training if f"train_{name}" in LAST}
    peaks |= {name: getattr(training, name) for name in UPDATES}
    return peaks | (cost_columns(training.cost) if training.cost is not None else {})


def cost_columns(cost: Cost) -> dict[str, Any]:
    """The columns of the training cost."""
    return {f"train_{name}": value for name, value in cost if f"train_{name}" in COST}


def make_table(rows: list[dict[str, Any]], metrics: Sequence[str]) -> pd.DataFrame:
    """The table with one row for each of `rows`. Columns and types do not depend on the rows."""
    return _typed(rows, FIRST | dict.fromkeys(metrics, "Float64") | LAST)


def make_along(rows: list[dict[str, Any]], metrics: Sequence[str]) -> pd.DataFrame:
    """The table of scores at checkpoints: `fraction` of the budget, the cost up to there, and the scores."""
    return _typed(
        rows,
        FIRST
        | {"fraction": "Float64"}
        | COST
        | dict.fromkeys(metrics, "Float64")
        | {"settings": "string", "compute": "string"},
    )


def _typed(rows: list[dict[str, Any]], types: dict[str, str]) -> pd.DataFrame:
    import pandas as pd  # imported here: the registry needs only the column names

    usual = {name: "" for name in LATER if types.get(name) == "string"}
    given = {name: [row.get(name, usual.get(name)) for row in rows] for name in types}
    columns = {name: pd.array(values, dtype=types[name]) for name, values in given.items()}  # type: ignore[call-overload]
    return pd.DataFrame(columns)


def write_table(table: pd.DataFrame, folder: Path, name: str = "table") -> None:
    """<name>.csv and <name>.parquet."""
    write_atomically(folder / f"{name}.csv", lambda path: table.to_csv(path, index=False))
    write_atomically(
        folder / f"{name}.parquet", lambda path: table.to_parquet(path, index=False, write_page_checksum=True)
    )
