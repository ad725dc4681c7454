"""`distillbench leaderboard`: a site of pages about several runs, which need no server of their own and no network.

Rows are compared within boards: the groups of rows that may be compared, as in a report. Of what several runs measured,
a board has the rows of the newest run; the page of a method has those of all runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from distillbench.errors import UserError, counted
from distillbench.records.statistics import KEYS, TEACHER, summarise
from distillbench.reports import words
from distillbench.reports.answer import Answers
from distillbench.reports.cost_ties import cost_ties
from distillbench.reports.differences import environments, versions
from distillbench.reports.entries import Entry, key_without_images, rows_of
from distillbench.reports.groups import Group, compared, group_answers, heading, make_groups, title
from distillbench.reports.histories import History, history
from distillbench.reports.html import TEMPLATES, Scripts, declared_scores, html_report, names_of, style, template
from distillbench.reports.labels import Labels
from distillbench.reports.runs import FILES, RunData, read_run
from distillbench.reports.tables import Comparison, Lead, Table, comparison_table
from distillbench.storage.files import check_writable, write_text

GENERATOR = '<meta name="generator" content="distillbench leaderboard">'  # in each page: these may be written again
RUNS, METHODS = "runs", "methods"  # folders of pages
UNKNOWN_DATE = "not recorded"


@dataclass(frozen=True)
class Listed:
    """A run as the site lists it."""

    run: RunData
    name: str
    page: str  # relative to the site
    date: str  # YYYY-MM-DD, of merged runs the latest; "" if not recorded
    version: str


@dataclass(frozen=True)
class Board:
    """Rows that may be compared. `free`: the answers for methods that need no data, if the rows say which do."""

    id: str
    dataset: str
    teacher: str
    title: str
    summary: str
    answers: Answers | None
    free: Answers | None
    others: list[Answers]
    table: Table
    ties: str  # what is known of differences of measured costs


@dataclass(frozen=True)
class MethodPage:
    """All that runs measured of one method. `histories`: one for each group of rows that may be compared."""

    name: str
    label: str
    long: str
    page: str
    free: str  # whether it needs no data: yes, no or ""
    leads: list[str]  # where it is in a leading group
    histories: list[History]

    @property
    def runs(self) -> int:
        return len({run for one in self.histories for run in one.runs})


def leaderboard(folders: Sequence[str], output: str, console: Console) -> None:
    """Write the site of the runs in `folders` to the folder `output`.

    A folder of runs, such as results/, stands for all runs in it. Raises UserError if there is none, and if `output`
    has pages that are not of an earlier site.
    """
    runs = [read_run(folder) for folder in _runs_in(folders)]
    for run in runs:
        for problem in [*run.problems, *run.notes]:
            click.echo(f"{run.name}: {problem}", err=True)
    target = Path(output)
    check_writable(target, "--output")
    pages = site(runs)
    _refuse_others(target, pages)
    for name, text in pages.items():
        write_text(target / name, text)
    for old in _stale(target, pages):
        old.unlink()
    console.print(f"written: {target / 'index.html'} and {counted(len(pages) - 1, 'page')}", soft_wrap=True)


def site(runs: Sequence[RunData]) -> dict[str, str]:
    """The pages of the site by their names, such as runs/digits.html. Raises UserError if no run has a row."""
    if not any(len(run.table) for run in runs):
        raise UserError(f"there is no row to show: {words.listed([run.name for run in runs])} finished no cell")
    names = names_of(runs)
    listed = _listed(runs, names)
    columns, clashes = declared_scores(runs, names)
    directions = {score: told["direction"] for score, told in columns.items()}
    newest = _newest(listed, directions)
    pages = _file_names(_methods(runs), METHODS)
    boards = _boards(make_groups([one.run for one in newest], names, directions), listed, pages)
    methods = _method_pages(listed, boards, pages, directions)
    shared = _Shared()
    problems = [(one, [*one.run.problems, *one.run.notes]) for one in listed if one.run.problems or one.run.notes]
    found = {
        "index.html": shared.page(
            "leaderboard.html.j2", "", boards=boards, runs=listed, methods=methods, problems=problems, clashes=clashes,
            choices=_choices(boards), unknown_date=UNKNOWN_DATE, table_counts=[len(one.run.table) for one in listed],
        )
    }  # fmt: skip
    for method in methods:
        found[method.page] = shared.page("method.html.j2", "../", method=method)
    for one in listed:
        found[one.page] = html_report([one.run], home="../index.html").replace("<head>", f"<head>\n{GENERATOR}", 1)
    return found


class _Shared:
    """Style and scripts that pages without charts have in common."""

    def __init__(self) -> None:
        self.scripts = Scripts.of(TEMPLATES / "tables.js", TEMPLATES / "leaderboard.js")
        self.style = style()

    def page(self, name: str, up: str, **parts: Any) -> str:
        """A page in a folder from which `up` leads to the site's."""
        text = template(name).render(
            up=up, style=self.style, scripts=self.scripts.texts, policy=self.scripts.policy, **parts
        )
        return text.replace("<head>", f"<head>\n{GENERATOR}", 1)


