"""Runs become one: nothing twice, nothing averaged across devices, nothing that disagrees goes unsaid."""

import io
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from pandas.testing import assert_frame_equal
from rich.console import Console

from distillbench.errors import UserError
from distillbench.records.table import make_along, make_table, write_table
from distillbench.reports.commands import merge_runs
from distillbench.reports.merge import merge
from distillbench.reports.runs import RunData, read_run
from tables_of_runs import COLUMNS, FID, NAMES, TEACHER, row, run_data, run_folder, seeds

BASE = row(fid=80.0, **TEACHER)
OTHER = "cuda (a GPU)"


def along(scores, **changes):
    rows = [row(fraction=k / 2, fid=score, **changes) for k, score in enumerate(scores, 1)]
    return make_along(rows, list(COLUMNS))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Three runs: two seeds, a third seed and a failed method, the first seed again on another device."""
    tmp_path = tmp_path_factory.mktemp("runs")
    run_folder(
        tmp_path / "a", [BASE, *seeds([10.0, 11.0], recall=0.5)], along=along([12.0, 10.0]),
        configs=[{"methods": {"boot": {"lr": 1}}, "seed": k} for k in (0, 1)], environment={"cpu": "one"},
    )  # fmt: skip
    failed = row(method="cm", training_seed=2, status="failed", reason="no memory", fid=None)
    run_folder(
        tmp_path / "b", [BASE | {"sample_latency_p50_ms": 9.0}, row(training_seed=2, fid=12.0), failed],
        configs=[{"methods": {"boot": {"lr": 1}, "cm": {}}, "seed": 2}, {"methods": {"boot": {"lr": 1}}, "seed": 1}],
        environment={"cpu": "two"}, columns={"fid": COLUMNS["fid"]},
    )  # fmt: skip
    run_folder(
        tmp_path / "c", [row(fid=10.5, device=OTHER, sample_latency_p50_ms=0.5, train_seconds=1.0)],
        along=along([12.5, 10.5]), configs=[{"methods": {"boot": {"lr": 1}}, "seed": 0}], environment={"gpu": "a GPU"},
    )  # fmt: skip
    return tmp_path


@pytest.fixture
def runs(originals, tmp_path):
    """A copy of them."""
    shutil.copytree(originals, tmp_path, dirs_exist_ok=True)
    return tuple(tmp_path / name for name in "abc")


def merged(folders, output, keep=None):
    console = Console(file=io.StringIO(), width=80, highlight=False)
    assert merge_runs([str(folder) for folder in folders], str(output), keep, console) == 0
    return console.file.getvalue()


def refused(folders, output, keep=None):
    with pytest.raises(UserError) as error:
        merged(folders, output, keep)
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*"))
    return str(error.value)


# --- what comes out --------------------------------------------------------------------------------------------------


def test_a_merged_folder_is_read_as_a_run(runs, tmp_path):
    said = merged(runs, tmp_path / "m")
    run = read_run(tmp_path / "m")
    assert run.problems == []
    found = run.table[["method", "training_seed", "device", "fid", "status"]].astype(object)
    assert found.where(found.notna(), None).values.tolist() == [
        ["teacher:ddim", None, NAMES["device"], 80, "ok"],
        ["boot", 0, NAMES["device"], 10, "ok"],
        ["boot", 1, NAMES["device"], 11, "ok"],
        ["boot", 2, NAMES["device"], 12, "ok"],
        ["cm", 2, NAMES["device"], None, "failed"],
        ["boot", 0, OTHER, 10.5, "ok"],
    ]
    assert run.table["recall"].tolist()[1] == 0.5 and run.table["reason"].tolist()[4] == "no memory"
    assert run.columns == COLUMNS
    assert [(config["seed"], list(config["methods"])) for config in run.configs] == [
        (0, ["boot"]), (1, ["boot"]), (2, ["boot", "cm"]),
    ]  # fmt: skip
    assert run.environment == {
        "merged": [{"run": "a", "cpu": "one"}, {"run": "b", "cpu": "two"}, {"run": "c", "gpu": "a GPU"}]
    }
    assert_frame_equal(pd.read_parquet(tmp_path / "m" / "summary.parquet"), run.summary)
    assert "1 rows are in several runs with equal scores: kept once, with the costs of the first" in said
    assert "samples.png and weights/ are not merged" in said and "6 rows of 3 runs" in said
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {f"{name}.{end}" for name in ("table", "summary", "along") for end in ("csv", "parquet")} | {
        "columns.json", "config.yaml", "environment.json",
    }  # fmt: skip


def test_equal_rows_are_kept_once_with_the_first_costs(runs, tmp_path):
    merged(runs[:2], tmp_path / "m")
    teacher = read_run(tmp_path / "m").table.iloc[0]
    assert teacher["sample_latency_p50_ms"] == NAMES["sample_latency_p50_ms"]
    merged(runs[1::-1], tmp_path / "n")
    assert read_run(tmp_path / "n").table.iloc[0]["sample_latency_p50_ms"] == 9


def test_no_cost_is_averaged_across_devices(runs, tmp_path):
    merged(runs, tmp_path / "m")
    boot = pd.read_csv(tmp_path / "m" / "summary.csv").query("method == 'boot'").set_index("device")
    assert boot["sample_latency_p50_ms"].to_dict() == {NAMES["device"]: 2.0, OTHER: 0.5}
    assert boot["train_seconds"].to_dict() == {NAMES["device"]: 100.0, OTHER: 1.0}
    assert boot["training_seeds"].to_dict() == {NAMES["device"]: 3, OTHER: 1}


def test_rows_along_training_are_told_apart_by_device(runs, tmp_path):
    merged(runs, tmp_path / "m")
    found = read_run(tmp_path / "m").along
    assert found[["fraction", "fid", "device"]].values.tolist() == [
        [0.5, 12.0, NAMES["device"]], [1.0, 10.0, NAMES["device"]], [0.5, 12.5, OTHER], [1.0, 10.5, OTHER],
    ]  # fmt: skip


def test_merging_is_associative_and_merging_again_changes_nothing(runs, tmp_path):
    a, b, c = runs
    merged([a, b], tmp_path / "ab"), merged([b, c], tmp_path / "bc"), merged(runs, tmp_path / "abc")
    merged([tmp_path / "ab", c], tmp_path / "left"), merged([a, tmp_path / "bc"], tmp_path / "right")
    merged([tmp_path / "abc", b, a, tmp_path / "abc"], tmp_path / "again")
    files = sorted(path.name for path in (tmp_path / "abc").iterdir())
    for other in ("left", "right", "again"):
        assert sorted(path.name for path in (tmp_path / other).iterdir()) == files
        for name in files:
            if name.endswith(".parquet"):
                assert_frame_equal(pd.read_parquet(tmp_path / other / name), pd.read_parquet(tmp_path / "abc" / name))
            else:
                assert (tmp_path / other / name).read_text() == (tmp_path / "abc" / name).read_text()


@pytest.mark.parametrize(("keep", "fid"), [("first", 10.0), ("last", 99.0)])
def test_keeping_the_first_or_last_of_a_conflict_is_associative(keep, fid):
    scores = {"a": 10.0, "b": 50.0, "c": 99.0}
    a, b, c = (run_data(name, [BASE, row(fid=score)]) for name, score in scores.items())
    whole = merge([a, b, c], keep)
    assert any(f"2 rows in conflict, the {keep} of each is kept" in note for note in whole.notes)
    assert whole.table.loc[whole.table["method"] == "boot", "fid"].tolist() == [fid]
    for other in (merge([again(merge([a, b], keep)), c], keep), merge([a, again(merge([b, c], keep))], keep)):
        assert_frame_equal(other.table, whole.table)


def again(made):
    """What was merged, as a run."""
    return RunData(
        Path("m"), made.table, made.summary, made.along, dict(made.labels.columns), made.configs, made.environment
    )


def test_a_run_read_from_csv_is_the_same(runs, tmp_path):
    copy = shutil.copytree(runs[0], tmp_path / "copy")
    for name in ("table", "along"):
        (copy / f"{name}.parquet").unlink()
    said = merged([runs[0], copy], tmp_path / "m")
    assert_frame_equal(read_run(tmp_path / "m").table, read_run(runs[0]).table)
    assert "3 rows are in several runs" in said and "along training: 2 rows are in several runs" in said


def test_it_records_where_the_records_are(runs, tmp_path):
    assert f"there are no records in {tmp_path / 'cells'}" in merged(runs, tmp_path / "m")
    (tmp_path / "cells").mkdir()
    said = merged(runs, tmp_path / "n")
    assert f"they stay in {tmp_path / 'cells'}, which is beside the merged folder" in said
    assert "where reports of the merged folder do not look" in merged(runs, tmp_path / "deep" / "o")


# --- what disagrees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fid": 11.0}, "boot, seed 0, 1 NFE, noise 0 on cpu (a model): fid 10 in a, 11 in b"),
        ({"fid": None}, "fid 10 in a, - in b"),
        ({"status": "failed", "reason": "no memory"}, "status ok in a, failed in b"),
        ({"key": "other"}, "key k in a, other in b"),
    ],
)
def test_other_values_for_one_measurement_are_a_conflict(changes, told):
    runs = [run_data("a", [row(fid=10.0)]), run_data("b", [row(**({"fid": 10.0} | changes))])]
    with pytest.raises(UserError) as error:
        merge(runs)
    message = str(error.value)
    assert "the runs disagree on 1 row: " in message and told in message and "--keep first or --keep last" in message
    assert merge(runs, "first").table["fid"].tolist() == [10]


@pytest.mark.parametrize(
    "changes",
    [{"device": OTHER}, {"settings": "lr=1"}, {"training_seed": 5}, {"sampling_seed": 5}, {"nfe": 2}, {"images": 64},
     {"protocol": "bbbb"}, {"budget": "2000 images"}, {"guidance": 2.0}, {"dataset": "other"}, {"teacher": "other"}],
)  # fmt: skip
def test_other_measurements_are_no_conflict(changes):
    found = merge([run_data("a", [row(fid=10.0)]), run_data("b", [row(fid=11.0, **changes)])])
    assert found.table["fid"].tolist() == [10, 11]


def test_many_conflicts_are_counted_and_some_named(tmp_path):
    a, b = run_folder(tmp_path / "a", seeds(range(9))), run_folder(tmp_path / "b", seeds(range(10, 19)))
    message = refused([a, b], tmp_path / "m")
    assert "disagree on 9 rows" in message and "and 4 more" in message and message.count("boot") == 5


def test_a_conflict_along_training_is_one(tmp_path):
    a = run_folder(tmp_path / "a", [row(fid=10.0)], along=along([12.0, 10.0]))
    b = run_folder(tmp_path / "b", [row(fid=10.0)], along=along([13.0, 10.0]))
    assert "fid 12 in a, 13 in b" in refused([a, b], tmp_path / "m")


@pytest.mark.parametrize(("fact", "other"), [("direction", "higher"), ("protocol", "frechet/3"), ("unit", "x")])
def test_scores_that_are_declared_differently_cannot_be_merged(fact, other):
    a, b = (run_data(name, [row(fid=1.0)], {"fid": FID | more}) for name, more in (("a", {}), ("b", {fact: other})))
    with pytest.raises(UserError, match=f"fid is declared differently: its {fact} is {FID[fact]!r} in a and {other!r}"):
        merge([a, b])


# --- versions and damage ---------------------------------------------------------------------------------------------


def rewrite(folder, change, name="table"):
    write_table(change(pd.read_parquet(folder / f"{name}.parquet")), folder, name)


def test_a_column_that_is_empty_elsewhere_may_be_lacking(runs, tmp_path):
    rewrite(runs[1], lambda table: table.drop(columns="train_joules"))
    said = merged(runs, tmp_path / "m")
    assert "columns that a run lacks, and that are empty in the others, are left out: train_joules" in said
    assert read_run(tmp_path / "m").notes == ["written by a version of distillbench that had no columns train_joules"]
    joules = run_folder(tmp_path / "j", [row(training_seed=7, train_joules=5.0)])
    assert "m: table was written by another version than j, it has no train_joules" in refused(
        [tmp_path / "m", joules], tmp_path / "n"
    )


def test_a_column_that_has_values_elsewhere_may_not_be_lacking(runs, tmp_path):
    rewrite(runs[1], lambda table: table.drop(columns="train_seconds"))
    message = refused(runs, tmp_path / "m")
    assert "b: table was written by another version than a, it has no train_seconds" in message


@pytest.mark.parametrize(("values", "is_refused"), [([1.0, None, None], True), ([None] * 3, False)])
def test_a_column_that_nothing_declares_may_not_have_values(runs, tmp_path, values, is_refused):
    rewrite(runs[0], lambda table: table.assign(train_novel=pd.array(values, dtype="Float64")))
    if is_refused:
        assert "nothing declares train_novel" in refused(runs, tmp_path / "m")
    else:
        merged(runs, tmp_path / "m")


def test_along_of_another_version_is_refused(runs, tmp_path):
    rewrite(runs[0], lambda table: table.assign(novel="x"), "along")
    assert "a: along was written by another version" in refused(runs, tmp_path / "m")


@pytest.mark.parametrize("name", ["table", "along"])
def test_damaged_files_are_refused_and_not_left_out(runs, tmp_path, name):
    for end in ("csv", "parquet"):
        (runs[0] / f"{name}.{end}").write_bytes(b"\xff\x00")
    assert f"a: its {name} is damaged" in refused(runs, tmp_path / "m") or name == "table"


def test_scores_without_their_declaration_are_refused(runs, tmp_path):
    (runs[0] / "columns.json").write_text("{")
    assert "a: table" in refused(runs, tmp_path / "m")


def test_an_empty_run_is_refused(runs, tmp_path):
    empty = run_folder(tmp_path / "empty", [])
    assert "empty: no rows to merge" in refused([runs[0], empty], tmp_path / "m")


def test_missing_settings_and_environments_are_reported(runs, tmp_path):
    (runs[0] / "config.yaml").unlink(), (runs[0] / "environment.json").unlink()
    assert "a: its settings are not known" in merged(runs, tmp_path / "m")
    assert read_run(tmp_path / "m").environment["merged"][0] == {"run": "a"}


# --- where to --------------------------------------------------------------------------------------------------------


def test_the_output_must_not_exist(runs, tmp_path):
    with pytest.raises(UserError, match="--output must name a folder that does not exist"):
        merged(runs, runs[0])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="does not exist"):
        merged(runs, tmp_path / "file")
    (tmp_path / "void").mkdir()
    merged(runs, tmp_path / "void")
    assert len(read_run(tmp_path / "void").table) == 6


def test_it_takes_two_existing_runs(runs, tmp_path):
    assert "two runs or more, got 1" in refused(runs[:1], tmp_path / "m")
    assert "no run" in refused([runs[0], tmp_path / "none"], tmp_path / "m")


def test_hostile_names_are_harmless(tmp_path):
    name = "[red]\x1b[31m"
    a, b = (run_folder(tmp_path / f"{k}[b]", [row(method=name, fid=float(k))]) for k in (1, 2))
    message = refused([a, b], tmp_path / "m")
    assert "\x1b" not in message and r"[red]\x1b[31m, seed 0" in message and "in 1[b]" in message
    said = merged([a, b], tmp_path / "m", "last")
    assert "\x1b" not in said and r"[red]\x1b[31m, seed 0" in said
    assert read_run(tmp_path / "m").table["method"].tolist() == [name]


def test_the_files_are_those_of_a_run(runs, tmp_path):
    merged(runs, tmp_path / "m")
    run = merge([read_run(folder) for folder in runs])
    assert json.loads((tmp_path / "m" / "columns.json").read_text()) == {**run.labels.columns, "method": {}}
    assert list(yaml.safe_load_all((tmp_path / "m" / "config.yaml").read_text())) == run.configs
    assert list(run.table.columns) == list(make_table([], list(COLUMNS)).columns)
