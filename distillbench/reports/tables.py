"""The two tables of a section of the HTML report: the comparison of means, and every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distillbench.records.costs import spread
from distillbench.records.statistics import TEACHER
from distillbench.records.table import LAST
from distillbench.reports import words
from distillbench.reports.charts import with_unit
from distillbench.reports.entries import Entry, TableRow, why_empty, without_common
from distillbench.reports.labels import Labels
from distillbench.reports.words import number, plus_minus

COSTS = [name for name in LAST if name.startswith(("train_", "sample_"))]
SHOWN = (
    "train_tflops",
    "train_teacher_nfe",
    "train_seconds",
    "sample_latency_p50_ms",
)  # costs that are visible at first
TEXTS = ("run", "dataset", "teacher", "method", "settings", "inputs", "status", "reason", "device", "key")
SAME = 0.02  # part of a cost by which its seeds may differ without a word
NO_REASON = "empty, no reason recorded"
TIED = "cannot be told apart from the best cost at this number of evaluations"


Lead = Literal["best", "group"]
LEADS: dict[Lead, str] = {
    "best": "leads: all others are worse beyond the uncertainty",
    "group": "in the leading group: the best, or not to be told from it",
}


@dataclass
class Cell:
    text: str
    value: float | str | None = None  # to sort by; None comes last
    below: str = ""
    kind: str = ""  # best, group (in the leading group), failed, none
    title: str = ""
    href: str = ""


@dataclass
class Column:
    name: str
    heading: str
    title: str
    shown: bool
    is_text: bool
    first: str = "ascending"  # the order after the first click
    empty: str = ""  # why all cells are empty, if they are


@dataclass
class Table:
    id: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]
    baselines: list[bool]  # whether each row is of the teacher
    attributes: list[dict[str, str]] = field(default_factory=list)  # of each row, for filters

    def __post_init__(self) -> None:
        self.attributes = self.attributes or [{} for _ in self.rows]

    @property
    def hidden(self) -> list[int]:
        """The places, from 1, of the columns that are hidden at first."""
        return [place for place, column in enumerate(self.columns, 1) if not column.shown]


@dataclass(frozen=True)
class Comparison:
    """Entries that may be compared. `leads`: for each score, how each entry leads, if it does.

    `ties`: for each cost, whether an entry's cannot be told apart from the best at its number of evaluations.
    """

    entries: Sequence[Entry]
    scores: dict[str, str]  # direction by score
    leads: Mapping[str, Sequence[Lead | None]]
    several_runs: bool
    labels: Labels
    ties: Mapping[str, list[bool]] = field(default_factory=dict)  # of measured costs, by `cost_ties`

    def differs(self, column: str) -> bool:
        return len({entry.values.get(column) for entry in self.entries}) > 1

    def differs_among_students(self, column: str) -> bool:
        return len({entry.values.get(column) for entry in self.entries if not entry.is_teacher}) > 1

    def has(self, column: str) -> bool:
        return any(entry.values.get(column) is not None for entry in self.entries)


def comparison_table(id_: str, data: Comparison) -> Table:
    """Means over seeds. Every cost is a column, of which a few are visible at first."""
    columns = [*_describing(data), *_scores(data), *_costs(data), *_identifying(data)]
    rows = [[_cell(data, at, column) for column in columns] for at in range(len(data.entries))]
    teachers = [entry.is_teacher for entry in data.entries]
    return Table(id_, "Means over seeds, with 95 % intervals", columns, rows, teachers)


def every_row_table(
    id_: str, rows: Sequence[TableRow], scores: dict[str, str], several_runs: bool, labels: Labels,
    common: Sequence[tuple[bool, str]],
) -> Table:  # fmt: skip
    """Every row of the runs' tables, seeds apart, with the key of its record. Reasons in `common` are left out."""
    inputs = ["inputs"] * any(row.values.get("inputs") for row in rows)
    names = ["method", "settings", *inputs, *["run"] * several_runs, "training_seed", "sampling_seed", "nfe", "status"]
    names += [*scores, "key", "reason"]
    any_settings = any(row.values["settings"] for row in rows)
    columns = [
        _score_column(name, scores[name], labels) if name in scores
        else _column(labels, name, any_settings or name != "settings")
        for name in names
    ]  # fmt: skip
    lines = [{**row.values, "reason": without_common(row.values, common)} for row in rows]
    cells = [[_plain_cell(line, name, labels) for name in names] for line in lines]
    teachers = [str(row.values["method"]).startswith(TEACHER) for row in rows]
    return Table(id_, "Every row, seeds apart", columns, cells, teachers)


def _plain_cell(row: dict[str, Any], name: str, labels: Labels) -> Cell:
    if name == "method":
        label = labels.method_label(str(row[name]))
        return Cell(label.short, label.short, title=str(row[name]))
    if name in TEXTS:
        failed = name == "status" and row[name] != "ok"
        return Cell(str(row.get(name) or ""), row.get(name), kind="failed" if failed else "")
    return Cell(number(row.get(name)), row.get(name))


# --- columns of the comparison ---------------------------------------------------------------------------------------


def _column(labels: Labels, name: str, shown: bool, has_values: bool = True) -> Column:
    label = labels.label(name)
    empty = "" if has_values else "all have their defaults"
    return Column(name, with_unit(label), f"{label.long} ({name})", shown, name in TEXTS, empty=empty)


