"""Texts of a report: names of columns, numbers with as many digits as are significant, leaders, why cells are empty."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from distillbench.errors import counted
from distillbench.records.statistics import TEACHER, leaders, verdict

ABOUT = {  # columns other than scores: heading (with its unit), explanation
    "run": ("run", "the run's folder"),
    "dataset": ("dataset", "the images"),
    "teacher": ("teacher", "the teacher's name and the first digits of its hash"),
    "guidance": ("guidance", "weight of the teacher's classifier-free guidance; 1 is without guidance"),
    "method": ("method", "the student's method; teacher:SAMPLER is the teacher itself"),
    "settings": ("settings", "the method's settings that differ from its defaults"),
    "inputs": ("trained on", "what the student was trained on: data, noise, rollout or pairs"),
    "training_seed": ("training seed", "seed of the student's training"),
    "sampling_seed": ("sampling seed", "seed of the noise that was sampled from"),
    "training_seeds": ("training seeds", "number of students that were trained"),
    "sampling_seeds": ("sampling seeds", "number of noise seeds that each student was sampled with"),
    "nfe": ("NFE", "network evaluations per image"),
    "images": ("images", "number of samples that were scored"),
    "status": ("status", "whether all seeds have scores"),
    "reason": ("reason", "why a row is not ok; why a value is empty"),
    "note": ("note", "remark on a row that is ok, such as an unstable sampler"),
    "compute": ("computed in", "precision and other compute settings of training and of sampling"),
    "device": ("device", "kind and model of the processor"),
    "key": ("record", "key of the row's record in cells/"),
    "sample_latency_p50_ms": ("latency p50, ms", "median time to sample one image"),
    "sample_latency_p95_ms": ("latency p95, ms", "95th percentile of the time to sample one image"),
    "sample_images_per_second": ("images/s", "highest throughput over batch sizes"),
    "sample_best_batch": ("best batch", "batch size with the highest throughput"),
    "sample_gflops": ("GFLOPs per image", "floating-point operations to sample one image"),
    "sample_decoder_latency_ms": (
        "decoder, ms",
        "time of the teacher's latent decoder for one image; not part of the latency",
    ),
    "sample_text_encoder_latency_ms": ("text encoder, ms", "time of the text encoder; not part of the latency"),
    "sample_peak_gpu_mib": ("sampling: GPU peak, MiB", "peak memory of tensors while sampling"),
    "sample_peak_gpu_reserved_mib": ("sampling: GPU reserved, MiB", "peak memory of torch's allocator while sampling"),
    "sample_peak_device_mib": (
        "sampling: device peak, MiB",
        "peak memory in use on the device, minus that before sampling",
    ),
    "sample_peak_rss_mib": ("sampling: resident peak, MiB", "peak resident memory of the sampling process"),
    "train_images": ("training images", "images consumed by training steps"),
    "train_seconds": ("training, s", "wall-clock time of training, without evaluation and writing files"),
    "train_teacher_seconds": ("training: teacher, s", "part of it: forward passes of the teacher"),
    "train_student_seconds": ("training: student, s", "part of it: the student's passes and optimizer steps"),
    "train_compile_seconds": ("training: compiler, s", "part of it: torch's compiler"),
    "train_other_seconds": ("training: rest, s", "part of it: data, noise, targets, averaging"),
    "train_teacher_nfe": ("teacher evaluations", "images that the teacher evaluated in training"),
    "train_student_nfe": ("student evaluations", "images that the student evaluated in training"),
    "train_tflops": ("training, TFLOPs", "floating-point operations of the networks, forward and backward"),
    "train_joules": ("training, J", "energy of the whole GPU"),
    "train_peak_gpu_mib": ("training: GPU peak, MiB", "peak memory of tensors while training"),
    "train_peak_gpu_reserved_mib": ("training: GPU reserved, MiB", "peak memory of torch's allocator while training"),
    "train_peak_device_mib": ("training: device peak, MiB", "peak memory in use on the device by all processes"),
    "train_peak_rss_mib": ("training: resident peak, MiB", "peak resident memory of the training process"),
    "machine_load_training": (
        "load while training",
        "processor time of other processes while training, as a fraction of all cores",
    ),
    "machine_load_sampling": (
        "load while timing",
        "processor time of other processes while sampling was timed, as a fraction of all cores",
    ),
    "tuning": (
        "tuning",
        "how the method's settings were found: equal_trials, self_tuned or defaults (no search)",
    ),
    "tuning_trials": ("trials", "trials of the search for the method's settings, those that failed included"),
    "tuning_images": ("search, images", "images that all these trials trained on"),
    "tuning_seconds": ("search, s", "training time of all these trials"),
    "tuning_joules": ("search, J", "energy of all these trials"),
    "fraction": ("fraction of the budget", "progress of training"),
}


def heading(column: str) -> str:
    return ABOUT[column][0] if column in ABOUT else column


def is_known(value: object) -> bool:
    """Whether a cell of a frame is not empty."""
    return value is not None and not pd.isna(value) and value != ""  # type: ignore[call-overload]


def number(value: object, low: object = None, high: object = None) -> str:
    """A number, rounded to two digits of its interval's half-width; without an interval to four digits.

    Whole numbers without an interval, such as counts, are written in full. "" for an empty value.
    """
    if not is_known(value):
        return ""
    x = float(value)  # type: ignore[arg-type]
    if not math.isfinite(x):
        return "∞" if x > 0 else "−∞"
    width = float(high) - float(low) if is_known(low) and is_known(high) else 0.0  # type: ignore[arg-type]
    if math.isfinite(width) and width > 0:
        decimals = 1 - _exponent(width / 2)
    elif x == int(x) and abs(x) < 1e15:
        decimals = 0
    else:
        decimals = 3 - _exponent(x)
    decimals = min(decimals, 3 - _exponent(x) + 4) if x else min(decimals, 6)
    if x and (abs(x) < 1e-4 or abs(x) >= 1e15):
        return f"{x:.{max(0, min(decimals + _exponent(x), 8))}e}".replace("-", "−")
    return f"{round(x, decimals):,.{max(decimals, 0)}f}".replace("-", "−")


def _exponent(x: float) -> int:
    return math.floor(math.log10(abs(x))) if x else 0


def interval(low: object, high: object) -> str:
    """Both ends, rounded as :func:`number` rounds; "" without an interval."""
    if not (is_known(low) and is_known(high)):
        return ""
    return f"{number(low, low, high)} to {number(high, low, high)}"


def listed(names: Iterable[object], most: int = 12) -> str:
    """Names as "a, b and c"; beyond `most` of them their number."""
    texts = [str(name) for name in names]
    if len(texts) > most:
        texts = [*texts[:most], f"{len(texts) - most:,} more"]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1] if texts else "none"


@functools.lru_cache(maxsize=100_000)
def why_empty(column: str, reason: object) -> str:
    """Why `column` is empty, from a row's reasons: parts `name, name empty: why`, separated by semicolons."""
    if not is_known(reason):
        return ""
    for part in str(reason).split("; "):
        names, separator, why = part.partition(" empty: ")
        if separator and any(column == n or (n.endswith("*") and column.startswith(n[:-1])) for n in names.split(", ")):
            return why
    return ""


