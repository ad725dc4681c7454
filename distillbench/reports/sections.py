"""The sections of an HTML report: rows that may be compared, with all that the page shows about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from distillbench.records.costs import disturbed
from distillbench.records.stars import Stars, stars_of
from distillbench.reports import charts, pictures, words
from distillbench.reports.answer import Answers, improving, improving_sentence
from distillbench.reports.cost_ties import cost_ties
from distillbench.reports.entries import Entry, common_reasons, why_empty
from distillbench.reports.groups import Group, compared, facts_of, group_answers, make_groups, title
from distillbench.reports.looks import Look, looks
from distillbench.reports.points import along_notes, curves_of, point
from distillbench.reports.runs import RunData
from distillbench.reports.tables import COSTS, Comparison, Lead, Table, comparison_table, every_row_table
from distillbench.reports.words import is_known, number

SPENT = ["train_tflops", "train_seconds", "train_teacher_nfe", "train_student_nfe", "train_images", "train_joules"]
SPEED = ["sample_latency_p50_ms", "sample_gflops", "nfe"]
BARS = [name for name in COSTS if name.endswith(("_mib", "_joules"))]

MOST_LEADERS = 4  # whose samples are on the first screen


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
    star: str  # what a star in it means; "" if no row can have one
    ties: str  # what is known of differences of measured costs in it
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


def make_sections(runs: Sequence[RunData], names: Sequence[str], directions: Mapping[str, str]) -> list[Section]:
    """The sections of `runs`, which are called `names`; `directions` are those of the scores."""
    groups = make_groups(runs, names, directions)
    return [_section(f"s{place}", group, len(groups) > 1) for place, group in enumerate(groups, 1)]


# --- a section -------------------------------------------------------------------------------------------------------


def _section(name: str, group: Group, several_sections: bool) -> Section:
    entries, scores = group.entries, group.scores
    stars = stars_of(group.leading, group.summary, scores)
    ties, said_of_ties = cost_ties(entries, group.labels)
    means = Comparison(entries, scores, _leads(stars), group.several_runs, group.labels, ties=ties)
    main, others = group_answers(group)
    series = {entry.label: str(entry.values["method"]) for entry in entries}
    alone = len(series) > charts.MOST_SERIES
    style = charts.Style(
        {} if alone else looks(series, group.methods), group.labels, main.leading if main is not None else ()
    )
    series_points = [point(entry, scores) for entry in entries]
    first, small = _quality(series_points, main.score if main is not None else "", [*scores], style)
    curves = curves_of(group.along, entries, [row.values for row in group.table_rows], [*scores], SPENT)
    drawn = {
        title: charts.bars(series_points, [cost for cost in BARS if cost.startswith(start)], style)
        for title, start in (("Training", "train_"), ("Sampling", "sample_"))
    }
    grid = pictures.grid([(row.run, row.label, row.values) for row in group.table_rows])
    common = common_reasons([row.values for row in group.table_rows])
    return Section(
        id=name,
        title=title(group, several_sections),
        summary=compared(group),
        facts=facts_of(group),
        sentences=_sentences(main, curves, group),
        failures=_failures(entries),
        remarks=_remarks(entries),
        answer=main,
        others=others,
        first=first,
        small=small,
        table=comparison_table(f"{name}-table", means),
        star=stars.said,
        ties=said_of_ties,
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


def _leads(stars: Stars) -> dict[str, list[Lead | None]]:
    """How each row of the summary leads on each score."""
    pairs = {score: zip(stars.marks[score], members, strict=True) for score, members in stars.groups.items()}
    return {
        score: ["best" if star else "group" if bold else None for star, bold in own] for score, own in pairs.items()
    }


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


def _sentences(main: Answers | None, curves: Sequence[charts.Curve], group: Group) -> list[str]:
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
