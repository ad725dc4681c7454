"""What a search will cost, before it begins."""

from __future__ import annotations

from collections.abc import Sequence

from distillbench.errors import counted
from distillbench.runs.cell import AS_IS
from distillbench.runs.forecast import forecast, why_none
from distillbench.runs.shared_context import Cell
from distillbench.runs.time_plan import about
from distillbench.tuning.prepare import Tuning


def estimate_lines(tuning: Tuning) -> list[str]:
    """Images, evaluations and time of the whole search, as if each trial cost what the defaults cost and none ended."""
    tune = tuning.tune
    if not tune.searches:
        return []
    cells = [cell for group in tuning.cells.values() for cell in group]
    each = tune.trials * len(tune.search_seeds)
    own = {name: [cell for cell in cells if cell.name == name] for name in tuning.spaces}
    lines = [f"search of {name}: {_cost(of_method, each)}" for name, of_method in own.items()]
    if tune.protocol == "self_tuned":
        lines.append(f"at most: the search of a method ends when a trial more could exceed {tune.total.in_words}")
    if tune.pruning == "halving":
        share = tune.shares[0]
        lines.append(f"at most: a trial that is not among the best quarter ends after {share:.0%} of the budget")
    if why := why_none(cells):
        return [*lines, f"time of the search: no estimate ({why})"]
    times = [forecast(group, AS_IS) for group in tuning.cells.values()]
    whole = sum(each * sum(plan.of_cell(k) for k in range(len(plan.cells))) for plan in times if plan is not None)
    before = max(sum(plan.before.values()) for plan in times if plan is not None)
    at_once = min(tuning.config.executor.count, len(tuning.spaces) * tuning.at_once)
    workers = f" with {at_once} cells at a time" if at_once > 1 else ""
    time = about(before + whole / at_once)
    return [*lines, f"time of the search: at most about {time}{workers}, if nothing of it is done"]


def _cost(cells: Sequence[Cell], times: int) -> str:
    images = sum(cell.cost.images for cell in cells) * times
    teacher = sum(cell.cost.teacher_nfe for cell in cells) * times
    student = sum(cell.cost.student_nfe for cell in cells) * times
    sampled = sum(nfe * cell.shared.config.evaluation.images for cell in cells for nfe in cell.nfe) * times
    return (
        f"{counted(len(cells) * times, 'training')}, {images:,} images, {teacher:,} evaluations of the teacher, "
        f"{student:,} of students, {sampled:,} in sampling"
    )
