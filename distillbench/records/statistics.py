"""Means of scores over seeds, their confidence intervals, and whether a method leads significantly.

There are two sources of randomness. Each training seed gives another student; each sampling seed gives other samples of
the same student. All students get the same noise for a sampling seed, so the errors of their scores are correlated: a
sampling seed is one draw, no matter how many students were sampled with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from distillbench.records.numbers import rounded

COMPARABLE = ["dataset", "teacher", "guidance", "nfe", "images", "budget", "protocol"]  # equal in comparable rows
KEYS = ["dataset", "teacher", "guidance", "method", "settings", "nfe", "images", "budget", "protocol", "device"]
SEEDS = ["training_seed", "sampling_seed"]
TEACHER = "teacher:"  # prefix of the method column in baseline rows
FEWEST = 6  # values from which on the bootstrap is used; see summarise
ARROWS = {"lower": "↓", "higher": "↑", "none": ""}

_TYPES = {"guidance": "Float64", "nfe": "Int64", "images": "Int64", "training_seed": "Int64", "sampling_seed": "Int64"}
_TYPES |= dict.fromkeys(
    ("dataset", "teacher", "method", "settings", "budget", "protocol", "device", "status"), "string"
)
_CHUNK = 100  # resamples and rows in memory at a time: they fit the CPU cache

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def arrow(direction: str) -> str:
    """The arrow for a heading: down if lower is better, up if higher is better, else none."""
    check_direction(direction)
    return ARROWS[direction]


def summarise(
    table: pd.DataFrame, directions: Mapping[str, str], confidence: float = 0.95, resamples: int = 9999
) -> pd.DataFrame:
    """One row for each of KEYS, sorted by them: the numbers of seeds, status, scores, costs.

    For each metric M of `directions` (name: lower, higher or none), from the rows that are ok:

    M            mean over training seeds of the mean over their sampling seeds
    M_missing    rows that are ok and have no M; the mean leaves them out
    M_training_* std (n - 1) of the training seeds' means over their sampling seeds; low, high: interval of M over
                 training seeds. It includes the variance that sampling adds to these means
    M_sampling_* std (n - 1) over the sampling seeds of one student, pooled over students by n - 1; low, high: interval
                 of M over sampling seeds for these students. Resampled are the sampling seeds, each with all
                 its students (see the module)
    M_*_interval method of the interval: "t" or "bootstrap"

    and the means of the numeric columns train_* and sample_*, over training seeds in the same way. Empty: fewer than
    two seeds, or, for the interval over sampling seeds, a student with a single sampling seed.

    From FEWEST values on: the BCa bootstrap of the mean (Efron 1987, scipy.stats.bootstrap). The standard deviation of
    resampled means is too small by sqrt((n - 1) / n): at n = 6 a plain 95 % interval covers the truth in 86 % of
    trials. The level is therefore widened to 2 Phi(sqrt(n / (n - 1)) t) - 1, with Student's t for n - 1 degrees of
    freedom (Hesterberg 2015, "What teachers should know about the bootstrap"): 92 to 95 % for normal values. BCa covers
    better than the percentile bootstrap for skewed scores (exponential, n = 10: 92 % instead of 90 %).

    Below FEWEST, where the range of the values is too narrow: Student's t with n - 1 degrees of freedom, exact for
    normal values and too narrow for very skewed ones. Equal values give an interval of no width.

    The summary does not depend on the order of rows, and a row does not depend on other groups.
    """
    _check(table, directions, confidence)
    table = tidy(table)
    first = ~table.duplicated(KEYS)
    summary = table.loc[first, KEYS].reset_index(drop=True)
    ok = is_ok(table).to_numpy()
    group = np.cumsum(first.to_numpy()) - 1
    table = table[ok]
    design = _design(table, group[ok], len(summary))
    summary["training_seeds"] = design.different(table["training_seed"])
    summary["sampling_seeds"] = design.different(table["sampling_seed"])
    good, all_rows = np.bincount(group[ok], minlength=len(summary)), np.bincount(group, minlength=len(summary))
    texts = ["ok" if g == a else f"{g} of {a} ok" for g, a in zip(good, all_rows, strict=True)]
    summary["status"] = pd.array(texts, dtype="string")
    columns: dict[str, object] = {}
    for metric in directions:
        for name, values in _scores(_floats(table[metric]), design, confidence, resamples).items():
            columns[metric + name] = values
    for cost in _costs(table, directions):
        values = _floats(table[cost])
        known = ~np.isnan(values)
        per_seed = _means(values[known], design.training[known], len(design.owner))
        columns[cost] = _empty_is_na(_means_of_known(per_seed, design))
    return pd.concat([summary, pd.DataFrame(columns, index=summary.index)], axis=1)


def leaders(summary: pd.DataFrame, metric: str, direction: str) -> pd.Series:
    """True for the student whose interval over training seeds is better than and disjoint from all others in its group.

    Rows of a group are equal in COMPARABLE. At most one row of a group is True; never a teacher, a method without
    others to compare with, or one of which a row failed or has no score; none if some student has no interval, such as
    one that was trained once.
    """
    check_direction(direction)
    marks = np.zeros(len(summary), dtype=bool)
    used = [f"{metric}{ending}" for ending in ("", "_missing", "_training_low", "_training_high")]
    rows = summary[["method", "settings", "device", "training_seeds", "status", *used]]
    number = group_numbers(summary)
    for one in np.unique(number):
        places = np.flatnonzero(number == one)
        best, _ = _judge(rows.iloc[places], metric, direction)
        if best is not None:
            marks[places[best]] = True
    return pd.Series(marks, index=summary.index, name=metric)


def verdict(group: pd.DataFrame, metric: str, direction: str) -> str:
    """Why a student of `group` leads, or why none does. `group`: rows of a summary that are equal in COMPARABLE."""
    check_direction(direction)
    if len(np.unique(group_numbers(group))) > 1:
        raise ValueError(f"a verdict is about rows that are equal in {', '.join(COMPARABLE)}")
    return _judge(group, metric, direction)[1]


def _judge(group: pd.DataFrame, metric: str, direction: str) -> tuple[int | None, str]:
    """The position of the leader in `group`, or None; and the reason."""
    if direction == "none":
        return None, "direction none: neither is better"
    low, high = _floats(group[f"{metric}_training_low"]), _floats(group[f"{metric}_training_high"])
    mean, labels = _floats(group[metric]), distinct_labels(group)
    status, missing = group["status"].tolist(), group[f"{metric}_missing"].tolist()
    students = [i for i, method in enumerate(group["method"].tolist()) if not method.startswith(TEACHER)]
    scored = [i for i in students if not np.isnan(mean[i])]
    partial = {i: f"{labels[i]} ({status[i]})" for i in scored if status[i] != "ok"}
    partial |= {i: f"{labels[i]} ({missing[i]} without a score)" for i in scored if missing[i] and i not in partial}
    dropped = [i for i in students if np.isnan(mean[i])]
    failed = [labels[i] for i in dropped if status[i].startswith("0 of ")]
    empty = [labels[i] for i in dropped if not status[i].startswith("0 of ")]
    notes = [("incomplete", list(partial.values())), ("failed", failed), ("no score", empty)]
    aside = "".join(f"; {what}: {', '.join(names)}" for what, names in notes if names)
    if not scored:
        return None, "no method has a score" + aside
    if len(scored) == 1:
        return None, f"no other method to compare with {labels[scored[0]]}" + aside
    single = [i for i in scored if np.isnan(low[i]) or np.isnan(high[i])]
    if single:
        counts = group["training_seeds"].tolist()
        names = ", ".join(f"{labels[i]} ({counts[i]} training seed{'s' * (counts[i] != 1)})" for i in single)
        return None, f"no interval over retraining: {names}" + aside
    sign = 1 if direction == "lower" else -1
    best = min(scored, key=lambda i: sign * mean[i])
    near = [i for i in scored if i != best and low[i] <= high[best] and low[best] <= high[i]]
    half = (high - low) / 2
    spans = {i: f"{labels[i]} {rounded(low[i], half[i])} to {rounded(high[i], half[i])}" for i in scored}
    if near:
        return None, f"intervals overlap: {', '.join(spans[i] for i in [best, *near])}" + aside
    if best in partial:
        return None, f"{spans[best]} is best, but incomplete" + aside
    return int(best), f"{spans[best]} leads: no other interval reaches its own" + aside


def distinct_labels(group: pd.DataFrame) -> list[str]:
    """Distinct names of the rows: the method, with its settings and then its device if names are equal."""
    names = group["method"].tolist()
    for column in ("settings", "device"):
        often = Counter(names)
        more = group[column].astype("string").fillna("").tolist()
        names = [f"{n} [{m}]" if often[n] > 1 and m else n for n, m in zip(names, more, strict=True)]
    return names


def group_numbers(summary: pd.DataFrame, columns: Sequence[str] = tuple(COMPARABLE)) -> Ints:
    """(N,) group numbers: equal for rows that are equal in `columns`. Empty equals empty."""
    number = np.zeros(len(summary), dtype=np.int64)
    for column in columns:
        codes, different = pd.factorize(summary[column], use_na_sentinel=False)
        number = np.unique(number * (len(different) + 1) + codes, return_inverse=True)[1]
    return number


def check_direction(direction: str) -> None:
    if direction not in ARROWS:
        raise ValueError(f"no direction {direction!r}. Possible: {', '.join(ARROWS)}")


def _check(table: pd.DataFrame, directions: Mapping[str, str], confidence: float) -> None:
    """Raise ValueError for invalid arguments."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, it must lie between 0 and 1")
    for direction in directions.values():
        check_direction(direction)
    absent = [name for name in [*KEYS, *SEEDS, "status", *directions] if name not in table.columns]
    if absent:
        raise ValueError(f"the table has no column {', '.join(absent)}")
    made = [*KEYS, *SEEDS, "training_seeds", "sampling_seeds", "status", *_costs(table, directions)]
    made += [metric + ending for metric in directions for ending in _ENDINGS]
    twice = sorted({name for name in made if made.count(name) > 1})
    if twice:
        raise ValueError(f"these names of metrics give columns of the same name: {', '.join(twice)}")


