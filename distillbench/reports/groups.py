"""The groups of rows that may be compared, of one or several runs: what reports and leaderboards are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd

from distillbench.errors import counted
from distillbench.records.leading import LeadingGroup, leading_groups
from distillbench.records.statistics import COMPARABLE, KEYS, SEEDS, TEACHER
from distillbench.records.table import make_table
from distillbench.reports import words
from distillbench.reports.answer import Answers, answers, primary
from distillbench.reports.entries import Entry, Row, TableRow, attach, entries_of, key_without_images, rows_of
from distillbench.reports.labels import Labels
from distillbench.reports.runs import RunData
from distillbench.reports.words import is_known, number

GROUP = [name for name in COMPARABLE if name != "nfe"]  # equal in the rows of one group

Place = tuple  # the values of GROUP


@dataclass(frozen=True)
class _Records:
    """The rows of all runs, each with its run's name in the column `run`."""

    summary: pd.DataFrame | None
    tables: list[tuple[RunData, Row]]
    along: list[Row]


@dataclass(frozen=True)
class Group:
    """Rows that are equal in GROUP; the teacher's, which have no budget, are in every budget."""

    place: Place
    summary: pd.DataFrame
    entries: list[Entry]
    table_rows: list[TableRow]
    scores: dict[str, str]  # direction by score
    several_runs: bool
    labels: Labels
    methods: list[str]  # of all groups
    along: list[Row]

    @cached_property
    def leading(self) -> list[LeadingGroup]:
        """The leading groups of its students, on each score that has a direction."""
        directions = {score: direction for score, direction in self.scores.items() if direction != "none"}
        rows = [row.values for row in self.table_rows if not str(row.values["method"]).startswith(TEACHER)]
        if not rows or not directions:
            return []
        plain = [{name: value for name, value in row.items() if name != "run"} for row in rows]
        table = make_table(plain, [*directions])
        table["images"] = table["images"].fillna(self.facts["images"])
        table = table.drop_duplicates([*KEYS, *SEEDS])
        runs = {id(row.run): row.run for row in self.table_rows}
        return leading_groups(table, directions, [run.influences for run in runs.values()])

    @property
    def facts(self) -> dict[str, Any]:
        return dict(zip(GROUP, self.place, strict=True))

    def only(self, entries: Sequence[Entry]) -> Group:
        """The group with some of its entries and their rows."""
        labels = {entry.label for entry in entries}
        return replace(self, entries=list(entries), table_rows=[row for row in self.table_rows if row.label in labels])

    @property
    def students(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.is_teacher]

    @property
    def samplers(self) -> list[str]:
        """The teacher's."""
        teachers = dict.fromkeys(str(entry.values["method"]) for entry in self.entries if entry.is_teacher)
        return [self.labels.method_label(m).short.removeprefix("teacher, ").removeprefix(TEACHER) for m in teachers]


def make_groups(runs: Sequence[RunData], names: Sequence[str], directions: Mapping[str, str]) -> list[Group]:
    """The groups of `runs`, which are called `names`; `directions` are those of the scores."""
    labels = Labels.of(run.labels for run in runs)
    records = _read(runs, names)
    if records.summary is None:
        return []
    rows = rows_of(records.summary)
    places: dict[Place, list[int]] = {}
    for at, row in enumerate(rows):
        places.setdefault(_place(row), []).append(at)
    homes = _homes(places, rows)
    return [
        _group(place, records.summary.iloc[own], records, directions, len(runs) > 1, labels)
        for place, own in homes.items()
    ]


def _read(runs: Sequence[RunData], names: Sequence[str]) -> _Records:
    summaries, tables, along = [], [], []
    for name, run in zip(names, runs, strict=True):
        if "status" in run.summary and "training_seeds" in run.summary and len(run.table):
            summaries.append(_in_order_of_table(run).assign(run=name))
        tables += [(run, {**row, "run": name}) for row in rows_of(run.table)]
        along += [{**row, "run": name} for row in rows_of(run.along)]
    summary = _merge_equal(pd.concat(summaries, ignore_index=True)) if summaries else None
    return _Records(summary, tables, along)


def _in_order_of_table(run: RunData) -> pd.DataFrame:
    """The run's summary, in the order in which its rows appear in the table."""
    places: dict[tuple, int] = {}
    for row in rows_of(run.table[KEYS]):
        places.setdefault(key_without_images(row), len(places))
    order = [places.get(key_without_images(row), len(places)) for row in rows_of(run.summary[KEYS])]
    return run.summary.iloc[pd.Series(order, dtype=int).argsort(kind="stable")]


def _merge_equal(summary: pd.DataFrame) -> pd.DataFrame:
    """Rows that are equal in everything but the run, as of a cell that two runs share, become one."""
    rest = [name for name in summary if name != "run"]
    known = summary[rest].astype(object).where(summary[rest].notna(), None)
    runs: dict[tuple, list[str]] = {}
    first = []
    for values, run in zip(known.itertuples(index=False, name=None), summary["run"], strict=True):
        first.append(values not in runs)
        runs.setdefault(values, []).append(run)
    kept = summary[first].reset_index(drop=True)
    return kept.assign(run=[", ".join(dict.fromkeys(several)) for several in runs.values()])


def _place(row: Mapping[str, Any]) -> Place:
    return tuple(row.get(name) for name in GROUP)


