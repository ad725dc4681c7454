"""Scores from the command to the table, end to end: a third-party metric, sampling seeds, checkpoints."""

import dataclasses
import io
import json

import pandas as pd
import pytest
from rich.console import Console

from distillbench import Metric
from distillbench.cli import commands
from distillbench.execution.run import run
from distillbench.registry import Entry, Plugin, load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.system.progress import Progress

WORDS = [
    "methods=[direct]",
    "dataset=digits",
    "experiment=smoke",
    "budget.images=400",
    "batch_size=100",
    "evaluation.images=24",
    "evaluation.nfe=[1]",
    "evaluation.teacher_steps=[1,4]",
    "evaluation.timing=off",
    "evaluation.metrics=[teacher_rmse,brightness]",
    "evaluation.seeds=[0,1,2]",
    "evaluation.checkpoints=3",
    "device=cpu",
    "run_name=here",
]


class Brightness(Metric):
    """A third-party metric."""

    name = "brightness"
    unit = "pixel values in [-1, 1]"
    direction = "higher"
    protocol = "brightness/1: mean of all pixels"

    def score(self, samples):
        return samples.x_0.mean().item()


@pytest.fixture(scope="module")
def registry():
    known = load_registry()
    entry = Entry(Brightness, Plugin("brightness", "stranger", "1.0"))
    return dataclasses.replace(known, metrics=known.metrics | {"brightness": entry})


@pytest.fixture(scope="module")
def ran(registry, tmp_path_factory):
    results = tmp_path_factory.mktemp("measures")
    configs = compose_runs([*WORDS, f'results_dir="{results}"'], registry)
    return run(plan(configs, registry), configs, Progress(Console(file=io.StringIO())), lambda rows: None)


def test_a_third_party_metric_has_column_unit_and_direction(ran):
    assert ran.table["brightness"].between(-1, 1).all()
    declared = json.loads((ran.folder / "columns.json").read_text())["brightness"]
    assert (declared["unit"], declared["direction"]) == ("pixel values in [-1, 1]", "higher")
    assert "brightness" in pd.read_csv(ran.folder / "summary.csv").columns


def test_a_third_party_metric_has_its_arrow_on_the_terminal(registry, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("distillbench.registry.load_registry", lambda *selected: registry)
    words = [*WORDS, "evaluation.seeds=[0]", "evaluation.checkpoints=0", f"results_dir={tmp_path}"]
    commands.main(["run", *words])
    heading, rule = capsys.readouterr().out.split("method", 1)[1].split("─", 1)
    assert "↑" in heading and "↓" in heading and rule


def test_every_sampling_seed_has_its_row_from_one_training(ran):
    student = ran.table[ran.table["method"] == "direct"]
    assert student["sampling_seed"].to_list() == [0, 1, 2]
    assert student["key"].nunique() == 1 and student["training_seed"].nunique() == 1
    assert student["teacher_rmse"].nunique() == 3  # other noise, other scores


def test_the_summary_is_over_sampling_seeds(ran):
    summary = pd.read_csv(ran.folder / "summary.csv")
    (row,) = summary[summary["method"] == "direct"].to_dict("records")
    values = ran.table[ran.table["method"] == "direct"]["teacher_rmse"]
    assert row["teacher_rmse"] == pytest.approx(values.mean())
    assert row["teacher_rmse_sampling_std"] == pytest.approx(values.std())
    assert row["sampling_seeds"] == 3 and pd.isna(row["teacher_rmse_training_std"])  # trained once
    assert row["teacher_rmse_sampling_low"] < values.mean() < row["teacher_rmse_sampling_high"]


def test_scores_of_checkpoints_have_their_cost(ran):
    along = pd.read_csv(ran.folder / "along.csv")
    assert sorted(along["fraction"].unique()) == [0.25, 0.5, 0.75, 1.0]
    assert along.groupby("fraction")["train_images"].first().to_list() == [100, 200, 300, 400]
    assert along.groupby("fraction")["train_seconds"].first().is_monotonic_increasing
    last = along[(along["fraction"] == 1.0) & (along["sampling_seed"] == 0)]["teacher_rmse"].item()
    table = ran.table[(ran.table["method"] == "direct") & (ran.table["sampling_seed"] == 0)]
    assert last == table["teacher_rmse"].item()
    assert along["teacher_rmse"].notna().all() and along["brightness"].notna().all()


def test_the_teacher_has_no_scores_along_training(ran):
    assert set(pd.read_csv(ran.folder / "along.csv")["method"]) == {"direct"}