def _score_column(score: str, direction: str, labels: Labels, why: str = "") -> Column:
    label = labels.label(score)
    unit = f", in {label.unit}" if label.unit else ""
    title = f"{label.long}{unit} ({score}): {words.better(direction)}"
    first = "descending" if direction == "higher" else "ascending"
    return Column(score, f"{label.short} {label.arrow}".strip(), title, True, False, first, why)


def _describing(data: Comparison) -> list[Column]:
    """Columns that say what a row is."""
    rows, labels = [entry.values for entry in data.entries], data.labels
    columns = [_column(labels, "method", True)]
    columns += [_column(labels, "settings", data.differs("settings"), any(row["settings"] for row in rows))]
    columns += [_column(labels, "run", data.differs("run"))] * data.several_runs
    columns += [_column(labels, "nfe", True)]
    columns += [
        _column(labels, seeds, data.differs_among_students(seeds)) for seeds in ("training_seeds", "sampling_seeds")
    ]
    return [*columns, _column(labels, "status", any(row["status"] != "ok" for row in rows))]


def _scores(data: Comparison) -> list[Column]:
    whys = {score: "" if data.has(score) else why_empty(score, data.entries) for score in data.scores}
    return [_score_column(score, direction, data.labels, whys[score]) for score, direction in data.scores.items()]


def _costs(data: Comparison) -> list[Column]:
    """Those that are shown first, then the others."""
    columns = []
    for cost in [*SHOWN, *(cost for cost in COSTS if cost not in SHOWN)]:
        label = data.labels.label(cost)
        first = "descending" if label.arrow == "↑" else "ascending"
        shown, why = data.has(cost) and cost in SHOWN, "" if data.has(cost) else why_empty(cost, data.entries)
        columns.append(Column(cost, with_unit(label), f"{label.long} ({cost})", shown, False, first, why))
    return columns


def _identifying(data: Comparison) -> list[Column]:
    devices = {entry.values["device"] for entry in data.entries if entry.values["device"]}
    return [_column(data.labels, "device", len(devices) > 1), _column(data.labels, "key", False)]


# --- cells of the comparison -----------------------------------------------------------------------------------------


def _cell(data: Comparison, at: int, column: Column) -> Cell:
    entry, name = data.entries[at], column.name
    value = entry.values.get(name)
    if name == "method":
        label = data.labels.method_label(str(value))
        return Cell(label.short, label.short, title=label.long if label.long != label.short else str(value))
    if name in data.scores:
        return _score_cell(entry, name, data.leads[name][at])
    if name in COSTS:
        return _cost_cell(entry, name, name in data.ties and data.ties[name][at])
    if name == "status":
        reasons = entry.failures()
        below = reasons if len(reasons) <= 160 else reasons[:159] + "…"
        return Cell(str(value), value, below, "failed" if value != "ok" else "", reasons)
    if name == "key":
        keys = list(dict.fromkeys(str(row["key"]) for row in entry.behind if row.get("key")))
        return Cell(" ".join(keys), keys[0] if keys else None)
    if name == "training_seeds" and entry.is_teacher:
        return Cell("", None)
    return Cell(str(value or "") if column.is_text else number(value), value)


def _score_cell(entry: Entry, score: str, leads: Lead | None) -> Cell:
    row, value = entry.values, entry.values.get(score)
    if value is None and str(row["status"]).startswith("0 of "):
        status = str(entry.behind[0]["status"]) if entry.behind else "failed"
        return Cell(status, None, "", "failed", entry.failures() or "no reason given")
    if value is None:
        return Cell("–", None, "", "none", entry.why_empty(score) or NO_REASON)
    low, high, source = entry.interval(score)
    title, below = "", ""
    if source:
        how = {"t": "Student's t", "bootstrap": "bootstrap"}.get(str(row.get(f"{score}_{source}_interval")), "")
        title = f"{words.interval(low, high)}: 95 % interval of the mean over {source} seeds"
        title += f", {how}" if how else ""
        below = "over sampling seeds" if source == "sampling" else ""
    if row.get(f"{score}_missing"):
        title = f"{title}; {row[f'{score}_missing']} of its rows have no score".lstrip("; ")
    if leads:
        title = f"{LEADS[leads]}. {title}"
    return Cell(plus_minus(value, low, high), float(value), below, leads or "", title)


def _cost_cell(entry: Entry, cost: str, tied: bool) -> Cell:
    value = entry.values.get(cost)
    if value is None:
        return Cell("–", None, "", "none", entry.why_empty(cost) or NO_REASON)
    of = spread(entry.behind, cost)
    apart = of is not None and of.most - of.least > SAME * abs(of.most)
    below = f"{number(of.least)} to {number(of.most)}" if of is not None and apart else ""
    mark, said = (" ≈", f"{TIED}. ") if tied else ("", "")
    if of is None or of.low is None or of.high is None or of.most == of.least:
        return Cell(number(value) + mark, float(value), below, title=said.rstrip())
    title = f"{words.interval(of.low, of.high)}: 95 % interval over training seeds" + "; below their range" * apart
    return Cell(plus_minus(value, of.low, of.high) + mark, float(value), below, title=said + title)
