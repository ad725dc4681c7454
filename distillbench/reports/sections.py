"""The sections of an HTML report: rows that may be compared, with all that the page shows about them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from distillbench.errors import counted
from distillbench.records.costs import disturbed
from distillbench.records.leading import leading_groups
from distillbench.records.statistics import COMPARABLE, KEYS, SEEDS, TEACHER, leaders
from distillbench.records.table import make_table
from distillbench.reports import charts, pictures, words
from distillbench.reports.answer import Answers, answers, improving, improving_sentence, primary
from distillbench.reports.entries import (
    Entry,
    Row,
    TableRow,
    attach,
    common_reasons,
    entries_of,
    key_without_images,
    rows_of,
    why_empty,
)
from distillbench.reports.labels import Labels
from distillbench.reports.looks import Look, looks
from distillbench.reports.points import along_notes, curves_of, point
from distillbench.reports.runs import RunData
from distillbench.reports.tables import COSTS, Comparison, Table, comparison_table, every_row_table
from distillbench.reports.words import is_known, number

GROUP = [name for name in COMPARABLE if name != "nfe"]  # equal in the rows of one section
SPENT = ["train_tflops", "train_seconds", "train_teacher_nfe", "train_student_nfe", "train_images", "train_joules"]
SPEED = ["sample_latency_p50_ms", "sample_gflops", "nfe"]
BARS = [name for name in COSTS if name.endswith(("_mib", "_joules"))]

MOST_LEADERS = 4  # whose samples are on the first screen

Place = tuple  # the values of GROUP


@dataclass
class Section:
    """What the page shows of rows that are equal in GROUP; the teacher's, which have no budget, are in every budget."""

    id: str
    title: str
    summary: str  # what was compared, in a line
    facts: list[tuple[str, str]]
    sentences: list[str]
    failures: list[str]
    remarks: list[str]  # notes on rows that are ok
    answer: Answers | None  # on the score that most methods have
    others: list[Answers]  # on the other scores
    first: list[tuple[str, charts.Chart]]  # this score over the costs of training and of sampling
    small: list[tuple[str, charts.Chart]]  # every other score over a cost
    table: Table
    along: charts.Chart | None
    along_notes: list[str]
    bars: list[tuple[str, charts.Chart]]
    same: list[tuple[str, str]]  # costs that hardly differ, and their values
    legend: list[tuple[str, Look]]
    empty: list[tuple[str, str]]  # costs that no row has, and why
    grid: pictures.Grid | None
    leaders: list[pictures.Strip]  # of the teacher and of the methods that lead
    details: Table
    common: list[tuple[bool, str]]  # reasons that all rows of the teacher (True) or of students share
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Records:
    """The rows of all runs, each with its run's name in the column `run`."""

    summary: pd.DataFrame | None
    tables: list[tuple[RunData, Row]]
    along: list[Row]


@dataclass(frozen=True)
class _Group:
    """The rows of one section, as its parts need them."""

    place: Place
    summary: pd.DataFrame
    entries: list[Entry]
    table_rows: list[TableRow]
    scores: dict[str, str]  # direction by score
    several_runs: bool
    labels: Labels
    methods: list[str]  # of the whole report

    @property
    def facts(self) -> dict[str, Any]:
        return dict(zip(GROUP, self.place, strict=True))

    @property
    def students(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.is_teacher]

    @property
    def samplers(self) -> list[str]:
        """The teacher's."""
        teachers = dict.fromkeys(str(entry.values["method"]) for entry in self.entries if entry.is_teacher)
        return [self.labels.method_label(m).short.removeprefix("teacher, ").removeprefix(TEACHER) for m in teachers]


def make_sections(runs: Sequence[RunData], names: Sequence[str], directions: Mapping[str, str]) -> list[Section]:
    """The sections of `runs`, which are called `names`; `directions` are those of the scores."""
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
        _section(
            f"s{number_}",
            _group(place, records.summary.iloc[own], records, directions, len(runs) > 1, labels),
            records.along,
            len(homes) > 1,
        )
        for number_, (place, own) in enumerate(homes.items(), 1)
    ]


# --- grouping rows ---------------------------------------------------------------------------------------------------


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
) -> _Group:  # fmt: skip
    images = place[GROUP.index("images")]
    summary = summary.reset_index(drop=True)
    if images is not None:  # rows that failed before they knew it
        summary = summary.assign(images=summary["images"].fillna(images))
    scores = {name: direction for name, direction in directions.items() if f"{name}_missing" in summary}
    entries = entries_of(summary, several_runs, labels)
    methods = [] if records.summary is None else records.summary["method"].dropna().unique().tolist()
    return _Group(
        place, summary, entries, attach(entries, records.tables), scores, several_runs, labels, methods
    )  # fmt: skip


