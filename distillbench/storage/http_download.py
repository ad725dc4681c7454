"""Download one file by its URL: resumed where an earlier attempt ended, checked, and moved into place when complete.

The part that has arrived is kept as NAME.part, with the server's ETag or date beside it. The next attempt asks for the
rest only (Range), and only if the file on the server is still the same (If-Range).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from http.client import HTTPException, HTTPMessage
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from distillbench._version import __version__
from distillbench.errors import UserError, counted
from distillbench.storage.files import sync
from distillbench.system.progress import Step

ATTEMPTS = 5  # without a single new byte
PAUSE = 1.0  # seconds, for each attempt in a row that failed
TIMEOUT = 30.0  # seconds without an answer
CHUNK = 2**20
REFUSED = ".refused"  # suffix of files that were set aside
RESERVE = 2**26  # bytes of a disk that a download leaves free
TEMPORARY_STATUS = (408, 425, 429, 500, 502, 503, 504)


class Unreachable(UserError):
    """A server does not answer, does not have the file, or cuts every connection."""


def bytes_at(url: str) -> int | None:
    """The size of the file at `url`, if its server says it. Raises Unreachable."""
    try:
        with urlopen(_request(url, {}), timeout=TIMEOUT) as answer:  # not by HEAD, which signed URLs may refuse
            return _length(answer.headers)
    except (OSError, HTTPException, ValueError) as error:
        raise Unreachable(f"cannot download {url}: {_in_words(error)}") from error


def _in_words(error: BaseException) -> str:
    """What failed, without the wrapping of urllib and the number of the system's error."""
    if isinstance(error, URLError) and isinstance(error.reason, BaseException) and not isinstance(error, HTTPError):
        error = error.reason
    if isinstance(error, HTTPError):
        return f"the server answers {error.code} {error.reason}"
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError unless the disk of `folder`, or of its nearest existing parent, has room for `needed` bytes."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed + RESERVE > free:
        raise UserError(
            f"no space for {what}: it needs {needed / 1e9:.2f} GB, and {str(place)!r} has {free / 1e9:.2f} GB free. "
            "Nothing was downloaded"
        )


def download(url: str, target: Path, sha256: str | None, step: Step) -> str:
    """Download `url` to `target` and return its SHA-256.

    With `sha256`, other bytes are set aside as NAME.refused. Raises UserError for that and if there is no space, and
    Unreachable if the server cannot be reached. What has arrived stays, and the next call continues.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part, mark = _beside(target, ".part"), _beside(target, ".part.etag")
    _receive(url, part, mark, sha256 is not None, step)
    with open(part, "rb+") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    mark.unlink(missing_ok=True)
    if sha256 is not None and found != sha256:
        aside = part.replace(_beside(target, REFUSED))
        raise UserError(
            f"{url} is not the file that was expected: its sha256 is {found}, not {sha256}. It was set aside as "
            f"{str(aside)!r} and is not used"
        )
    part.replace(target)
    sync(target.parent)
    return found


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _receive(url: str, part: Path, mark: Path, is_checked: bool, step: Step) -> None:
    """Append to `part` until it is complete; begins again where the connection was cut."""
    failures = 0
    while True:
        before = _size(part)
        try:
            if _receive_once(url, part, mark, is_checked, step):
                return
            error: Exception = ConnectionError("the connection was cut")
        except HTTPError as answer:
            if answer.code not in TEMPORARY_STATUS:
                raise Unreachable(f"cannot download {url}: {_in_words(answer)}") from answer
            error = answer
        except (OSError, HTTPException, ValueError) as reason:
            error = reason
        failures = 0 if _size(part) > before else failures + 1
        if failures == ATTEMPTS or isinstance(error, ValueError) or not _may_pass(error):
            kept = f"; {counted(_size(part), 'byte')} are kept, and the same command continues" if _size(part) else ""
            raise Unreachable(f"cannot download {url}: {_in_words(error)}{kept}") from error
        time.sleep(PAUSE * failures)


def _may_pass(error: Exception) -> bool:
    """Whether another attempt may help: not if there is no such file, no space, or no server at all."""
    return isinstance(error, HTTPError | HTTPException | ConnectionError | TimeoutError)


def _receive_once(url: str, part: Path, mark: Path, is_checked: bool, step: Step) -> bool:
    """One attempt; whether the file is complete now."""
    have = _size(part)
    validator = mark.read_text(encoding="utf-8") if mark.is_file() else ""
    headers = {}
    if have and (validator or is_checked):  # without either, nothing would tell that the rest is of another file
        headers = {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})
    try:
        answer = urlopen(_request(url, headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:  # the range begins at the end: the file is complete, or another one
            raise
        if (error.headers.get("Content-Range") or "").rpartition("/")[2] == str(have):
            return True
        part.unlink()
        return False
    with answer:
        resumed = answer.status == 206
        length = _length(answer.headers)
        start = have if resumed else 0
        total = None if length is None else start + length
        check_space(part.parent, length or 0, part.stem)
        _write_mark(mark, answer.headers)
        with open(part, "ab" if resumed else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                start += len(chunk)
                step.advance(start / total if total else 0.0, f"{start / 1e6:,.0f} of {(total or start) / 1e6:,.0f} MB")
    return total is None or start == total


def _request(url: str, headers: dict[str, str]) -> Request:
    return Request(url, headers={"User-Agent": f"distillbench/{__version__}", "Accept-Encoding": "identity"} | headers)


def _write_mark(mark: Path, headers: HTTPMessage) -> None:
    """Keep what tells this version of the file from others: a strong ETag, or the date."""
    etag = headers.get("ETag") or ""
    validator = headers.get("Last-Modified") or "" if not etag or etag.startswith("W/") else etag
    mark.write_text(validator, encoding="utf-8")


def _length(headers: HTTPMessage) -> int | None:
    text = headers.get("Content-Length") or ""
    return int(text) if text.isdigit() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
