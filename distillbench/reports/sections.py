"""The sections of an HTML report: rows that may be compared, with all that the page shows about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from distillbench.records.statistics import COMPARABLE, KEYS, TEACHER, leaders
from distillbench.reports import charts, pictures, words
from distillbench.reports.entries import (
    Entry,
    Row,
    TableRow,
    attach,
    entries_of,
    key_without_images,
    rows_of,
    why_empty,
)
from distillbench.reports.runs import RunData
from distillbench.reports.tables import COSTS, Comparison, Table, comparison_table, every_row_table
from distillbench.reports.words import heading, is_known, number

GROUP = [name for name in COMPARABLE if name != "nfe"]  # equal in the rows of one section
SPENT = ["train_images", "train_seconds", "train_teacher_nfe", "train_student_nfe", "train_tflops", "train_joules"]
QUALITY = {"NFE": ["nfe"], "latency": ["sample_latency_p50_ms"], "training cost": SPENT}  # costs of a chart by title
BARS = [name for name in COSTS if name.endswith(("_mib", "_joules"))]

Place = tuple  # the values of GROUP


@dataclass
class Section:
    """What the page shows of rows that are equal in GROUP; the teacher's, which have no budget, are in every budget."""

    id: str
    title: str
    facts: list[tuple[str, str]]
    sentences: list[str]
    failures: list[str]
    remarks: list[str]  # notes on rows that are ok
    leading: list[dict[str, Any]]
    table: Table
    quality: list[tuple[str, charts.Chart]]
    along: charts.Chart | None
    bars: list[tuple[str, charts.Chart]]
    legend: list[tuple[str, str]]  # series and their colours
    empty: list[tuple[str, str]]  # costs that no row has, and why
    grid: pictures.Grid | None
    details: Table
    notes: list[str] = field(default_factory=list)

    @property
    def nfes(self) -> list[int]:
        """The numbers of evaluations at which methods are compared."""
        return sorted({int(one["nfe"]) for one in self.leading})


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
        return [method.removeprefix(TEACHER) for method in teachers]


def make_sections(runs: Sequence[RunData], names: Sequence[str], directions: Mapping[str, str]) -> list[Section]:
    """The sections of `runs`, which are called `names`; `directions` are those of the scores."""
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
            _group(place, records.summary.iloc[own], records.tables, directions, len(runs) > 1),
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
    place: Place, summary: pd.DataFrame, tables: list[tuple[RunData, Row]], directions: Mapping[str, str],
    several_runs: bool,
) -> _Group:  # fmt: skip
    images = place[GROUP.index("images")]
    summary = summary.reset_index(drop=True)
    if images is not None:  # rows that failed before they knew it
        summary = summary.assign(images=summary["images"].fillna(images))
    scores = {name: direction for name, direction in directions.items() if f"{name}_missing" in summary}
    entries = entries_of(summary, several_runs)
    return _Group(place, summary, entries, attach(entries, tables), scores, several_runs)


# --- a section -------------------------------------------------------------------------------------------------------


def _section(name: str, group: _Group, along: list[Row], several_sections: bool) -> Section:
    entries, scores = group.entries, group.scores
    leads = {score: leaders(group.summary, score, direction).tolist() for score, direction in scores.items()}
    labels = [entry.label for entry in entries]
    leading = words.leading(group.summary, labels, scores)
    style = charts.styles(list(dict.fromkeys(labels)))
    points = [_point(entry, scores) for entry in entries]
    quality = ((title, charts.quality(points, costs, scores, style)) for title, costs in QUALITY.items())
    bars = (
        (title, charts.bars(points, [cost for cost in BARS if cost.startswith(start)], style))
        for title, start in (("Training", "train_"), ("Sampling", "sample_"))
    )
    one_colour = len(style) > charts.MOST_SERIES
    return Section(
        id=name,
        title=_title(group.facts, several_sections),
        facts=_facts(group),
        sentences=[_compared(group), *words.conclusion(leading)],
        failures=_failures(entries),
        remarks=_remarks(entries),
        leading=leading,
        table=comparison_table(f"{name}-table", Comparison(entries, scores, leads, group.several_runs)),
        quality=[(title, chart) for title, chart in quality if chart],
        along=charts.along_training(_lines(along, group), scores, style),
        bars=[(title, chart) for title, chart in bars if chart],
        legend=[] if one_colour else [(label, colour) for label, (colour, _) in style.items()],
        empty=[
            (heading(cost), why_empty(cost, entries))
            for cost in BARS
            if all(entry.values.get(cost) is None for entry in entries)
        ],
        grid=pictures.grid([(row.run, row.label, row.values) for row in group.table_rows]),
        details=every_row_table(f"{name}-rows", group.table_rows, scores, group.several_runs),
        notes=[f"{len(style):,} methods share one colour: {charts.MOST_SERIES} are told apart"] if one_colour else [],
    )


