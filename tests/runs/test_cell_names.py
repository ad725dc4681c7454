"""Progress lines name the settings that differ among the cells of a run, and nothing else."""

from __future__ import annotations

import pytest

from distillbench.cli.terminal import print_rows
from distillbench.records.table import make_table
from distillbench.registry import load_registry
from distillbench.reports.labels import Labels
from distillbench.runs.cell_task import CellTask
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import SharedContexts
from recorded_progress import RecordingProgress

WORDS = ["dataset=gmm", "teacher=gmm", "budget.images=64", "batch_size=16"]
METHODS = "methods=[cm,direct]"


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def labels(registry, *words):
    return [cell.label for cell in plan(compose_runs([*WORDS, *words], registry), registry)]


def test_a_setting_of_a_method_names_its_own_cells_only(registry):
    found = labels(registry, METHODS, "methods.cm.lr=1e-4,1e-3", "seed=0,1", "methods.cm.steps=20")
    assert found == [
        "teacher:ddim", "cm lr=0.0001 (seed 0)", "direct (seed 0)", "cm lr=0.0001 (seed 1)", "direct (seed 1)",
        "cm lr=0.001 (seed 0)", "cm lr=0.001 (seed 1)",
    ]  # fmt: skip


def test_a_setting_of_the_run_names_the_cells_that_it_changes(registry):
    found = labels(registry, "methods=[cm]", "budget.images=32,64", "evaluation.images=16,32")
    assert sorted(found) == [
        *(f"cm budget.images={n} evaluation.images={k} (seed 0)" for n in (32, 64) for k in (16, 32)),
        *(f"teacher:ddim evaluation.images={k}" for k in (16, 32)),
    ]


def test_lists_have_no_spaces_and_datasets_are_named_by_their_kind(registry):
    found = labels(registry, "methods=[tract]", "methods.tract.steps=[4,2,1],[2,1]")
    assert found[1:] == ["tract steps=[4,2,1] (seed 0)", "tract steps=[2,1] (seed 0)"]
    assert labels(registry, "methods=[cm]") == ["teacher:ddim", "cm (seed 0)"]


def test_a_worker_process_has_the_same_name(registry):
    cells = plan(compose_runs([*WORDS, "methods=[cm]", "methods.cm.lr=1e-4,1e-3"], registry), registry)
    assert [CellTask.of(c).cell(registry, SharedContexts()).label for c in cells] == [c.label for c in cells]


def test_lines_of_rows_name_it_too():
    row = {"method": "cm", "training_seed": 0, "sampling_seed": 0, "nfe": 1, "status": "ok"}
    progress = RecordingProgress()
    print_rows(progress, make_table([row, row], []).set_axis(["lr=0.0001", "lr=0.001"]), Labels())
    names = [line.partition(":")[0].strip() for line in progress.lines]
    assert names == ["cm [lr=0.0001], seed 0, 1 NFE, noise 0", "cm [lr=0.001], seed 0, 1 NFE, noise 0"]
