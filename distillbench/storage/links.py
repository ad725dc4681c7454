"""Hard links to stored files, or copies if the file system does not support links."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from distillbench.storage.files import sync, write_atomically


def link_all(links: Mapping[Path, Path]) -> None:
    """:func:`link_or_copy` for {target: source}; each target's folder is listed only once."""
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
    """Try to create a hard link at a `target` that does not exist; needs no temporary file, since links are atomic."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    except OSError:
        return False
    return True


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy of it if the file system does not support links."""
    if target.exists() and target.samefile(source):
        return

    def write(path: str) -> None:
        Path(path).unlink()
        try:
            os.link(source, path)
        except OSError:
            shutil.copyfile(source, path)

    write_atomically(target, write)