# --- a section -------------------------------------------------------------------------------------------------------


def _section(name: str, group: _Group, along: list[Row], several_sections: bool) -> Section:
    entries, scores = group.entries, group.scores
    leads = {score: leaders(group.summary, score, direction).tolist() for score, direction in scores.items()}
    main, others = _answers(group)
    series = {entry.label: str(entry.values["method"]) for entry in entries}
    alone = len(series) > charts.MOST_SERIES
    style = charts.Style(
        {} if alone else looks(series, group.methods), group.labels, main.leading if main is not None else ()
    )
    series_points = [point(entry, scores) for entry in entries]
    first, small = _quality(series_points, main.score if main is not None else "", [*scores], style)
    mine = [row for row in along if _place(row) == group.place]
    curves = curves_of(mine, entries, [row.values for row in group.table_rows], [*scores], SPENT)
    drawn = {
        title: charts.bars(series_points, [cost for cost in BARS if cost.startswith(start)], style)
        for title, start in (("Training", "train_"), ("Sampling", "sample_"))
    }
    grid = pictures.grid([(row.run, row.label, row.values) for row in group.table_rows])
    common = common_reasons([row.values for row in group.table_rows])
    return Section(
        id=name,
        title=_title(group, several_sections),
        summary=_compared(group),
        facts=_facts(group),
        sentences=_sentences(main, curves, group),
        failures=_failures(entries),
        remarks=_remarks(entries),
        answer=main,
        others=others,
        first=first,
        small=small,
        table=comparison_table(f"{name}-table", Comparison(entries, scores, leads, group.several_runs, group.labels)),
        along=charts.along_training(curves, [*scores], SPENT, style),
        along_notes=along_notes(curves),
        bars=[(title, chart) for title, (chart, _) in drawn.items() if chart],
        same=[one for _, same in drawn.values() for one in same],
        legend=list(style.looks.items()),
        empty=[
            (group.labels.label(cost).short, why_empty(cost, entries))
            for cost in BARS
            if all(entry.values.get(cost) is None for entry in entries)
        ],
        grid=grid,
        leaders=_leaders_strips(grid, main),
        details=every_row_table(f"{name}-rows", group.table_rows, scores, group.several_runs, group.labels, common),
        common=common,
        notes=_chart_notes(entries, len(series) if alone else 0),
    )


def _answers(group: _Group) -> tuple[Answers | None, list[Answers]]:
    """The answers on the score that most methods have, and those on the others."""
    directions = {score: direction for score, direction in group.scores.items() if direction != "none"}
    rows = [row.values for row in group.table_rows if not str(row.values["method"]).startswith(TEACHER)]
    if not rows or not directions:
        return None, []
    table = make_table([{name: value for name, value in row.items() if name != "run"} for row in rows], [*directions])
    table["images"] = table["images"].fillna(group.facts["images"])
    table = table.drop_duplicates([*KEYS, *SEEDS])
    runs = {id(row.run): row.run for row in group.table_rows}
    groups = leading_groups(table, directions, [run.influences for run in runs.values()])
    first = primary(groups, [*directions])
    found = {score: answers(groups, group.entries, score, group.labels) for score in directions}
    return found.get(first), [one for score, one in found.items() if one is not None and score != first]


def _quality(
    points: Sequence[charts.Point], main: str, scores: Sequence[str], style: charts.Style
) -> tuple[list[tuple[str, charts.Chart]], list[tuple[str, charts.Chart]]]:
    """The charts of the main score over the costs of training and of sampling; those of the other scores."""
    if not main:
        return [], []
    speed = next(
        (cost for cost in SPEED if any(p.values.get(cost) is not None for p in points if not p.teacher)), "nfe"
    )
    pairs = (("training", SPENT), ("sampling", [speed, *(cost for cost in SPEED if cost != speed)]))
    first = [(title, charts.quality(points, costs, main, style)) for title, costs in pairs]
    every = ["nfe", *SPENT, *SPEED[:2]]
    plain = charts.Style(style.looks, style.labels)
    small = [(style.labels.label(s).short, charts.quality(points, every, s, plain)) for s in scores if s != main]
    return [(t, c) for t, c in first if c], [(t, c) for t, c in small if c]


