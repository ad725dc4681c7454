"""Which measured costs of methods cannot be told apart: they are compared over training seeds, as scores are.

Counted costs, such as FLOPs, are exact. Times, memory and energy are measured, and differ between two trainings of one
method, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from distillbench.errors import counted
from distillbench.records.costs import COUNTED
from distillbench.records.leading import LeadingGroup, leading_groups
from distillbench.records.statistics import KEYS, SEEDS, is_cost
from distillbench.records.table import LAST, make_table
from distillbench.reports.entries import Entry, key_of
from distillbench.reports.labels import Labels

MEASURED = tuple(name for name in LAST if is_cost(name) and name not in (*COUNTED, "sample_best_batch"))
ABOUT = "measured costs (time, memory, energy)"


def cost_groups(entries: Sequence[Entry], costs: Sequence[str], labels: Labels) -> list[LeadingGroup]:
    """The methods of `entries` with the best costs, at each number of evaluations, by pairs over training seeds."""
    directions = {cost: "higher" if labels.label(cost).arrow == "↑" else "lower" for cost in costs}
    rows = [
        {name: value for name, value in row.items() if name != "run"} | {"images": entry.values["images"]}
        for entry in entries
        if not entry.is_teacher
        for row in entry.behind
    ]
    if not rows or not directions:
        return []
    table = make_table(rows, [])
    known = {cost: direction for cost, direction in directions.items() if pd.api.types.is_numeric_dtype(table[cost])}
    return leading_groups(table.drop_duplicates([*KEYS, *SEEDS]), known)


def cost_ties(entries: Sequence[Entry], labels: Labels) -> tuple[Mapping[str, list[bool]], str]:
    """For each measured cost, whether each entry cannot be told apart from the best at its number of evaluations.

    Second, what to say of the marks, or why there are none; "" if there is nothing to compare.
    """
    students = [entry for entry in entries if not entry.is_teacher]
    costs = [cost for cost in MEASURED if any(entry.values.get(cost) is not None for entry in students)]
    groups = [one for one in cost_groups(students, costs, labels) if len(one.leaders) + len(one.trailing) > 1]
    keys = [key_of(entry.values) for entry in entries]
    marks = {cost: [False] * len(entries) for cost in costs}
    for group in groups:
        if group.rule != "none" and len(group.leaders) > 1:
            tied = {key_of(one.row) for one in group.leaders}
            found = [key in tied and keys.count(key) == 1 for key in keys]
            marks[group.score] = [old or new for old, new in zip(marks[group.score], found, strict=True)]
    return marks, _said(groups)


def _said(groups: Sequence[LeadingGroup]) -> str:
    judged = [one for one in groups if one.rule != "none"]
    if judged:
        seeds = sorted({one.training_seeds for one in judged})
        over = counted(seeds[0], "common training seed") if len(seeds) == 1 else "common training seeds"
        return (
            "≈: cannot be told apart from the best cost at its number of evaluations; "
            f"{ABOUT} are compared in pairs over {over}, corrected for all pairs"
        )
    if any(one.training_seeds == 1 for one in groups):
        return f"{ABOUT[0].upper()}{ABOUT[1:]} are of one training seed: their spread is not known, none is marked"
    return ""
