"""Released datasets and networks that can be downloaded: the entries of ``distillbench/sources.toml`` as values.

``DISTILLBENCH_SOURCES`` names a file of the same form with own entries, such as an institute's mirror; they replace
those of the same name. Neither torch nor plugins are imported here, so that missing files are reported at once.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from distillbench.errors import UserError, unknown

FILE = Path(__file__).resolve().parents[1] / "sources.toml"
VARIABLE = "DISTILLBENCH_SOURCES"  # environment variable: a file with own entries
DATASET, TEACHER = "dataset", "teacher"  # parts of a run
HUB_DATASET, URL = "hub dataset", "url"  # kinds of sources
PLAIN = re.compile(r"[^./\\][^/\\]*")  # names of files and folders

_STRICT = ConfigDict(extra="forbid")  # a misspelt sha256 must not go unnoticed


@dataclass(frozen=True)
class SourceFile:
    """A file with a URL. `bytes` and `sha256` are None where they are not known for certain."""

    __pydantic_config__ = _STRICT
    url: str
    bytes: int | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """A dataset or a teacher that can be downloaded. ``sources.toml`` explains the fields."""

    __pydantic_config__ = _STRICT
    name: str
    part: str
    plugin: str
    title: str
    licence: str
    publisher: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    teacher: str = ""
    repository: str = ""
    revision: str = ""
    patterns: tuple[str, ...] = ()
    files: tuple[SourceFile, ...] = ()
    size: str = ""
    images: int | None = None
    example: str = ""
    by_hand: str = ""
    note: str = ""

    @property
    def origin(self) -> str:
        """Where its files come from."""
        return f"{self.repository} on the hub" if self.kind == HUB_DATASET else ", ".join(f.url for f in self.files)

    @property
    def known_bytes(self) -> int | None:
        """The size of all files, or None if it is not known without the server."""
        sizes = [file.bytes for file in self.files]
        return sum(size or 0 for size in sizes) if sizes and None not in sizes else None

    def fits(self, given: Mapping[str, Any]) -> bool:
        """Whether no setting in `given` differs from its own; values may be texts of the command line."""
        own = self.settings.items()
        return all(str(given[name]).lower() == str(value).lower() for name, value in own if name in given)


def known() -> dict[str, Source]:
    """All sources by name. Raises UserError if the user's own file cannot be read."""
    found = read_sources(FILE)
    if named := os.environ.get(VARIABLE, ""):
        found |= read_sources(Path(named))
    return found


def read_sources(file: Path) -> dict[str, Source]:
    """The entries of a file by name. Raises UserError unless all are complete."""
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(file)!r} as sources of downloads: {error}") from error
    return {name: _read_entry(name, entry, file) for name, entry in entries.items()}


def _read_entry(name: str, entry: Any, file: Path) -> Source:
    try:
        source = _ENTRY.validate_python(entry | {"name": name} if isinstance(entry, dict) else entry)
    except ValidationError as error:
        first = error.errors()[0]
        why = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise UserError(f"the entry {name!r} in {str(file)!r} cannot be used: {why}") from error
    if source.kind not in (HUB_DATASET, URL):
        raise unknown("kind of source", source.kind, (HUB_DATASET, URL), f" ({name} in {file.name})")
    if why := _unusable(source):
        raise UserError(f"the entry {name!r} in {str(file)!r} cannot be used: {why}")
    return source


def _unusable(source: Source) -> str:
    """Why the files of an entry cannot be asked for, or have no place of their own; or ""."""
    if source.kind == HUB_DATASET and not (source.repository and source.patterns):
        return f"kind {HUB_DATASET!r} needs repository and patterns"
    names = [file.name for file in source.files]
    if source.kind == URL and not names:
        return f"kind {URL!r} needs files"
    if len(set(names)) < len(names):
        return f"two of its files have the same name: {', '.join(sorted(names))}"
    if wrong := [name for name in (source.name, *names) if not PLAIN.fullmatch(name)]:
        return f"{wrong[0]!r} cannot be the name of a file or folder"
    return ""


_ENTRY = TypeAdapter(Source)


def of_dataset(name: str, given: Mapping[str, Any]) -> Source | None:
    """The download of dataset=`name` that fits its settings `given`."""
    found = (s for s in known().values() if (s.part, s.plugin) == (DATASET, name) and s.fits(given))
    return next(found, None)


def of_teacher(dataset: str, resolution: int, conditional: bool, family: str = "", release: str = "") -> Source | None:
    """The released network that fits a run, of any family or of teacher=`family`; `release` names one.

    Raises UserError if no teacher of the family is called `release`.
    """
    teachers = {s.name: s for s in known().values() if s.part == TEACHER and family in ("", s.plugin)}
    if release:
        if release not in teachers:
            raise unknown("released teacher", release, teachers, " in teacher.release")
        return teachers[release]
    given = {"dataset": dataset, "resolution": resolution, "conditional": conditional}
    return next((source for source in teachers.values() if source.fits(given)), None)


def size_in_words(source: Source) -> str:
    """Its size as far as it is known without asking the server."""
    known_bytes = source.known_bytes
    return in_megabytes(known_bytes) if known_bytes is not None else source.size or "of unknown size"


def in_megabytes(count: int) -> str:
    """A number of bytes, such as "170.5 MB" or "7.41 GB"."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
