"""Who does the work of a cell: this process, or one that is started for it. Where that is: executors.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import torch

from distillbench.cell import Policy, found_cell, keep_ending, run_cell
from distillbench.claims import claimed, is_claimed, waiting
from distillbench.done import About, Done, about, done
from distillbench.errors import UserError
from distillbench.processes import ProcessError, Worker
from distillbench.progress import Progress, Step
from distillbench.seen_files import SeenFiles
from distillbench.shared_context import Cell
from distillbench.signals import Interrupted, Stop, stopping
from distillbench.tasks import Task, cells_of

LOG = "log.txt"  # in the folder of a cell: what its processes printed
SECONDS_OF_GRACE = 60.0  # between being told to stop and being killed
SECONDS_BETWEEN_NOTES = 0.2  # of progress


class Ended(Exception):
    """The process of a cell gave no answer. `status` is that of its rows."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Seen:
    """A cell, and what an earlier run left of it (None: something is left to do)."""

    about: About
    done: Done | None


class Hands(Protocol):
    """Who looks at cells and does their work."""

    def look(self, cells: Sequence[Cell], policy: Policy) -> list[Seen]:
        """All cells as they are. Trains or loads the teacher if need be; raises UserError if it does not fit."""

    def work(self, cell: Cell, seen: Seen, policy: Policy) -> Done | None:
        """Do what is left of `cell`; None if another process has it. Raises Ended, Interrupted or UserError."""


def look_at_all(cells: Sequence[Cell], policy: Policy, progress: Progress) -> list[Seen]:
    """The cells as they are."""
    with ExitStack() as still:
        for scene in {id(cell.scene): cell.scene for cell in cells}.values():
            still.enter_context(scene.unchanged())
        folders = {cell.scene.config.results_dir for cell in cells}
        files = {folder: SeenFiles(Path(folder) / "cells") for folder in folders}
        seen = [look_at(cell, files[cell.scene.config.results_dir], policy, progress) for cell in cells]
    for one in files.values():
        one.keep()
    return seen


def look_at(cell: Cell, files: SeenFiles, policy: Policy, progress: Progress) -> Seen:
    """The cell as it is."""
    teacher = loaded(cell, progress)
    told = about(cell, teacher)
    found = found_cell(cell, told.train_inputs, told.folder, files, progress, policy)
    return Seen(told, None if found is None else done(found, told))


def worked(hands: Hands, cell: Cell, seen: Seen, policy: Policy) -> Done | None:
    """What came of the work on `cell`, also where its process gave no answer; None if another process has it.

    Raises Interrupted or UserError.
    """
    if is_claimed(seen.about.folder):
        return None
    try:
        return hands.work(cell, seen, policy)
    except Ended as ended:
        return given_up(cell, seen.about, ended)


def given_up(cell: Cell, about: About, ended: Ended) -> Done:
    """The rows of a cell whose process gave no answer; that is kept."""
    inputs = about.train_inputs, about.evaluation_inputs
    keep_ending(cell, *inputs, about.folder, about.names["device"], ended.status, str(ended))
    return Done(about, about.without_scores(ended.status, str(ended)))


def work_on(cell: Cell, folder: Path, policy: Policy, progress: Progress, stop: Stop) -> Done | None:
    """What is left to do of the cell whose records are in `folder`; None if another process has it.

    Raises Ended where it is another cell here than it was when `folder` was told.
    """
    here = about(cell, loaded(cell, progress))
    if here.folder.name != folder.name:
        device = cell.scene.device.partition(":")[0]
        raise Ended("failed", f"it is another cell in the process that was to do it (device {device}, other plugins?)")
    with claimed(folder) as mine:
        if not mine:
            return None
        finished = run_cell(cell, progress, policy, stop)
        return done(finished, here)


def loaded(cell: Cell, progress: Progress) -> Any:
    """The teacher; only one process trains it."""
    scene = cell.scene
    torch.set_num_threads(scene.config.threads)
    if scene.teacher is None and scene.source.plan().images:
        with waiting(Path(scene.config.results_dir) / "cache" / "teachers", "the teacher", progress):
            return scene.loaded(progress)
    return scene.loaded(progress)


class OwnHands:
    """This process does it."""

    def __init__(self, progress: Progress, stop: Stop) -> None:
        self.progress, self.stop = progress, stop

    def look(self, cells: Sequence[Cell], policy: Policy) -> list[Seen]:
        return look_at_all(cells, policy, self.progress)

    def work(self, cell: Cell, seen: Seen, policy: Policy) -> Done | None:
        return work_on(cell, seen.about.folder, policy, self.progress, self.stop)


