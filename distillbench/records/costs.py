"""Costs are measurements: their spread over seeds, and what disturbed them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BUSY = 0.1  # load by other processes, as a fraction of all cores, from which on rows say so
COUNTED = (  # costs that are counted and not timed: the same on any machine, however busy
    "train_images", "train_teacher_nfe", "train_student_nfe", "train_tflops", "sample_gflops", "parameters",
    "trained_parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """A cost over training seeds. `low` and `high`: 95 % interval of its mean (Student's t); None for one seed.

    `least` and `most`: over seeds. Each student is timed in a process of its own, so that seeds are repeats of the
    latency, too. Differences of methods within their noise are none: `leading.leading_groups` compares costs.
    """

    mean: float
    low: float | None
    high: float | None
    least: float
    most: float
    seeds: int


def spread(rows: Iterable[Mapping[str, Any]], cost: str) -> Spread | None:
    """The spread of a cost over the training seeds of one method's `rows` of the table; None if none has it.

    A value of a seed is the mean over its rows: sampling seeds share one measurement. Only rows that are ok count.
    """
    by_seed: dict[Any, list[float]] = {}
    for row in rows:
        value = row.get(cost)
        if row.get("status") == "ok" and value is not None and not np.isnan(value):
            seed = row.get("training_seed")
            by_seed.setdefault(None if seed is None or seed != seed else int(seed), []).append(float(value))
    if not by_seed:
        return None
    values = np.array([np.mean(several) for several in by_seed.values()])
    mean, low, high = float(values.mean()), None, None
    if len(values) > 1:
        from scipy import stats  # takes half a second to import

        half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
        low, high = mean - half, mean + half
    return Spread(mean, low, high, float(values.min()), float(values.max()), len(values))


def disturbed(rows: Iterable[Mapping[str, Any]], cores: int | None = None) -> str:
    """What to say of timed costs in `rows` of the table if other processes kept the machine busy; "" if they did not.

    The largest load of all rows counts. `cores`: of the machine (environment.json: cpu_cores).
    """
    known = [dict(row) for row in rows]
    parts = []
    for what, column in (("trained", "machine_load_training"), ("timed", "machine_load_sampling")):
        loads = [row[column] for row in known if row.get(column) is not None and row[column] == row[column]]
        if loads and max(loads) >= BUSY:
            share = f"{max(loads) * cores:.1f} of {cores} cores" if cores else f"{max(loads):.0%} of the cores"
            parts.append(f"{what} while other processes used {share}")
    return "; ".join(parts)
