"""A plan counts pairs that are made between phases, and what their losses cost; the rows have both."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from distillbench.errors import UserError
from distillbench.execution.run import run
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.system.progress import Progress

SETTINGS = """methods=[reflow,direct] dataset=digits device=cpu evaluation.nfe=[1] methods.reflow.steps=4
methods.reflow.pairs=1000 methods.reflow.distil_share=0.5 methods.reflow.distil_pairs=own methods.direct.steps=4
methods.direct.pairs=1000 methods.direct.held_out=500 methods.direct.checks=4"""


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def planned(registry, folder, budget: str):
    """The cells of both methods in a plan."""
    configs = compose_runs([*SETTINGS.split(), f"results_dir={folder}", *budget.split()], registry)
    cells = plan(configs, registry)
    return {cell.name: cell for cell in cells if cell.entry is not None}, cells, configs


def test_a_plan_counts_the_flow_s_pairs_and_losses_on_held_out_pairs(registry, tmp_path):
    """In closed form. A pair is four evaluations, a training image one, a loss one for each of 500 pairs."""
    cells, *_ = planned(registry, tmp_path, "budget.limit=nfe budget.nfe=17000")
    own = cells["reflow"]
    assert own.cost.images == pytest.approx(17000 - 2 * 4000, abs=1) and own.cost.teacher_nfe == 4000
    assert own.cost.student_nfe == own.cost.images + 4000 and own.plan_speed.pair_evaluations == 8000
    held = cells["direct"].cost
    assert held.images == 17000 - 6000 - 3 * 500 and held.teacher_nfe == 6000  # the last loss is after the budget's end
    assert held.student_nfe == held.images + 4 * 500
    with pytest.raises(
        UserError, match=r"phase 'distil' costs 4,000 evaluations, .* budget.nfe=12,000 allows 4,000 more"
    ):
        planned(registry, tmp_path, "budget.limit=nfe budget.nfe=12000")  # of which 8,000 are those of the first phase


@pytest.mark.nightly
def test_a_run_costs_what_was_planned_and_names_the_average_that_was_kept(registry, tmp_path):
    small = "batch_size=100 evaluation.images=32 evaluation.metrics=[teacher_rmse] evaluation.timing=off"
    budget = "budget.limit=nfe budget.nfe=17000 teacher.budget.images=2000"
    cells, every, configs = planned(registry, tmp_path, f"{small} {budget}")
    table = run(every, configs, Progress(Console(file=io.StringIO())), lambda rows: None).table
    for name, cell in cells.items():
        row = table[table["method"] == name].iloc[0]
        assert row["status"] == "ok", row["reason"]
        assert row["train_images"] == pytest.approx(cell.cost.images, abs=4 * 100)  # phases end with whole steps
        assert row["train_teacher_nfe"] == cell.cost.teacher_nfe
        beside = cell.cost.student_nfe - cell.cost.images
        assert row["train_student_nfe"] - row["train_images"] == beside == {"reflow": 4000, "direct": 2000}[name]
        assert ("on held-out pairs (the last: " in (row["note"] or "")) == (name == "direct")
