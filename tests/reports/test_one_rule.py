"""One run printed in all forms: the same numbers have the same digits everywhere, and the same method has the star."""

import io
import re

import pytest
from rich.console import Console

from distillbench.records.costs import spread, with_intervals
from distillbench.records.numbers import rounded
from distillbench.reports.commands import show_runs
from distillbench.reports.html import html_report
from distillbench.reports.papers import paper_table
from distillbench.reports.runs import read_run
from tables_of_runs import run_folder, seeds

CASES = {"boot": ([176.8, 184.6, 170.1], "177 ± 18"), "cm": ([1870.5, 1880.25, 1860.1], "1,870 ± 25")}  # t of 2: 4.303


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rows = [one for name, (values, _) in CASES.items() for one in seeds(values, method=name)]
    for k, one in enumerate(rows):
        one["train_seconds"] = 100.0 + k % 3  # 101 ± 2.48
    return read_run(run_folder(tmp_path_factory.mktemp("r") / "r", rows))


def test_all_forms_have_the_same_digits_and_star(run):
    console = Console(file=io.StringIO(), width=200)
    show_runs([str(run.folder)], [], [], [], "summary", "table", console)
    words = " ".join(re.sub(r"<[^>]*>", " ", html_report([run])).split())
    texts = {
        "terminal": re.sub(" +", " ", console.file.getvalue()),
        "html": words,
        "markdown": paper_table([run]).replace("**", ""),
        "latex": re.sub(r"[^0-9.±]+", " ", paper_table([run], form="latex").replace(r"\pm\,", "±")).replace("± ", "±"),
    }
    for _, text in CASES.values():
        for form, whole in texts.items():
            wanted = text.replace(",", "").replace("± ", "±") if form == "latex" else text  # siunitx groups digits
            assert wanted in whole, form
    for form, whole in texts.items():
        assert ("101.0 ±2.5" if form == "latex" else "101.0 ± 2.5") in whole, form
    assert "177 ± 18*" in texts["terminal"] and "25*" not in texts["terminal"]
    assert "**177 ± 18**" in paper_table([run])
    assert "**1,870" not in paper_table([run])
    for form, rule in (("terminal", "the only leader"), ("html", "the only leader"), ("markdown", "apart from it")):
        assert f"{rule} by pairwise comparison" in texts[form]


def test_intervals_of_costs_are_those_of_their_spread(run):
    found = with_intervals(run.summary, run.table)
    of = spread(run.table[run.table["method"] == "cm"].to_dict("records"), "train_seconds")
    row = found[found["method"] == "cm"].iloc[0]
    ends = row["train_seconds_training_low"], row["train_seconds_training_high"]
    assert ends == pytest.approx((of.low, of.high))
    assert found["train_teacher_nfe_training_low"].isna().all(), "counted costs are equal"


def test_numbers_at_the_borders_of_the_rule():
    assert [rounded(0.0), rounded(-0.5, 0.3), rounded(1e-6, 2e-8), rounded(1e15), rounded(3.0, 1e-17)] == [
        "0", "-0.50", "1.000e-06", "1.000e+15", "3",
    ]  # fmt: skip


def test_members_of_a_leading_group_are_bold_everywhere(tmp_path):
    values = {"boot": [176.8, 184.6, 170.1], "pd": [177.0, 184.0, 171.5], "cm": [1870.5, 1880.25, 1860.1]}
    run = read_run(run_folder(tmp_path / "r", [one for name, own in values.items() for one in seeds(own, method=name)]))
    lines = paper_table([run]).splitlines()
    bold = {name: any(line.startswith(f"| {name} ") and "**" in line for line in lines) for name in values}
    assert bold == {"boot": True, "pd": True, "cm": False}
    page = html_report([run])
    assert len(re.findall(r'class="num group"', page)) == 2 and 'class="num best"' not in page
