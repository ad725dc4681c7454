"""Which points of a score over a cost are best for their cost, beyond the uncertainty of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from distillbench.records.leading import Influences, Unit, common_seeds, compared, mean_over_seeds, units_of
from distillbench.records.statistics import COMPARABLE, TEACHER, check_direction, distinct_labels, group_numbers, tidy

Place = Literal["on", "off", "unclear"]
GROUP = [name for name in COMPARABLE if name != "nfe"]  # equal for the points of a front


@dataclass(frozen=True)
class FrontPoint:
    """A method (or a teacher) at a number of evaluations. `row`: its values of statistics.KEYS.

    `place`: "off" if another point, `beaten_by`, is better in the score or in the cost beyond the uncertainty, and by
    its mean not worse in the other. "on" if every other point is worse in one of the two beyond the uncertainty.
    Otherwise "unclear": for example a point that is ahead only in a cost, by less than its noise.
    """

    label: str
    row: Mapping[str, Any]
    cost: float
    score: float
    place: Place
    beaten_by: str = ""


@dataclass(frozen=True)
class Front:
    """The points of one group, by cost. `group`: the values of COMPARABLE of its first point. `left_out`: points that
    were not compared, and why.

    Draw a line through points that are "on", none through "unclear" ones, and let those "off" recede.
    """

    group: Mapping[str, Any]
    score: str
    cost: str
    points: tuple[FrontPoint, ...]
    left_out: Mapping[str, str]
    said: str  # what the uncertainty is, or why there is none and points are placed by their means


def fronts(
    table: pd.DataFrame, score: str, direction: str, cost: str, influences: Sequence[Influences] = (),
    cost_direction: str = "lower", each_nfe: bool = False,
) -> list[Front]:  # fmt: skip
    """One front for each group of rows that are equal in GROUP and have a score and a cost.

    With `each_nfe` also for each number of evaluations: for training costs, which do not depend on it.

    Both axes are compared as in `leading_groups`: in pairs, on common seeds and noise, corrected for all pairs. A
    teacher has no training seeds; it is the same for all. Without two seeds the cost has no uncertainty that is known:
    then, as for counted costs such as sample_gflops, which seeds do not change, unequal costs are told apart.
    """
    check_direction(direction)
    rows = tidy(table)
    firsts, units = units_of(rows)
    is_teacher = firsts["method"].str.startswith(TEACHER).fillna(True).to_numpy(dtype=bool)
    columns = COMPARABLE if each_nfe else GROUP
    number = group_numbers(firsts, columns)
    without_budget = group_numbers(firsts, [name for name in columns if name != "budget"])
    found = []
    for one in np.unique(number[~is_teacher]):
        students = np.flatnonzero((number == one) & ~is_teacher)
        teachers = np.flatnonzero((without_budget == without_budget[students[0]]) & is_teacher)
        places = np.r_[students, teachers]
        points = firsts.iloc[places]
        labels = distinct_labels(points.assign(method=points["method"] + ", " + points["nfe"].astype(str) + " NFE"))
        members = [replace(units[place], label=label) for label, place in zip(labels, places, strict=True)]
        seeds = sorted({seed for unit in members[: len(students)] for seed in unit.rows["training_seed"].dropna()})
        members[len(students) :] = [_at_seeds(unit, seeds) for unit in members[len(students) :]]
        front = _front(members, score, direction, cost, cost_direction, influences)
        if front.points:
            found.append(front)
    return found


def _at_seeds(teacher: Unit, seeds: Sequence[int]) -> Unit:
    """The teacher's rows for each training seed of students: it is the same for all."""
    parts = [teacher.rows.assign(training_seed=pd.array([seed] * len(teacher.rows), dtype="Int64")) for seed in seeds]
    return replace(teacher, rows=pd.concat(parts, ignore_index=True))


def _front(
    members: Sequence[Unit], score: str, direction: str, cost: str, cost_direction: str, where: Sequence[Influences]
) -> Front:
    left_out = {unit.label: why for unit in members if (why := unit.why_left_out(score) or unit.why_left_out(cost))}
    units = [unit for unit in members if unit.label not in left_out]
    scores, costs = [unit.values(score) for unit in units], [unit.values(cost) for unit in units]
    seeds = common_seeds(scores)
    score_pairs, _, why = compared(units, scores, score, seeds, where)
    cost_pairs, _, _ = compared(units, costs, cost, seeds, ())
    means = np.array([mean_over_seeds(one, *seeds) for one in scores])
    prices = np.array([mean_over_seeds(one, *seeds) for one in costs])
    behind = []  # (A,A) of score and of cost: by how much the row's point is worse than the column's
    for values, lower in ((means, direction), (prices, cost_direction)):
        behind.append((values[:, None] - values[None, :]) * (1 if lower == "lower" else -1))
    apart = [True if pairs is None else pairs.apart for pairs in (score_pairs, cost_pairs)]
    surely = [(off < 0) & sure for off, sure in zip(behind, apart, strict=True)]  # better beyond the uncertainty
    beats = (surely[0] & (behind[1] <= 0)) | (surely[1] & (behind[0] <= 0))
    worse_somewhere = surely[0].T | surely[1].T  # the row's point is worse than the column's in one of them
    np.fill_diagonal(worse_somewhere, True)
    points = []
    for i in np.argsort(prices, kind="stable"):
        winners = np.flatnonzero(beats[:, i])
        place: Place = "off" if len(winners) else "on" if worse_somewhere[:, i].all() else "unclear"
        by = units[winners[0]].label if len(winners) else ""
        points.append(FrontPoint(units[i].label, units[i].row, float(prices[i]), float(means[i]), place, by))
    group = {name: members[0].row[name] for name in COMPARABLE}
    said = (
        why or "Scores and costs are compared in pairs, corrected for all pairs; points that are not apart are unclear."
    )
    return Front(group, score, cost, tuple(points), left_out, said)
