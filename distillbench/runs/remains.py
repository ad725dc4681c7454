"""What is left to do of a cell, by the records that earlier runs left. Reads them, and changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from distillbench.runs.cell import CellRunner, Policy
from distillbench.runs.cell_result import CellDescription, describe_cell
from distillbench.runs.shared_context import Cell, SharedContext
from distillbench.system.progress import Progress


@dataclass(frozen=True)
class Remains:
    """What is left of a cell. `teacher_sha256` is empty where the teacher is not known yet."""

    training: bool
    evaluation: bool
    speed: bool
    teacher_sha256: str = ""

    @property
    def any(self) -> bool:
        return self.training or self.evaluation or self.speed


NOTHING = Remains(False, False, False)


def remains_of(cell: Cell, description: CellDescription, policy: Policy) -> Remains:
    """What is left of `cell`. Files of weights are looked for, not checked."""
    runner = CellRunner(cell, description, policy, Progress(None))
    sha256, timed = description.train_inputs["teacher_sha256"], cell.shared.config.evaluation.timing != "off"
    training = None
    if cell.entry is not None:
        training = runner.found_training(lambda path, _: path.is_file())
        if training is None:
            return Remains(True, True, timed, sha256)
    found = runner.found_evaluation(training)
    if found is None:
        works = training is None or training.status == "ok"  # of a failed training nothing is evaluated
        return Remains(False, works, timed and works, sha256)
    return Remains(False, False, runner.found_speed(found[0]) is None, sha256)


def remains_by_records(cells: Sequence[Cell], policy: Policy) -> list[Remains]:
    """What is left of each cell, for a plan. Loads the teacher, by which records are found, if there are any."""
    contexts = {id(cell.shared): cell.shared for cell in cells}.values()
    known = {id(shared): shared.load_teacher(Progress(None)) for shared in contexts if _has_records(shared)}
    with ExitStack() as stack:
        for shared in contexts:
            stack.enter_context(shared.identities_cached())
        found = [
            remains_of(cell, describe_cell(cell, known[id(cell.shared)]), policy)
            if id(cell.shared) in known
            else untouched(cell)
            for cell in cells
        ]
    for shared in contexts:
        shared.teacher = None  # large ones are not kept
    return found


def untouched(cell: Cell) -> Remains:
    """What is to do for a cell of which nothing is done."""
    return Remains(cell.entry is not None, True, cell.shared.config.evaluation.timing != "off")


def _has_records(shared: SharedContext) -> bool:
    """Whether the results folder holds anything that a cell with this teacher may find."""
    folder = shared.folder
    kept = [folder.cells, folder.cache("pairs"), folder.cache("answers")]
    return not shared.source.plan().images and any(path.is_dir() and any(path.iterdir()) for path in kept)