def _title(facts: dict[str, Any], several_sections: bool) -> str:
    parts = [str(facts["dataset"] or "unknown dataset"), str(facts["teacher"] or "")]
    if several_sections:
        parts += [str(facts["budget"] or "teacher only")]
        parts += [f"{number(facts['images'])} images"] if facts["images"] else []
        parts += [f"guidance {number(facts['guidance'])}"] if facts["guidance"] is not None else []
        parts += [f"protocol {facts['protocol']}"] if facts["protocol"] else []
    return ", ".join(part for part in parts if part)


def _compared(group: _Group) -> str:
    """What was compared, on which data, within which budget."""
    facts = group.facts
    students = list(dict.fromkeys(str(entry.values["method"]) for entry in group.students))
    teacher = f"the frozen teacher {facts['teacher'] or 'of unknown name'}"
    teacher += f" on {facts['dataset'] or 'an unknown dataset'}"
    images = f"{number(facts['images'])} samples per row" if facts["images"] else "an unknown number of samples"
    samplers = words.listed(group.samplers)
    if not students:
        return f"Only the teacher was scored: {teacher}, sampled with {samplers}, on {images}."
    beside = f", next to the teacher sampled with {samplers}" if group.samplers else ""
    verb, each = ("was", "") if len(students) == 1 else ("were", "each ")
    return (
        f"{words.listed(students)} {verb} distilled from {teacher}, {each}within "
        f"{facts['budget'] or 'an unknown budget'}, and scored on {images}{beside}."
    )


def _facts(group: _Group) -> list[tuple[str, str]]:
    """The list of facts above a section's tables, without empty ones."""
    facts, students = group.facts, group.students
    sampled_by = f", sampled with {words.listed(group.samplers)}" if group.samplers else ""
    devices = dict.fromkeys(entry.values["device"] for entry in group.entries if entry.values["device"])
    found = [
        ("Dataset", facts["dataset"]),
        ("Teacher", f"{facts['teacher'] or ''}{sampled_by}"),
        ("Guidance", number(facts["guidance"])),
        ("Budget per method", facts["budget"] or ("not known" if students else "none: nothing is trained")),
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


# --- points and lines of charts --------------------------------------------------------------------------------------


def _point(entry: Entry, scores: Iterable[str]) -> charts.Point:
    row, nfe = entry.values, entry.values["nfe"]
    values = {name: None if row.get(name) is None else float(row[name]) for name in COSTS}
    values["nfe"] = None if nfe is None else float(nfe)
    return charts.Point(
        series=entry.label,
        label=entry.label if nfe is None else f"{entry.label}, NFE {nfe}",
        teacher=entry.is_teacher,
        device=str(row["device"] or ""),
        nfe=nfe,
        values=values,
        scores={score: (_finite(row.get(score)), *entry.interval(score)[:2]) for score in scores},
    )


def _finite(value: Any) -> float | None:
    return None if value is None or abs(float(value)) == float("inf") else float(value)


def _lines(along: list[Row], group: _Group) -> list[charts.Line]:
    """A line for each student that was scored along its training; its last point is from the table."""
    labels: dict[tuple, str] = {}
    for entry in group.entries:
        for run in entry.runs:
            labels.setdefault((entry.values["method"], entry.values["settings"], run), entry.label)

    def name_of(row: Row) -> tuple[str | None, Any, Any]:
        label = labels.get((row["method"], row["settings"], row["run"]))
        return label, row["training_seed"], row["nfe"]

    students: dict[tuple, dict[float, list[Row]]] = {}
    for row in along:
        name = name_of(row)
        if name[0] and _place(row) == group.place and row["nfe"] is not None and row["fraction"] is not None:
            students.setdefault(name, {}).setdefault(row["fraction"], []).append(row)
    for final in group.table_rows:
        if final.values["status"] == "ok" and (name := name_of(final.values)) in students:
            students[name].setdefault(1.0, []).append(final.values)
    lines = []
    for (label, seed, nfe), fractions in students.items():
        title = f"{label}, NFE {nfe}" + (f", seed {seed}" if seed is not None else "")
        points = [
            ({cost: _mean(rows, cost) for cost in SPENT}, {score: _mean(rows, score) for score in group.scores})
            for _, rows in sorted(fractions.items())
        ]
        lines.append(charts.Line(label, nfe, title, points))
    return lines


def _mean(rows: Iterable[Row], name: str) -> float | None:
    known = [value for row in rows if (value := _finite(row.get(name))) is not None]
    return sum(known) / len(known) if known else None
