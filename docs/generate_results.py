"""Writes docs/samples.png and the table of docs/results.md: ``python docs/generate_results.py``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from PIL import Image

from distillbench.reports.answer import Answers
from distillbench.reports.groups import Group, group_answers, make_groups
from distillbench.reports.leaderboard import board_table
from distillbench.reports.runs import read_run
from distillbench.reports.tables import Table

DOCS = Path(__file__).resolve().parent
REFERENCE = DOCS.parent / "results" / "reference"
RUN = REFERENCE / "digits"
PAGE = DOCS / "results.md"
MARKS = "<!-- table -->\n", "<!-- end of table -->\n"
SCORES = ["fd_efficientnet_lite0", "teacher_rmse"]
COSTS = ["train_teacher_nfe", "train_student_nfe", "train_tflops"]
TOP, HEIGHT = 3, 52  # of samples-seed0.png: above its rows, and of each of them


def table() -> str:
    """Every row of the reference run: names, numbers and their rounding as in its report and in a leaderboard."""
    columns = ["method", "nfe", *SCORES, *COSTS]
    (shown,) = _boards()
    return _markdown(shown, columns, range(len(shown.rows)))


def short_table() -> str:
    """The rows at one evaluation, or at the fewest that a method has, for the README. Methods have their names."""
    (group,), (shown,) = _groups(), _boards()
    fewest: dict[str, int] = {}
    for place, entry in enumerate(group.entries):
        name = str(entry.values["method"])
        if name not in fewest or entry.values["nfe"] < group.entries[fewest[name]].values["nfe"]:
            fewest[name] = place
        shown.rows[place][0].text = name
    return _markdown(shown, ["method", *SCORES, "train_tflops", "train_teacher_nfe"], fewest.values())


def _groups() -> list[Group]:
    run = read_run(RUN)
    return make_groups([run], [run.name], run.directions)


def _boards() -> list[Table]:
    """The tables of the run's groups, as a leaderboard shows them; bold: in the leading group."""
    return [board_table(f"t{i}", group, [], {}, _answers(group), {}) for i, group in enumerate(_groups())]


def _answers(group: Group) -> list[Answers | None]:
    main, others = group_answers(group)
    return [main, *others]


def _markdown(table: Table, columns: Sequence[str], rows: Iterable[int]) -> str:
    at = {column.name: place for place, column in enumerate(table.columns)}
    places = [at[name] for name in columns if name in at]
    lines = [[table.columns[place].heading for place in places], ["---"] * len(places)]
    for row in rows:
        cells = [table.rows[row][place] for place in places]
        lines.append([f"**{cell.text}**" if cell.kind == "group" else cell.text.replace("–", "") for cell in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def page(text: str) -> str:
    """`text`, the page, with the table of today's reference runs."""
    before, after = MARKS
    return re.sub(f"{before}.*?{after}", lambda _: before + "\n" + table() + "\n" + after, text, flags=re.DOTALL)


def picture() -> Image.Image:
    """The rows of samples-seed0.png that the README shows: the teacher at 1 and most evaluations, students at 1."""
    whole = Image.open(RUN / "samples-seed0.png").convert("RGB")
    table = pd.read_csv(RUN / "table.csv")
    shown_rows = table[table["training_seed"].isna() | (table["training_seed"] == 0)].reset_index()
    teacher = shown_rows["method"].str.startswith("teacher:")
    best = shown_rows.index == shown_rows[teacher]["nfe"].idxmax()
    rows = shown_rows.index[(shown_rows["nfe"] == 1) | best].tolist()
    shown = Image.new("RGB", (whole.width, HEIGHT * len(rows) + 2 * TOP), "white")
    for place, row in enumerate(rows):
        strip = whole.crop((0, TOP + HEIGHT * row, whole.width, TOP + HEIGHT * (row + 1)))
        shown.paste(strip, (0, TOP + HEIGHT * place))
    return shown


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    picture().save(DOCS / "samples.png", optimize=True)
    print(short_table())
