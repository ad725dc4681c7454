"""The context of a step: device, sizes, time, a folder, the findings of earlier steps, and where it reports its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distillbench.errors import Unavailable, UserError
from gpu_steps.verdicts import Verdict

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class Context:
    """Of one step, in a process of its own."""

    device: str
    small: bool  # a rehearsal: everything tiny
    folder: Path  # scratch, of this step alone
    output: Path  # JSON lines
    seconds: float  # of the step's time limit
    batch: int = 0  # images of a step of training; 0: chosen by the device's memory
    simulated: bool = False
    earlier: dict[str, Any] = field(default_factory=dict)  # what earlier steps kept
    begin: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def left(self) -> float:
        """Seconds until the step is killed, less some to end in order."""
        return self.begin + 0.92 * self.seconds - time.monotonic()

    def say(self, *verdicts: Verdict) -> None:
        for verdict in verdicts:
            self._write({"verdict": asdict(verdict)})

    def keep(self, name: str, value: Any) -> None:
        """A value for the JSON; those of the same name in a step replace each other."""
        self._write({"name": name, "value": value})

    def _write(self, line: dict[str, Any]) -> None:
        with self.output.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What goes wrong in the block is a verdict, and the step goes on. The log has the traceback."""
        try:
            yield
        except (NotRun, Unavailable, UserError) as reason:
            self.say(Verdict("skipped", what, str(reason)))
        except OutOfTime as late:
            self.say(Verdict("look", what, str(late), "", "repeat this step alone"))
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            self.say(Verdict("wrong", what, f"{type(error).__name__}: {lines[0] if lines else ''}", "", "see the log"))

    def need(self, seconds: float) -> None:
        """Raise NotRun where less time than that is left."""
        if self.left < seconds:
            raise NotRun(f"no time is left: {seconds:.0f} s are needed")

    # --- the command line --------------------------------------------------------------------------------------------

    def start(self, *words: str, before: Sequence[str] = (), **variables: str) -> subprocess.Popen[str]:
        """The project's command line in a process of its own; what it prints goes into this step's log.

        `before`: arguments of Python in the place of the usual ones. `variables` of the environment are added.
        """
        print("$", *(f"{name}={value}" for name, value in variables.items()), *words, flush=True)
        usual = ("-m", "distillbench.simulated_cuda" if self.simulated else "distillbench")
        command = [sys.executable, *(before or usual), *words]
        return subprocess.Popen(command, env=os.environ | variables, text=True, stdout=sys.stdout, stderr=sys.stdout)

    def run(self, *words: str, before: Sequence[str] = (), **variables: str) -> int:
        """Its exit code; it ends with the step's time."""
        process = self.start(*words, before=before, **variables)
        try:
            return process.wait(max(1.0, self.left))
        except subprocess.TimeoutExpired:
            stop(process)
            raise OutOfTime("a command was killed when the step's time was over: it hangs, or is too slow") from None


class NotRun(Exception):
    """Something was left out; the message is the reason."""


class OutOfTime(Exception):
    """A command did not end in the step's time."""


def stop(process: subprocess.Popen[Any], number: int = signal.SIGTERM, patience: float = 10.0) -> int:
    """Ask a process to end, and kill it if it does not."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def wait_for(condition: Callable[[], bool], seconds: float, process: subprocess.Popen[Any]) -> bool:
    """Whether `condition` holds before the time is over or the process has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def path_of_python() -> str:
    """PYTHONPATH of the processes: this checkout before all else."""
    before = os.environ.get("PYTHONPATH", "")
    own = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "plugins")]
    return os.pathsep.join([*own, *filter(None, [before])])