def is_cost(column: str) -> bool:
    """Whether a column of numbers is a cost of training or of sampling, not a score."""
    return column.startswith(("train_", "sample_"))


def _costs(table: pd.DataFrame, directions: Mapping[str, str]) -> list[str]:
    costs = [name for name in table.columns if is_cost(name) and name not in directions]
    return [name for name in costs if pd.api.types.is_numeric_dtype(table[name])]


def tidy(table: pd.DataFrame) -> pd.DataFrame:
    """The rows without duplicates, with the types of KEYS and SEEDS, sorted by them.

    A failed row without a number of images is counted in every group that it may belong to. Raises ValueError for two
    different rows with the same keys and seeds.
    """
    table = table.astype(_TYPES)
    table["settings"] = table["settings"].fillna("")  # CSV files turn "" into empty
    table = table.drop_duplicates()
    lost = ~is_ok(table) & table["images"].isna()
    if lost.any():
        known = table.loc[table["images"].notna(), KEYS].drop_duplicates()
        rest = [key for key in KEYS if key != "images"]
        found = table[lost].drop(columns="images").merge(known, how="left", on=rest)
        table = pd.concat([table[~lost], found[table.columns]])
    table = table.sort_values(KEYS + SEEDS, kind="stable", ignore_index=True)
    ok = table[is_ok(table)]
    clash = ok[ok.duplicated(KEYS + SEEDS)]
    if len(clash):
        names = ", ".join(f"{name}={value}" for name, value in clash.iloc[0][KEYS + SEEDS].items())
        raise ValueError(f"two different rows for {names}")
    return table


