"""Which methods lead, and which cannot be told from the best: pairwise comparisons on common noise and common seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from distillbench.records.statistics import COMPARABLE, KEYS, TEACHER, distinct_labels, group_numbers, summarise

Floats = NDArray[np.float64]
Rule = Literal["seeds and images", "seeds", "images", "none"]
LEVEL = 0.95


class Influences(Protocol):
    """Where influences of images on scores are found. :class:`distillbench.records.influences.InfluenceFiles` is one."""

    def of(self, key: str, nfe: int, sampling_seed: int, score: str) -> Floats | None:
        """(n,) influences of the images of the table's row with this `key`; None if there are none."""


@dataclass(frozen=True)
class Standing:
    """One method in a comparison. `row` has its values of statistics.KEYS, `label` is distinct within the group.

    `difference` is its mean minus the best's, on the training seeds that all have in common; negative is better if
    lower is better. `low` and `high` are its simultaneous 95 % interval, `p` its corrected p-value. All four are None
    for the best itself, and where nothing could be compared (rule "none").
    """

    label: str
    row: Mapping[str, Any]
    mean: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def apart(self) -> bool:
        """Whether it is worse than the best beyond the uncertainty."""
        return self.p is not None and self.p < 1 - LEVEL


@dataclass(frozen=True)
class LeadingGroup:
    """The methods that are best on one score in one group of comparable rows.

    `group`: the values of statistics.COMPARABLE (dataset, teacher, guidance, nfe, images, budget, protocol); empty ones
    are None. `leaders`: the best method first, then those that cannot be told from it, by mean. `trailing`: the others,
    by mean. `left_out`: methods that were not compared, each with the reason. `rule`: what the uncertainty consists of;
    `said`: the same as a sentence for readers, also why there is no comparison (rule "none": all are `leaders`).
    """

    group: Mapping[str, Any]
    score: str
    direction: str
    leaders: tuple[Standing, ...]
    trailing: tuple[Standing, ...]
    left_out: Mapping[str, str]
    rule: Rule
    said: str
    training_seeds: int
    images: int  # whose influences were compared: of all sampling seeds together; 0 without influences

    @property
    def best(self) -> Standing:
        return self.leaders[0]

    @property
    def leads(self) -> bool:
        """Whether the best method is alone, and at least one other was compared with it."""
        return len(self.leaders) == 1 and bool(self.trailing)


def leading_groups(
    table: pd.DataFrame, directions: Mapping[str, str], influences: Sequence[Influences] = ()
) -> list[LeadingGroup]:
    """One for each group of comparable students and each score with a direction, in order of groups, then of scores.

    `table` has the rows of one or more runs (RunData.table), `directions` is {score: lower, higher or none};
    `influences` are searched in order ([run.influences for run in runs]). Groups without a score are left out.

    Temporary: this version compares intervals over training seeds, as statistics.leaders does.
    """
    summary = summarise(table, directions)
    students = summary[~summary["method"].str.startswith(TEACHER)].reset_index(drop=True)
    number, found = group_numbers(students), []
    for one in np.unique(number):
        group = students[number == one].reset_index(drop=True)
        for score, direction in directions.items():
            if direction != "none" and group[score].notna().any():
                found.append(_overlapping(group, score, direction))
    return found


def _overlapping(group: pd.DataFrame, score: str, direction: str) -> LeadingGroup:
    sign = 1 if direction == "lower" else -1
    labels = distinct_labels(group)
    rows = group[KEYS].astype(object).where(group[KEYS].notna(), None).to_dict("records")
    means = group[score].astype(float).to_numpy()
    order = [int(i) for i in np.argsort(sign * means) if not np.isnan(means[i])]
    standings = [Standing(labels[i], rows[i], float(means[i])) for i in order]
    first = {name: rows[0][name] for name in COMPARABLE}
    return LeadingGroup(
        first, score, direction, tuple(standings), (), {}, "none", "not compared yet", int(group["training_seeds"].min()), 0
    )
