"""Costs are measurements: their spread over seeds, and what disturbed them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from distillbench.records.statistics import KEYS, is_cost, is_ok

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
        half = float(_t(len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
        low, high = mean - half, mean + half
    return Spread(mean, low, high, float(values.min()), float(values.max()), len(values))


def with_intervals(summary: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The summary of `table` with the ends of :func:`spread`'s interval, COST_training_low and COST_training_high.

    They are empty for one training seed, and where all seeds have the same cost, as if it is counted.
    """
    costs = [name for name in summary if is_cost(name) and name in table and name in summary]
    costs = [name for name in costs if pd.api.types.is_numeric_dtype(table[name])]
    rows = table[is_ok(table)]
    rows = rows.assign(settings=rows["settings"].fillna("")).dropna(subset=["training_seed"])
    if not len(rows) or not costs:
        return summary
    seeds = rows.groupby([*KEYS, "training_seed"], dropna=False, sort=False)[costs].mean()
    groups = seeds.astype("float64").groupby(KEYS, dropna=False, sort=False)
    count, mean, std = groups.count(), groups.mean(), groups.std()
    half = (std / np.sqrt(count) * count.map(lambda n: _t(n - 1) if n > 1 else np.nan)).where(std > 1e-12 * mean.abs())
    low, high = (mean - half).add_suffix("_training_low"), (mean + half).add_suffix("_training_high")
    return summary.merge(pd.concat([low, high], axis=1).reset_index(), on=KEYS, how="left").set_axis(summary.index)


def is_end(column: str) -> bool:
    """Whether a column is of :func:`with_intervals`."""
    return is_cost(column) and column.endswith(("_training_low", "_training_high"))


def _t(freedom: int) -> float:
    """Half the width of a 95 % interval in standard errors (Student's t)."""
    from scipy.special import stdtrit  # scipy.stats takes half a second to import

    return float(stdtrit(freedom, 0.975))


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
