"""Which methods lead on a score, and which cannot be told from the best. The statistics are in `pairwise`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from distillbench.errors import counted
from distillbench.records.pairwise import Floats, Pairs, compare
from distillbench.records.statistics import (
    COMPARABLE,
    KEYS,
    TEACHER,
    check_direction,
    distinct_labels,
    group_numbers,
    is_cost,
    is_ok,
    tidy,
)

NOT_STORED = "no influences of images are stored for this score"
MOST = 64  # methods that are compared: all pairs are drawn thousands of times
Rule = Literal["seeds and images", "seeds", "images", "none"]


class Influences(Protocol):
    """Where influences of images on scores are found, as `influences.InfluenceFiles`."""

    def of(self, key: str, nfe: int, sampling_seed: int, score: str) -> Floats | None:
        """(n,) influences of the images of the table's row with this `key`; None if there are none."""


@dataclass(frozen=True)
class Standing:
    """One method in a comparison. `row` has its values of statistics.KEYS, `label` is distinct within the group.

    `mean` is over the seeds that all methods of the group have in common. `difference` is its mean minus the best's:
    positive is worse if lower is better. `low` and `high`: its simultaneous 95 % interval; `p`: corrected.
    All four are None for the best itself, and where nothing could be compared (rule "none").
    """

    label: str
    row: Mapping[str, Any]
    mean: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    apart: bool = False  # worse than the best beyond the uncertainty


@dataclass(frozen=True)
class LeadingGroup:
    """The methods that are best on one score in one group of comparable rows.

    `group`: the values of statistics.COMPARABLE (dataset, teacher, guidance, nfe, images, budget, protocol); empty ones
    are None. `leaders`: the best method first, then those that cannot be told from it, by mean. `trailing`: the others,
    by mean. `left_out`: methods that were not compared, each with the reason. `rule`: what the uncertainty consists of;
    `said`: the same in a sentence for readers, or why there is no comparison (rule "none": all are `leaders`).
    """

    group: Mapping[str, Any]
    score: str
    direction: str
    leaders: tuple[Standing, ...]
    trailing: tuple[Standing, ...]
    left_out: Mapping[str, str]
    rule: Rule
    said: str
    training_seeds: int  # in common
    images: int  # whose influences were compared, of all sampling seeds together; 0 without influences

    @property
    def best(self) -> Standing:
        return self.leaders[0]

    @property
    def leads(self) -> bool:
        """Whether all other methods that were compared are worse beyond the uncertainty."""
        return len(self.leaders) == 1 and bool(self.trailing)


def leading_groups(
    table: pd.DataFrame, directions: Mapping[str, str], influences: Sequence[Influences] = ()
) -> list[LeadingGroup]:
    """One for each group of comparable students and each score with a direction, in order of groups, then of scores.

    `table` has the rows of one or more runs (RunData.table), `directions` is {score: lower, higher or none}. Any column
    of numbers can be a score, such as {"train_seconds": "lower"}: costs are compared over seeds. `influences` are
    searched in order ([run.influences for run in runs]). Groups without any value are left out.

    Methods are compared in pairs, on the training seeds and on the noise that they have in common; see `pairwise`. A
    method with failed rows, or without some scores, is not compared. Teachers are not, either: a group has students.
    """
    for direction in directions.values():
        check_direction(direction)
    rows = tidy(table)
    rows = rows[~rows["method"].str.startswith(TEACHER).fillna(True).astype(bool)]
    firsts, units = units_of(rows)
    number, found = group_numbers(firsts), []
    for one in np.unique(number):
        places = np.flatnonzero(number == one)
        labels = distinct_labels(firsts.iloc[places])
        members = [replace(units[place], label=label) for label, place in zip(labels, places, strict=True)]
        for score, direction in directions.items():
            if direction != "none" and any(rows[score].notna().any() for rows in (unit.rows for unit in members)):
                found.append(_judged(members, score, direction, influences))
    return found


@dataclass(frozen=True, eq=False)
class Unit:
    """A method with its settings on its device at a number of evaluations: one that is compared."""

    label: str
    row: dict[str, Any]  # its values of KEYS
    rows: pd.DataFrame  # of the table

    def why_left_out(self, score: str) -> str:
        ok = is_ok(self.rows)
        if not ok.any():
            return "failed"
        if not ok.all():
            return f"incomplete: {ok.sum()} of {len(ok)} rows are ok"
        empty = self.rows[score].isna()
        if empty.all():
            return "no score"
        return f"incomplete: {empty.sum()} of {counted(len(empty), 'row')} without a score" if empty.any() else ""

    def values(self, score: str) -> dict[tuple[int, int], float]:
        """By (training seed, sampling seed)."""
        seeds = zip(self.rows["training_seed"], self.rows["sampling_seed"], strict=True)
        return dict(zip(seeds, self.rows[score].astype(float), strict=True))

    def influences(
        self, training_seed: int, sampling_seed: int, score: str, where: Sequence[Influences]
    ) -> Floats | None:
        seeds = self.rows["training_seed"].eq(training_seed) & self.rows["sampling_seed"].eq(sampling_seed)
        row = self.rows[seeds].iloc[0]
        found = (one.of(str(row["key"]), int(row["nfe"]), sampling_seed, score) for one in where)
        return next((values for values in found if values is not None), None)


def units_of(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[Unit]]:
    """The first row of each unit in a tidy table, and the units, without labels."""
    firsts = rows.drop_duplicates(KEYS).reset_index(drop=True)
    parts = {plain_key(key): part for key, part in rows.groupby(KEYS, dropna=False, sort=False)}
    keys = [plain_key(key) for key in firsts[KEYS].itertuples(index=False, name=None)]
    return firsts, [Unit("", dict(zip(KEYS, key, strict=True)), parts[key]) for key in keys]


