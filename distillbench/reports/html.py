"""The report of one or several runs as one HTML file, which fetches nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from distillbench.files import write_atomically
from distillbench.reports import charts, pictures, words
from distillbench.reports.published import LABEL, published_section
from distillbench.reports.runs import RunData
from distillbench.reports.words import heading, is_known, number
from distillbench.statistics import COMPARABLE, KEYS, TEACHER, arrow, leaders
from distillbench.table import LAST

TEMPLATES = Path(__file__).parent / "templates"
GROUP = [name for name in COMPARABLE if name != "nfe"]  # of rows in one section
COSTS = [n for n in LAST if n.startswith(("train_", "sample_"))]
SHOWN = ("sample_latency_p50_ms", "train_seconds", "train_teacher_nfe")  # costs that the table begins with
SPENT = ["train_images", "train_seconds", "train_teacher_nfe", "train_student_nfe", "train_tflops", "train_joules"]
BARS = [n for n in COSTS if n.endswith(("_mib", "_joules"))]
TEXTS = ("run", "dataset", "teacher", "method", "settings", "status", "reason", "device", "key")

Row = dict[str, Any]


@dataclass
class Cell:
    text: str
    value: float | str | None = None  # to sort by; None comes last
    below: str = ""
    kind: str = ""  # best, failed, none
    title: str = ""


@dataclass
class Column:
    name: str
    heading: str
    title: str
    shown: bool
    is_text: bool
    first: str = "ascending"  # how the first click sorts
    empty: str = ""  # why nothing is in it, where nothing is


@dataclass
class Table:
    id: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]

    @property
    def hidden(self) -> list[int]:
        """The places of the columns that are not shown at first, from 1."""
        return [place for place, column in enumerate(self.columns, 1) if not column.shown]


@dataclass
class Section:
    """Rows that may be compared: equal in GROUP, but for the teacher's, which no budget was spent on."""

    id: str
    title: str
    facts: list[tuple[str, str]]
    sentences: list[str]
    failures: list[str]
    remarks: list[str]  # what must be known of rows that are ok
    leading: list[dict[str, Any]]
    nfes: list[int]
    table: Table
    quality: list[tuple[str, charts.Chart]]
    along: charts.Chart | None
    bars: list[tuple[str, charts.Chart]]
    legend: list[tuple[str, str]]  # series and their colours
    empty: list[tuple[str, str]]  # costs that nobody has, and why
    grid: pictures.Grid | None
    details: Table
    notes: list[str] = field(default_factory=list)


def write_html(runs: Sequence[RunData], path: Path) -> None:
    """Write the report of `runs` to `path`."""
    text = html_report(runs)
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def html_report(runs: Sequence[RunData]) -> str:
    """One HTML file: it opens anywhere, offline. Whatever comes from records is escaped. Needs one run at least."""
    if not runs:
        raise ValueError("a report needs a run")
    names = _names(runs)
    columns: dict[str, dict[str, str]] = {}
    clashes = []
    for name, run in zip(names, runs, strict=True):
        for score, told in run.columns.items():
            if columns.setdefault(score, told) != told:
                clashes.append(f"{name}: {score} is declared otherwise than in {names[0]}")
    directions = {score: told["direction"] for score, told in columns.items()}
    sections = _sections(runs, names, directions)
    loader = jinja2.FileSystemLoader(TEMPLATES)
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["plotly"] = charts.safe  # a trace's name as the chart has it
    scripts = [_script(get_plotlyjs()), _script((TEMPLATES / "report.js").read_text(encoding="utf-8"))]
    return templates.get_template("report.html.j2").render(
        title=words.listed(names, 4),
        problems=[(name, run.problems) for name, run in zip(names, runs, strict=True) if run.problems],
        clashes=clashes,
        overview=_overview(runs, names, sections),
        sections=sections,
        scores=[
            (name, arrow(told["direction"]), words.better(told["direction"]), told) for name, told in columns.items()
        ],
        about=[(name, *words.ABOUT[name]) for name in COSTS],
        published={"rows": _rows(published_section(runs)), "label": LABEL},
        runs=[_provenance(name, run) for name, run in zip(names, runs, strict=True)],
        several=len(runs) > 1,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(text) for text, _ in scripts],
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src "
        + " ".join(f"'sha256-{digest}'" for _, digest in scripts),
        ABOUT=words.ABOUT,
    )


