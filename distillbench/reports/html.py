"""The report of one or several runs as one HTML file, which loads nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from distillbench.errors import counted
from distillbench.records.statistics import arrow
from distillbench.reports import charts, words
from distillbench.reports.entries import rows_of
from distillbench.reports.published import LABEL, published_section
from distillbench.reports.reproduce import commands
from distillbench.reports.runs import RunData
from distillbench.reports.sections import Section, make_sections
from distillbench.reports.tables import COSTS
from distillbench.reports.tuning_section import tuning_sections
from distillbench.storage.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
MOST_CONFIGS = 100  # points of a grid that are shown


def write_html(runs: Sequence[RunData], path: Path) -> None:
    """Write the report of `runs` to `path`."""
    write_text(path, html_report(runs))


def html_report(runs: Sequence[RunData]) -> str:
    """One HTML file that works offline. All text from records is escaped. Raises ValueError without a run."""
    if not runs:
        raise ValueError("a report needs a run")
    names = _names(runs)
    columns, clashes = _declared(runs, names)
    sections = make_sections(runs, names, {score: declared["direction"] for score, declared in columns.items()})
    scripts = [_script(get_plotlyjs()), _script((TEMPLATES / "report.js").read_text(encoding="utf-8"))]
    return _template().render(
        title=words.listed(names, 4),
        problems=[(name, run.problems) for name, run in zip(names, runs, strict=True) if run.problems],
        clashes=clashes,
        overview=_overview(runs, names, sections),
        sections=sections,
        tuning=tuning_sections(runs, names),
        scores=[
            (name, arrow(declared["direction"]), words.better(declared["direction"]), declared)
            for name, declared in columns.items()
        ],
        about=[(name, *words.ABOUT[name]) for name in COSTS],
        published={"rows": rows_of(published_section(runs)), "label": LABEL},
        runs=[_provenance(name, run) for name, run in zip(names, runs, strict=True)],
        several=len(runs) > 1,
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup(text) for text, _ in scripts],
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src "
        + " ".join(f"'sha256-{digest}'" for _, digest in scripts),
        ABOUT=words.ABOUT,
    )


def _template() -> jinja2.Template:
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["plotly"] = charts.safe  # the name of a trace as it is in the chart
    return templates.get_template("report.html.j2")


def _script(text: str) -> tuple[str, str]:
    """The script as it stands in the file, and its hash, by which the page's policy allows it and no other."""
    text = "\n" + text.replace("\r\n", "\n").replace("\r", "\n").replace("</script", "<\\/script") + "\n"
    return text, base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _names(runs: Sequence[RunData]) -> list[str]:
    """The runs' names, numbered where two are equal."""
    names = [run.name for run in runs]
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


def _declared(runs: Sequence[RunData], names: Sequence[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
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
    lines = [f"{counted(rows, 'row')} of {of}, {f'{bad:,} of them not' if bad else 'all'} ok."]
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
        "commands": commands(run.configs)[:MOST_CONFIGS],
    }
