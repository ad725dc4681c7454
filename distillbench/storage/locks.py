"""Locks between processes that share a results folder.

A lock is the operating system's lock of a file beside the folder: it is released when its process ends for any reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from distillbench.system.progress import Progress


@contextmanager
def try_lock(folder: Path) -> Iterator[bool]:
    """Whether this process has the lock of `folder` during the block; does not wait."""
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
    """Whether another process has the lock of `folder` now."""
    if not _file(folder).exists():
        return False
    with try_lock(folder) as mine:
        return not mine


@contextmanager
def wait_for_lock(folder: Path, what: str, progress: Progress) -> Iterator[None]:
    """Hold the lock of `folder` during the block; waits for it. `what` names in messages what is being made."""
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
