"""A cache of verified file hashes, so that a run does not hash thousands of weight files again at its start.

As in git's index, a file counts as unchanged while its size, modification time and inode are unchanged.
`distillbench doctor --thorough` reads every byte.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from distillbench.storage.files import sha256_file, write_atomically

NAME = "seen.json"  # in the folder of cells
FORMAT = 1


class HashCache:
    """Verified hashes of the files below `folder`, by their path relative to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known = _read(folder / NAME)
        self.fresh: dict[str, list[Any]] = {}

    def intact(self, path: Path, sha256: str) -> bool:
        """Whether the file exists and has this hash."""
        entry = self._entry(path, sha256)
        if entry is None:
            return False
        name = path.relative_to(self.folder).as_posix()
        if (self.fresh.get(name) or self.known.get(name)) == entry:
            return True
        if sha256_file(path) != sha256:
            return False
        self.fresh[name] = entry
        return True

    def note(self, path: Path, sha256: str) -> None:
        """Add a file that was just written, with its hash."""
        if self.folder not in path.parents or (entry := self._entry(path, sha256)) is None:
            return
        name = path.relative_to(self.folder).as_posix()
        if self.known.get(name) != entry:
            self.fresh[name] = entry

    def keep(self) -> None:
        """Write the new entries, merged with those of other processes. An error is ignored: it only costs time."""
        if self.fresh:
            files = _read(self.folder / NAME) | self.fresh
            text = json.dumps({"format": FORMAT, "files": files})
            try:
                write_atomically(self.folder / NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))
            except OSError:
                return
            self.known, self.fresh = files, {}

    @staticmethod
    def _entry(path: Path, sha256: str) -> list[Any] | None:
        """What identifies the unchanged file: size, modification time, inode and hash; None if it does not exist."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns, found.st_ino, sha256]


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        stored = json.loads(path.read_bytes())
        files = stored["files"] if stored["format"] == FORMAT else {}
        return {str(name): list(entry) for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
