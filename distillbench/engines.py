"""Work that is handed to another machine, and the answer that comes back. An engine carries both.

Both machines see the same results folder, and the same paths below the folder that the run was started in.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from distillbench.cell import Policy
from distillbench.done import Done
from distillbench.environment import environment
from distillbench.errors import UserError
from distillbench.hands import Ended, Hands, OtherHands, OwnHands, Seen, Task, cells_of, look_at_all, worked
from distillbench.processes import in_words
from distillbench.progress import Progress
from distillbench.signals import Interrupted, Stop


@dataclass(frozen=True)
class Looked:
    """The cells as they are, and what they are worked on."""

    seen: list[Seen]
    environment: dict[str, Any]


@dataclass(frozen=True)
class Look:
    """To look at all cells of a run."""

    tasks: list[Task]
    policy: Policy

    def do(self, progress: Progress, stop: Stop) -> Looked:
        cells = cells_of(self.tasks)
        seen = look_at_all(cells, self.policy, progress)
        scene = cells[0].scene
        return Looked(seen, environment(scene.device, scene.config.threads))


@dataclass(frozen=True)
class Work:
    """To work on a cell."""

    task: Task
    seen: Seen
    policy: Policy

    def do(self, progress: Progress, stop: Stop) -> Done | None:
        (cell,) = cells_of([self.task])
        hands: Hands = OwnHands(progress, stop)
        if self.task.config.isolate:
            hands = OtherHands(progress, stop, self.task.config.cell_seconds)
        return worked(hands, cell, self.seen, self.policy)


@dataclass(frozen=True)
class Answer:
    """What came of a job.

    "answer": `value`; "refused": a UserError, its text; "interrupted": a signal ended it, its name; "ended": there is
    no answer, the status and the reason.
    """

    kind: Literal["answer", "refused", "interrupted", "ended"]
    value: Any
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """Work, the folder that the run was started in, and where its modules are: plugins may be files."""

    pickled: bytes
    folder: str
    path: tuple[str, ...]

    @staticmethod
    def of(work: Look | Work) -> Job:
        try:
            pickled = pickle.dumps(work)
        except Exception as error:  # whatever a stranger's class raises
            raise UserError(f"a cell cannot be handed to another machine: {in_words(error)}") from error
        return Job(pickled, os.getcwd(), tuple(os.path.abspath(folder) for folder in sys.path))

    def answer(self, stop: Stop) -> Answer:
        """Do it. Errors are answers."""
        progress = RecordingProgress()
        try:
            os.chdir(self.folder)
            sys.path += [folder for folder in self.path if folder not in sys.path]
            work: Look | Work = pickle.loads(self.pickled)
            return Answer("answer", work.do(progress, stop), progress.said)
        except UserError as error:
            return Answer("refused", str(error), progress.said)
        except Interrupted as interrupted:
            return Answer("interrupted", interrupted.name, progress.said)
        except Ended as ended:
            return Answer("ended", (ended.status, str(ended)), progress.said)
        except Exception as error:
            traceback.print_exc()
            return Answer("ended", ("failed", in_words(error)), progress.said)


class RecordingProgress(Progress):
    """Keeps the lines, for the machine that shows them; they go into the job's log, too."""

    def __init__(self) -> None:
        super().__init__(None)
        self.said: list[str] = []

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.said.append(line)


class Engine(Protocol):
    """Carries jobs to other machines, and their answers back. A job in its hands is known by a number.

    `jobs`: what it calls them; `most`: that it is given at a time; `notes`: lines that a person should see.
    """

    jobs: str
    most: int
    notes: list[str]

    def submit(self, jobs: Sequence[Job]) -> list[int]:
        """Take them in; their numbers. Raises UserError where that is refused."""

    def answers(self, running: Sequence[int], seconds: float) -> list[tuple[int, Answer]]:
        """Those that have come by now; waits some `seconds` where there is none."""

    def cancel(self, running: Sequence[int]) -> None:
        """End them; each keeps the state of its training."""

    def close(self) -> None:
        """All is done."""
