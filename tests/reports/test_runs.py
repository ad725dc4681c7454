"""A run's folder is read for reports whatever state it is in."""

import shutil

import pandas as pd
import pytest

from distillbench.errors import UserError
from distillbench.records.table import make_table, write_table
from distillbench.reports.runs import read_run
from tables_of_runs import finished_run, toy_rows


@pytest.fixture
def folder(tmp_path):
    """A finished run of two seeds, with its records beside it."""
    return finished_run(tmp_path / "results")


def test_a_finished_run_has_no_problems(folder):
    run = read_run(folder)
    assert run.problems == [] and run.name == "mine" and run.directions == {"fd_toy": "lower"}
    assert len(run.table) == 2 and run.summary["fd_toy"].item() == 10.5 and run.along.empty
    assert [config["seed"] for config in run.configs] == [0, 1] and run.environment == {"python": "3.11"}


def test_pictures_are_those_of_the_rows_that_are_ok(folder):
    shown = read_run(folder).shown("k0")
    assert [(nfe, seed, int(images[0, 0, 0, 0])) for nfe, seed, images in shown] == [(1, 0, 7), (4, 0, 9)]
    assert read_run(folder).shown("k1") == []
    (folder.parent / "cells" / "c" / "evaluation-k0.safetensors").write_bytes(b"nothing")
    assert read_run(folder).shown("k0") == []


def test_an_unfinished_run_says_what_has_no_rows(folder):
    write_table(make_table(toy_rows(0), ["fd_toy"]), folder)
    assert read_run(folder).problems == ["not finished: no rows of boot (seed 1)"]


def test_a_damaged_table_is_read_from_its_other_form(folder):
    (folder / "table.parquet").write_bytes(b"PAR1 no")
    run = read_run(folder)
    assert len(run.table) == 2 and len(run.problems) == 1 and run.problems[0].startswith("table.parquet is damaged")
    (folder / "table.csv").unlink()
    run = read_run(folder)
    assert run.table.empty and "not finished: no rows of boot (seed 0), boot (seed 1)" in run.problems


@pytest.mark.parametrize("name", ["columns.json", "config.yaml", "environment.json"])
@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_missing_and_damaged_files_are_problems_and_the_rest_is_used(folder, name, content):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    run = read_run(folder)
    assert len(run.table) == 2
    if (name, content) != ("config.yaml", "[1]"):
        assert any(problem.startswith(name) for problem in run.problems)


def test_columns_of_another_version_are_a_problem(folder):
    table = pd.DataFrame(toy_rows(0, 1)).drop(columns=["budget"]).assign(old_column=1)
    table.to_parquet(folder / "table.parquet")
    run = read_run(folder)
    assert "budget" in run.problems[0] and run.problems[0].startswith("written by another version")
    assert run.problems[1] == "undeclared columns are ignored: old_column"
    assert run.table["fd_toy"].to_list() == [10.0, 11.0]


def test_scores_along_training_without_needed_columns_are_ignored(folder):
    pd.DataFrame({"method": ["boot"], "fraction": [0.5]}).to_csv(folder / "along.csv", index=False)
    run = read_run(folder)
    assert run.along.empty and run.problems == ["along is damaged or written by another version: it is ignored"]


def test_the_first_of_two_rows_of_one_measurement_is_used(folder):
    write_table(make_table([*toy_rows(0, 1), *toy_rows(1, fd_toy=99.0)], ["fd_toy"]), folder)
    run = read_run(folder)
    assert run.summary["fd_toy"].item() == 10.5 and len(run.table) == 3
    assert run.problems[0].startswith("rows of one measurement differ; the first ones are used: ")


def test_what_is_no_run_is_refused(folder):
    with pytest.raises(UserError, match=r"no run .*min'\. Did you mean 'mine'\? Possible: mine"):
        read_run(folder.parent / "min")
    empty = folder.parent / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"is not a run: it has none of table\.parquet"):
        read_run(empty)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no run"):
        read_run(folder)