# --- processes -------------------------------------------------------------------------------------------------------


class OtherHands:
    """A process for each look and for each cell. It is told to stop when this one is, and killed when time is up.

    `device`: another than the run's.
    """

    def __init__(self, progress: Progress, stop: Stop, seconds: float, device: str = "") -> None:
        self.progress, self.stop, self.seconds, self.device = progress, stop, seconds, device

    def look(self, cells: Sequence[Cell], policy: Policy) -> list[Seen]:
        tasks = [Task.of(cell, self.device) for cell in cells]
        log = Path(cells[0].scene.config.results_dir) / "cells" / LOG
        try:
            return self._answer(_look, (tasks, policy), log, 0.0)
        except Ended as ended:
            raise UserError(f"the teacher cannot be made: {ended} (see {log})") from ended

    def work(self, cell: Cell, seen: Seen, policy: Policy) -> Done | None:
        folder = seen.about.folder
        return self._answer(_work, (Task.of(cell, self.device), folder, policy), folder / LOG, self.seconds)

    def _answer(self, function: Callable[..., Any], argument: Any, log: Path, seconds: float) -> Any:
        end = time.monotonic() + seconds if seconds else float("inf")
        steps: dict[int, tuple[Any, Step]] = {}
        with Worker(function, argument, log) as worker, self.stop.patiently():
            try:
                while True:
                    if self.stop():
                        worker.end(SECONDS_OF_GRACE, lambda: self.stop.again)
                        raise Interrupted(self.stop.name)
                    if time.monotonic() > end:
                        raise Ended("timeout", f"killed after cell_seconds={seconds:g}")
                    if not worker.has_news(0.2):
                        continue
                    kind, *told = worker.news()
                    if kind == "answer":
                        return told[0]
                    _hear(kind, told, steps, self.progress)
            except ProcessError as error:
                if self.stop():  # the signal came before the process could keep anything
                    raise Interrupted(self.stop.name) from error
                raise Ended("failed", str(error)) from error
            finally:
                for context, _ in steps.values():
                    context.__exit__(None, None, None)


def _hear(kind: str, told: list[Any], steps: dict[int, tuple[Any, Step]], progress: Progress) -> None:
    """Show what a process tells of its progress."""
    if kind == "say":
        progress.say(told[0])
    elif kind == "begin":
        context = progress.step(told[1])
        steps[told[0]] = (context, context.__enter__())
    elif kind == "advance":
        steps[told[0]][1].advance(*told[1:])
    elif kind == "end":
        steps.pop(told[0])[0].__exit__(None, None, None)
    elif kind == "user error":
        raise UserError(told[0])
    elif kind == "ended":
        raise Ended(*told)
    elif kind == "interrupted":
        raise Interrupted(told[0])


class Told(Progress):
    """Progress that is told to the process that started this one; lines go into the log, too."""

    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__(None)
        self.tell, self.count = tell, 0

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.tell("say", line)

    @contextmanager
    def step(self, label: str) -> Iterator[Step]:
        self.count += 1
        number, last = self.count, 0.0

        def show(fraction: float, note: str) -> None:
            nonlocal last
            if time.monotonic() - last > SECONDS_BETWEEN_NOTES:
                last = time.monotonic()
                self.tell("advance", number, fraction, note)

        print(label, flush=True)
        self.tell("begin", number, label)
        yield Step(show)
        self.tell("end", number)


def _look(argument: tuple[list[Task], Policy], tell: Callable[..., None]) -> None:
    tasks, policy = argument
    with _answering(tell) as (progress, _):
        tell("answer", look_at_all(cells_of(tasks), policy, progress))


def _work(argument: tuple[Task, Path, Policy], tell: Callable[..., None]) -> None:
    task, folder, policy = argument
    with _answering(tell) as (progress, stop):
        (cell,) = cells_of([task])
        tell("answer", work_on(cell, folder, policy, progress, stop))


@contextmanager
def _answering(tell: Callable[..., None]) -> Iterator[tuple[Progress, Stop]]:
    """What a started process does its work in: it stops when it is told to, or when its parent is gone."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        with stopping() as stop:
            yield Told(tell), stop
    except UserError as error:
        tell("user error", str(error))
    except Interrupted as interrupted:
        tell("interrupted", interrupted.name)
    except Ended as ended:
        tell("ended", ended.status, str(ended))
    sys.stdout.flush()


def _follow_parent() -> None:
    """Stop, as if told to, when the process that started this one has died."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