def other_reasons(reason: object) -> str:
    """A row's reasons without those of empty columns: why it failed."""
    parts = [part for part in str(reason).split("; ") if " empty: " not in part] if is_known(reason) else []
    return "; ".join(parts)


def better(direction: str) -> str:
    return {"lower": "lower is better", "higher": "higher is better"}.get(direction, "no direction")


def leading(summary: pd.DataFrame, labels: Sequence[str], directions: Mapping[str, str]) -> list[dict[str, object]]:
    """For each score and nfe of rows that may be compared: the best method, and whether it leads significantly.

    `labels` names the rows of `summary`. Keys of each: score, nfe, name (several if tied), value, leads, alone (no
    other method has the score), has_intervals (all methods have one), why.
    """
    found: list[dict[str, object]] = []
    names = pd.Series(list(labels), index=summary.index, dtype=object)
    students = summary[~summary["method"].fillna("").str.startswith(TEACHER)]
    for score, direction in directions.items():
        if direction == "none" or f"{score}_training_low" not in summary:
            continue
        marks = leaders(students, score, direction)
        for nfe, group in students.groupby("nfe", dropna=True):
            scored = group[group[score].notna()]
            if not len(scored):
                continue
            values = scored[score].astype(float)
            best = values.min() if direction == "lower" else values.max()
            first = values.index[values == best]
            row = scored.loc[first[0]]
            ends = scored[[f"{score}_training_low", f"{score}_training_high"]]
            found.append({
                "score": score, "nfe": int(nfe), "name": " = ".join(names[first].tolist()[:3]),
                "value": number(best, row[f"{score}_training_low"], row[f"{score}_training_high"]),
                "leads": bool(marks[group.index].any()), "alone": len(scored) == 1,
                "has_intervals": bool(ends.notna().all(axis=None)),
                "why": verdict(group.reset_index(drop=True), score, direction),
            })  # fmt: skip
    return found


def conclusion(found: Sequence[Mapping[str, object]]) -> list[str]:
    """The findings of :func:`leading` in sentences, significant leads first."""
    sure = [one for one in found if one["leads"]]
    unsettled = [one for one in found if not one["leads"] and not one["alone"]]
    lines = [
        f"{one['name']} leads significantly on {one['score']} at {counted(_int(one['nfe']), 'evaluation')} "
        f"({one['value']})."
        for one in sure
    ]
    if unsettled:
        one_seed = not any(one["has_intervals"] for one in unsettled)
        because = (
            "an interval needs at least two training seeds of each method"
            if one_seed
            else "95 % intervals over training seeds overlap or are missing, or rows are incomplete"
        )
        where = "Elsewhere" if sure else "On every score"
        lines.append(f"{where} no method leads significantly: {because}.")
    if found and not sure and not unsettled:
        lines.append("No method leads: no score has two methods at the same number of evaluations to compare.")
    return lines


def _int(value: object) -> int:
    return int(value)  # type: ignore[call-overload]
