"""Fetch the files of a source, check them, and find them again.

The files of a source lie in a folder of its name, below ``$DISTILLBENCH_DOWNLOADS`` or the user's cache. NAME.json
beside that folder records their sizes and SHA-256 and, from the hub, the commit. Where ``sources.toml`` gives no hash,
this record is what later downloads are compared with: the first one is trusted.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from distillbench.errors import UserError, first_of, quoted
from distillbench.storage.files import sha256_file, signed, write_atomically, write_text
from distillbench.storage.http_download import REFUSED, Unreachable, bytes_at, check_space, download
from distillbench.storage.locks import wait_for_lock
from distillbench.storage.sources import HUB_DATASET, Source
from distillbench.storage.user_cache import user_cache
from distillbench.system.progress import Progress

VARIABLE = "DISTILLBENCH_DOWNLOADS"  # environment variable: the folder of downloads
FORMAT = 1
SHARD = re.compile(r"(.*-)(\d+)-of-(\d{1,6})(\.\w+)")  # such as data/train-00000-of-00002.parquet
MOST_NAMED = 4  # files in a message


@dataclass(frozen=True)
class RemoteFile:
    """A file of a source as its server offers it. `bytes` and `sha256` are None where the server does not say them."""

    name: str  # relative to the source's folder
    bytes: int | None
    sha256: str | None
    url: str = ""


@dataclass(frozen=True)
class Offer:
    """The files of a source, with their sizes, before they are downloaded. `commit` is that of the hub."""

    source: Source
    files: tuple[RemoteFile, ...]
    commit: str = ""

    @property
    def bytes(self) -> int | None:
        sizes = [file.bytes for file in self.files]
        return None if None in sizes else sum(size or 0 for size in sizes)


@dataclass(frozen=True)
class Record:
    """The files of a source as they were first downloaded: name to (bytes, SHA-256)."""

    origin: str
    commit: str
    files: dict[str, tuple[int, str]]


def downloads_folder() -> Path:
    """The folder of downloads: $DISTILLBENCH_DOWNLOADS, or one in the user's cache."""
    named = os.environ.get(VARIABLE, "")
    return Path(named) if named else user_cache() / "downloads"


# --- finding ---------------------------------------------------------------------------------------------------------


def located(source: Source) -> Path | None:
    """What dataset.path or teacher.path would be: the file, or the folder of several; None unless all are there.

    Sizes are compared with the record. :func:`fetch` compares the hashes.
    """
    record, folder = read_record(source), downloads_folder() / source.name
    if record is None or not record.files:
        return None
    for name, (size, _) in record.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return None
    return _path(folder, list(record.files))


def is_intact(source: Source) -> bool:
    """Whether all files are there with the SHA-256 of the record. Reads every byte."""
    return located(source) is not None and not _damaged(source)


def _damaged(source: Source) -> list[Path]:
    """The files of the record that are there with other bytes."""
    record, folder = read_record(source), downloads_folder() / source.name
    known = {} if record is None else {folder / name: sha256 for name, (_, sha256) in record.files.items()}
    return [path for path, sha256 in known.items() if path.is_file() and sha256_file(path) != sha256]


def _path(folder: Path, names: list[str]) -> Path:
    return folder / names[0] if len(names) == 1 else folder


