"""Hard links to stored files, and copies where the file system has no links."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from distillbench.storage.files import sync, write_atomically


def link_all(links: Mapping[Path, Path]) -> None:
    """:func:`link_or_copy` each source to its target, the key. In one folder, which is read once."""
    there: dict[Path, dict[str, int]] = {}
    for target, source in links.items():
        folder = target.parent
        if folder not in there:
            there[folder] = {entry.name: entry.inode() for entry in os.scandir(folder)} if folder.is_dir() else {}
        if target.name not in there[folder] and _linked(source, target):
            continue
        if there[folder].get(target.name) != source.stat().st_ino:
            link_or_copy(source, target)
    for folder in there:
        sync(folder)


def _linked(source: Path, target: Path) -> bool:
    """Whether a hard link could be made, where there is nothing yet: it is whole at once."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    except OSError:
        return False
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link where the file system has them, otherwise a copy."""
    if target.exists() and target.samefile(source):
        return

    def write(path: str) -> None:
        Path(path).unlink()
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)

    write_atomically(target, write)