def _homes(places: dict[Place, list[int]], rows: list[Row]) -> dict[Place, list[int]]:
    """The rows of each section: the teacher's are in every budget, failed ones in every number of images."""
    budget, images = GROUP.index("budget"), GROUP.index("images")
    teachers = {p: at for p, at in places.items() if all(str(rows[i]["method"]).startswith(TEACHER) for i in at)}
    failed = {p: at for p, at in places.items() if p[images] is None and p not in teachers}
    found = {p: list(at) for p, at in places.items() if p not in teachers and p not in failed}

    def without(place: Place, *columns: int) -> Place:
        return tuple(value for i, value in enumerate(place) if i not in columns)

    for place, at in failed.items():
        alike = [p for p in found if without(p, images) == without(place, images)]
        if not alike:  # no student of its kind knows its images: take those of the teacher's rows, if there are any
            beside = [p for p in teachers if without(p, budget, images) == without(place, budget, images)]
            alike = [(*p[:budget], place[budget], *p[budget + 1 :]) for p in beside] or [place]
        for p in alike:
            found.setdefault(p, []).extend(at)
    for place, at in teachers.items():
        alike = [p for p in found if without(p, budget) == without(place, budget)]
        for p in alike:
            found[p] = [*at, *found[p]]
        if not alike:
            found[place] = list(at)
    return found


def _group(
    place: Place, summary: pd.DataFrame, records: _Records, directions: Mapping[str, str], several_runs: bool,
    labels: Labels,
) -> Group:  # fmt: skip
    images = place[GROUP.index("images")]
    summary = summary.reset_index(drop=True)
    if images is not None:  # rows that failed before they knew it
        summary = summary.assign(images=summary["images"].fillna(images))
    scores = {name: direction for name, direction in directions.items() if f"{name}_missing" in summary}
    entries = entries_of(summary, several_runs, labels)
    methods = [] if records.summary is None else records.summary["method"].dropna().unique().tolist()
    along = [row for row in records.along if _place(row) == place]
    rows = attach(entries, records.tables)
    return Group(place, summary, entries, rows, scores, several_runs, labels, methods, along)


def group_answers(group: Group) -> tuple[Answers | None, list[Answers]]:
    """The answers on the score that most methods have, and those on the others."""
    directions = {score: direction for score, direction in group.scores.items() if direction != "none"}
    groups = group.leading
    if not groups:
        return None, []
    first = primary(groups, [*directions])
    found = {score: answers(groups, group.entries, score, group.labels) for score in directions}
    return found.get(first), [one for score, one in found.items() if one is not None and score != first]


def heading(group: Group) -> str:
    """Dataset and budget."""
    facts = group.facts
    return f"{facts['dataset'] or 'unknown dataset'}, {grouped(str(facts['budget'] or 'teacher only'))}"


def title(group: Group, several_sections: bool) -> str:
    facts = group.facts
    if not several_sections:
        count = len({str(entry.values["method"]) for entry in group.students})
        what = f"{counted(count, 'method')} of distillation" if count else "The teacher alone"
        return f"{what} on {facts['dataset'] or 'an unknown dataset'}"
    parts = [str(facts["dataset"] or "unknown dataset"), str(facts["teacher"] or "")]
    if several_sections:
        parts += [grouped(str(facts["budget"] or "teacher only"))]
        parts += [f"{number(facts['images'])} images"] if facts["images"] else []
        parts += [f"guidance {number(facts['guidance'])}"] if facts["guidance"] is not None else []
        parts += [f"protocol {facts['protocol']}"] if facts["protocol"] else []
    return ", ".join(part for part in parts if part)


def grouped(text: str) -> str:
    """The text with separators in its long numbers: 300,000 images."""
    return re.sub(r"\b\d{4,}\b", lambda match: f"{int(match[0]):,}", text)


def compared(group: Group) -> str:
    """What was compared, in a line: budget, seeds, samples, teacher."""
    facts = group.facts
    parts = [grouped(str(facts["budget"] or "an unknown budget")) + " each"] if group.students else []
    seeds = _span(group.students, "training_seeds")
    parts += [f"{seeds} training seed{'s' * (seeds != '1')}"] if group.students and seeds else []
    parts += [f"{number(facts['images'])} samples per row"] if facts["images"] else []
    parts += [f"teacher {facts['teacher']}"] if facts["teacher"] else []
    parts += [f"sampled with {words.listed(group.samplers)}"] if group.samplers else []
    return " · ".join(parts)


def facts_of(group: Group) -> list[tuple[str, str]]:
    """The list of facts above a section's tables, without empty ones."""
    facts, students = group.facts, group.students
    sampled_by = f", sampled with {words.listed(group.samplers)}" if group.samplers else ""
    budget = grouped(facts["budget"] or "")
    devices = dict.fromkeys(entry.values["device"] for entry in group.entries if entry.values["device"])
    found = [
        ("Dataset", facts["dataset"]),
        ("Teacher", f"{facts['teacher'] or ''}{sampled_by}"),
        ("Guidance", number(facts["guidance"])),
        (
            "Budget per method",
            budget or ("not known" if students else "none: nothing is trained"),
        ),
        ("Samples per row", number(facts["images"])),
        ("Training seeds", _span(students, "training_seeds")),
        ("Sampling seeds", _span(group.entries, "sampling_seeds")),
        ("Protocol", facts["protocol"] or "not known"),
        ("Device", words.listed(devices)),
        ("Runs", words.listed(dict.fromkeys(e.values["run"] for e in group.entries)) if group.several_runs else ""),
    ]
    return [(name, str(text)) for name, text in found if is_known(text)]


def _span(entries: Iterable[Entry], column: str) -> str:
    """The smallest and largest number of seeds of entries that did not fail entirely."""
    counts = sorted({entry.values[column] or 0 for entry in entries if entry.values["status"][:2] != "0 "})
    return "" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
