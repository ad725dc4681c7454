"""The report of one or several runs as one HTML file, which loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from markupsafe import Markup

from distillbench.errors import UserError, counted
from distillbench.records.statistics import arrow
from distillbench.reports import charts, words
from distillbench.reports.charts import with_unit
from distillbench.reports.entries import rows_of
from distillbench.reports.labels import Labels
from distillbench.reports.papers import paper_table
from distillbench.reports.published import LABEL, METRICS, published_section
from distillbench.reports.reproduce import commands
from distillbench.reports.runs import RunData
from distillbench.reports.sections import Section, make_sections
from distillbench.reports.tables import COSTS
from distillbench.reports.tuning_section import tuning_sections
from distillbench.storage.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
PLOTLY = TEMPLATES / "plotly-basic.min.js"  # npm plotly.js-basic-dist-min 4.1.1 (MIT): a quarter of the whole library
MARKS = {  # paths in a square of 12, of the markers in looks.SYMBOLS
    "circle": "M6 1.2a4.8 4.8 0 1 0 .01 0Z",
    "square": "M1.5 1.5h9v9h-9Z",
    "diamond": "M6 .3 11.7 6 6 11.7 .3 6Z",
    "triangle-up": "M6 1 11.5 10.8H.5Z",
    "triangle-down": "M6 11 .5 1.2h11Z",
    "cross": "M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2Z",
    "x": "M3.2 .8 6 3.6 8.8.8l2.4 2.4L8.4 6l2.8 2.8-2.4 2.4L6 8.4l-2.8 2.8L.8 8.8 3.6 6 .8 3.2Z",
    "triangle-left": "M1 6 10.8.5v11Z",
    "triangle-right": "M11 6 1.2.5v11Z",
    "hexagon": "M6 .5 10.8 3.3v5.4L6 11.5 1.2 8.7V3.3Z",
    "star": "M6 .2 7.5 4.1 11.7 4.3 8.4 7 9.5 11.1 6 8.8 2.5 11.1 3.6 7 .3 4.3 4.5 4.1Z",
}
LARGEST_DOWNLOAD = 2**21  # bytes of a table in the page
MOST_CONFIGS = 100  # points of a grid that are shown


def write_html(runs: Sequence[RunData], path: Path) -> None:
    """Write the report of `runs` to `path`."""
    write_text(path, html_report(runs))


def html_report(runs: Sequence[RunData], home: str = "") -> str:
    """One HTML file that works offline. All text from records is escaped. Raises ValueError without a run.

    `home`: the address, relative to the report, of the leaderboard that it belongs to.
    """
    if not runs:
        raise ValueError("a report needs a run")
    names = names_of(runs)
    columns, clashes = declared_scores(runs, names)
    sections = make_sections(runs, names, {score: declared["direction"] for score, declared in columns.items()})
    scripts = Scripts.of(PLOTLY, TEMPLATES / "tables.js", TEMPLATES / "report.js")
    labels = Labels.of(run.labels for run in runs)
    return template("report.html.j2").render(
        title=words.listed(names, 4),
        downloads=_downloads(runs),
        problems=[(name, run.problems) for name, run in zip(names, runs, strict=True) if run.problems],
        clashes=clashes,
        overview=_overview(runs, names, sections),
        sections=sections,
        tuning=tuning_sections(runs, names),
        scores=[
            (name, arrow(declared["direction"]), words.better(declared["direction"]), declared)
            for name, declared in columns.items()
        ],
        about=[(name, with_unit(labels.label(name)), labels.label(name).long) for name in COSTS],
        published={"rows": rows_of(published_section(runs)), "label": LABEL, "metrics": METRICS},
        runs=[_provenance(name, run) for name, run in zip(names, runs, strict=True)],
        several=len(runs) > 1,
        home=home,
        style=style(),
        scripts=scripts.texts,
        policy=scripts.policy,
    )


def template(name: str) -> jinja2.Template:
    """A template of the folder TEMPLATES; parts.html.j2 has the parts that pages share."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(default=True),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["plotly"] = charts.safe  # the name of a trace as it is in the chart
    templates.globals["MARKS"] = MARKS
    return templates.get_template(name)


