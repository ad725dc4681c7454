"""``distillbench clean --downloads``: what ``fetch`` stored, and what its interrupted and refused downloads left."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distillbench.errors import UserError, counted, unknown
from distillbench.evaluation.pretrained_weights import weights_folder
from distillbench.storage.downloads import downloads_folder
from distillbench.storage.files import TEMPORARY
from distillbench.storage.folders import files_below, folders_in, lstat, size_of
from distillbench.storage.http_download import REFUSED
from distillbench.storage.locks import is_locked, try_lock

if TYPE_CHECKING:
    from rich.console import Console

LEFT = (".part", ".part.etag", ".incomplete", REFUSED)  # ends of the names of files that no run reads
DAYS = 1.0  # the default minimum age of such a file: a download may be running, and continues from it
MIB = 2**20


def leftovers(before: float) -> list[Path]:
    """Files of interrupted and refused downloads, unchanged since `before`, that no process is working on."""
    found = []
    for folder in (downloads_folder(), weights_folder()):
        for file in files_below(folder):
            stat = lstat(file)
            left = file.name.endswith(LEFT) or file.name.startswith(TEMPORARY)
            if left and stat is not None and stat.st_mtime < before and not any(map(is_locked, _locked(folder, file))):
                found.append(file)
    return found


def _locked(root: Path, file: Path) -> Iterator[Path]:
    """What a download that writes `file` holds the lock of: the folder of its source, or the file of weights."""
    top = root / file.relative_to(root).parts[0]
    yield top
    for end in LEFT:
        if file.name.endswith(end):
            yield file.with_name(file.name.removesuffix(end))


def fetched() -> dict[str, int]:
    """The sources that are stored, with their bytes."""
    return {folder.name: size_of(files_below(folder)) for folder in folders_in(downloads_folder())}


def clean_downloads(
    names: Sequence[str], older_than_days: float | None, yes: bool, console: Console, confirm: Callable[[str], bool]
) -> int:
    """Print what is stored and what is left over. Remove the latter and the sources `names`, after confirmation.

    Returns 1 if something could not be removed, else 0. Raises UserError for a name that is not stored.
    """
    stored = fetched()
    for name in names:
        if name not in stored:
            raise unknown("stored download", name, stored)
    days = DAYS if older_than_days is None else older_than_days
    if not days >= 0:
        raise UserError(f"--older-than must not be negative, got {days:g}")
    files = leftovers(time.time() - 86400 * days)
    say = lambda line: console.print(line, markup=False, highlight=False)
    say(f"{downloads_folder()}: {counted(len(stored), 'stored download')}")
    for name, size in stored.items():
        say(f"  {name:24} {size / MIB:>10,.1f} MiB{'  to be removed' if name in names else ''}")
    if files:
        say(f"left over of downloads: {counted(len(files), 'file')}, {size_of(files) / MIB:,.1f} MiB, to be removed")
    if not files and not names:
        say("nothing to remove (--what NAME removes a stored download)")
        return 0
    if not yes and not confirm("Remove this?"):
        say("nothing was removed (--yes removes without asking)")
        return 0
    troubles = [trouble for file in files if (trouble := _tried(file.unlink, file))]
    for name in names:
        troubles += _remove_source(name)
    for line in troubles:
        say(line)
    say("removed, but not everything" if troubles else "removed")
    return 1 if troubles else 0


def _remove_source(name: str) -> list[str]:
    """Remove the files of a source. The record of their hashes stays: a later download is compared with it."""
    folder = downloads_folder() / name
    with try_lock(folder) as mine:
        trouble = _tried(lambda: shutil.rmtree(folder), folder) if mine else f"a process is downloading {name}: skipped"
    return [trouble] if trouble else []


def _tried(remove: Callable[[], object], path: Path) -> str:
    try:
        remove()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"cannot remove {path}: {error.strerror or error}"
    return ""