def _script(text: str) -> tuple[str, str]:
    """The script as it stands in the file, and its hash, by which the page allows it and no other."""
    text = "\n" + text.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script") + "\n"
    return text, base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _names(runs: Sequence[RunData]) -> list[str]:
    """The runs' names; numbered where two have the same."""
    names: list[str] = []
    for run in runs:
        twice = sum(other.name == run.name for other in runs) > 1
        names.append(f"{run.name} ({len(names) + 1})" if twice else run.name)
    return names


# --- sections --------------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """A cell as a plain value: None for nothing."""
    if not is_known(value):
        return None
    return value.item() if hasattr(value, "item") else value


def _rows(frame: pd.DataFrame) -> list[Row]:
    columns = {name: [_plain(v) for v in frame[name].astype(object).tolist()] for name in frame}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _place(row: Mapping[str, Any]) -> tuple:
    return tuple(row.get(name) for name in GROUP)


def _sections(runs: Sequence[RunData], names: Sequence[str], directions: dict[str, str]) -> list[Section]:
    frames, tables, alongs = [], [], []
    for name, run in zip(names, runs, strict=True):
        if "status" in run.summary and "training_seeds" in run.summary and len(run.table):
            seen: dict[tuple, int] = {}  # in the order of the run
            for row in _rows(run.table[KEYS]):
                seen.setdefault(_loose(row), len(seen))
            at = pd.Series([seen.get(_loose(row), len(seen)) for row in _rows(run.summary[KEYS])], dtype=int)
            frames.append(run.summary.iloc[at.argsort(kind="stable")].assign(run=name))
        tables += [(run, {**row, "run": name}) for row in _rows(run.table)]
        alongs += [{**row, "run": name} for row in _rows(run.along)]
    if not frames:
        return []
    summary = pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0].reset_index(drop=True)
    summary = _merged(summary)
    rows = _rows(summary)
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(_place(row), []).append(i)
    homes = _homes(groups, rows)
    return [
        _section(f"s{i}", place, summary.iloc[own], tables, alongs, directions, len(homes) > 1, len(runs) > 1)
        for i, (place, own) in enumerate(homes, 1)
    ]


def _loose(row: Mapping[str, Any]) -> tuple:
    """What a row of the summary and its rows of the table have in common; a failed row may not know its images."""
    return tuple(_plain(row.get(name)) for name in KEYS if name != "images")


def _merged(summary: pd.DataFrame) -> pd.DataFrame:
    """Rows that are equal in all but the run, as of a cell that two runs share, once."""
    rest = [name for name in summary if name != "run"]
    known = summary[rest].astype(object).where(summary[rest].notna(), None)
    names: dict[tuple, list[str]] = {}
    first = []
    for values, run in zip(known.itertuples(index=False, name=None), summary["run"], strict=True):
        first.append(values not in names)
        names.setdefault(values, []).append(run)
    kept = summary[first].reset_index(drop=True)
    return kept.assign(run=[", ".join(dict.fromkeys(runs)) for runs in names.values()])


def _homes(groups: dict[tuple, list[int]], rows: list[Row]) -> list[tuple[tuple, list[int]]]:
    """Which rows each section has: the teacher's come to every budget, failed ones to every number of images."""
    budget, images = GROUP.index("budget"), GROUP.index("images")
    baselines = {p: at for p, at in groups.items() if all(str(rows[i]["method"]).startswith(TEACHER) for i in at)}
    lost = {p: at for p, at in groups.items() if p[images] is None and p not in baselines}

    def but(place: tuple, *without: int) -> tuple:
        return tuple(value for i, value in enumerate(place) if i not in without)

    students = {p: list(at) for p, at in groups.items() if p not in baselines and p not in lost}
    for place, at in lost.items():
        found = [p for p in students if but(p, images) == but(place, images)]
        if not found:  # nothing else of its kind: its images are those of a teacher's rows, if there are any
            beside = [p for p in baselines if but(p, budget, images) == but(place, budget, images)]
            found = [(*p[:budget], place[budget], *p[budget + 1 :]) for p in beside] or [place]
        for p in found:
            students.setdefault(p, []).extend(at)
    for place, at in baselines.items():
        found = [p for p in students if but(p, budget) == but(place, budget)]
        for p in found:
            students[p] = [*at, *students[p]]
        if not found:
            students[place] = list(at)
    return list(students.items())