def _judged(members: Sequence[Unit], score: str, direction: str, where: Sequence[Influences]) -> LeadingGroup:
    left_out = {unit.label: why for unit in members if (why := unit.why_left_out(score))}
    units = [unit for unit in members if unit.label not in left_out]
    values = [unit.values(score) for unit in units]
    seeds = common_seeds(values)
    means = [mean_over_seeds(one, *seeds) for one in values]
    sign = 1 if direction == "lower" else -1
    order = sorted(range(len(units)), key=lambda i: sign * means[i])
    group = {name: members[0].row[name] for name in COMPARABLE}
    pairs, images, why = compared(units, values, score, seeds, where)
    standings = [_standing(units[i], means[i], None if pairs is None else (pairs, i, order[0])) for i in order]
    rule = _rule(pairs, len(seeds[0]), images)
    return LeadingGroup(
        group, score, direction,
        tuple(one for one in standings if not one.apart), tuple(one for one in standings if one.apart),
        left_out, rule, why or _said(rule, len(seeds[0]), images, is_cost(score)), len(seeds[0]), images,
    )  # fmt: skip


def compared(
    units: Sequence[Unit], values: Sequence[dict[tuple[int, int], float]], score: str,
    seeds: tuple[list[int], list[int]], where: Sequence[Influences],
) -> tuple[Pairs | None, int, str]:  # fmt: skip
    """The comparison, the number of images in it, and why there is none."""
    training, sampling = seeds
    if len(units) < 2:
        return None, 0, "There is no other method to compare with."
    if len(units) > MOST:
        return None, 0, f"Not compared in pairs: {len(units)} methods and settings, more than {MOST}."
    if not (training and sampling):
        return None, 0, "Not compared: the methods have no training seed and noise in common."
    at_seeds = np.array([[np.mean([one[s, k] for k in sampling]) for s in training] for one in values])
    if not np.isfinite(at_seeds).all():
        return None, 0, "Not compared: a score is not finite."
    known = _all_influences(units, score, training, sampling, where)
    pairs = compare(at_seeds, known)
    if pairs is None:
        return None, 0, "Not compared: one training seed" + ("." if is_cost(score) else f", and {NOT_STORED}.")
    return pairs, 0 if known is None else known.shape[-1], ""


def _all_influences(
    units: Sequence[Unit], score: str, training: Sequence[int], sampling: Sequence[int], where: Sequence[Influences]
) -> Floats | None:
    """(A,S,n) influences of the images of all sampling seeds; None if some are missing."""
    whole = []
    for unit in units:
        for s in training:
            parts = [unit.influences(s, k, score, where) for k in sampling]
            if any(part is None or not np.isfinite(part).all() for part in parts):
                return None
            whole.append(np.concatenate([part for part in parts if part is not None]).astype(np.float64))
    if len({len(one) for one in whole}) > 1 or len(whole[0]) < 2:
        return None
    return np.stack(whole).reshape(len(units), len(training), -1)


def common_seeds(values: Sequence[dict[tuple[int, int], float]]) -> tuple[list[int], list[int]]:
    """The training seeds that all have, and the sampling seeds that all have for each of them."""
    if not values:
        return [], []
    common = set.intersection(*({s for s, _ in one} for one in values))
    noise = set.intersection(*({k for t, k in one if t == s} for one in values for s in common)) if common else set()
    return sorted(common), sorted(noise)


def mean_over_seeds(values: dict[tuple[int, int], float], training: Sequence[int], sampling: Sequence[int]) -> float:
    """The mean over training seeds of the mean over their sampling seeds: the common ones, or if there are none all."""
    part = {key: value for key, value in values.items() if key[0] in training and key[1] in sampling} or values
    seeds = sorted({s for s, _ in part})
    return float(np.mean([np.mean([value for (t, _), value in part.items() if t == s]) for s in seeds]))


def _standing(unit: Unit, mean: float, at: tuple[Pairs, int, int] | None) -> Standing:
    if at is None or at[1] == at[2]:
        return Standing(unit.label, unit.row, mean)
    pairs, this, best = at
    difference, width = float(pairs.difference[this, best]), float(pairs.half_width[this, best])
    return Standing(
        unit.label, unit.row, mean, difference, difference - width, difference + width,
        float(pairs.p[this, best]), bool(pairs.apart[this, best]),
    )  # fmt: skip


def _rule(pairs: Pairs | None, seeds: int, images: int) -> Rule:
    if pairs is None:
        return "none"
    return "images" if seeds < 2 else "seeds and images" if images else "seeds"


def _said(rule: Rule, seeds: int, images: int, cost: bool) -> str:
    noise = f"{counted(images, 'image')} from common noise"
    trainings = counted(seeds, "common training seed")
    trainings_only = f"over {trainings}"
    basis = {
        "seeds and images": f"over {trainings} and {noise}",
        "seeds": trainings_only
        if cost
        else f"{trainings_only}; does not include which images were sampled: {NOT_STORED}",
        "images": f"over {noise}; does not include variation between trainings (one training seed)",
    }[rule]
    return f"Pairwise comparison, corrected for all pairs, {basis}."


def plain_key(key: Any) -> tuple:
    values = key if isinstance(key, tuple) else (key,)
    return tuple(None if pd.isna(value) else value.item() if hasattr(value, "item") else value for value in values)