def is_ok(table: pd.DataFrame) -> pd.Series:
    return table["status"].eq("ok").fillna(False).astype(bool)


@dataclass(frozen=True)
class _Design:
    """The group, training seed and sampling seed of each of R rows, numbered over all groups."""

    groups: int
    group: Ints  # (R,)
    training: Ints  # (R,), of T pairs (group, training seed)
    sampling: Ints  # (R,), of pairs (group, sampling seed)
    owner: Ints  # (T,), the group of each training seed
    named: NDArray[np.bool_]  # (T,), False for the teacher, which has no training seed

    def different(self, seeds: pd.Series) -> pd.arrays.IntegerArray:
        """(G,) number of different `seeds` (R,) in each group; empty ones do not count."""
        pairs = pd.DataFrame({"group": self.group, "seed": seeds.to_numpy()})[seeds.notna().to_numpy()]
        counts = np.bincount(pairs.drop_duplicates()["group"], minlength=self.groups)
        return pd.array(counts, dtype="Int64")


def _design(table: pd.DataFrame, group: Ints, groups: int) -> _Design:
    """The design of rows that are sorted by `group` (R,) and training seed."""
    seeds, different = pd.factorize(table["training_seed"], use_na_sentinel=False)
    pairs, training = np.unique(group * (len(different) + 1) + seeds, return_inverse=True)
    owner, unnamed = np.zeros(len(pairs), dtype=np.int64), np.zeros(len(pairs), dtype=bool)
    owner[training], unnamed[training] = group, table["training_seed"].isna().to_numpy()
    seeds, different = pd.factorize(table["sampling_seed"], use_na_sentinel=False)
    sampling = np.unique(group * (len(different) + 1) + seeds, return_inverse=True)[1]
    return _Design(groups, group, training, sampling, owner, ~unnamed)