def _labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row's method that tells it from others: with settings, device and run where these differ."""
    names = [str(row["method"]) for row in rows]
    for column in ("settings", "device", "run"):
        values: dict[str, set] = {}
        for name, row in zip(names, rows, strict=True):
            values.setdefault(name, set()).add(row.get(column))
        names = [
            f"{n} [{row[column]}]" if len(values[n]) > 1 and row.get(column) else n
            for n, row in zip(names, rows, strict=True)
        ]
    return names


def _section(
    name: str, place: tuple, summary: pd.DataFrame, tables: list[tuple[RunData, Row]], alongs: list[Row],
    directions: dict[str, str], several: bool, runs: bool,
) -> Section:  # fmt: skip
    images = place[GROUP.index("images")]  # of rows that failed before they knew it, too
    summary = summary.reset_index(drop=True)
    summary = summary if images is None else summary.assign(images=summary["images"].fillna(images))
    rows = _rows(summary)
    scores = {s: d for s, d in directions.items() if f"{s}_missing" in summary}
    labels = _labels(rows)
    of_run = [set(str(row["run"]).split(", ")) if runs else {row["run"]} for row in rows]
    index: dict[tuple, list[int]] = {}
    for at, row in enumerate(rows):
        index.setdefault(_loose(row), []).append(at)
    own: list[list[Row]] = [[] for _ in rows]
    with_runs: list[tuple[RunData, str, Row]] = []
    for run, row in tables:
        for at in index.get(_loose(row), []):
            fits = row["images"] == rows[at]["images"] or row["images"] is None or rows[at]["images"] is None
            if fits and row["run"] in of_run[at]:
                own[at].append(row)
                with_runs.append((run, labels[at], row))
                break
    facts = dict(zip(GROUP, place, strict=True))
    marks = {s: leaders(summary, s, d).tolist() for s, d in scores.items()}
    found = words.leading(summary, labels, scores)
    style = charts.styles(list(dict.fromkeys(labels)))
    points = [_point(row, label, scores) for row, label in zip(rows, labels, strict=True)]
    by_label: dict[tuple, str] = {}
    for row, label in zip(rows, labels, strict=True):
        for one in str(row["run"]).split(", ") if runs else [row["run"]]:
            by_label.setdefault((row["method"], row["settings"], one), label)
    lines = _lines(alongs, [row for _, _, row in with_runs], place, by_label, scores)
    quality = [
        (title, chart)
        for title, costs in (("NFE", ["nfe"]), ("latency", ["sample_latency_p50_ms"]), ("training cost", SPENT))
        if (chart := charts.quality(points, costs, scores, style))
    ]
    kinds = {"Training": "train_", "Sampling": "sample_"}
    bars = [
        (title, chart)
        for title, start in kinds.items()
        if (chart := charts.bars(points, [c for c in BARS if c.startswith(start)], style))
    ]
    many = len(style) > charts.MOST_SERIES
    return Section(
        id=name,
        title=_title(facts, several),
        facts=_facts(facts, rows, runs),
        sentences=[_compared(facts, rows), *words.conclusion(found)],
        failures=_failures(rows, labels, own),
        remarks=_remarks(rows, labels, own),
        leading=found,
        nfes=sorted({int(str(one["nfe"])) for one in found}),
        table=_comparison(name, rows, labels, own, scores, marks, runs),
        quality=quality,
        along=charts.along_training(lines, scores, style),
        bars=bars,
        legend=[] if many else [(label, style[label][0]) for label in style],
        empty=[(heading(c), _why_all(c, own)) for c in BARS if not any(row.get(c) is not None for row in rows)],
        grid=pictures.grid(with_runs),
        details=_details(name, with_runs, scores, runs),
        notes=[f"{len(style):,} methods share one colour: {charts.MOST_SERIES} are told apart"] if many else [],
    )


