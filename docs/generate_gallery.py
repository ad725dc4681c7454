"""Writes docs/gallery.md, one row for each method, from the plugins: ``python docs/generate_gallery.py``.

A row has what the class declares and what one step of it counts, at default settings on digits. Nothing is trained.
"""

from __future__ import annotations

from pathlib import Path

from distillbench.registry import Registry, installed, load_registry
from distillbench.runs.cell import Cell
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import build

PAGE = Path(__file__).resolve().parent / "gallery.md"
HEAD = """# Gallery of methods

The methods that ship, at their default settings on `dataset=digits`. `distillbench describe NAME` prints the paper and
all settings of one, [Methods](methods.md) says how each differs from its paper, and [Results](results.md) has scores.
This page is written by `docs/generate_gallery.py` from the plugins.

![samples of the teacher and of each student at one evaluation, from the same noise](samples.png)

"""
TAIL = """
- **learns**: the teacher's *map* means that a student's sample is compared with the teacher's sample for the same noise
  (`teacher_rmse`); a method that learns the *distribution* only has no such score.
- **NFE**: numbers of network evaluations per image at which it can sample, of 1, 2 and 4.
- **teacher, student**: network evaluations per training image, pairs made ahead included, as
  `distillbench run --dry-run` counts them. A budget in images gives all methods as many images, not as many
  evaluations: `budget.limit=nfe` does that.
- **phases**: stages of training with targets of their own.
"""


def page() -> str:
    """The content of docs/gallery.md."""
    registry = load_registry([source for source in installed() if source.distribution == "distillbench"])
    words = [f"methods=[{','.join(sorted(registry.methods))}]", "dataset=digits"]
    cells = [cell for cell in plan(compose_runs(words, registry), registry) if cell.entry is not None]
    columns = ["method", "idea", "paper", "real data", "learns", "NFE", "teacher", "student", "phases"]
    rows = [f"| {' | '.join(_row(cell, registry))} |" for cell in cells]
    return HEAD + "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows]) + "\n" + TAIL


def _row(cell: Cell, registry: Registry) -> list[str]:
    cls, cost = registry.methods[cell.name].cls, cell.cost
    source = cell.shared.source
    method = build(cell, source.untrained().conditioned(cell.shared.conditioning))
    return [
        f"`{cell.name}`",
        _idea(cls),
        cls.paper,
        "needed" if cls.needs_data else "no",
        "map" if method.keeps_noise(1) else "distribution",
        ", ".join(map(str, cell.nfe)),
        f"{cost.teacher_nfe / cost.images:.3g}",
        f"{cost.student_nfe / cost.images:.3g}",
        str(len(method.phases())),
    ]


def _idea(cls: type) -> str:
    """The first sentence of the plugin's docstring, without the method's name."""
    import sys

    first = (cls.__doc__ or sys.modules[cls.__module__].__doc__ or "").strip().split("\n")[0].removesuffix(".")
    text = first.partition(": ")[2] or first
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    PAGE.write_text(page())