_ENDINGS = ["", "_missing"]
_ENDINGS += [f"_{seed}_{what}" for seed in ("training", "sampling") for what in ("std", "low", "high", "interval")]


def _scores(values: Floats, design: _Design, confidence: float, resamples: int) -> dict[str, object]:
    """The columns of one metric, by _ENDINGS, each (G,), from its values (R,), NaN if missing."""
    known = ~np.isnan(values)
    group, training = design.group[known], design.training[known]
    values, size = values[known], design.groups
    counts = np.bincount(training, minlength=len(design.owner))
    per_seed = _means(values, training, len(design.owner))
    mean = _means_of_known(per_seed, design)

    again = (counts > 0) & design.named
    owner = design.owner[again]
    trained = np.bincount(owner, minlength=size)
    with np.errstate(invalid="ignore"):  # a score may be infinite
        off = per_seed[again] - mean[owner]
        within = values - per_seed[training]
    training_std = _root_mean_square(off, owner, trained - 1)
    training_interval = _intervals(per_seed[again], owner, trained, confidence, resamples)

    students = np.bincount(design.owner[counts > 0], minlength=size)
    sampling_std = _root_mean_square(within, group, np.bincount(group, minlength=size) - students)
    drawn, seed = np.unique(design.sampling[known], return_inverse=True)
    of = np.zeros(len(drawn), dtype=np.int64)
    of[seed] = group
    moves = np.bincount(seed, within / (students[group] * counts[training]), minlength=len(drawn))  # of M, by each seed
    fewest = np.full(size, np.iinfo(np.int64).max)
    np.minimum.at(fewest, design.owner[counts > 0], counts[counts > 0])
    fewest[students == 0] = 0
    draws = np.bincount(of, minlength=size)
    sampling_interval = _intervals(mean[of] + draws[of] * moves, of, fewest, confidence, resamples)

    missing = np.bincount(design.group[~known], minlength=size)
    columns = [_empty_is_na(mean), pd.array(missing, dtype="Int64")]
    for std, (low, high, kind) in ((training_std, training_interval), (sampling_std, sampling_interval)):
        columns += [_empty_is_na(std), _empty_is_na(low), _empty_is_na(high), pd.array(kind, dtype="string")]
    return dict(zip(_ENDINGS, columns, strict=True))