def _title(facts: dict[str, Any], several: bool) -> str:
    parts = [str(facts["dataset"] or "unknown dataset"), str(facts["teacher"] or "")]
    if several:
        parts += [str(facts["budget"] or "teacher alone")]
        parts += [f"{number(facts['images'])} images"] if facts["images"] else []
        parts += [f"guidance {number(facts['guidance'])}"] if facts["guidance"] is not None else []
        parts += [f"protocol {facts['protocol']}"] if facts["protocol"] else []
    return ", ".join(part for part in parts if part)


def _compared(facts: dict[str, Any], rows: list[Row]) -> str:
    """What was compared, on what, at what budget."""
    methods = dict.fromkeys(str(row["method"]) for row in rows)
    students = [method for method in methods if not method.startswith(TEACHER)]
    samplers = [method.removeprefix(TEACHER) for method in methods if method.startswith(TEACHER)]
    teacher = (
        f"the frozen teacher {facts['teacher'] or 'of unknown name'} on {facts['dataset'] or 'an unknown dataset'}"
    )
    images = f"{number(facts['images'])} samples a row" if facts["images"] else "an unknown number of samples"
    if not students:
        return f"Scored: {teacher} alone, sampled by {words.listed(samplers)}, on {images}."
    beside = f" beside the teacher's own samples by {words.listed(samplers)}" if samplers else ""
    verb = "was" if len(students) == 1 else "were"
    each = "each " if len(students) > 1 else ""
    return (
        f"{words.listed(students)} {verb} distilled from {teacher}, {each}within "
        f"{facts['budget'] or 'an unknown budget'}, and scored on {images}{beside}."
    )


def _facts(facts: dict[str, Any], rows: list[Row], runs: bool) -> list[tuple[str, str]]:
    students = [row for row in rows if not str(row["method"]).startswith(TEACHER)]
    alone = [str(row["method"]) for row in rows if str(row["method"]).startswith(TEACHER)]
    teachers = list(dict.fromkeys(name.removeprefix(TEACHER) for name in alone))
    trained = sorted({row["training_seeds"] or 0 for row in students if row["status"][:2] != "0 "})
    sampled = sorted({row["sampling_seeds"] or 0 for row in rows if row["status"][:2] != "0 "})
    told = [
        ("Dataset", facts["dataset"]),
        ("Teacher", f"{facts['teacher'] or ''}" + (f", sampled by {words.listed(teachers)}" if teachers else "")),
        ("Guidance", number(facts["guidance"])),
        ("Budget of each", facts["budget"] or ("none: nothing is trained" if not students else "not known")),
        ("Samples a row", number(facts["images"])),
        ("Training seeds", _span(trained) if students else ""),
        ("Sampling seeds", _span(sampled)),
        ("Protocol", facts["protocol"] or "not known"),
        ("Device", words.listed(dict.fromkeys(row["device"] for row in rows if row["device"]))),
        ("Runs", words.listed(dict.fromkeys(row["run"] for row in rows)) if runs else ""),
    ]
    return [(name, str(text)) for name, text in told if is_known(text)]


def _span(numbers: list[int]) -> str:
    return "" if not numbers else str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _failures(rows: list[Row], labels: list[str], own: list[list[Row]]) -> list[str]:
    found = []
    for row, label, of_table in zip(rows, labels, own, strict=True):
        if row["status"] == "ok":
            continue
        nfe = f" at NFE {row['nfe']}" if row["nfe"] is not None else ""
        found.append(f"{label}{nfe}: {row['status']}. {_reasons(of_table) or 'No reason given.'}")
    return list(dict.fromkeys(found))


def _remarks(rows: list[Row], labels: list[str], own: list[list[Row]]) -> list[str]:
    """What must be known of rows, with the rows of each."""
    told: dict[str, list[str]] = {}
    for row, label, of_table in zip(rows, labels, own, strict=True):
        for note in dict.fromkeys(r["note"] for r in of_table if is_known(r.get("note"))):
            told.setdefault(note, []).append(f"{label} at NFE {row['nfe']}")
    return [f"{words.listed(dict.fromkeys(named))}: {note}" for note, named in told.items()]


