"""A server of files on this machine: plain HTTP with Range and ETag, and the hub's protocol for a dataset.

It can cut connections, refuse ranges, and change files, as servers and networks do.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class FileServer:
    """``files``: path on the server to content. ``cuts``: how many bytes the next answers give before they are cut."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.statuses: list[int] = []  # of the next answers to GET, in the place of the file
        self.ranges = True  # whether Range is understood
        self.etags = True
        self.lengths = True
        self.asked: list[tuple[str, str, str]] = []  # method, path, Range
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commit = COMMIT
        self.url = ""

    @property
    def gets(self) -> list[str]:
        """The ranges of all GET requests so far."""
        return [asked for method, _, asked in self.asked if method == "GET"]

    def content(self, path: str) -> bytes | None:
        """What is at `path`: a file, or a file of a dataset of the hub."""
        if path.startswith("/datasets/"):
            owner, name, _, _, *rest = path.removeprefix("/datasets/").split("/")
            return self.repositories.get(f"{owner}/{name}", {}).get("/".join(rest))
        return self.files.get(path)

    def info(self, path: str) -> dict | None:
        """The hub's answer about a dataset, with the sizes and hashes of its files."""
        parts = path.removeprefix("/api/datasets/").split("/")
        files = self.repositories.get("/".join(parts[:2]))
        known = len(parts) == 2 or parts[2:] in (["revision", "main"], ["revision", self.commit])
        if files is None or not known:
            return None
        siblings = [
            {
                "rfilename": name,
                "size": len(data),
                "blobId": "b",
                "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1},
            }
            for name, data in files.items()
        ]
        return {"id": "/".join(parts[:2]), "sha": self.commit, "siblings": siblings}


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            asked = self.headers.get("Range") or ""
            server.asked.append((self.command, path, asked))
            if path.startswith("/api/"):
                info = server.info(path)
                return self.give(404 if info is None else 200, json.dumps(info).encode(), {}, with_body)
            data = server.content(path)
            if data is None:
                return self.give(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
            if with_body and server.statuses:
                return self.give(server.statuses.pop(0), b"", {}, with_body)
            digest = hashlib.sha256(data).hexdigest()
            headers = {"ETag": f'"{digest}"'} if server.etags else {}
            if path.startswith("/datasets/"):
                linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
                headers |= {"X-Repo-Commit": server.commit} | linked
            same = self.headers.get("If-Range") in (None, headers.get("ETag"))
            start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked and server.ranges and same else None
            if start is None:
                return self.give(200, data, headers, with_body)
            total = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            if start >= len(data):
                return self.give(416, b"", {"Content-Range": f"bytes */{len(data)}"}, with_body)
            self.give(206, data[start:], headers | total, with_body)

        def give(self, status: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if server.lengths:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data[: server.cuts.pop(0)] if server.cuts and data and status < 300 else data)
            self.close_connection = True

    return Handler


@contextmanager
def serving() -> Iterator[FileServer]:
    """A running server; its address is ``url``."""
    files = FileServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(files))
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
