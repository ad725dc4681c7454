"""Calls in a process of their own, started for them and killed where it takes too long.

The process is spawned and not forked: it has none of the caller's memory, threads or CUDA context. It imports what the
call needs, but not the script that started the caller: one that is not guarded would start it again, and one that came
by standard input is not there to be read. What it prints is shown to nobody; where it dies, its last line is part of
the reason.

A process and a pipe, and no executor: its worker can be killed, its exit code is known, and it ends by itself when the
caller is killed, where the worker of a ProcessPoolExecutor waits forever and holds its memory.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from distillbench.errors import Unavailable, UserError
from distillbench.output_encoding import replace_unwritable

SECONDS_TO_EXIT = 5.0  # after the answer was given
SECONDS_BETWEEN_LOOKS = 0.2  # at a process that ends

_STARTING = threading.Lock()

Argument = TypeVar("Argument")
Answer = TypeVar("Answer")


class ProcessError(Exception):
    """A call in a fresh process gave no answer. The message is one line; a traceback, if there is one, is a note."""


def call_in_fresh_process(function: Callable[[Argument], Answer], argument: Argument, limit_seconds: float) -> Answer:
    """``function(argument)``, computed by a process that is started for it and has `limit_seconds` for all it does.

    Raises ProcessError if the two cannot be pickled, if the call raises, if the process dies, or if time is up.
    """
    try:
        pickled = pickle.dumps((function, argument))
    except Exception as error:  # whatever a stranger's class raises
        raise ProcessError(f"cannot be handed to a fresh process: {in_words(error)}") from error
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        printed = Path(folder) / "printed.txt"
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(pickled, writer, str(printed)), daemon=True)
        with _without_main_script():
            process.start()
        writer.close()
        try:
            answer, failure, told = _received(reader, process, printed, limit_seconds)
        finally:
            process.kill()
            process.join()
            process.close()
            reader.close()
    if failure:
        failed = ProcessError(failure)
        if told:
            failed.add_note(told)
        raise failed
    return answer


class Worker:
    """A process that does ``function(argument, tell)`` and tells how it goes: ``tell(kind, ...)`` is ``news()`` here.

    What it prints is appended to the file `log`. Unlike a call's, it may start processes of its own.
    """

    def __init__(self, function: Callable[[Any, Callable[..., None]], None], argument: Any, log: Path) -> None:
        try:
            pickled = pickle.dumps((function, argument))
        except Exception as error:  # whatever a stranger's class raises
            raise ProcessError(f"cannot be handed to another process: {in_words(error)}") from error
        context = multiprocessing.get_context("spawn")
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(pickled, writer, str(log)))
        with _without_main_script():
            self.process.start()
        writer.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        """Give it time to leave by itself after its last word; then it is killed."""
        self.process.join(SECONDS_TO_EXIT if error[0] is None else 0)
        self.process.kill()
        _await_code(self.process)
        self.process.close()
        self.reader.close()

    def has_news(self, seconds: float) -> bool:
        """Whether it has told something, or has died; waits so long for it."""
        return self.reader.poll(seconds)

    def news(self) -> tuple[Any, ...]:
        """The next that it has told. Raises ProcessError where it fails or dies before its last word."""
        try:
            told = pickle.loads(self.reader.recv_bytes())
        except (EOFError, OSError):
            _await_code(self.process)
            raise ProcessError(_end(self.process.exitcode or 0, self.log)) from None
        if told[0] == "failed":
            failed = ProcessError(told[1])
            failed.add_note(told[2])
            raise failed
        return told

    def end(self, seconds: float, at_once: Callable[[], bool]) -> None:
        """Tell it to stop, and wait until it has: for so long, or until `at_once`."""
        self.process.terminate()
        end = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < end and not at_once():
            self.process.join(SECONDS_BETWEEN_LOOKS)


def _work(pickled: bytes, writer: Connection, log: str) -> None:
    """What a worker's process does. Ctrl-C at the terminal is for the process that started it, which passes it on."""
    os.setsid()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    replace_unwritable()
    lock = threading.Lock()

    def tell(*told: Any) -> None:
        with lock, suppress(BrokenPipeError):  # nobody is there: whoever watches the parent ends this process
            writer.send_bytes(
                pickle.dumps(told)
            )  # not send(): it would share tensors' memory, which ends with the sender

    try:
        function, argument = pickle.loads(pickled)
        function(argument, tell)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        tell("failed", in_words(error), traceback.format_exc())


def in_words(error: BaseException) -> str:
    """One line for a table: the message, after the error's kind unless the message was written to be read alone."""
    line = (str(error).strip() or "no message").splitlines()[0]
    return line if isinstance(error, UserError | Unavailable) else f"{type(error).__name__}: {line}"


def _received(reader: Connection, process: BaseProcess, printed: Path, limit_seconds: float) -> tuple[Any, str, str]:
    """What `_answer` sent: the answer, or one line and the traceback that say why there is none."""
    if not reader.poll(limit_seconds):
        return None, f"the process was killed: it was not done after {limit_seconds:g} s", ""
    try:
        received = reader.recv()
    except EOFError:
        process.join()
        return None, _end(process.exitcode or 0, printed), ""
    process.join(SECONDS_TO_EXIT)
    return received


def _end(code: int, printed: Path) -> str:
    """How a process ended that gave no answer."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    how += ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    lines = printed.read_text(errors="replace").split("\n") if printed.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"the process died ({how}){last and '; its last words: '}{last}"


def _answer(pickled: bytes, writer: Connection, printed: str) -> None:
    """What the fresh process does."""
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    replace_unwritable()
    answer, failure, told = None, "", ""
    try:
        function, argument = pickle.loads(pickled)
        answer = function(argument)
    except (Exception, SystemExit) as error:
        failure, told = in_words(error), traceback.format_exc()
    writer.send((answer, failure, told))


@contextmanager
def _without_main_script() -> Iterator[None]:
    """A block in which multiprocessing finds no script to import anew, only an empty module. One thread at a time."""
    with _STARTING:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


def _await_code(process: BaseProcess) -> None:
    """Wait for its end, until its exit code is known: another thread may have been the one who was told."""
    process.join()
    while process.exitcode is None:
        time.sleep(0.01)
