"""Points and curves of charts from the rows of a section."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from distillbench.reports import charts, words
from distillbench.reports.entries import Entry, Row
from distillbench.reports.tables import COSTS


def point(entry: Entry, scores: Iterable[str]) -> charts.Point:
    row, nfe = entry.values, entry.values["nfe"]
    values = {name: None if row.get(name) is None else float(row[name]) for name in COSTS}
    values["nfe"] = None if nfe is None else float(nfe)
    return charts.Point(
        series=entry.label,
        label=entry.label if nfe is None else f"{entry.label}, NFE {nfe}",
        teacher=entry.is_teacher,
        nfe=nfe,
        values=values,
        scores={score: (_finite(row.get(score)), *entry.interval(score)[:2]) for score in scores},
    )


def _finite(value: Any) -> float | None:
    return None if value is None or abs(float(value)) == float("inf") else float(value)


def curves_of(
    along: Sequence[Row], entries: Sequence[Entry], rows: Sequence[Row], scores: Sequence[str], costs: Sequence[str]
) -> list[charts.Curve]:
    """A curve for each method and number of evaluations that was scored along its training, over its seeds.

    `along`: rows of the section; `rows`: those of the table, from which the last point is. At each fraction of the
    budget, a seed's value is its mean over sampling seeds.
    """
    labels: dict[tuple, str] = {}
    for entry in entries:
        for run in entry.runs:
            labels.setdefault((entry.values["method"], entry.values["settings"], run), entry.label)

    def name_of(row: Row) -> tuple[str | None, Any]:
        return labels.get((row["method"], row["settings"], row["run"])), row["nfe"]

    found: dict[tuple, dict[float, dict[Any, list[Row]]]] = {}
    for row in along:
        name = name_of(row)
        if name[0] and row["nfe"] is not None and row["fraction"] is not None:
            found.setdefault(name, {}).setdefault(row["fraction"], {}).setdefault(row["training_seed"], []).append(row)
    for final in rows:
        if final["status"] == "ok" and (name := name_of(final)) in found:
            found[name].setdefault(1.0, {}).setdefault(final["training_seed"], []).append(final)
    return [_curve(str(label), nfe, fractions, scores, costs) for (label, nfe), fractions in found.items()]


def _curve(
    label: str, nfe: int, fractions: dict[float, dict[Any, list[Row]]], scores: Sequence[str], costs: Sequence[str]
) -> charts.Curve:
    points = []
    for _, seeds in sorted(fractions.items()):
        rows = [row for several in seeds.values() for row in several]
        values = {score: _spread([_mean(several, score) for several in seeds.values()]) for score in scores}
        points.append(({cost: _mean(rows, cost) for cost in costs}, values))
    most = max(len(seeds) for seeds in fractions.values())
    return charts.Curve(label, nfe, most, points, sorted(fractions))


def _spread(values: Iterable[float | None]) -> charts.Mean:
    """The mean, the smallest and the largest of the known values."""
    known = [value for value in values if value is not None]
    return (sum(known) / len(known), min(known), max(known)) if known else (None, None, None)


def along_notes(curves: Sequence[charts.Curve]) -> list[str]:
    single = [f"{c.series} (NFE {c.nfe})" for c in curves if len(c.points) == 1]
    if not single:
        return []
    has = "has one point: it was" if len(single) == 1 else "have one point each: they were"
    return [f"{words.listed(single)} {has} scored at this NFE at the end only."]


def _mean(rows: Iterable[Row], name: str) -> float | None:
    known = [value for row in rows if (value := _finite(row.get(name))) is not None]
    return sum(known) / len(known) if known else None