# --- runs ------------------------------------------------------------------------------------------------------------


def _runs_in(folders: Sequence[str]) -> list[Path]:
    """The runs' folders: those named, and those in folders of runs."""
    found: list[Path] = []
    for name in folders:
        folder = Path(name)
        inside = sorted(path for path in folder.iterdir() if _is_run(path)) if folder.is_dir() else []
        if folder.is_dir() and not _is_run(folder) and not inside:
            raise UserError(f"{name!r} is not a run and has none in it: no folder there has one of {', '.join(FILES)}")
        found += inside if inside and not _is_run(folder) else [folder]
    unique: dict[Path, Path] = {}
    for folder in found:
        unique.setdefault(folder.resolve(), folder)
    return list(unique.values())


def _is_run(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in FILES)


def _listed(runs: Sequence[RunData], names: Sequence[str]) -> list[Listed]:
    pages = _file_names(names, RUNS)
    found = []
    for run, name in zip(runs, names, strict=True):
        dates = [
            str(one["date"]) for one in environments(run) if re.fullmatch(r"\d{4}-\d\d-\d\d", str(one.get("date")))
        ]
        found.append(Listed(run, name, pages[name], max(dates, default=""), ", ".join(versions(run))))
    return found


def _newest(listed: Sequence[Listed], directions: Mapping[str, str]) -> list[Listed]:
    """The runs with the rows that boards show: each measurement as the newest run has it that has it without failures.

    Runs of the same day, or without a date, are in the order in which they were given.
    """
    place: dict[tuple, tuple] = {}
    for at, one in enumerate(listed):
        for row in rows_of(one.run.table):
            key, rank = key_without_images(row), (row["status"] == "ok", one.date, at)
            place[key] = max(place.get(key, rank), rank)
    found = []
    for at, one in enumerate(listed):
        keys = [key_without_images(row) for row in rows_of(one.run.table[KEYS])]
        table = one.run.table[[place[key][2] == at for key in keys]].reset_index(drop=True)
        summary = table
        if len(table):
            unique = table.drop_duplicates([*KEYS, "training_seed", "sampling_seed"])
            summary = summarise(unique, {name: directions[name] for name in one.run.columns})
        found.append(replace(one, run=replace(one.run, table=table, summary=summary, along=one.run.along.iloc[:0])))
    return found


def _methods(runs: Sequence[RunData]) -> list[str]:
    """The students' methods of all runs."""
    names = {str(name) for run in runs for name in run.table["method"].dropna()}
    return sorted(name for name in names if not name.startswith(TEACHER))


# --- boards ----------------------------------------------------------------------------------------------------------


def _boards(groups: Sequence[Group], listed: Sequence[Listed], pages: Mapping[str, str]) -> list[Board]:
    found = []
    short = [heading(group) for group in groups]
    titles = [title(group, True) if short.count(own) > 1 else own for own, group in zip(short, groups, strict=True)]
    for number, group in enumerate(groups, 1):
        main, others = group_answers(group)
        needs = [_is_free(entry) for entry in group.students]
        free = None
        if "yes" in needs and "no" in needs:
            kept = [entry for entry in group.entries if entry.is_teacher or _is_free(entry) == "yes"]
            free = group_answers(group.only(kept))[0]
        ties, said_of_ties = cost_ties(group.entries, group.labels)
        facts = group.facts
        dataset, teacher = str(facts["dataset"] or "unknown dataset"), str(facts["teacher"] or "unknown teacher")
        more = [f"guidance {words.number(facts['guidance'])}"] if facts["guidance"] is not None else []
        more += [f"protocol {facts['protocol']}"] if facts["protocol"] else []
        found.append(
            Board(
                f"b{number}", dataset, teacher, titles[number - 1],
                " · ".join([compared(group), *more]), main, free, others,
                board_table(f"b{number}-table", group, listed, pages, [main, *others], ties), said_of_ties,
            )
        )  # fmt: skip
    return found


