"""Where cells are worked on: one after the other, side by side, or elsewhere. Who owns a cell its claim decides.

An executor is given cells and yields what came of them, in whatever order it comes.
"""

from __future__ import annotations

import collections
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Protocol

from distillbench.cell import Policy
from distillbench.claims import claimed, is_claimed
from distillbench.config import RunConfig
from distillbench.done import Done
from distillbench.engines import Answer, Engine, Job, Look, Looked, Work
from distillbench.environment import environment
from distillbench.errors import UserError
from distillbench.executor_settings import LocalConfig, RayConfig, SubmititConfig
from distillbench.hands import Ended, Hands, OtherHands, OwnHands, Seen, Task, given_up, worked
from distillbench.progress import Progress
from distillbench.shared_context import Cell
from distillbench.signals import Interrupted, Stop

SECONDS_BETWEEN_LOOKS = 0.2  # at threads
SECONDS_BETWEEN_ANSWERS = 0.5

Todo = Mapping[int, tuple[Cell, Seen]]  # by the cell's index
Came = Generator[tuple[int, Done | None], None, None]


class Executor(Protocol):
    """Spreads the work on cells. `patience`: seconds between looks at what other processes do."""

    patience: float

    def look(self, cells: Sequence[Cell], policy: Policy) -> Looked:
        """All cells as they are. Raises UserError if the teacher does not fit, Interrupted."""

    def work(self, todo: Todo, policy: Policy) -> Came:
        """What came of each cell; None: another process has it. Ends early where --fail-fast does.

        Raises UserError or Interrupted, once all that was begun has ended. It ends so, too, when it is closed.
        """

    def close(self) -> None:
        """All is done."""


def executor_of(config: RunConfig, progress: Progress, stop: Stop) -> Executor:
    """The executor that the settings choose. Raises UserError where its package is missing."""
    where = config.executor
    if isinstance(where, LocalConfig):
        if where.count > 1:
            return SideBySide(progress, stop, config.cell_seconds, where)
        device = where.devices[0] if where.devices else ""
        other = OtherHands(progress, stop, config.cell_seconds, device)
        return OneByOne(other if config.isolate else OwnHands(progress, stop))
    if isinstance(where, SubmititConfig):
        from distillbench.engine_submitit import Submitit

        return Elsewhere(Submitit(where, Path(config.results_dir)), where.requeues, progress, stop)
    assert isinstance(where, RayConfig)
    from distillbench.engine_ray import Ray

    return Elsewhere(Ray(where), where.retries, progress, stop)


def _looked(hands: Hands, cells: Sequence[Cell], policy: Policy) -> Looked:
    scene = cells[0].scene
    return Looked(hands.look(cells, policy), environment(scene.device, scene.config.threads))


def _enough(done: Done | None, policy: Policy) -> bool:
    return policy.fail_fast and done is not None and not done.ok


class OneByOne:
    """The cells in their order, one at a time."""

    patience = 1.0

    def __init__(self, hands: Hands) -> None:
        self.hands = hands

    def look(self, cells: Sequence[Cell], policy: Policy) -> Looked:
        return _looked(self.hands, cells, policy)

    def work(self, todo: Todo, policy: Policy) -> Came:
        for index, (cell, seen) in todo.items():
            done = worked(self.hands, cell, seen, policy)
            yield index, done
            if _enough(done, policy):
                return

    def close(self) -> None:
        pass