def _reasons(of_table: list[Row]) -> str:
    """Why rows are not ok, with their seeds."""
    told: dict[str, list[str]] = {}
    for row in of_table:
        if row["status"] != "ok":
            seed = "" if row["training_seed"] is None else f"seed {row['training_seed']}"
            why = words.other_reasons(row["reason"]) or str(row["reason"] or "no reason given")
            told.setdefault(f"{row['status'] or 'no status'}: {why}", []).append(seed)
    return "; ".join(f"{', '.join(dict.fromkeys(s for s in seeds if s))} {why}".strip() for why, seeds in told.items())


def _why_all(column: str, own: list[list[Row]]) -> str:
    whys = [words.why_empty(column, row["reason"]) for of_table in own for row in of_table]
    if column.startswith("train_"):  # of the teacher it is empty by nature
        whys = [w for w in whys if "the teacher is the baseline" not in w] or whys
    return "; ".join(dict.fromkeys(w for w in whys if w)) or "no reason recorded"


def _point(row: Row, label: str, scores: Iterable[str]) -> charts.Point:
    values = {name: None if row.get(name) is None else float(row[name]) for name in COSTS}
    values["nfe"] = None if row["nfe"] is None else float(row["nfe"])
    nfe = f", NFE {row['nfe']}" if row["nfe"] is not None else ""
    triples = {s: (_finite(row.get(s)), *_ends(row, s)[:2]) for s in scores}
    return charts.Point(
        label, label + nfe, label.startswith(TEACHER), str(row["device"] or ""), row["nfe"], values, triples
    )


def _finite(value: Any) -> float | None:
    return None if value is None or abs(float(value)) == float("inf") else float(value)


def _ends(row: Row, score: str) -> tuple[float | None, float | None, str]:
    """The interval over training seeds, else over sampling seeds, and which."""
    for source in ("training", "sampling"):
        low, high = row.get(f"{score}_{source}_low"), row.get(f"{score}_{source}_high")
        if low is not None and high is not None:
            return float(low), float(high), source
    return None, None, ""


def _lines(
    alongs: list[Row], final: list[Row], place: tuple, labels: dict[tuple, str], scores: Iterable[str]
) -> list[charts.Line]:
    """A line for each student that was scored along its training, its end taken from the table."""
    lines: dict[tuple, dict[float, list[Row]]] = {}
    for row in alongs:
        label = labels.get((row["method"], row["settings"], row["run"]))
        if label and _place(row) == place and row["nfe"] is not None and row["fraction"] is not None:
            name = (label, row["training_seed"], row["nfe"])
            lines.setdefault(name, {}).setdefault(row["fraction"], []).append(row)
    for row in final:
        label = labels.get((row["method"], row["settings"], row["run"]))
        end = (label, row["training_seed"], row["nfe"])
        if end in lines and row["status"] == "ok":
            lines[end].setdefault(1.0, []).append(row)
    found = []
    for (label, seed, nfe), fractions in lines.items():
        points: list[tuple[dict[str, float | None], dict[str, float | None]]] = []
        for _, rows in sorted(fractions.items()):
            costs = {c: _mean(row.get(c) for row in rows) for c in SPENT}
            points.append((costs, {s: _mean(row.get(s) for row in rows) for s in scores}))
        told = f"{label}, NFE {nfe}" + (f", seed {seed}" if seed is not None else "")
        found.append(charts.Line(label, nfe, told, points))
    return found


def _mean(values: Iterable[Any]) -> float | None:
    known = [float(v) for v in values if _finite(v) is not None]
    return sum(known) / len(known) if known else None


# --- tables ----------------------------------------------------------------------------------------------------------


