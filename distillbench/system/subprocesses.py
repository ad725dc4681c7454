"""Functions run in a process of their own, which can be killed when they take too long.

The process has none of the caller's memory, threads or CUDA context. On Linux it is forked from a server process
("forkserver" of multiprocessing), which the first worker starts: it has imported torch and the module of that
worker's function and done nothing else, so further workers start in milliseconds and not in the seconds that importing
takes. Elsewhere it is spawned. It does not import the caller's main script: an unguarded script would start again, and
one read from standard input cannot be imported. What it prints goes into a log file; when the process dies, the last
line of the log is part of the error message.

A ProcessPoolExecutor would not do: its workers cannot be killed one by one, their exit codes are unknown, and they wait
forever, holding their memory, when the caller is killed.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
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
from distillbench.system.output_encoding import replace_unwritable
from distillbench.system.signals import STOP_SIGNALS

SECONDS_TO_EXIT = 5.0  # after the last message
SECONDS_BETWEEN_POLLS = 0.2

_STARTING = threading.Lock()

Argument = TypeVar("Argument")
Answer = TypeVar("Answer")


class ProcessError(Exception):
    """A process returned no result. The message is one line; the traceback, if there is one, is a note."""


def call_in_fresh_process(function: Callable[[Argument], Answer], argument: Argument, limit_seconds: float) -> Answer:
    """``function(argument)``, computed by a process that is started for it and killed after `limit_seconds`.

    Raises ProcessError if function, argument or result cannot be pickled, if the call raises, if the process dies, or
    if the time is up.
    """
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        Worker(_call, (function, argument), Path(folder) / "log.txt") as worker,
    ):
        if not worker.poll(limit_seconds):
            raise ProcessError(f"the process was killed: it was not done after {limit_seconds:g} s")
        _, answer = worker.news()
        return answer


def _call(call: tuple[Callable[[Any], Any], Any], send: Callable[..., None]) -> None:
    function, argument = call
    send("answer", function(argument))


class Worker:
    """A process that runs ``function(argument, send)``; each ``send(kind, ...)`` there is one :meth:`news` here.

    What it prints is appended to the file `log`. It may start processes itself. Raises ProcessError if function or
    argument cannot be pickled, or if the server dies that forks processes.
    """

    def __init__(self, function: Callable[[Any, Callable[..., None]], None], argument: Any, log: Path) -> None:
        try:
            pickled = pickle.dumps((function, argument))
        except Exception as error:  # third-party classes may raise anything
            raise ProcessError(f"cannot be sent to another process: {in_words(error)}") from error
        context = _context(function.__module__)
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(pickled, writer, str(log), dict(os.environ), sys.path))
        try:
            with _without_main_script():
                if context.get_start_method() == "forkserver":
                    _start_server()
                self.process.start()
        except (EOFError, ConnectionError) as error:
            self.reader.close()
            raise ProcessError("the server process that workers are forked from has died") from error
        finally:
            writer.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        """Kill it; after a block without an error it first has time to exit by itself."""
        self.process.join(SECONDS_TO_EXIT if error[0] is None else 0)
        self.process.kill()
        _await_exit_code(self.process)
        self.process.close()
        self.reader.close()

    def poll(self, seconds: float) -> bool:
        """Whether it has sent a message or has died; waits up to `seconds` for it."""
        return self.reader.poll(seconds)

    def news(self) -> tuple[Any, ...]:
        """The next message. Raises ProcessError if the function has raised or the process has died."""
        try:
            message = pickle.loads(self.reader.recv_bytes())
        except (EOFError, OSError):
            _await_exit_code(self.process)
            raise ProcessError(_death(self.process.exitcode or 0, self.log)) from None
        if message[0] == "failed":
            failed = ProcessError(message[1])
            failed.add_note(message[2])
            raise failed
        return message

    def end(self, seconds: float, at_once: Callable[[], bool]) -> None:
        """Send SIGTERM and wait until it has exited, at most `seconds`, or until `at_once` says so."""
        self.process.terminate()
        end = time.monotonic() + seconds
        while self.process.is_alive() and time.monotonic() < end and not at_once():
            self.process.join(SECONDS_BETWEEN_POLLS)


def _context(module: str) -> Any:
    """How processes are started. `module` is imported by the server, if this call is the first."""
    if not sys.platform.startswith("linux"):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", module])  # ignored once the server runs
    return context


def _start_server() -> None:
    """Start the server that workers are forked from, unless it runs, with the signals blocked that stop a run.

    The terminal and schedulers send them to all processes. Without the server nobody could wait for its workers, which
    save their states then.
    """
    multiprocessing.resource_tracker.ensure_running()  # in the other order it would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(pickled: bytes, writer: Connection, log: str, environment: dict[str, str], path: list[str]) -> None:
    """The main function of a worker process. It is in a session apart from the terminal: its parent handles Ctrl-C."""
    os.environ.clear()  # the server has those of the time when it was started
    os.environ.update(environment)
    sys.path[:] = path
    if hasattr(os, "setsid"):
        os.setsid()
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the server has them blocked
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    replace_unwritable()
    lock = threading.Lock()

    def send(*message: Any) -> None:
        # writer.send() would share the memory of tensors, which ends with this process.
        pickled = pickle.dumps(message)
        with lock, suppress(BrokenPipeError):  # the parent has died
            writer.send_bytes(pickled)

    try:
        function, argument = pickle.loads(pickled)
        function(argument, send)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        send("failed", in_words(error), traceback.format_exc())


def in_words(error: BaseException) -> str:
    """The error in one line for a table: its message, with its class unless it was written for a user to read."""
    line = (str(error).strip() or "no message").splitlines()[0]
    return line if isinstance(error, UserError | Unavailable) else f"{type(error).__name__}: {line}"


def _death(code: int, log: Path) -> str:
    """How a process died, and the last line of its log."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    how += ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"the process died ({how}){last and '; its last words: '}{last}"


@contextmanager
def _without_main_script() -> Iterator[None]:
    """A block, for one thread at a time, in which multiprocessing finds an empty main module in place of the script."""
    with _STARTING:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


def _await_exit_code(process: BaseProcess) -> None:
    """Wait until the exit code is known: another thread may have reaped the process and not stored the code yet."""
    process.join()
    while process.exitcode is None:
        time.sleep(0.01)
