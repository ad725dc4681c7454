"""What of a cell is sent to another process."""

from __future__ import annotations

import pickle
from pathlib import Path

from distillbench.registry import Selection
from distillbench.runs.cell_task import CellTask, cells_of
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan


def test_the_group_size_is_sent_too(tmp_path: Path) -> None:
    words = ["methods=[cm]", "dataset=gmm", "teacher=gmm", "budget.images=8", "batch_size=8", f"results_dir={tmp_path}"]
    registry = Selection().load()
    cell = next(c for c in plan(compose_runs(words, registry), registry) if c.entry is not None)
    cell.group_size = 4  # decides into how many parts a step can be cut when memory runs out
    (sent,) = cells_of([pickle.loads(pickle.dumps(CellTask.of(cell)))])
    assert sent.group_size == 4
