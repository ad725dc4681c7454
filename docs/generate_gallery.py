"""Writes docs/gallery.md, one row for each method, from the plugins: ``python docs/generate_gallery.py``.

A row has what the class declares and what one step of it counts, at default settings on digits. Nothing is trained.
"""

from __future__ import annotations

from pathlib import Path

from distillbench import Method
from distillbench.registry import Registry, installed, load_registry
from distillbench.reports.words import number
from distillbench.runs.cell import Cell
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.runs.shared_context import build
from distillbench.testing.method_kinds import KINDS, kind_of

PAGE = Path(__file__).resolve().parent / "gallery.md"
HEAD = """# Gallery of methods

The methods that ship, at their default settings on `dataset=digits`. `distillbench describe NAME` prints the paper and
all settings of one, [Methods](methods.md) says how each differs from its paper, and [Results](results.md) has scores.
This page is written by `docs/generate_gallery.py` from the plugins.

![samples of the teacher and of each student at one evaluation, from the same noise](samples.png)

The same methods on eight clusters in the plane, with the colour of the noise. A method's name below leads to
[its pictures](two_dimensions.md) on this and two other distributions.

![the noise, the distribution, the teacher's samples and those of each student](two_dimensions/mixture.png)

"""
TAIL = """
- **Distribution**: these have no `teacher_rmse`, the distance to the teacher's sample for the same noise.
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
    columns = ["method", "idea", "paper", "real data", "NFE", "teacher", "student", "phases"]
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    groups: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for cell in cells:
        method = build(cell, cell.shared.source.untrained().conditioned(cell.shared.conditioning))
        groups[kind_of(method)].append(f"| {' | '.join(_row(cell, method, registry))} |\n")
    sections = [
        f"## {kind.capitalize()}\n\n{meaning.capitalize()}.\n\n{head}{''.join(groups[kind])}"
        for kind, meaning in KINDS.items()
        if groups[kind]
    ]
    return HEAD + "\n".join(sections) + TAIL


def _row(cell: Cell, method: Method, registry: Registry) -> list[str]:
    cls, cost = registry.methods[cell.name].cls, cell.cost
    return [
        f"[`{cell.name}`](two_dimensions.md#{cell.name})",
        _idea(cls),
        cls.paper,
        "needed" if cls.needs_data else "no",
        ", ".join(map(str, cell.nfe)),
        number(cost.teacher_nfe / cost.images),
        number(cost.student_nfe / cost.images),
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
