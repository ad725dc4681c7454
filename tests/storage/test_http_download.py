"""One file over HTTP: complete and checked, or refused with a message; what has arrived is used by the next attempt."""

from __future__ import annotations

import hashlib
import os
import socket
from collections import namedtuple
from pathlib import Path

import pytest

from distillbench.errors import UserError
from distillbench.storage import http_download
from distillbench.storage.http_download import Unreachable, bytes_at, check_space, download
from distillbench.system.progress import Progress
from file_server import serving

DATA = bytes(range(256)) * 64
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http_download, "PAUSE", 0.0)
    monkeypatch.setattr(http_download, "CHUNK", 1000)
    with serving() as files:
        files.files["/net.pkl"] = DATA
        yield files


def fetched(server, target: Path, sha256: str | None = SHA256, path: str = "/net.pkl") -> str:
    with Progress(None).step("") as step:
        return download(server.url + path, target, sha256, step)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_file_arrives_whole(server, tmp_path, sha256):
    assert fetched(server, tmp_path / "a" / "net.pkl", sha256) == SHA256
    assert (tmp_path / "a" / "net.pkl").read_bytes() == DATA
    assert names(tmp_path / "a") == ["net.pkl"] and bytes_at(f"{server.url}/net.pkl") == len(DATA)


def test_a_cut_connection_is_resumed_where_it_ended(server, tmp_path):
    server.cuts = [5000, 2000]
    assert fetched(server, tmp_path / "net.pkl", None) == SHA256
    assert server.gets == ["", "bytes=5000-", "bytes=7000-"] and names(tmp_path) == ["net.pkl"]


def test_a_later_call_continues_what_an_earlier_one_left(server, tmp_path):
    server.cuts = [6000] + [0] * http_download.ATTEMPTS
    with pytest.raises(Unreachable, match="the connection was cut; 6,000 bytes are kept, and the same command conti"):
        fetched(server, tmp_path / "net.pkl")
    assert (tmp_path / "net.pkl.part").stat().st_size == 6000 and not (tmp_path / "net.pkl").exists()
    server.asked.clear()
    assert fetched(server, tmp_path / "net.pkl") == SHA256 and server.gets == ["bytes=6000-"]


def test_a_file_that_has_changed_on_the_server_is_not_joined_to_the_old_one(server, tmp_path):
    server.files["/net.pkl"] = b"x" * 20_000
    server.cuts = [6000] + [0] * http_download.ATTEMPTS
    with pytest.raises(Unreachable):
        fetched(server, tmp_path / "net.pkl", None)
    server.files["/net.pkl"] = DATA
    assert fetched(server, tmp_path / "net.pkl", None) == SHA256
    assert (tmp_path / "net.pkl").read_bytes() == DATA


def test_without_etag_and_hash_a_part_is_not_continued(server, tmp_path):
    server.etags = False
    server.cuts = [6000]
    assert fetched(server, tmp_path / "net.pkl", None) == SHA256 and server.gets == ["", ""]
    server.cuts = [6000]
    server.asked.clear()
    assert fetched(server, tmp_path / "b.pkl") == SHA256 and server.gets == ["", "bytes=6000-"]


def test_a_server_without_ranges_begins_again(server, tmp_path):
    server.ranges = False
    server.cuts = [6000]
    assert fetched(server, tmp_path / "net.pkl") == SHA256 and (tmp_path / "net.pkl").read_bytes() == DATA


@pytest.mark.parametrize("part, gets", [(DATA, 1), (DATA + b"more", 2)])
def test_a_part_that_is_complete_or_too_long(server, tmp_path, part, gets):
    (tmp_path / "net.pkl.part").write_bytes(part)
    assert fetched(server, tmp_path / "net.pkl") == SHA256 and len(server.gets) == gets


def test_other_bytes_are_set_aside(server, tmp_path):
    server.files["/net.pkl"] = DATA[::-1]
    found = hashlib.sha256(DATA[::-1]).hexdigest()
    with pytest.raises(UserError, match=f"its sha256 is {found}, not {SHA256}. It was set aside as .*net.pkl.refused"):
        fetched(server, tmp_path / "net.pkl")
    assert names(tmp_path) == ["net.pkl.refused"]
    server.files["/net.pkl"] = DATA
    assert fetched(server, tmp_path / "net.pkl") == SHA256


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    server.statuses = [503, 429]
    assert fetched(server, tmp_path / "net.pkl") == SHA256
    server.asked.clear()
    with pytest.raises(Unreachable, match=r"cannot download http://127.*/no\.pkl: the server answers 404"):
        fetched(server, tmp_path / "no.pkl", path="/no.pkl")
    assert len(server.gets) == 1
    server.statuses = [503] * http_download.ATTEMPTS
    with pytest.raises(Unreachable, match="the server answers 503"):
        fetched(server, tmp_path / "b.pkl")


def test_no_network(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/net.pkl"
        with Progress(None).step("") as step, pytest.raises(Unreachable, match=r"net\.pkl: Connection refused$"):
            download(url, tmp_path / "net.pkl", None, step)
        with pytest.raises(Unreachable, match=r"net\.pkl: Connection refused$"):
            bytes_at(url)
    assert names(tmp_path) == []


def test_a_full_disk_is_said_before_the_download(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, http_download.RESERVE + len(DATA) - 1))
    with pytest.raises(UserError, match=r"no space for net\.pkl: it needs 0\.00 GB, and .* has 0\.07 GB free"):
        fetched(server, tmp_path / "net.pkl")
    assert not (tmp_path / "net.pkl").exists()
    with pytest.raises(UserError, match=r"no space for x: it needs 7\.41 GB"):
        check_space(tmp_path / "not" / "yet", 7_410_000_000, "x")
    check_space(tmp_path, len(DATA) - 1, "x")


def test_a_disk_that_fills_up_keeps_what_has_arrived(server, tmp_path, monkeypatch):
    monkeypatch.setattr(http_download.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, os.strerror(28))))
    with pytest.raises(OSError, match="No space left"):
        fetched(server, tmp_path / "net.pkl")
    assert "net.pkl.part" in names(tmp_path) and "net.pkl" not in names(tmp_path)