def _intervals(
    values: Floats, group: Ints, fewest: Ints, confidence: float, resamples: int
) -> tuple[Floats, Floats, list[str | None]]:
    """Interval (G,), (G,) of the mean of the values (K,) of each group, and its method.

    `fewest` (G,) decides the method and the degrees of freedom: the number of values, or for sums over strata the size
    of the smallest stratum. Less than 2: no interval.
    """
    low, high = np.full(len(fewest), np.nan), np.full(len(fewest), np.nan)
    order = np.lexsort((values, group))
    values, group = values[order], group[order]
    sizes = np.bincount(group, minlength=len(fewest))
    finite = np.bincount(group, ~np.isfinite(values), minlength=len(fewest)) == 0
    usable = (fewest >= 2) & finite
    for n, m in sorted(set(zip(sizes[usable].tolist(), fewest[usable].tolist(), strict=True))):
        from scipy.special import stdtrit  # imported here: most tables have one seed; scipy.stats takes half a second

        these = usable & (sizes == n) & (fewest == m)
        rows = values[these[group]].reshape(-1, n)
        mean = rows.mean(axis=1).clip(rows[:, 0], rows[:, -1])
        std = np.sqrt(((rows - mean[:, None]) ** 2).mean(axis=1))
        reach = stdtrit(m - 1, (1 + confidence) / 2) * np.sqrt(m / (m - 1))
        if m < FEWEST:
            low[these], high[these] = mean - reach * std / np.sqrt(n), mean + reach * std / np.sqrt(n)
            continue
        ends = np.zeros((2, len(rows)))
        varied = std > 0  # without variance, resampling only gives the mean
        ends[:, varied] = _bootstrap((rows - mean[:, None])[varied] / std[varied, None], reach, resamples)
        low[these], high[these] = mean + ends * std
    kind = [("t" if m < FEWEST else "bootstrap") if u else None for m, u in zip(fewest, usable, strict=True)]
    return low, high, kind


def _bootstrap(rows: Floats, reach: float, resamples: int) -> Floats:
    """(2,G) BCa interval of the mean of each row (G,n) at the level 2 Phi(reach) - 1. Rows share their resamples."""
    from scipy import stats

    level, ends = 1 - 2 * stats.norm.sf(reach), np.empty((2, len(rows)))
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        found = stats.bootstrap(
            (rows[part],), np.mean, axis=-1, method="BCa", confidence_level=level, n_resamples=resamples,
            batch=_CHUNK, vectorized=True, rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        ends[:, part] = found.low, found.high
    return ends


def _means_of_known(per_seed: Floats, design: _Design) -> Floats:
    """(G,) means over training seeds (T,) without NaN; NaN if all are NaN."""
    known = ~np.isnan(per_seed)
    return _means(per_seed[known], design.owner[known], design.groups)


def _means(values: Floats, index: Ints, size: int) -> Floats:
    """(size,) means of the values of each index, NaN if there are none.

    They are clipped to the range of the values, so that equal values have exactly their mean and no deviation.
    """
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, index, values)
    np.maximum.at(high, index, values)
    counts = np.bincount(index, minlength=size)
    with np.errstate(invalid="ignore"):
        means = np.clip(np.bincount(index, values, minlength=size) / np.maximum(counts, 1), low, high)
    return np.where(counts > 0, means, np.nan)


def _root_mean_square(off: Floats, index: Ints, freedom: Ints) -> Floats:
    """(size,) roots of the sums of squared deviations of each index over their degrees of freedom; NaN without any."""
    sums = np.bincount(index, off**2, minlength=len(freedom))
    return np.sqrt(np.where(freedom > 0, sums, np.nan) / np.maximum(freedom, 1))


def _floats(column: pd.Series) -> Floats:
    return column.astype("Float64").to_numpy(dtype=np.float64, na_value=np.nan)


def _empty_is_na(values: Floats) -> pd.arrays.FloatingArray:
    return pd.arrays.FloatingArray(values, np.isnan(values))