def read_record(source: Source) -> Record | None:
    """The record of the first download; None if there is none, or if it is of another origin or revision."""
    try:
        plain = json.loads(_record_file(source).read_text(encoding="utf-8"))
        if plain != signed(plain) or plain["format"] != FORMAT or plain["origin"] != source.origin:
            return None
        if source.revision not in ("", plain["commit"], plain.get("revision", "")):
            return None
        files = {str(name): (int(size), str(sha256)) for name, (size, sha256) in plain["files"].items()}
        return Record(plain["origin"], plain["commit"], files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _record_file(source: Source) -> Path:
    return downloads_folder() / f"{source.name}.json"


# --- what a download would take --------------------------------------------------------------------------------------


def offered(source: Source) -> Offer:
    """The files of the source and their sizes. Asks the server for what is not known; UserError if it is not there."""
    if source.kind == HUB_DATASET:
        return _offered_by_hub(source)
    files = []
    for file in source.files:
        with _helped(source, file.url):
            size = file.bytes if file.bytes is not None else bytes_at(file.url)
        files.append(RemoteFile(file.name, size, file.sha256, file.url))
    return Offer(source, tuple(files))


def _offered_by_hub(source: Source) -> Offer:
    from huggingface_hub import HfApi

    record = read_record(source)
    revision = (record.commit if record else "") or source.revision or None  # a revision may be a branch, which moves
    with _helped(source, f"{source.repository} from the hub"):
        info = HfApi().dataset_info(source.repository, revision=revision, files_metadata=True)
    found = [s for s in info.siblings or [] if any(fnmatch.fnmatchcase(s.rfilename, p) for p in source.patterns)]
    if not found:
        raise UserError(f"{source.repository} on the hub has no file {' or '.join(source.patterns)}")
    for sibling in found:
        _check_name(source, sibling.rfilename)
    files = (RemoteFile(s.rfilename, s.size, s.lfs.sha256 if s.lfs else None) for s in found)
    return Offer(source, tuple(sorted(files, key=lambda file: file.name)), info.sha or "")


def _check_name(source: Source, name: str) -> None:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise UserError(f"{source.repository} on the hub has a file {quoted(name)}, which points outside its folder")


@contextmanager
def _helped(source: Source, what: str, begun: bool = False) -> Iterator[None]:
    """Turns errors of the hub's library, the network and servers into a UserError that says what can be done.

    `begun`: something may have arrived.
    """
    try:
        yield
    except Exception as error:  # huggingface_hub raises errors of its own and of its HTTP library
        if isinstance(error, UserError) and not isinstance(error, Unreachable):
            raise
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        why = why.strip() if isinstance(error, UserError) else f"cannot get {what}: {why.strip()}"
        at_hub = source.kind == HUB_DATASET
        mirror = (
            f"\n  behind a proxy or with a mirror: HTTPS_PROXY=..., HF_ENDPOINT=https://... (now {_hub()})"
            if at_hub
            else ""
        )
        kept = "what has arrived is kept: the same command continues" if begun else "nothing was downloaded"
        raise UserError(
            f"{why}\n  {kept}"
            f"\n  by hand, where there is a network: {by_hand(source)}; then here: distillbench fetch {source.name} "
            f"--from FOLDER{mirror}"
        ) from error


def _hub() -> str:
    """The address that the hub's library asks."""
    from huggingface_hub.constants import ENDPOINT

    return str(ENDPOINT)


def by_hand(source: Source) -> str:
    """The command that downloads the files without distillbench."""
    if source.kind == HUB_DATASET:
        included = " ".join(f"--include '{pattern}'" for pattern in source.patterns)
        at = f" --revision {source.revision}" if source.revision else ""
        return f"hf download {source.repository} --repo-type dataset{at} {included} --local-dir FOLDER"
    return " && ".join(f"curl -LO {file.url}" for file in source.files)


# --- fetching --------------------------------------------------------------------------------------------------------


def fetch(offer: Offer, progress: Progress) -> Path:
    """Download what is missing and check all of it; returns what :func:`located` does.

    Raises UserError if the server cannot be reached, if there is no space, and for other bytes than expected.
    """
    source = offer.source

    def receive(folder: Path) -> dict[str, tuple[int, str]]:
        check_space(folder, _missing_bytes(offer, folder), source.name)
        expected = _expected(source)
        return {file.name: _received(offer, file, folder, expected(file.name), progress) for file in offer.files}

    return _kept(source, offer.commit, receive, progress)


def adopt(source: Source, given: Path, progress: Progress) -> Path:
    """Copy files that were downloaded by hand: `given` is the file, or a folder that holds them. Checks like fetch."""

    def copy(folder: Path) -> dict[str, tuple[int, str]]:
        found = _given_files(source, given)
        _check_complete(source, given, found)
        check_space(folder, sum(path.stat().st_size for path in found.values()), source.name)
        expected, files = _expected(source), {}
        for name, path in found.items():
            sha256 = sha256_file(path)
            if (wanted := expected(name)) is not None and sha256 != wanted:
                raise UserError(f"{str(path)!r} is not {source.name}: its sha256 is {sha256}, not {wanted}")
            if path.resolve() != (folder / name).resolve():
                write_atomically(folder / name, functools.partial(shutil.copyfile, path))
            files[name] = path.stat().st_size, sha256
        return files

    return _kept(source, "", copy, progress)


def _given_files(source: Source, given: Path) -> dict[str, Path]:
    """The files at `given`, by their names in the source's folder. Raises UserError if one is missing."""
    patterns = source.patterns or tuple(file.name for file in source.files)
    if given.is_file() and len(patterns) == 1 and "*" not in patterns[0]:
        return {patterns[0]: given}
    names = [path.relative_to(given).as_posix() for path in given.rglob("*") if path.is_file()]
    found = {name: given / name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    for pattern in patterns:
        if not fnmatch.filter(found, pattern):
            raise UserError(f"--from: no file {pattern} in {str(given)!r}, which {source.name} is made of")
    return dict(sorted(found.items()))


def _check_complete(source: Source, given: Path, found: Mapping[str, Path]) -> None:
    """Raise UserError if a file has another size than published, or if one of the files is not at `given`.

    Which there are is known from the record of an earlier download, or from names such as train-00000-of-00002.parquet.
    """
    for file in source.files:
        size = found[file.name].stat().st_size
        if file.sha256 is None and file.bytes not in (None, size):
            raise UserError(
                f"{str(found[file.name])!r} is not {source.name}: it has {size:,} bytes, not {file.bytes:,}"
            )
    record = read_record(source)
    wanted = set() if record is None else set(record.files)
    for name in found:
        if numbered := SHARD.fullmatch(name):
            start, digits, count, end = numbered.groups()
            wanted |= {f"{start}{k:0{len(digits)}}-of-{count}{end}" for k in range(int(count))}
    if missing := sorted(wanted - set(found)):
        raise UserError(
            f"--from: {str(given)!r} lacks {first_of(missing, MOST_NAMED)}, which {source.name} has. Files that belong "
            "together are given together"
        )


def _kept(
    source: Source, commit: str, make: Callable[[Path], dict[str, tuple[int, str]]], progress: Progress
) -> Path:  # fmt: skip
    """Run ``make(folder)`` alone in the source's folder, and record the files. Complete ones are only checked."""
    folder = downloads_folder() / source.name
    with wait_for_lock(folder, source.name, progress):
        record = read_record(source)
        for path in _damaged(source):
            path.unlink()
        if (found := located(source)) is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        files = make(folder)
        if record is None:
            _set_aside_others(source, folder, files, progress)
            plain = {"format": FORMAT, "origin": source.origin, "commit": commit, "files": files}
            plain |= {"revision": source.revision} if source.revision else {}
            write_text(_record_file(source), json.dumps(signed(plain), indent=1))
        return _path(folder, list(files))


def _set_aside_others(source: Source, folder: Path, files: Iterable[str], progress: Progress) -> None:
    """Rename what lies in the folder and is none of `files`, such as those of an earlier commit: all would be read."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in set(files) and not name.startswith(".") and path.suffix != REFUSED:
            aside = path.replace(path.with_name(path.name + REFUSED))
            progress.say(f"{source.name} does not have the file {name}: set aside as {str(aside)!r}")


def _expected(source: Source) -> Callable[[str], str | None]:
    """The SHA-256 of a file by its name, as published or else as first seen; None if neither is known."""
    record = read_record(source)
    hashes = {name: sha256 for name, (_, sha256) in record.files.items()} if record else {}
    hashes |= {file.name: file.sha256 for file in source.files if file.sha256 is not None}
    return hashes.get


def _missing_bytes(offer: Offer, folder: Path) -> int:
    """Bytes that are still to be downloaded, as far as sizes are known; parts of files are already on the disk."""
    have = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != REFUSED)
    return max(0, sum(file.bytes or 0 for file in offer.files) - have)


def _received(
    offer: Offer, file: RemoteFile, folder: Path, expected: str | None, progress: Progress
) -> tuple[int, str]:  # fmt: skip
    """Download one file unless it is there; its size and SHA-256."""
    source, path = offer.source, folder / file.name
    if source.kind == HUB_DATASET:
        from huggingface_hub import hf_hub_download

        with _helped(source, f"{file.name} of {source.repository} from the hub", begun=True):
            hf_hub_download(source.repository, file.name, repo_type="dataset", revision=offer.commit, local_dir=folder)
        found = sha256_file(path)
        for wanted, said in ((expected, "as first downloaded or published"), (file.sha256, "as the hub says")):
            if wanted is not None and found != wanted:
                raise _refused(source, path, found, f"{wanted}, {said}")
    elif expected is not None and path.is_file() and sha256_file(path) == expected:
        found = expected
    else:
        with _helped(source, file.url, begun=True), progress.step(f"{source.name}: {file.name}") as step:
            found = download(file.url, path, expected, step)
    if file.bytes is not None and path.stat().st_size != file.bytes:
        raise _refused(source, path, f"of {path.stat().st_size:,} bytes", f"of {file.bytes:,} bytes")
    return path.stat().st_size, found


def _refused(source: Source, path: Path, found: str, wanted: str) -> UserError:
    """The error for a file with other bytes, which is set aside."""
    aside = path.replace(path.with_name(path.name + REFUSED))
    return UserError(
        f"{path.name} of {source.origin} is not the file that was expected: it is {found}, not {wanted}. It was set "
        f"aside as {str(aside)!r} and is not used. If its publisher has replaced it, and you trust that, remove "
        f"{str(_record_file(source))!r} and fetch it again"
    )