def board_table(
    id_: str, group: Group, listed: Sequence[Listed], pages: Mapping[str, str], answers: Iterable[Answers | None],
    ties: Mapping[str, list[bool]], up: str = "",
) -> Table:  # fmt: skip
    """The table of a group's entries, with links, leading groups and the attributes that filters need.

    `ties`: of measured costs, by `cost_ties`.
    """
    rows = ((a.score, row) for a in answers if a for row in a.rows if len(row.ranked) > 1)
    leading = {(score, row.nfe, one.label) for score, row in rows for one in row.leading}
    leads: dict[str, list[Lead | None]] = {
        score: ["group" if (score, e.values["nfe"], e.label) in leading else None for e in group.entries]
        for score in group.scores
    }
    table = comparison_table(id_, Comparison(group.entries, group.scores, leads, True, group.labels, ties))
    of = {one.name: one.page for one in listed}
    for column, told in enumerate(table.columns):
        for row, entry in zip(table.rows, group.entries, strict=True):
            method, runs = str(entry.values["method"]), sorted(entry.runs)
            if told.name == "method" and method in pages:
                row[column].href = up + pages[method]
            if told.name == "run" and len(runs) == 1 and runs[0] in of:
                row[column].href = up + of[runs[0]]
        if told.name == "run":
            told.shown = len(listed) > 1
    table.attributes[:] = [
        {"nfe": words.number(entry.values["nfe"]), "free": "teacher" if entry.is_teacher else _is_free(entry)}
        for entry in group.entries
    ]
    return table


def _is_free(entry: Entry) -> str:
    """Whether a method was trained without data: yes, no, or "" if the rows do not say what it was trained on."""
    inputs = {str(row["inputs"]) for row in entry.behind if words.is_known(row.get("inputs"))}
    return "" if not inputs else "no" if any("data" in re.findall(r"\w+", text) for text in inputs) else "yes"


def _choices(boards: Sequence[Board]) -> dict[str, list[str]]:
    """What the filters offer."""
    evaluations = {one["nfe"] for board in boards for one in board.table.attributes if one["nfe"]}
    return {
        "dataset": sorted({board.dataset for board in boards}),
        "teacher": sorted({board.teacher for board in boards}),
        "nfe": sorted(evaluations, key=lambda text: float(text.replace(",", ""))),
        "free": sorted({one["free"] for board in boards for one in board.table.attributes} - {"teacher", ""}),
    }


# --- methods ---------------------------------------------------------------------------------------------------------


def _method_pages(
    listed: Sequence[Listed], boards: Sequence[Board], pages: Mapping[str, str], directions: Mapping[str, str]
) -> list[MethodPage]:  # fmt: skip
    ordered = sorted(listed, key=lambda one: one.date, reverse=True)
    groups = [(one, group) for one in ordered for group in make_groups([one.run], [one.name], directions)]
    labels = Labels.of(one.run.labels for one in listed)
    found = []
    for name, page in pages.items():
        mine = [(one, group.only([e for e in group.entries if e.values["method"] == name])) for one, group in groups]
        mine = [(one, group) for one, group in mine if group.entries]
        free = {_is_free(entry) for _, group in mine for entry in group.entries} - {""}
        label = labels.method_label(name)
        leads = [
            f"{board.dataset}, {board.answers.heading.split(' (')[0]}, NFE {row.nfe}"
            for board in boards if board.answers
            for row in board.answers.rows
            if len(row.ranked) > 1 and any(one.method == name for one in row.leading)
        ]  # fmt: skip
        sure = free.pop() if len(free) == 1 else ""
        histories = history([(one.name, f"../{one.page}", one.date, one.version, group) for one, group in mine])
        found.append(MethodPage(name, label.short, label.long, page, sure, list(dict.fromkeys(leads)), histories))
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def _file_names(names: Sequence[str], folder: str) -> dict[str, str]:
    """A page in `folder` for each name; unique also where the case of letters does not matter."""
    found: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:80] or "_"
        while f"{folder}/{stem}.html".lower() in {page.lower() for page in found.values()}:
            stem += "_"
        found[name] = f"{folder}/{stem}.html"
    return found


def _refuse_others(target: Path, pages: Iterable[str]) -> None:
    for name in pages:
        if (target / name).is_file() and not _is_ours(target / name):
            raise UserError(
                f"{str(target / name)!r} is no page of a leaderboard and would be overwritten. "
                "Possible: another folder for --output"
            )


def _stale(target: Path, pages: Iterable[str]) -> list[Path]:
    """Pages of an earlier site that this one does not have."""
    kept = {target / name for name in pages}
    found = [page for folder in (RUNS, METHODS) for page in (target / folder).glob("*.html")]
    return [page for page in found if page not in kept and _is_ours(page)]


def _is_ours(page: Path) -> bool:
    with page.open(encoding="utf-8", errors="replace") as file:
        return GENERATOR in file.read(1000)