def _comparison(
    name: str, rows: list[Row], labels: list[str], own: list[list[Row]], scores: dict[str, str],
    marks: dict[str, list[bool]], runs: bool,
) -> Table:  # fmt: skip
    """Means over seeds; every cost is a column, of which a few are shown at first."""

    def differs(column: str) -> bool:
        return len({row.get(column) for row in rows}) > 1

    columns = [Column("method", "method", words.ABOUT["method"][1], True, True)]
    columns += [_column("settings", differs("settings"), any(row["settings"] for row in rows))]
    columns += [_column("run", differs("run"))] if runs else []
    columns += [_column("nfe", True)]
    for seeds in ("training_seeds", "sampling_seeds"):
        columns.append(_column(seeds, any((row[seeds] or 0) > 1 for row in rows)))
    columns.append(_column("status", any(row["status"] != "ok" for row in rows)))
    for score, direction in scores.items():
        first = "descending" if direction == "higher" else "ascending"
        text = f"{score} {arrow(direction)}".strip()
        why = "" if any(row[score] is not None for row in rows) else _why_all(score, own)
        columns.append(Column(score, text, f"{score}: {words.better(direction)}", True, False, first, why))
    for cost in COSTS:
        there = any(row.get(cost) is not None for row in rows)
        first = "descending" if "per_second" in cost else "ascending"
        why = "" if there else _why_all(cost, own)
        columns.append(Column(cost, heading(cost), words.ABOUT[cost][1], there and cost in SHOWN, False, first, why))
    columns += [_column("device", differs("device") and len({row["device"] for row in rows if row["device"]}) > 1)]
    columns += [_column("key", False)]
    cells = []
    for at, (row, of_table) in enumerate(zip(rows, own, strict=True)):
        reasons = _reasons(of_table)
        line = []
        for column in columns:
            c = column.name
            if c in scores:
                line.append(_score_cell(row, c, marks[c][at], of_table, reasons))
            elif c == "status":
                bad = row["status"] != "ok"
                line.append(Cell(row["status"], row["status"], _cut(reasons, 160), "failed" if bad else "", reasons))
            elif c == "key":
                keys = list(dict.fromkeys(str(r["key"]) for r in of_table if r.get("key")))
                line.append(Cell(" ".join(keys), keys[0] if keys else None))
            elif c in COSTS:
                line.append(_cost_cell(row.get(c), c, of_table))
            elif column.is_text:
                line.append(Cell(str(row[c] or ""), row[c]))
            elif c == "training_seeds" and str(row["method"]).startswith(TEACHER):
                line.append(Cell("", None))
            else:
                line.append(Cell(number(row[c]), row[c]))
        cells.append(line)
    return Table(f"{name}-table", "Means over seeds, with 95 % intervals", columns, cells)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _column(name: str, shown: bool, there: bool = True) -> Column:
    told = words.ABOUT[name]
    return Column(name, told[0], told[1], shown, name in TEXTS, empty="" if there else "all have their defaults")


def _score_cell(row: Row, score: str, best: bool, of_table: list[Row], reasons: str) -> Cell:
    value = row[score]
    if value is None:
        if str(row["status"]).startswith("0 of "):
            return Cell(
                str(of_table[0]["status"]) if of_table else "failed", None, "", "failed", reasons or "no reason given"
            )
        why = "; ".join(dict.fromkeys(w for r in of_table if (w := words.why_empty(score, r["reason"]))))
        return Cell("–", None, "", "none", why or "empty, no reason recorded")
    low, high, source = _ends(row, score)
    below, title = words.interval(low, high), ""
    if below:
        how = {"t": "Student's t", "bootstrap": "bootstrap"}.get(str(row.get(f"{score}_{source}_interval")), "")
        title = f"95 % interval of the mean over {source} seeds{', ' + how if how else ''}"
        below += " (sampling)" if source == "sampling" else ""
    if row.get(f"{score}_missing"):
        title = f"{title}; {row[f'{score}_missing']} of its rows have no score".lstrip("; ")
    if best:
        title = f"leads: no other interval reaches its own. {title}"
    return Cell(number(value, low, high), float(value), below, "best" if best else "", title)


def _cost_cell(value: Any, column: str, of_table: list[Row]) -> Cell:
    if value is not None:
        return Cell(number(value), float(value))
    why = "; ".join(dict.fromkeys(w for r in of_table if (w := words.why_empty(column, r["reason"]))))
    return Cell("–", None, "", "none", why or "empty, no reason recorded")


