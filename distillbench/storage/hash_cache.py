"""Files whose hash was found to be right, so that thousands of weights are not read anew whenever a run begins.

As in git's index, a file counts as unchanged while its size, its time of change and its place on the disk are what they
were. `distillbench doctor --thorough` reads every byte.
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
    """Hashes of the files below `folder`, by their path there: what was read once, and what was noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known = _read(folder / NAME)
        self.fresh: dict[str, list[Any]] = {}

    def intact(self, path: Path, sha256: str) -> bool:
        """Whether the file is there and has this hash."""
        told = self._told(path, sha256)
        if told is None:
            return False
        name = path.relative_to(self.folder).as_posix()
        if (self.fresh.get(name) or self.known.get(name)) == told:
            return True
        if sha256_file(path) != sha256:
            return False
        self.fresh[name] = told
        return True

    def note(self, path: Path, sha256: str) -> None:
        """The file was written just now, with this hash."""
        if self.folder not in path.parents or (told := self._told(path, sha256)) is None:
            return
        name = path.relative_to(self.folder).as_posix()
        if self.known.get(name) != told:
            self.fresh[name] = told

    def keep(self) -> None:
        """Write down what is new, beside what others have written meanwhile. It is only there to save time."""
        if self.fresh:
            files = _read(self.folder / NAME) | self.fresh
            text = json.dumps({"format": FORMAT, "files": files})
            try:
                write_atomically(self.folder / NAME, lambda path: Path(path).write_text(text, encoding="utf-8"))
            except OSError:
                return
            self.known, self.fresh = files, {}

    @staticmethod
    def _told(path: Path, sha256: str) -> list[Any] | None:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return [found.st_size, found.st_mtime_ns, found.st_ino, sha256]


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        told = json.loads(path.read_bytes())
        files = told["files"] if told["format"] == FORMAT else {}
        return {str(name): list(entry) for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
