"""What a report says in words: numbers with as many digits as they bear, who leads, what is empty and why."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from distillbench.statistics import TEACHER, leaders, verdict

ABOUT = {  # of columns that are no scores: heading, what it is. Units are in the heading
    "run": ("run", "the run's folder"),
    "dataset": ("dataset", "the images"),
    "teacher": ("teacher", "the teacher's family and the first digits of its hash"),
    "guidance": ("guidance", "weight of the teacher's classifier-free guidance; 1 is none"),
    "method": ("method", "the student's method; teacher:SAMPLER is the teacher itself"),
    "settings": ("settings", "the method's settings that differ from its defaults"),
    "training_seed": ("training seed", "seed of the student's training"),
    "sampling_seed": ("sampling seed", "seed of the noise that was sampled from"),
    "training_seeds": ("training seeds", "how many students were trained"),
    "sampling_seeds": ("sampling seeds", "how many seeds of noise each was sampled with"),
    "nfe": ("NFE", "network evaluations for one image"),
    "images": ("images", "samples that were scored"),
    "status": ("status", "whether all seeds gave scores"),
    "reason": ("reason", "why a row is not ok; why a value is empty"),
    "note": ("note", "what must be known of a row that is ok, such as a sampler that is unstable in so few steps"),
    "compute": ("computed in", "precision of the networks, and what else is set, in training and in sampling"),
    "device": ("device", "kind and model of the processor"),
    "key": ("record", "key of the row's record in cells/"),
    "sample_latency_p50_ms": ("latency p50, ms", "median time to make one image"),
    "sample_latency_p95_ms": ("latency p95, ms", "95th percentile of the time to make one image"),
    "sample_images_per_second": ("images/s", "most images per second over batches"),
    "sample_best_batch": ("best batch", "the batch with the most images per second"),
    "sample_gflops": ("GFLOPs an image", "floating-point operations to make one image"),
    "sample_decoder_latency_ms": ("decoder, ms", "the teacher's decoder of latents, one image; not in the latency"),
    "sample_text_encoder_latency_ms": ("text encoder, ms", "the encoder of texts; not in the latency"),
    "sample_peak_gpu_mib": ("sampling: GPU peak, MiB", "most memory that tensors held while sampling"),
    "sample_peak_gpu_reserved_mib": ("sampling: GPU reserved, MiB", "most that torch's allocator took while sampling"),
    "sample_peak_device_mib": ("sampling: device peak, MiB", "most in use on the device, less what was there before"),
    "sample_peak_rss_mib": ("sampling: resident peak, MiB", "most resident memory of the sampling process"),
    "train_images": ("training images", "images that training steps consumed"),
    "train_seconds": ("training, s", "wall-clock of training, without evaluation and writing files"),
    "train_teacher_seconds": ("training: teacher, s", "of it, forward passes of the teacher"),
    "train_student_seconds": ("training: student, s", "of it, the student's passes and optimiser steps"),
    "train_compile_seconds": ("training: compiler, s", "of it, torch's compiler"),
    "train_other_seconds": ("training: rest, s", "of it, data, noise, targets, averaging"),
    "train_teacher_nfe": ("teacher evaluations", "images that the teacher evaluated in training"),
    "train_student_nfe": ("student evaluations", "images that the student evaluated in training"),
    "train_tflops": ("training, TFLOPs", "floating-point operations of the networks, forward and backward"),
    "train_joules": ("training, J", "energy of the whole GPU"),
    "train_peak_gpu_mib": ("training: GPU peak, MiB", "most memory that tensors held while training"),
    "train_peak_gpu_reserved_mib": ("training: GPU reserved, MiB", "most that torch's allocator took while training"),
    "train_peak_device_mib": ("training: device peak, MiB", "most in use on the device, of all processes"),
    "train_peak_rss_mib": ("training: resident peak, MiB", "most resident memory of the training process"),
    "fraction": ("part of the budget", "how far training was"),
}


def heading(column: str) -> str:
    return ABOUT[column][0] if column in ABOUT else column


def is_known(value: object) -> bool:
    """Whether a cell of a frame holds something."""
    return value is not None and not pd.isna(value) and value != ""  # type: ignore[call-overload]


def number(value: object, low: object = None, high: object = None) -> str:
    """A number with as many digits as its interval allows: two of the interval's half-width, else four in all.

    Whole numbers without an interval, as counts, are written in full. Empty for an empty value.
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
    """Both ends, in the digits that their distance allows; empty without an interval."""
    if not (is_known(low) and is_known(high)):
        return ""
    return f"{number(low, low, high)} to {number(high, low, high)}"


def listed(names: Iterable[object], most: int = 12) -> str:
    """a, b and c; the rest is counted."""
    texts = [str(name) for name in names]
    if len(texts) > most:
        texts = [*texts[:most], f"{len(texts) - most:,} more"]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1] if texts else "none"


def counted(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


@functools.lru_cache(maxsize=100_000)
def why_empty(column: str, reason: object) -> str:
    """Why `column` is empty, out of a row's reasons: parts `name, name empty: why` parted by semicolons."""
    if not is_known(reason):
        return ""
    for part in str(reason).split("; "):
        names, told, why = part.partition(" empty: ")
        if told and any(column == n or (n.endswith("*") and column.startswith(n[:-1])) for n in names.split(", ")):
            return why
    return ""


def other_reasons(reason: object) -> str:
    """What a row's reasons say beside which columns are empty: why it failed."""
    parts = [part for part in str(reason).split("; ") if " empty: " not in part] if is_known(reason) else []
    return "; ".join(parts)


def better(direction: str) -> str:
    return {"lower": "lower is better", "higher": "higher is better"}.get(direction, "no direction")


def leading(summary: pd.DataFrame, labels: Sequence[str], directions: Mapping[str, str]) -> list[dict[str, object]]:
    """For each score and nfe of one comparable group: who is ahead, whether beyond the uncertainty, and why.

    `labels` names the rows of `summary`. Each: score, nfe, name, value, leads, tied (several are ahead), why.
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
            found.append({
                "score": score, "nfe": int(nfe), "name": " = ".join(names[first].tolist()[:3]),
                "value": number(best, row[f"{score}_training_low"], row[f"{score}_training_high"]),
                "leads": bool(marks[group.index].any()), "alone": len(scored) == 1,
                "why": verdict(group.reset_index(drop=True), score, direction),
            })  # fmt: skip
    return found


def conclusion(found: Sequence[Mapping[str, object]]) -> list[str]:
    """The findings of `leading` in sentences: what is beyond the uncertainty first."""
    sure = [one for one in found if one["leads"]]
    open_ = [one for one in found if not one["leads"] and not one["alone"]]
    lines = [
        f"{one['name']} leads on {one['score']} at {counted(_int(one['nfe']), 'evaluation')} ({one['value']}), beyond "
        "the uncertainty of retraining."
        for one in sure
    ]
    if open_:
        single = all("no interval over retraining" in str(one["why"]) for one in open_)
        because = (
            "there is no interval over retraining, which takes at least two training seeds of each method"
            if single
            else "intervals over retraining overlap, are missing, or rows are incomplete"
        )
        where = "On every score" if not sure else "Elsewhere"
        lines.append(f"{where} nobody leads beyond the uncertainty: {because}.")
    if found and not sure and not open_:
        lines.append("Nobody leads: no score has two methods at the same number of evaluations to compare.")
    return lines


def _int(value: object) -> int:
    return int(value)  # type: ignore[call-overload]