def _chart_notes(entries: Sequence[Entry], alike: int) -> list[str]:
    """Notes on the first charts; `alike`: the number of series, if they share one look."""
    notes = [f"{alike:,} methods share one colour: {charts.MOST_SERIES} are told apart"] if alike else []
    students = [entry for entry in entries if not entry.is_teacher]
    if students and all(entry.values.get(SPEED[0]) is None for entry in students):
        notes.append(f"Latency is not known: {why_empty(SPEED[0], students)}")
    if busy := disturbed(row for entry in entries for row in entry.behind):
        notes.append(f"On a busy machine: {busy}")
    return notes


def _sentences(main: Answers | None, curves: Sequence[charts.Curve], group: _Group) -> list[str]:
    if main is None:
        return []
    fewest = min(row.nfe for row in main.rows)
    points = {
        curve.series: [(f, m) for f, (_, v) in zip(curve.fractions, curve.points, strict=True)
                       if (m := v[main.score][0]) is not None]
        for curve in curves if curve.nfe == fewest
    }  # fmt: skip
    sign = 1 if group.scores[main.score] == "lower" else -1
    return [text for text in (improving_sentence(improving(points, sign)),) if text]


def _leaders_strips(grid: pictures.Grid | None, main: Answers | None) -> list[pictures.Strip]:
    """The samples of the teacher and of at most MOST_LEADERS methods that lead at the fewest evaluations."""
    if grid is None or main is None or grid.reference is None:
        return []
    row = min(main.rows, key=lambda one: one.nfe)
    of = {(strip.label, strip.nfe): strip for strip in grid.strips if strip.source}
    names = [one.label for one in row.leading][:MOST_LEADERS]
    found = [of[(name, number(row.nfe))] for name in names if (name, number(row.nfe)) in of]
    return [grid.reference, *found] if found else []


def _title(group: _Group, several_sections: bool) -> str:
    facts = group.facts
    if not several_sections:
        count = len({str(entry.values["method"]) for entry in group.students})
        what = f"{counted(count, 'method')} of distillation" if count else "The teacher alone"
        return f"{what} on {facts['dataset'] or 'an unknown dataset'}"
    parts = [str(facts["dataset"] or "unknown dataset"), str(facts["teacher"] or "")]
    if several_sections:
        parts += [_grouped(str(facts["budget"] or "teacher only"))]
        parts += [f"{number(facts['images'])} images"] if facts["images"] else []
        parts += [f"guidance {number(facts['guidance'])}"] if facts["guidance"] is not None else []
        parts += [f"protocol {facts['protocol']}"] if facts["protocol"] else []
    return ", ".join(part for part in parts if part)


def _grouped(text: str) -> str:
    """The text with separators in its long numbers: 300,000 images."""
    return re.sub(r"\b\d{4,}\b", lambda match: f"{int(match[0]):,}", text)


def _compared(group: _Group) -> str:
    """What was compared, in a line: budget, seeds, samples, teacher."""
    facts = group.facts
    parts = [_grouped(str(facts["budget"] or "an unknown budget")) + " each"] if group.students else []
    seeds = _span(group.students, "training_seeds")
    parts += [f"{seeds} training seed{'s' * (seeds != '1')}"] if group.students and seeds else []
    parts += [f"{number(facts['images'])} samples per row"] if facts["images"] else []
    parts += [f"teacher {facts['teacher']}"] if facts["teacher"] else []
    parts += [f"sampled with {words.listed(group.samplers)}"] if group.samplers else []
    return " · ".join(parts)


def _facts(group: _Group) -> list[tuple[str, str]]:
    """The list of facts above a section's tables, without empty ones."""
    facts, students = group.facts, group.students
    sampled_by = f", sampled with {words.listed(group.samplers)}" if group.samplers else ""
    budget = _grouped(facts["budget"] or "")
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


def _failures(entries: Sequence[Entry]) -> list[str]:
    found = []
    for entry in entries:
        status, nfe = entry.values["status"], entry.values["nfe"]
        if status != "ok":
            where = f"{entry.label} at NFE {nfe}" if nfe is not None else entry.label
            found.append(f"{where}: {status}. {entry.failures() or 'No reason given.'}")
    return list(dict.fromkeys(found))


def _remarks(entries: Sequence[Entry]) -> list[str]:
    """The notes of rows that are ok, each with the rows that it is of."""
    rows: dict[str, list[str]] = {}
    for entry in entries:
        for note in dict.fromkeys(row["note"] for row in entry.behind if is_known(row.get("note"))):
            rows.setdefault(note, []).append(f"{entry.label} at NFE {entry.values['nfe']}")
    return [f"{words.listed(dict.fromkeys(named))}: {note}" for note, named in rows.items()]
