"""Which rows of a table get a star or are bold, by the same comparison as sentences about leading groups.

Members of a leading group are bold: the best, and those that cannot be told apart from it. A star marks the only member
of one (`leading.LeadingGroup.leads`). Both need two training seeds: one does not tell how another training would come
out. Where methods cannot be compared in pairs, such as those without a training seed in common, both mark the one whose
interval overlaps no other (`statistics.leaders`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from distillbench.records.leading import Influences, LeadingGroup, leading_groups, plain_key
from distillbench.records.statistics import COMPARABLE, KEYS, SEEDS, leaders

PAIRS = "by pairwise comparison, corrected for all pairs, over common training seeds"
ONLY = f"the only leader {PAIRS}"
GROUP = f"in the leading group, the best and those that cannot be told apart from it {PAIRS}"
IMAGES = "images from common noise"
INTERVALS = "where pairs cannot be compared, its interval overlaps no other"


@dataclass(frozen=True)
class Stars:
    """For each score, whether each row of the summary gets a star (`marks`), and is in a leading group (`groups`).

    `said` and `said_of_groups`: what these mean; "" if no row can have one.
    """

    marks: Mapping[str, list[bool]]
    groups: Mapping[str, list[bool]]
    said: str = ""
    said_of_groups: str = ""


def find_stars(
    table: pd.DataFrame, summary: pd.DataFrame, directions: Mapping[str, str], influences: Sequence[Influences] = ()
) -> Stars:
    """The stars of `summary`, the summary of `table`. Influences are read only if there are two training seeds."""
    if not len(summary) or not (summary["training_seeds"] > 1).any():
        marks, members = ({score: [False] * len(summary) for score in directions} for _ in range(2))
        return Stars(marks, members)
    known = {score: direction for score, direction in directions.items() if score in table}
    return stars_of(leading_groups(table.drop_duplicates([*KEYS, *SEEDS]), known, influences), summary, directions)


def stars_of(groups: Sequence[LeadingGroup], summary: pd.DataFrame, directions: Mapping[str, str]) -> Stars:
    """The same from the leading `groups` of the summary's rows."""
    keys = [plain_key(key) for key in summary[KEYS].fillna({"settings": ""}).itertuples(index=False, name=None)]
    places = [plain_key(key) for key in summary[COMPARABLE].itertuples(index=False, name=None)]
    marks, members = ({score: [False] * len(summary) for score in directions} for _ in range(2))
    rules: dict[str, None] = {}
    for score, direction in directions.items():
        apart: list[bool] | None = None
        for group in (one for one in groups if one.score == score and len(one.leaders) + len(one.trailing) > 1):
            if group.rule in ("seeds", "seeds and images"):
                rules[group.rule] = None
                best = {tuple(one.row[name] for name in KEYS) for one in group.leaders}
                found = [key in best and keys.count(key) == 1 for key in keys]  # not if trained again in another run
            elif group.rule == "none" and group.training_seeds != 1:
                apart = leaders(summary, score, direction).tolist() if apart is None else apart
                rules["none"] = None
                place = tuple(group.group[name] for name in COMPARABLE)
                found = [mark and own == place for mark, own in zip(apart, places, strict=True)]
            else:
                continue
            members[score] = [old or new for old, new in zip(members[score], found, strict=True)]
            if group.leads or group.rule == "none":
                marks[score] = [old or new for old, new in zip(marks[score], found, strict=True)]
    return Stars(marks, members, _said(ONLY, list(rules)), _said(GROUP, list(rules)))


def _said(what: str, rules: Sequence[str]) -> str:
    parts = []
    if "seeds" in rules or "seeds and images" in rules:
        where = "" if "seeds" not in rules else ", where their influences are stored"
        parts.append(what + (f" and {IMAGES}{where}" if "seeds and images" in rules else ""))
    if "none" in rules:
        parts.append(INTERVALS)
    return "; or ".join(parts)
