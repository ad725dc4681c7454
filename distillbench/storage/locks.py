"""Claims: of several processes on one results folder, one at a time does what only one should do.

A claim is a lock of the operating system on a file: it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from distillbench.system.progress import Progress


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Whether this process has the claim on `folder` during the block; does not wait."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether another process has the claim on `folder` now."""
    if not _file(folder).exists():
        return False
    with try_lock(folder) as mine:
        return not mine


@contextmanager
def wait_for_lock(folder: Path, what: str, progress: Progress) -> Iterator[None]:
    """The claim on `folder` during the block, waited for: `what` another process is then making."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress.say(f"waiting for {what}, which another process is making")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.claim")


def _lock(folder: Path) -> FileLock:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(_file(folder))
