"""Checks of ``distillbench doctor``: room, rights, hard links, replacing and locks of the disks that are written to."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillbench.cli.clean_downloads import DAYS, leftovers
from distillbench.cli.doctor_findings import MIB, Finding, Installation, Level
from distillbench.errors import counted
from distillbench.evaluation.pretrained_weights import VARIABLE
from distillbench.storage import folders
from distillbench.storage.downloads import VARIABLE as DOWNLOADS
from distillbench.storage.downloads import downloads_folder, is_intact, located, read_record
from distillbench.storage.files import TEMPORARY
from distillbench.storage.sources import known

LITTLE_MIB, TOO_LITTLE_MIB = 5 * 1024, 200  # free on a disk
LITTLE_INODES = 1000
LOCAL_LOCKS = ("nolock", "localflock", "local_lock=flock", "local_lock=all")  # options of mounts


@dataclass(frozen=True)
class Disk:
    """What the file system of a folder can do. An error is "" where the operation works."""

    free_mib: float
    inodes: int | None  # free; None without a limit
    kind: str = ""  # of the file system
    options: str = ""  # of the mount
    write_error: str = ""
    link_error: str = ""
    rename_error: str = ""
    lock_error: str = ""


def judge_room(what: str, disk: Disk, level: Level, advice: str) -> Finding:
    """Whether a folder can be written to and has room. `what` names the folder; `level` is that of a failure."""
    if disk.write_error:
        return Finding(level, f"{what}: cannot be written to: {disk.write_error}", advice)
    where = f"{what}: {disk.free_mib / 1024:,.1f} GiB free{disk.kind and f' on {disk.kind}'}"
    where += ", a network file system" if disk.kind in folders.NETWORK_FILE_SYSTEMS else ""
    if disk.inodes is not None and disk.inodes < LITTLE_INODES:
        return Finding(level, f"{where}, room for {disk.inodes:,} more files", advice)
    if disk.free_mib < TOO_LITTLE_MIB:
        return Finding(level, where, advice)
    return Finding("warning", where, advice) if disk.free_mib < LITTLE_MIB else Finding("ok", where)


def judge_files(what: str, disk: Disk) -> Iterator[Finding]:
    """Whether files of a writable folder can be replaced, locked and hard-linked."""
    if disk.rename_error:
        line = f"{what}: a file cannot be replaced atomically: {disk.rename_error}"
        yield Finding("wrong", line, "choose a folder on a local disk: records could be lost here")
    if disk.lock_error:
        line = f"{what}: files cannot be locked: {disk.lock_error}"
        yield Finding("wrong", line, "choose another folder, or run one process at a time in this one")
    elif disk.kind in folders.NETWORK_FILE_SYSTEMS and (only_here := _local_locks(disk)):
        line = f"{what}: other machines do not see locks ({disk.kind}: {only_here})"
        yield Finding("warning", line, "use this folder from one machine at a time, or have it mounted with locks")
    if disk.link_error:
        line = f"{what}: no hard links: {disk.link_error}; students' weights are copied and take twice the space"
        yield Finding("warning", line, "nothing, or choose another folder")


def _local_locks(disk: Disk) -> str:
    """Why locks are local to this machine; "" where they are not, or it is not known."""
    if disk.kind == "fuse.sshfs":
        return "has no locks"
    local = [option for option in disk.options.split(",") if option in LOCAL_LOCKS]
    return f"mounted with {', '.join(local)}" if local else ""


def check_disk(installation: Installation) -> Iterator[Finding]:
    """Whether results and weights can be written to their folders."""
    what, disk = f"results ({installation.results_dir})", find_disk(installation.results_dir)
    advice = "free space (distillbench clean), fix its permissions, or choose another folder: results_dir=FOLDER"
    yield judge_room(what, disk, "wrong", advice)
    yield from judge_files(what, disk)
    advice = f"only matters for fetching weights; {VARIABLE}=FOLDER sets another folder for them"
    yield judge_room(f"weights ({installation.weights})", find_disk(installation.weights), "warning", advice)
    advice = f"only matters for fetching datasets and teachers; {DOWNLOADS}=FOLDER sets another folder for them"
    folder = downloads_folder()
    yield judge_room(f"downloads ({folder})", find_disk(folder), "warning", advice)


def check_downloads(installation: Installation) -> Iterator[Finding]:
    """Whether datasets and teachers that were fetched are complete; with --thorough also their hashes."""
    good, stored, folder = [], False, downloads_folder()
    for name, source in known().items():
        if not (folder / name).is_dir() or read_record(source) is None:
            continue
        stored = True
        if located(source) is None or (installation.thorough and not is_intact(source)):
            yield Finding("wrong", f"{name}: files are missing or damaged", f"distillbench fetch {name}")
        else:
            good.append(name)
    if good:
        checked = "complete and undamaged" if installation.thorough else "complete (--thorough hashes them)"
        yield Finding("ok", f"{checked}: {', '.join(good)}")
    left = leftovers(time.time() - 86400 * DAYS)
    if left:
        line = f"left over of downloads: {counted(len(left), 'file')}, {folders.size_of(left) / MIB:,.1f} MiB"
        yield Finding("warning", line, "distillbench clean --downloads")
    if not stored and not left:
        yield Finding("ok", f"no downloads in {folder} yet")


def find_disk(folder: Path) -> Disk:
    """What the file system of `folder`, or of its closest existing parent, can do. Leaves no files behind."""
    parent = folder.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    usage = shutil.disk_usage(parent)
    inodes = None
    if sys.platform != "win32":
        found = os.statvfs(parent)
        inodes = found.f_favail if found.f_files else None
    kind, options = folders.file_system(parent)
    facts: dict[str, Any] = {"free_mib": usage.free / MIB, "inodes": inodes, "kind": kind, "options": options}
    try:
        if not parent.is_dir():
            raise NotADirectoryError(f"{parent} is not a folder")
        with tempfile.TemporaryDirectory(dir=parent, prefix=TEMPORARY, ignore_cleanup_errors=True) as scratch:
            probe = Path(scratch)
            (probe / "a").write_bytes(b"first")
            return Disk(
                **facts,
                link_error=_error_of(lambda: _try_link(probe)),
                rename_error=_error_of(lambda: _try_rename(probe)),
                lock_error=_error_of(lambda: _try_lock(probe)),
            )
    except OSError as error:
        return Disk(**facts, write_error=error.strerror or str(error))


def _error_of(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except Exception as error:  # file systems and locks can raise anything
        return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return ""


def _try_link(probe: Path) -> None:
    os.link(probe / "a", probe / "linked")
    if not os.path.samefile(probe / "a", probe / "linked"):
        raise OSError("the link is not the same file")


def _try_rename(probe: Path) -> None:
    (probe / "b").write_bytes(b"second")
    (probe / "target").write_bytes(b"old")
    os.replace(probe / "b", probe / "target")
    if (probe / "target").read_bytes() != b"second" or (probe / "b").exists():
        raise OSError("the old file is still there afterwards")


def _try_lock(probe: Path) -> None:
    """Lock a file twice: the second attempt must time out."""
    from filelock import FileLock, Timeout

    with FileLock(probe / "lock"):
        try:
            with FileLock(probe / "lock", timeout=0, is_singleton=False):
                pass
        except Timeout:
            return
    raise OSError("two locks on one file at once")