def _details(name: str, rows: list[tuple[RunData, str, Row]], scores: dict[str, str], runs: bool) -> Table:
    """Every row of the tables, seeds apart, with the key of its record."""
    names = [*(["method"]), "settings", *(["run"] if runs else []), "training_seed", "sampling_seed", "nfe", "status"]
    names += [*scores, "key", "reason"]
    known = any(row["settings"] for _, _, row in rows)
    columns = [
        Column(n, f"{n} {arrow(scores[n])}".strip(), n, True, False)
        if n in scores
        else _column(n, known or n != "settings")
        for n in names
    ]
    cells = []
    for _, _, row in rows:
        line = []
        for n in names:
            bad = "failed" if n == "status" and row[n] != "ok" else ""
            if n in TEXTS:
                line.append(Cell(str(row.get(n) or ""), row.get(n), kind=bad))
            else:
                line.append(Cell(number(row.get(n)), row.get(n)))
        cells.append(line)
    return Table(f"{name}-rows", "Every row, seeds apart", columns, cells)


# --- words and provenance --------------------------------------------------------------------------------------------


def _overview(runs: Sequence[RunData], names: Sequence[str], sections: list[Section]) -> list[str]:
    rows = sum(len(run.table) for run in runs)
    bad = sum(int((run.table["status"].fillna("") != "ok").sum()) for run in runs)
    of = f"{words.counted(len(runs), 'run')} ({words.listed(names)})" if len(runs) > 1 else f"run {names[0]}"
    if not rows:
        return [f"There is nothing to compare: {of} has no finished row." if len(runs) == 1 else f"No row in {of}."]
    lines = [f"{words.counted(rows, 'row')} of {of}, {f'{bad:,} of them not' if bad else 'all'} ok."]
    if len(sections) > 1:
        lines.append(
            f"They fall into {len(sections)} groups that differ in dataset, teacher, guidance, images, budget or "
            "protocol: scores are not compared across groups."
        )
    return lines


def _provenance(name: str, run: RunData) -> dict[str, Any]:
    """What a run was made of: settings, environment, and the command that makes it again."""
    environment = {
        k: json.dumps(v, ensure_ascii=False) if isinstance(v, (dict, list)) else "none" if v is None else str(v)
        for k, v in run.environment.items()
    }
    commands = _commands(run.configs)
    return {
        "name": name,
        "environment": environment,
        "configs": [yaml.safe_dump(config, sort_keys=False, allow_unicode=True) for config in run.configs[:100]],
        "left_out": max(0, len(run.configs) - 100),
        "commands": commands[:100],
    }


def _commands(configs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(with the methods' settings left at their defaults where possible, every setting) for the points of a grid.

    Points that differ in the seed alone are one command.
    """
    groups: dict[str, tuple[dict[str, Any], list[Any]]] = {}
    for config in configs:
        rest = {k: v for k, v in config.items() if k != "seed"}
        groups.setdefault(json.dumps(rest, sort_keys=True, default=str), (rest, []))[1].append(config.get("seed"))
    found = []
    for config, seeds in groups.values():
        seed = [f"seed={','.join(map(str, dict.fromkeys(seeds)))}"] if any(s is not None for s in seeds) else []
        every = [*_overrides(config), *seed]
        short = [w for w in every if not re.match(_IN_LONG, w)]
        found.append(tuple("distillbench run " + " ".join(map(shlex.quote, w)) for w in (short, every)))
    return found  # type: ignore[return-value]


_IN_LONG = (
    r"methods\.|teacher\.(?!path|kind)|evaluation\.(?!images|nfe|seeds|metrics)|results_dir|threads|energy|device"
)


def _overrides(config: Mapping[str, Any]) -> list[str]:
    """Every setting as a word of the command line, the parts that are chosen by name first."""
    methods = config.get("methods") if isinstance(config.get("methods"), dict) else {}
    found = [f"methods=[{','.join(map(str, methods))}]"] if methods else []
    for part in ("dataset", "teacher"):
        of_part = config.get(part)
        if isinstance(of_part, dict) and of_part.get("kind"):
            found.append(f"{part}={of_part['kind']}")
    for key, value in config.items():
        if isinstance(value, dict):
            found += _words(
                key, {k: v for k, v in value.items() if k != "kind"} if key in ("dataset", "teacher") else value
            )
        else:
            found += _words(key, value)
    return [w for w in found if not re.match(r"methods\.[^.]+\.kind=", w)]


def _words(key: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        return [word for k, v in value.items() for word in _words(f"{key}.{k}", v)]
    return [f"{key}={_hydra(value)}"]


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_hydra, value))}]"
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_/][\w./:-]*", value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