def _downloads(runs: Sequence[RunData]) -> list[tuple[str, str, str]]:
    """(text, file, data URI) of the tables that the page offers: every row, and the table for a paper."""
    frames = [run.table.assign(run=run.name) if len(runs) > 1 else run.table for run in runs if len(run.table)]
    if not frames:
        return []
    offered = [("CSV of every row", "rows.csv", "text/csv", pd.concat(frames).to_csv(index=False))]
    with contextlib.suppress(UserError):  # runs that contradict each other have no common table
        offered.append(("LaTeX table", "table.tex", "text/plain", paper_table(runs, form="latex")))
    return [
        (text, file, f"data:{kind};base64," + base64.b64encode(content.encode()).decode())
        for text, file, kind, content in offered
        if len(content) <= LARGEST_DOWNLOAD
    ]


@dataclass(frozen=True)
class Scripts:
    """The scripts of a page, and the policy that allows these by their hashes and no other, and no address."""

    texts: list[Markup]
    policy: str

    @classmethod
    def of(cls, *files: Path) -> Scripts:
        texts, hashes = [], []
        for file in files:
            text = "\n" + file.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\r", "\n") + "\n"
            text = text.replace("</script", "<\\/script")
            texts.append(Markup(text))
            hashes.append(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
        policy = (
            "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; "
            f"img-src data: blob:; script-src {' '.join(hashes)}"
        )
        return cls(texts, policy)


def style() -> Markup:
    return Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))


def names_of(runs: Sequence[RunData]) -> list[str]:
    """The runs' names, numbered where two are equal."""
    names = [run.name for run in runs]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def declared_scores(runs: Sequence[RunData], names: Sequence[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """What each score declares, by the first run that has it; where other runs declare something else."""
    columns: dict[str, dict[str, str]] = {}
    clashes = []
    for name, run in zip(names, runs, strict=True):
        for score, declared in run.columns.items():
            if columns.setdefault(score, declared) != declared:
                clashes.append(f"{name}: {score} is declared differently than in {names[0]}")
    return columns, clashes


def _overview(runs: Sequence[RunData], names: Sequence[str], sections: list[Section]) -> list[str]:
    rows = sum(len(run.table) for run in runs)
    bad = sum(int((run.table["status"].fillna("") != "ok").sum()) for run in runs)
    of = f"{counted(len(runs), 'run')} ({words.listed(names)})" if len(runs) > 1 else f"run {names[0]}"
    if not rows:
        return [f"There is nothing to compare: {of} has no finished row." if len(runs) == 1 else f"No row in {of}."]
    lines = (
        [f"{counted(rows, 'row')} of {of}, {f'{bad:,} of them not' if bad else 'all'} ok."]
        if bad or len(runs) > 1
        else []
    )
    if len(sections) > 1:
        lines.append(
            f"They fall into {len(sections)} groups that differ in dataset, teacher, guidance, images, budget or "
            "protocol: scores are not compared across groups."
        )
    return lines


def _provenance(name: str, run: RunData) -> dict[str, Any]:
    """A run's settings, its environment and the commands that reproduce it."""
    environment = {
        k: json.dumps(v, ensure_ascii=False) if isinstance(v, (dict, list)) else "none" if v is None else str(v)
        for k, v in run.environment.items()
    }
    shown = run.configs[:MOST_CONFIGS]
    return {
        "name": name,
        "environment": environment,
        "configs": [yaml.safe_dump(config, sort_keys=False, allow_unicode=True) for config in shown],
        "left_out": len(run.configs) - len(shown),
        "commands": run.commands[:MOST_CONFIGS],
        "every": commands(run.configs)[:MOST_CONFIGS],
        "notes": run.notes,
    }