class SideBySide:
    """Several cells at a time on this machine: a thread for each, which watches over a process. Each has a device.

    The threads are told to stop by a Stop of their own, so that an error of one ends the others as a signal does.
    """

    patience = 1.0

    def __init__(self, progress: Progress, stop: Stop, seconds: float, where: LocalConfig) -> None:
        self.stop, self.ours = stop, Stop()
        devices = where.devices or [""]
        self.hands = [OtherHands(progress, self.ours, seconds, devices[k % len(devices)]) for k in range(where.count)]
        self.first = OtherHands(progress, stop, seconds, devices[0])

    def look(self, cells: Sequence[Cell], policy: Policy) -> Looked:
        return _looked(self.first, cells, policy)

    def work(self, todo: Todo, policy: Policy) -> Came:
        self.ours.name, self.ours.again = "", False
        waiting, free = collections.deque(todo.items()), list(self.hands)
        running: dict[Future[Done | None], tuple[int, OtherHands]] = {}
        with self.stop.patiently(), ThreadPoolExecutor(len(self.hands)) as threads:
            try:
                while running or (waiting and not self.stop()):
                    self.ours.name = self.stop.name
                    while waiting and free and not self.stop():
                        index, (cell, seen) = waiting.popleft()
                        hands = free.pop(0)
                        running[threads.submit(worked, hands, cell, seen, policy)] = index, hands
                    for future in wait(running, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done:
                        index, hands = running.pop(future)
                        free.append(hands)
                        if isinstance(future.exception(), Interrupted):
                            continue
                        done = future.result()
                        yield index, done
                        if _enough(done, policy):
                            waiting.clear()
            finally:
                self.ours.name = self.ours.name or self.stop.name or "another cell's error"
                self._await(running)
        if self.stop():
            raise Interrupted(self.stop.name)

    def _await(self, running: Iterable[Future[Done | None]]) -> None:
        """Wait for those that were told to stop. A second signal kills them."""
        left = set(running)
        while left:
            self.ours.again = self.stop.again
            left = wait(left, SECONDS_BETWEEN_LOOKS).not_done

    def close(self) -> None:
        pass


class Elsewhere:
    """The cells are jobs of other machines, and the looking at them is one, too: keys depend on what is there.

    A job that a signal ended there, and not here, begins again, at most `again` times.
    """

    patience = 30.0

    def __init__(self, engine: Engine, again: int, progress: Progress, stop: Stop) -> None:
        self.engine, self.again, self.progress, self.stop = engine, again, progress, stop
        for note in engine.notes:
            progress.say(note)

    def look(self, cells: Sequence[Cell], policy: Policy) -> Looked:
        self.progress.say(f"looking at what is there, in one of the {self.engine.jobs}")
        with closing(self._answers({0: Look([Task.of(cell) for cell in cells], policy)})) as answers:
            ((_, answer),) = answers
        if answer.kind == "ended":
            raise UserError(f"the teacher cannot be made: {answer.value[1]}")
        return answer.value

    def work(self, todo: Todo, policy: Policy) -> Came:
        free = {index: given for index, given in todo.items() if not is_claimed(given[1].about.folder)}
        yield from ((index, None) for index in todo.keys() - free.keys())
        with closing(self._answers({i: Work(Task.of(cell), seen, policy) for i, (cell, seen) in free.items()})) as came:
            for index, answer in came:
                done = answer.value if answer.kind == "answer" else _without_answer(*free[index], answer)
                yield index, done
                if _enough(done, policy):
                    return

    def _answers(self, work: Mapping[int, Look | Work]) -> Generator[tuple[int, Answer], None, None]:
        """Answers as they come, but those that have the work done again."""
        waiting, running, begun = collections.deque(work), dict[int, int](), collections.Counter[int]()
        with self.stop.patiently(), self.progress.step(f"{self.engine.jobs} ({len(work):,})") as step:
            try:
                while waiting or running:
                    if self.stop():
                        raise Interrupted(self.stop.name)
                    batch = [waiting.popleft() for _ in range(min(len(waiting), self.engine.most - len(running)))]
                    begun.update(batch)
                    numbers = self.engine.submit([Job.of(work[index]) for index in batch]) if batch else []
                    running |= zip(numbers, batch, strict=True)
                    for number, answer in self.engine.answers(list(running), SECONDS_BETWEEN_ANSWERS):
                        index = running.pop(number)
                        for line in answer.said:
                            self.progress.say(line)
                        if answer.kind == "refused":
                            raise UserError(answer.value)
                        if answer.kind == "interrupted" and begun[index] <= self.again:
                            self.progress.say(
                                f"one of the {self.engine.jobs} was ended by {answer.value}; it begins again"
                            )
                            waiting.append(index)
                            continue
                        yield index, answer
                    left = len(running) + len(waiting)
                    step.advance(1 - left / len(work), f"{len(work) - left:,} done")
            finally:
                self._cancel(list(running))

    def _cancel(self, running: list[int]) -> None:
        if running:
            kept = "what they reached is kept, and the same command goes on from there"
            self.progress.say(f"{self.engine.jobs} that are cancelled: {len(running):,}; {kept}")
            self.engine.cancel(running)

    def close(self) -> None:
        self.engine.close()


def _without_answer(cell: Cell, seen: Seen, answer: Answer) -> Done | None:
    """The rows of a cell whose job gave none; None where a process of it is still at work."""
    status, reason = ("failed", f"ended by {answer.value}") if answer.kind == "interrupted" else answer.value
    with claimed(seen.about.folder) as mine:
        return given_up(cell, seen.about, Ended(status, reason)) if mine else None
