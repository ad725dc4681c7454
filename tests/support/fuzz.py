"""Damaged and hostile files for every reader: small real files, their mutations, and the outcome of reading them.

Each reader is a :class:`Subject`. Its files are written by the usual libraries, damaged in one of many
ways, and read in a separate process with little memory and time. The outcome is one of

| outcome   | meaning                                                                                          |
|-----------|--------------------------------------------------------------------------------------------------|
| refused   | one message                                                                                      |
| equal     | accepted with the content of the undamaged file: the damage is in bytes without a meaning        |
| rekeyed   | accepted with other content and another key, where the format has no checksum                    |
| unkeyed   | the same where there is no key either, as for a table that anybody may edit                      |
| silent    | accepted with other content although a checksum or the key should differ: a defect               |
| crash     | an unexpected exception, or the end of the process: a defect                                     |
| hang, memory, executed, escaped | took too long, too much memory, ran code, opened files beyond: defects     |

    python tests/support/fuzz.py SUBJECT FOLDER SEED FIRST WRITTEN RANDOM    the process that reads, started by `fuzz`
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import re
import resource
import select
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REFUSED, EQUAL, REKEYED, UNKEYED = "refused", "equal", "rekeyed", "unkeyed"
GOOD = (REFUSED, EQUAL, REKEYED, UNKEYED)
DEFECTS = ("silent", "crash", "hang", "memory", "executed", "escaped")
MEMORY = 3 * 2**30  # bytes of addresses beyond what the process has before it reads
RESIDENT = 2**30  # bytes that reading may add
SECONDS = 20.0
LONGEST_MESSAGE = 2000  # characters

Files = dict[str, bytes]
Read = Callable[[Path], tuple[str, str]]


@dataclass(frozen=True)
class Subject:
    """A reader. `build` writes whole files into a folder, `read` gives the key of its content and a hash of it.

    `detected_by` says how other content is noticed: by a "checksum" (it is refused), by the "key", or by "nothing".
    """

    build: Callable[[Path], None]
    read: Read
    detected_by: str = "key"
    hostile: Callable[[Path], list[tuple[str, Files]]] | None = None  # further bad inputs, in words and files


def digest(*parts: Any) -> str:
    """A hash of arrays, texts and plain values."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "backslashreplace"))
    return sha.hexdigest()


# --- damage ----------------------------------------------------------------------------------------------------------

HUGE = [2**31 - 1, 2**32 - 1, 2**63 - 1, 2**16 - 1, 0]
VALUES = [
    *("NaN", "Infinity", "-Infinity", "1e400", "-1", "0", "1" + "0" * 400, "9" * 5000, "true", "null", "[]", "{}"),
    *('""', '"x"', '"\\u0000"', '"\\ud800"', '"../../outside/secret.png"', '"/etc/passwd"', "[[]]", '[{"a": 1}]'),
    *("1099511627776", "-1099511627776", "0.5", '"' + "a" * 100_000 + '"', "[" * 10_000 + "]" * 10_000),
    *('{"a": ' * 10_000 + "1" + "}" * 10_000, "[" + "0," * 100_000 + "0]"),
]


def flip_bit(data: bytearray, dice: random.Random, other: bytes) -> None:
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def set_byte(data: bytearray, dice: random.Random, other: bytes) -> None:
    data[dice.randrange(len(data))] = dice.choice((0, 255, dice.randrange(256)))


def truncate(data: bytearray, dice: random.Random, other: bytes) -> None:
    del data[dice.randrange(len(data)) :]


def extend(data: bytearray, dice: random.Random, other: bytes) -> None:
    data += dice.randbytes(dice.randrange(1, 200))


def swap(data: bytearray, dice: random.Random, other: bytes) -> None:
    size = max(1, len(data) // 8)
    a, b = (dice.randrange(max(1, len(data) - size)) for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def zero(data: bytearray, dice: random.Random, other: bytes) -> None:
    start = dice.randrange(len(data))
    size = min(len(data) - start, dice.randrange(1, 64))
    data[start : start + size] = bytes(size)


def splice(data: bytearray, dice: random.Random, other: bytes) -> None:
    data[dice.randrange(len(data)) :] = other[dice.randrange(max(1, len(other))) :]


def duplicate(data: bytearray, dice: random.Random, other: bytes) -> None:
    start = dice.randrange(len(data))
    data[start:start] = data[start : start + dice.randrange(1, 200)]


def huge_length(data: bytearray, dice: random.Random, other: bytes) -> None:
    """A number of 2, 4 or 8 bytes, either way round, becomes very large or nothing: near the start more often."""
    code = dice.choice(["<H", ">H", "<I", ">I", "<Q", ">Q"])
    size = struct.calcsize(code)
    if len(data) < size:
        return
    last = len(data) - size + 1
    start = dice.randrange(min(last, 64) if dice.random() < 0.5 else last)
    data[start : start + size] = struct.pack(code, dice.choice(HUGE) % 2 ** (8 * size))


def json_value(data: bytearray, dice: random.Random, other: bytes) -> None:
    """One value of a JSON text becomes another, of another type or beyond all bounds; or a key is lost or renamed."""
    try:
        tree = json.loads(data)
    except ValueError:
        return flip_bit(data, dice, other)
    places = [(tree, key) for tree, key in _places(tree)]
    if not places:
        return flip_bit(data, dice, other)
    parent, key = dice.choice(places)
    if isinstance(parent, dict) and dice.random() < 0.2:
        value = parent.pop(key)
        if dice.random() < 0.5:
            parent["renamed"] = value
        data[:] = json.dumps(tree).encode()
    else:
        parent[key] = "@@HERE@@"
        data[:] = json.dumps(tree).replace('"@@HERE@@"', dice.choice(VALUES)).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


BYTES = [flip_bit, flip_bit, set_byte, truncate, extend, swap, zero, splice, duplicate, huge_length, huge_length]


def damaged(files: Files, dice: random.Random) -> tuple[str, Files]:
    """What was done, and the files after it."""
    names = sorted(name for name, data in files.items() if data)
    name = dice.choice(names)
    text = name.endswith((".json", ".jsonl")) or name == "words"
    change = dice.choice([json_value, *BYTES] if not text else [json_value] * 12 + BYTES)
    data, other = bytearray(files[name]), files[dice.choice(names)]
    change(data, dice, other)
    return f"{change.__name__} of {name}", files | {name: bytes(data)}


# --- the process that reads ------------------------------------------------------------------------------------------


class Watch:
    """Records through Python's audit events what code does while `on` is true."""

    def __init__(self, folder: Path, outside: Path) -> None:
        self.on, self.folder, self.outside = False, str(folder), str(outside)
        self.seen = ""
        self.safe = (self.folder, f"{tempfile.gettempdir()}/tmp", "/dev/")  # where files may be written
        sys.addaudithook(self.record)

    def record(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "os.fork"):
            if not (
                event == "subprocess.Popen" and os.path.basename(str(args[0])) == "git"
            ):  # which new-plugin asks for the author's name
                self.seen = f"executed: {event} {args[0]!r}"
        elif event == "open" and isinstance(args[0], str | bytes):
            path = os.path.realpath(os.fsdecode(args[0]))
            writes = isinstance(args[1], str) and any(letter in args[1] for letter in "wax+")
            if path.startswith(self.outside) or (writes and not path.startswith(self.safe)):
                self.seen = f"escaped: {path}"


def work(name: str, root: Path, seed: int, first: int, written: int, drawn: int) -> None:
    """Read inputs of a subject from number `first` on and print what came of each, a JSON line before and after.

    Those are the first `written` of its hostile ones, and after them `drawn` random ones.
    """
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    subject, whole = SUBJECTS[name], root / "whole"
    outside = root / "outside"
    if not whole.is_dir():
        outside.mkdir()
        (outside / "secret.png").write_bytes(_png(_pixels(1)[0]))
        (outside / "secret.txt").write_text("secret")
        whole.mkdir()
        subject.build(whole)
    files = _files(whole)
    case = root / "case"
    key, content = _fresh(case, files, subject)
    hostile = subject.hostile(root)[:written] if subject.hostile else []
    watch = Watch(case, outside)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(json.dumps({"ready": True}), file=out)
    for number in range(first, len(hostile) + drawn):
        dice = random.Random(f"{name} {seed} {number}")
        what, bad = hostile[number] if number < len(hostile) else damaged(files, dice)
        print(json.dumps({"begin": number, "what": what}), file=out)
        if bad == files:
            print(json.dumps({"number": number, "outcome": EQUAL, "message": "nothing was changed"}), file=out)
            continue
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _write(case, bad)
        watch.seen, watch.on = "", True
        outcome, message = _outcome(subject, case, key, content)
        watch.on = False
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > RESIDENT:
            outcome, message = "memory", f"{grown / 2**20:.0f} MiB; {message}"
        if watch.seen:
            outcome, message = watch.seen.split(":")[0], watch.seen
        if (root / "canary").exists():
            outcome, message = "executed", "the canary is there"
        print(json.dumps({"number": number, "outcome": outcome, "message": message}), file=out)


def _outcome(subject: Subject, case: Path, key: str, content: str) -> tuple[str, str]:
    from distillbench.errors import Unavailable, UserError

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            new_key, new_content = subject.read(case)
    except (UserError, Unavailable, Refusal) as error:
        message = str(error)
        if not message.strip() or len(message) > LONGEST_MESSAGE or not message.encode("utf-8", "replace").isascii():
            bad = "no message" if not message.strip() else f"a message of {len(message):,} characters"
            return (REFUSED, message) if 0 < len(message) <= LONGEST_MESSAGE else ("crash", bad)
        return REFUSED, message
    except MemoryError as error:
        return "memory", repr(error)
    except BaseException as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "distillbench" in f.filename]
        return "crash", f"{type(error).__name__}: {str(error)[:200]} at {', '.join(ours[-3:])}"
    if new_content == content:
        return EQUAL, ""
    if subject.detected_by == "nothing":
        return UNKEYED, ""
    return (
        (REKEYED, "") if subject.detected_by == "key" and new_key != key else ("silent", "other content, the same key")
    )


class Refusal(Exception):
    """A refusal without a UserError: the reader lists a problem, or computes the file again."""


def _fresh(case: Path, files: Files, subject: Subject) -> tuple[str, str]:
    _write(case, files)
    return subject.read(case)


def _write(case: Path, files: Files) -> None:
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    for name, data in files.items():
        (case / name).parent.mkdir(parents=True, exist_ok=True)
        if data.startswith(LINK):
            (case / name).symlink_to(data.removeprefix(LINK).decode())
        elif data == FIFO:
            os.mkfifo(case / name)
        else:
            (case / name).write_bytes(data)


LINK, FIFO = b"@@link to ", b"@@fifo"  # files that are none


def _files(folder: Path) -> Files:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the process that watches it -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    subject: str
    number: int
    what: str
    outcome: str
    message: str


def fuzz(name: str, written: int, drawn: int, seed: int = 0, seconds: float = SECONDS) -> list[Outcome]:
    """What came of bad inputs of a subject: `written` of the hostile ones at most, and `drawn` random ones."""
    found: list[Outcome] = []
    first, done = 0, False
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        while not done:
            command = [sys.executable, __file__, name, folder, *map(str, (seed, first, written, drawn))]
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            first, done = _follow(process, name, first, found, seconds)
    return found


def _follow(process: subprocess.Popen, name: str, first: int, found: list[Outcome], seconds: float) -> tuple[int, bool]:
    """Read the output of a process until it ends: (number of the first input that is not read, whether all are)."""
    assert process.stdout is not None and process.stderr is not None
    begun: dict[str, Any] = {}
    ready, held = False, b""
    os.set_blocking(process.stdout.fileno(), False)
    os.set_blocking(process.stderr.fileno(), False)
    said, heard = b"", time.monotonic()
    while True:
        select.select([process.stdout, process.stderr], [], [], 0.5)
        said = (said + (process.stderr.read() or b""))[-4000:]
        chunk = process.stdout.read()
        held += chunk or b""
        *lines, held = held.split(b"\n")
        for line in lines:
            heard, message = time.monotonic(), json.loads(line)
            ready = ready or "ready" in message
            if "begin" in message:
                begun = message
            elif "number" in message:
                what = begun["what"]
                found.append(Outcome(name, message["number"], what, message["outcome"], message["message"]))
                first, begun = message["number"] + 1, {}
        if process.poll() is not None and not chunk:
            if process.returncode == 0:
                return first, True
            if not begun:
                raise RuntimeError(f"{name}: the reading process ended: {said.decode(errors='replace')}")
            last = said.decode(errors="replace").strip().splitlines()[-1:]
            found.append(Outcome(name, begun["begin"], begun["what"], "crash", f"exit {process.returncode}: {last}"))
            return begun["begin"] + 1, False
        if time.monotonic() - heard > (seconds if ready else 300):
            process.kill()
            process.wait()
            if not begun:
                raise RuntimeError(f"{name}: the reading process did not begin: {said.decode(errors='replace')}")
            found.append(Outcome(name, begun["begin"], begun["what"], "hang", f"over {seconds:g} s"))
            return begun["begin"] + 1, False


# --- images ----------------------------------------------------------------------------------------------------------


def _pixels(count: int, side: int = 8) -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def _encoded(image: Any, kind: str, **settings: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format=kind, **settings)
    return file.getvalue()


def _png(image: Any) -> bytes:
    return _encoded(image, "png")


def _put(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def _zip(files: dict[str, bytes | str], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, data)
    return file.getvalue()


def dataset(name: str = "", **settings: Any) -> Read:
    """What `distillbench data check` reads of a folder of images, or of the file `name` in it."""

    def read(folder: Path) -> tuple[str, str]:
        from distillbench.builtin.folder import Folder
        from distillbench.cli.data_check import check
        from distillbench.errors import UserError

        found = Folder(Folder.Config("folder", path=str(folder / name), resolution=8, workers=1, **settings))
        report = check(found)
        if report.damaged:
            raise UserError(report.damaged[0])
        report.lines()
        images = [found.image(index).tobytes() for index in range(len(found))]
        labels = None if found.targets is None else found.targets.tolist()
        return found.sha256, digest(*images, labels, found.prompts)

    return read


def _labels(count: int, prefix: str = "") -> str:
    return json.dumps({"labels": [[f"{prefix}{k}.png", k % 2] for k in range(count)]})


def _images(folder: Path) -> None:
    _put(folder, {f"{k}.png": _png(image) for k, image in enumerate(_pixels(3))} | {"dataset.json": _labels(3)})


def _one_image(folder: Path) -> None:
    _put(folder, {"0.png": _png(_pixels(1)[0])})


def _captioned(folder: Path) -> None:
    lines = "".join(json.dumps({"file_name": f"{k}.png", "text": f"picture {k}"}) + "\n" for k in range(3))
    _put(folder, {f"{k}.png": _png(image) for k, image in enumerate(_pixels(3))} | {"metadata.jsonl": lines})


def _lossy(folder: Path) -> None:
    for kind in ("jpeg", "webp", "bmp"):
        _put(folder, {f"1.{kind}": _encoded(_pixels(1)[0], kind)})


def _bomb(width: int, height: int) -> bytes:
    """A PNG of one colour that is small in its file."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pack = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    data = b"".join(pack.compress(row) for _ in range(min(height, 30_000))) + pack.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )  # fmt: skip


def _huge_tiff() -> bytes:
    tags = [(256, 2**31 - 1), (257, 2**31 - 1), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


def _text_bomb() -> bytes:
    import zlib

    data = b"k\0\0" + zlib.compress(bytes(2**28), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = _png(_pixels(1)[0])
    return whole[:33] + chunk + whole[33:]


def _hostile_images(root: Path) -> list[tuple[str, Files]]:
    import numpy as np
    from PIL import Image

    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    return [
        ("decompression bomb", {"0.png": _bomb(60_000, 60_000)}),
        ("picture just under Pillow's error", {"0.png": _bomb(13_000, 13_000)}),
        ("bomb in a text of the PNG", {"0.png": _text_bomb()}),
        ("strip of 1 pixel", {"0.png": _bomb(100_000_000, 1)}),
        ("animated PNG", {"0.png": _encoded(frames[0], "png", save_all=True, append_images=frames[1:])}),
        ("animated WebP", {"0.webp": _encoded(frames[0], "webp", save_all=True, append_images=frames[1:])}),
        ("animated GIF", {"0.png": _encoded(frames[0], "gif", save_all=True, append_images=frames[1:])}),
        ("16 bits of grey", {"0.png": _png(np.full((8, 8), 700, np.uint16))}),
        ("Targa", {"0.png": _encoded(frames[0], "tga")}),
        ("link to a device", {"0.png": LINK + b"/dev/zero"}),
        ("pipe", {"0.png": FIFO}),
        ("link to itself", {"0.png": LINK + b"0.png"}),
        ("link to nothing", {"0.png": LINK + b"gone.png"}),
        ("link to its own folder", {"a/0.png": _png(_pixels(1)[0]), "a/b": LINK + b"."}),
        ("TIFF of many pages", {"0.tif": _encoded(frames[0], "tiff", save_all=True, append_images=frames * 40)}),
        ("TIFF of 2^62 pixels", {"0.tif": _huge_tiff()}),
        ("PPM of 2^62 pixels", {"0.ppm": b"P6 2147483647 2147483647 255\n" + bytes(100)}),
        ("PPM of 10,000 digits", {"0.ppm": b"P6 " + b"9" * 10_000 + b" 1 255\n"}),
        ("GIF of 2^32 pixels", {"0.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00," + bytes(8) + b"\x02\x02D\x01\x00;"}),
        ("empty", {"0.png": b"\n"}),
        ("name that moves the cursor", {"\x1b[2J\n.png": b"x"}),
    ]


def _nested(column: str) -> bytes:
    return f'{{"file_name": "0.png", "{column}": {"[" * 900}"a"{"]" * 900}}}'.encode()


def _hostile_captions(root: Path) -> list[tuple[str, Files]]:
    image = {"0.png": _png(_pixels(1)[0])}
    return [
        ("a name that leads out", image | {"metadata.jsonl": b'{"file_name": "../outside/secret.png", "text": "a"}'}),
        ("one of Windows", image | {"metadata.jsonl": b'{"file_name": "..\\\\outside\\\\secret.png", "text": "a"}'}),
        ("a name of the root", image | {"metadata.csv": f"file_name,text\n{root}/outside/secret.png,a".encode()}),
        ("captions of another kind", image | {"metadata.jsonl": LINK + b"/etc/passwd"}),
        ("captions that are a device", image | {"metadata.csv": LINK + b"/dev/zero"}),
        ("a field of 2^27 letters", image | {"metadata.csv": b"file_name,text\n0.png," + b"a" * 2**27}),
        ("a parquet that is none", image | {"metadata.parquet": b"PAR1" + bytes(50) + b"PAR1"}),
        ("a caption in 900 lists", image | {"metadata.jsonl": _nested("text")}),
        ("a label in 900 lists", image | {"metadata.jsonl": _nested("label")}),
        ("labels that are a pipe", image | {"dataset.json": FIFO}),
        ("labels that are a device", image | {"dataset.json": LINK + b"/dev/zero"}),
        ("class 2^31 - 1", image | {"dataset.json": json.dumps({"labels": [["0.png", 2**31 - 1]]}).encode()}),
        ("half a surrogate pair", image | {"metadata.jsonl": b'{"file_name": "0.png", "text": "\\ud800"}'}),
    ]


def _hostile_zips(root: Path) -> list[tuple[str, Files]]:
    one = _png(_pixels(1)[0])
    lying = bytearray(_zip({"0.png": bytes(2**28)}, zipfile.ZIP_DEFLATED))
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", lying, lying.rindex(mark) + place, 100)
    twice = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(twice, "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("0.png", one)
    cases = {
        "path traversal": _zip({"../../outside/evil.png": one, "/etc/evil.png": one}),
        "path traversal of Windows": _zip({"..\\..\\outside\\evil.png": one}),
        "bomb": _zip({"0.png": bytes(2**28)}, zipfile.ZIP_DEFLATED),
        "bomb that lies of its size": bytes(lying),
        "bomb of lzma": _zip({"0.png": bytes(2**25)}, zipfile.ZIP_LZMA),
        "bomb as labels": _zip({"0.png": one, "dataset.json": b"[" * 2**28}, zipfile.ZIP_DEFLATED),
        "the same name twice": twice.getvalue(),
        "no member": _zip({}),
    }
    return [(what, {"a.zip": data}) for what, data in cases.items()]


def _npy(header: str, data: bytes = b"") -> bytes:
    text = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def _hostile_arrays(name: str) -> Callable[[Path], list[tuple[str, Files]]]:
    headers = {
        "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "2^50 values": "{'descr': '|u1', 'fortran_order': False, 'shape': (1125899906842624,), }",
        "2^33 values": "{'descr': '|u1', 'fortran_order': False, 'shape': (8589934592,), }",
        "sides of less than nothing": "{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 3), }",
        "no side": "{'descr': '|u1', 'fortran_order': False, 'shape': (), }",
        "a hundred sides": f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({'1,' * 60}), }}",
        "sides that are true": "{'descr': '|u1', 'fortran_order': False, 'shape': (True, True), }",
        "code": "__import__('os').system('touch canary')",
        "nesting": "(" * 100,
        "no type": "{'descr': 7, 'fortran_order': 3, 'shape': 'x', }",
    }

    def hostile(root: Path) -> list[tuple[str, Files]]:
        import numpy as np

        members = {what: _npy(header, bytes(192)) for what, header in headers.items()}
        cases = {f"header of {what}": _zip({name: data, "sigma.npy": data}) for what, data in members.items()}
        pickled = io.BytesIO()
        np.save(pickled, np.array([_Runs(root)], dtype=object), allow_pickle=True)
        cases["a pickle"] = _zip({name: pickled.getvalue()})
        cases["no array"] = _zip({name.removesuffix(".npy"): b"nothing"})
        cases["bomb"] = _zip({name: bytes(2**28)}, zipfile.ZIP_DEFLATED)
        cases["a pickle alone"] = pickle.dumps(_Runs(root))
        return [(what, {"a.npz": data}) for what, data in cases.items()]

    return hostile


class _Runs:
    """Makes the canary where it is unpickled."""

    def __init__(self, root: Path) -> None:
        self.command = f"touch {root}/canary"

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def _npz(folder: Path) -> None:
    import numpy as np

    np.savez(folder / "a.npz", images=_pixels(40, 8), labels=np.arange(40) % 3)


def _large_npz(folder: Path) -> None:
    import numpy as np

    np.savez(folder / "a.npz", images=_pixels(90, 64), labels=np.arange(90) % 3)


def _packed_npz(folder: Path) -> None:
    import numpy as np

    np.savez_compressed(folder / "a.npz", images=_pixels(5, 8) // 64, labels=np.arange(5) % 3)


def _idx_of(array: Any) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _idx(folder: Path) -> None:
    images = _pixels(4)[..., 0]
    labels = images[:, 0, 0] % 10
    _put(folder, {"train-images-idx3-ubyte": _idx_of(images), "train-labels-idx1-ubyte": _idx_of(labels)})


def _packed_idx(folder: Path) -> None:
    _put(folder, {"train-images-idx3-ubyte.gz": gzip.compress(_idx_of(_pixels(4)[..., 0]), mtime=0)})


def _hostile_idx(root: Path) -> list[tuple[str, Files]]:
    heads = {
        "2^32 images": struct.pack(">3I", 2**32 - 1, 8, 8),
        "2^96 values": struct.pack(">3I", *[2**32 - 1] * 3),
        "no image": bytes(12),
    }
    cases = {what: b"\0\0\x08\x03" + head + bytes(64) for what, head in heads.items()}
    cases["255 sides"] = b"\0\0\x08\xff" + struct.pack(">255I", *[1] * 255) + b"\0"
    cases["a gzip bomb"] = gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 1, 8, 8) + bytes(2**30))
    return [(what, {"train-images-idx3-ubyte": data}) for what, data in cases.items()]


def _batch_of(number: int) -> bytes:
    rows = _pixels(3, 32).transpose(0, 3, 1, 2).reshape(3, -1)
    return pickle.dumps({"data": rows, "labels": [1, 2, number], "filenames": ["a", "b", "c"]}, 2)


def _cifar(folder: Path) -> None:
    _put(folder, {f"data_batch_{number}": _batch_of(number) for number in (1, 2)})


def _tar(folder: Path) -> None:
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="w", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as archive:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = len(_batch_of(1))
        archive.addfile(info, io.BytesIO(_batch_of(1)))
    _put(folder, {"a.tar.gz": file.getvalue()})


PICKLES: dict[str, bytes] = {
    "memo of 2^32": b"\x80\x02}r\xff\xff\xff\xff.",
    "text of 2^62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "bytes of 2^31": b"\x80\x03B" + struct.pack("<I", 2**31 - 1) + b"x.",
    "frame of 2^62": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "keys in keys": b"\x80\x02}" + b"N" + b"\x85" * 200_000 + b"K\x01s.",
    "lists in lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "doubled": b"\x80\x02}U\x04dataK\x01s}U\x06labelsN" + b"2\x86" * 60 + b"ss.",
    "INST": b"(S'touch canary'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nS'touch canary'\no.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n)}\x92.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
    "BUILD of a name": b"\x80\x02cbuiltins\neval\n}U\x08__dict__}sb.",
    "extension": b"\x80\x02\x82\x01.",
    "a number of 10,000 digits": b"I" + b"9" * 10_000 + b"\n.",
    "nothing": b".",
    "marks": b"(" * 100_000 + b".",
    "duplicates": b"\x80\x02N" + b"2" * 1_000_000 + b".",
}


def _hostile_batches(root: Path) -> list[tuple[str, Files]]:
    import numpy as np

    cases = PICKLES | {f"os.system, protocol {p}": pickle.dumps(_Runs(root), p) for p in range(6)}
    array = pickle.dumps({"data": np.zeros((1, 12), np.uint8), "labels": [0]}, 2)
    nested = b"\x80\x02K\x01" + b"2\x86" * 40  # a tuple of 2^40 ones
    cases["labels of 2^40 numbers"] = re.sub(rb"\]q.K\x00a", lambda match: nested[2:], array)
    cases["objects"] = pickle.dumps({"data": np.array([None]), "labels": [0]})
    return [(what, {"data_batch_1": data}) for what, data in cases.items()]


def _image_tar(folder: Path) -> None:
    files = {f"./a/{k}.png": _png(image) for k, image in enumerate(_pixels(3))}
    files |= {f"./a/{k}.cls": f"{k}".encode() for k in range(3)}
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _packed_image_tar(folder: Path) -> None:
    _image_tar(folder)
    (folder / "a.tar.gz").write_bytes(gzip.compress((folder / "a.tar").read_bytes(), mtime=0))
    (folder / "a.tar").unlink()


def _other_formats(folder: Path) -> None:
    from PIL import Image

    image = Image.fromarray(_pixels(1)[0])
    _put(folder, {"1.tif": _encoded(image, "tiff", compression="tiff_deflate"), "2.ppm": _encoded(image, "ppm")})
    _put(folder, {"3.gif": _encoded(image.quantize(16), "gif"), "4.tif": _encoded(image.convert("RGBA"), "tiff")})


def _metadata(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {f"{part}/{k}.png": _png(image) for part in ("train", "test") for k, image in enumerate(_pixels(2))}
    _put(folder, files | {"train/metadata.csv": "file_name,text\n0.png,a\n1.png,b\n"})
    rows = [{"file_name": f"{k}.png", "text": [f"picture {k}", "b"]} for k in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "test" / "metadata.parquet", write_page_checksum=True)


def _npy_files(folder: Path) -> None:
    import numpy as np

    np.save(folder / "images.npy", _pixels(40, 8))
    np.save(folder / "labels.npy", np.eye(3)[np.arange(40) % 3])


def _hostile_npy(root: Path) -> list[tuple[str, Files]]:
    import numpy as np

    pickled = io.BytesIO()
    np.save(pickled, np.array([_Runs(root)], dtype=object), allow_pickle=True)
    large = "{'descr': '|u1', 'fortran_order': False, 'shape': (1125899906842624,), }"
    cases = {"a pickle": pickled.getvalue(), "2^50 values": _npy(large, bytes(100)), "nesting": _npy("(" * 100)}
    return [(what, {"images.npy": data}) for what, data in cases.items()]


def _hostile_tars(root: Path) -> list[tuple[str, Files]]:
    def tar(name: str, size: int, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes | None = None) -> bytes:
        info = tarfile.TarInfo(name)
        info.size, info.type, info.linkname = size, kind, link
        return info.tobuf(tarfile.GNU_FORMAT) + (bytes(-(-size // 512) * 512) if data is None else data)

    end = bytes(1024)
    cases = {
        "bomb": gzip.compress(tar("data_batch_1", 2**29) + end),
        "bomb beside the batches": gzip.compress(tar("other", 2**29) + tar("data_batch_1", 10) + end),
        "2^62 bytes": gzip.compress(tar("data_batch_1", 2**62, data=bytes(512)) + end),
        "link out": gzip.compress(tar("data_batch_1", 0, tarfile.SYMTYPE, str(root / "outside/secret.txt")) + end),
        "link to itself": gzip.compress(tar("data_batch_1", 0, tarfile.LNKTYPE, "data_batch_1") + end),
        "path traversal": gzip.compress(tar("../../outside/data_batch_1", 10) + end),
        "link to an image": gzip.compress(tar("0.png", 0, tarfile.SYMTYPE, str(root / "outside/secret.png")) + end),
        "an image that leads out": gzip.compress(tar("../../outside/secret.png", 10) + end),
        "an image of 2^62 bytes": tar("0.png", 2**62, data=bytes(512)) + end,
        "twenty thousand names": gzip.compress(b"".join(tar(f"{k}.txt", 0) for k in range(20_000)) + end),
        "hostile batch": gzip.compress(
            tar("data_batch_1", len(b := pickle.dumps(_Runs(root))), data=b.ljust(512, b"\0")) + end
        ),
    }
    return [(what, {"a.tar.gz": data}) for what, data in cases.items()]


def _parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": _png(image), "path": "x.png"} for image in _pixels(3)]
    table = pa.table({"image": images, "label": [0, 1, 2]})
    pq.write_table(table, folder / "a.parquet", write_page_checksum=True, compression="none")


def _hostile_parquet(root: Path) -> list[tuple[str, Files]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(**columns: Any) -> Files:
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file)
        return {"a.parquet": file.getvalue()}

    paths = [str(root / "outside/secret.png"), "../outside/secret.png", "/dev/zero", "/etc/passwd", "\0", "x" * 5000]
    one = [_png(_pixels(1)[0])]
    return [
        *((f"path {path[:40]!r}", table(image=[{"bytes": None, "path": path}])) for path in paths),
        ("class 2^63", table(image=one, label=pa.array([2**63], pa.uint64()))),
        ("class 2^40", table(image=one, label=[2**40])),
        ("numbers", table(image=[1, 2])),
        ("lists", table(image=[[1], [2]])),
        ("no row", table(image=pa.array([], pa.binary()))),
        ("many rows of nothing", table(image=pa.nulls(50_000_000, pa.binary()), label=pa.repeat(1, 50_000_000))),
    ]


# --- statistics, weights, records, caches ----------------------------------------------------------------------------


def _reference(folder: Path) -> None:
    import torch

    from distillbench.evaluation.frechet import GaussianStatistics
    from distillbench.evaluation.reference_statistics import write_reference

    statistics = GaussianStatistics(9, torch.zeros(4).double(), given=torch.eye(4).double())
    write_reference(folder / "a.npz", statistics, {"network": "toy", "split": "all"})


def read_reference(folder: Path) -> tuple[str, str]:
    from distillbench.evaluation.reference_statistics import read_reference

    found = read_reference(folder / "a.npz")
    mean, covariance = found.statistics.mean, found.statistics.covariance
    return found.sha256, digest(mean.tolist(), covariance.tolist(), found.statistics.n, found.provenance)


def _hostile_references(root: Path) -> list[tuple[str, Files]]:
    import numpy as np

    def npz(**arrays: Any) -> Files:
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return {"a.npz": file.getvalue()}

    good = {"mu": np.zeros(2), "sigma": np.eye(2)}
    texts = ('{"images": NaN}', '{"images": 1e400}', '{"images": "x"}', '{"images": []}', '{"images": -1}', "[" * 9999)
    texts = (*texts, "[]", "", "null", '{"images": 9999999999999999999999}', '{"images": true}')
    cases = [(f"provenance {text[:20]}", npz(**good, provenance=np.array(text))) for text in texts]
    cases += [("65,536 features", npz(mu=np.zeros(2), sigma=np.zeros((2**13, 2**13 + 1))))]
    return [*cases, *_hostile_arrays("mu.npy")(root)]


RECIPE = {
    "network": {"name": "mlp", "width": 8, "depth": 1},
    **{"shape": [1, 4, 4], "schedule": "vp_cosine", "prediction": "v", "dataset": "toy"},
}


def _teacher(folder: Path) -> None:
    import torch

    from distillbench.builtin.trained import METADATA
    from distillbench.networks.architectures import ResidualMLP
    from distillbench.storage.checksummed import write_tensors

    torch.manual_seed(0)
    network = ResidualMLP((1, 4, 4), 8, 1)
    write_tensors(folder / "a.safetensors", network.state_dict(), {METADATA: json.dumps({"recipe": RECIPE})})


def read_teacher(folder: Path) -> tuple[str, str]:
    import diffusers  # noqa: F401  # takes seconds, which are none of the reader's

    from distillbench.builtin.trained import read_teacher

    teacher = read_teacher(folder / "a.safetensors", (1, 4, 4), 0, "cpu")
    tensors = teacher.denoiser.state_dict()
    return teacher.sha256, digest({name: value.tolist() for name, value in tensors.items()})


def _safetensors(header: dict[str, Any] | str, data: bytes = b"") -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


def _hostile_teachers(root: Path) -> list[tuple[str, Files]]:
    networks: list[Any] = [
        *({"name": "mlp", "width": width, "depth": 1} for width in (10**6, 2**40, -1, 0, "8", None, 1.5)),
        *({"name": "mlp", "width": 8, "depth": depth} for depth in (10**9, 65536, -1, "x")),
        *({"name": name} for name in ("dit", "nothing", "", ["mlp"], None, "diffusers")),
        *(7, "mlp", None, [], {}, {"name": "mlp", "shape": [1]}, {"name": "mlp", "_target_": "os.system"}),
        {"name": "unet", "width": 65536},
        {"name": "diffusers", "config": {"_class_name": "UNet2DModel", "sample_size": 4, "in_channels": 1}},
        {"name": "diffusers", "config": []},
    ]
    recipes: list[Any] = [RECIPE | {"network": network} for network in networks]
    recipes += [RECIPE | {"classes": value} for value in (1e400, "x", -5, [], 2**40)]
    recipes += [RECIPE | {"schedule": value} for value in ([], None, "x")] + [RECIPE | {"prediction": {}}]
    recipes += [7, None, [], "x", {}, {"shape": 5}]
    tensor = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    cases = []
    for recipe in recipes:
        header = {"__metadata__": {"distillbench_teacher": json.dumps({"recipe": recipe})}, **tensor}
        cases.append((f"recipe {json.dumps(recipe)[:60]}", {"a.safetensors": _safetensors(header, bytes(4))}))
    deep = json.dumps({"__metadata__": {"distillbench_teacher": "[" * 20_000}, **tensor})
    plain = {
        "nested recipe": _safetensors(deep, bytes(4)),
        "header of 2^62": struct.pack("<Q", 2**62) + b"{}",
        "tensor of 2^60": _safetensors({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}),
        "tensors that overlap": _safetensors({"a": tensor["a"], "b": tensor["a"]}, bytes(4)),
        "nested header": _safetensors("[" * 20_000),
        "a pickle": pickle.dumps(_Runs(root)),
    }
    return [*cases, *((what, {"a.safetensors": data}) for what, data in plain.items())]


def _weights(folder: Path) -> None:
    _put(folder, {"net.pth": bytes(range(256)) * 4})


def read_weights(folder: Path) -> tuple[str, str]:
    from distillbench.evaluation.pretrained_weights import WeightsFile, locate

    sha = hashlib.sha256(bytes(range(256)) * 4).hexdigest()
    os.environ["TORCH_HOME"] = str(folder)
    path = locate("toy", WeightsFile("net.pth", sha, "", "", 1), folder)
    return "", digest(path.read_bytes())


def _features(folder: Path) -> None:
    import torch

    from distillbench.storage.checksummed import write_tensors

    write_tensors(folder / "a.safetensors", {"features": torch.arange(8.0).reshape(2, 4)})


def read_features(folder: Path) -> tuple[str, str]:
    from distillbench.storage.checksummed import read_tensors

    try:
        return "", digest({name: value.tolist() for name, value in read_tensors(folder / "a.safetensors").items()})
    except ValueError as error:
        raise Refusal(str(error)) from error


INPUTS = {"seed": 0, "method": "boot"}


def _records(folder: Path) -> None:
    from distillbench.records import records
    from distillbench.storage.files import key_of

    common = {"key": key_of(INPUTS), "inputs": INPUTS, "device": "cpu", "environment": {"python": "3"}}
    rows = [records.RowRecord(nfe=1, sampling_seed=0, scores={"fd": 1.25, "fid": None})]
    curve = [records.CurvePoint(images=1, seconds=0.5, loss=2.0)]
    records.write_record(folder / "train.json", records.TrainRecord(status="ok", curve=curve, **common))
    records.write_record(folder / "evaluation.json", records.EvaluationRecord(rows=rows, **common))
    records.write_record(folder / "speed.json", records.SpeedRecord(rows=[records.SpeedRow(nfe=1)], **common))


def read_records(folder: Path) -> tuple[str, str]:
    from distillbench.records import records

    kinds = {"train": records.TrainRecord, "evaluation": records.EvaluationRecord, "speed": records.SpeedRecord}
    try:
        found = [records.read_record(folder / f"{name}.json", kind, INPUTS) for name, kind in kinds.items()]
    except ValueError as error:
        raise Refusal(str(error)) from error
    return "", digest(*(record.model_dump_json() for record in found if record is not None))


def _state(folder: Path) -> None:
    import torch

    from distillbench.system.progress import Progress
    from distillbench.training.resume import State, States

    state = State({"w": torch.arange(5.0)}, {"images": 3, "nested": {"a": [1, 2.5, None]}})
    States(folder, 2, Progress(None)).save(7, state)


def read_state(folder: Path) -> tuple[str, str]:
    from distillbench.system.progress import Progress
    from distillbench.training.resume import States

    found = States(folder, 2, Progress(None)).newest()
    if found is None:
        raise Refusal("set aside")
    return "", digest({name: tensor.tolist() for name, tensor in found.tensors.items()}, found.values)


def _pairs(folder: Path) -> None:
    from pair_requests import request_pairs

    request_pairs(folder)


def read_pairs(folder: Path) -> tuple[str, str]:
    from pair_requests import read_all, request_pairs

    pairs, solved, meter, _ = request_pairs(folder)
    if solved:
        raise Refusal("made again")
    charged = meter.charged
    return "", digest(read_all(pairs)[1].tolist(), charged.seconds, charged.teacher_seconds, meter.teacher_nfe)


def _latents(folder: Path) -> None:
    read_latents(folder, known=False)


def read_latents(folder: Path, known: bool = True) -> tuple[str, str]:
    import torch

    from distillbench.system.progress import Progress
    from distillbench.teachers.latents import training_data
    from random_pictures import Pictures
    from toy_encoders import latent_teacher

    calls: list[int] = []
    latents = training_data(Pictures(), latent_teacher(calls), folder, "cpu", Progress(None))
    if calls and known:
        raise Refusal("made again")
    return "", digest(latents.read(torch.arange(len(latents))).tolist())


def _encoded_prompts(folder: Path) -> None:
    read_encoded_prompts(folder, known=False)


def read_encoded_prompts(folder: Path, known: bool = True) -> tuple[str, str]:
    import torch

    from distillbench.system.progress import Progress
    from distillbench.teachers.encoded_prompts import encode_prompts
    from toy_encoders import PROMPTS, encode

    calls: list[Any] = []
    table = encode_prompts(PROMPTS, encode(calls), "e", folder, "cpu", Progress(None))
    if calls and known:
        raise Refusal("made again")
    return "", digest(table(torch.arange(len(PROMPTS) + 1)).tolist())


# --- teachers of others ----------------------------------------------------------------------------------------------


def _edm(folder: Path) -> None:
    from edm_files import edm_writer_in

    with edm_writer_in(folder) as writer:
        writer.network()[1].rename(folder / "a.pkl")


def read_edm(folder: Path) -> tuple[str, str]:
    from distillbench.system.progress import Progress
    from edm_files import edm_source

    teacher = edm_source(folder / "a.pkl").load(Progress(None))
    return teacher.sha256, digest({name: value.tolist() for name, value in teacher.denoiser.state_dict().items()})


def _hostile_pickles(root: Path) -> list[tuple[str, Files]]:
    cases = PICKLES | {f"os.system, protocol {p}": pickle.dumps(_Runs(root), p) for p in range(2, 6)}
    return [(what, {"a.pkl": data}) for what, data in cases.items()]


def _pipeline(folder: Path) -> None:
    from diffusers_files import diffusers, unet

    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(num_train_timesteps=20)).save_pretrained(folder)


def read_pipeline(folder: Path) -> tuple[str, str]:
    from diffusers_files import diffusers, diffusers_source
    from distillbench.system.progress import Progress

    diffusers.logging.set_verbosity(60)
    found = diffusers_source(folder)
    found.plan()
    teacher = found.load(Progress(None))
    state = {name: value.tolist() for name, value in teacher.denoiser.state_dict().items()}
    return teacher.sha256, digest(state, teacher.provenance["reading"])


def _hostile_pipelines(root: Path) -> list[tuple[str, Files]]:
    whole = _files(root / "whole")
    weights = "unet/diffusion_pytorch_model.safetensors"
    config = json.loads(whole["unet/config.json"])
    scheduler = json.loads(whole["scheduler/scheduler_config.json"])
    index = json.loads(whole["model_index.json"])

    def unet(**settings: Any) -> Files:
        return whole | {"unet/config.json": json.dumps(config | settings).encode()}

    def betas(**settings: Any) -> Files:
        return whole | {"scheduler/scheduler_config.json": json.dumps(scheduler | settings).encode()}

    def parts(*names: Any) -> Files:
        index = json.dumps({"metadata": {}, "weight_map": {f"t{k}": name for k, name in enumerate(names)}})
        files = {name: data for name, data in whole.items() if name != weights}
        return files | {f"{weights}.index.json": index.encode()}

    evil = f"import os\nos.system('touch {root}/canary')\n".encode()
    code = whole | {"unet/my.py": evil, "pipeline.py": evil, "my.py": evil}
    return [
        *((f"{key} of 2^40", unet(**{key: 2**40})) for key in ("sample_size", "in_channels", "layers_per_block")),
        *((f"channels {value}", unet(block_out_channels=value)) for value in ([10**6, 10**6], [2**20] * 2, [], "x")),
        ("4,000 levels", unet(block_out_channels=[8] * 4000, down_block_types=["DownBlock2D"] * 4000)),
        ("wide", unet(block_out_channels=[40_000, 80_000])),
        ("deep", unet(layers_per_block=500)),
        *((f"classes {value!r}", unet(num_class_embeds=value)) for value in ("x", [], 2**19)),
        *((f"T = {steps}", betas(num_train_timesteps=steps)) for steps in (10**9, 2**62, -1, 0, 1.5, "x", None)),
        *((f"betas {value}", betas(trained_betas=value)) for value in ([], [2], [None], "x", [[0.1]], [1e-4, -1])),
        *((f"beta_end {value}", betas(beta_end=value)) for value in (-1, 0, 1, 10**400, "x", None)),
        *((f"part {name!r}", parts(name)) for name in ("../../outside/x.safetensors", "/etc/passwd", "x.bin", 5, None)),
        ("code of the pipeline", code | {"model_index.json": json.dumps(index | {"_class_name": ["my", "My"]}).encode()}),  # noqa: E501
        ("code of a component", code | {"model_index.json": json.dumps(index | {"unet": ["my", "My"]}).encode()}),
        ("auto_map", code | {"unet/config.json": json.dumps(config | {"auto_map": {"AutoModel": "my.My"}}).encode()}),
        ("pickled weights", {n: d for n, d in whole.items() if n != weights}
         | {"unet/diffusion_pytorch_model.bin": pickle.dumps(_Runs(root))}),
        ("a pickle as safetensors", whole | {weights: pickle.dumps(_Runs(root))}),
    ]  # fmt: skip


# --- tables, texts, words --------------------------------------------------------------------------------------------


def _run(folder: Path) -> None:
    from tables_of_runs import finished_run

    (finished_run(folder) / "table.csv").unlink()


def read_run(folder: Path) -> tuple[str, str]:
    from distillbench.reports.pictures import grid
    from distillbench.reports.published import published_section
    from distillbench.reports.runs import read_run

    run = read_run(folder / "mine")
    strips = grid([(run, "boot", row) for _, row in run.table.iterrows()])
    published_section([run])
    if run.problems:
        raise Refusal("; ".join(run.problems)[:LONGEST_MESSAGE])
    return "", digest(run.table.to_csv(), run.along.to_csv(), run.columns, run.configs, run.environment, strips)


def _hostile_runs(root: Path) -> list[tuple[str, Files]]:
    import pandas as pd

    from tables_of_runs import toy_rows

    whole = _files(root / "whole")
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12)
    )
    settings = {
        "a billion laughs": laughs,
        "python objects": f"methods: !!python/object/apply:os.system ['touch {root}/canary']",
        "nesting": "[" * 10_000,
        "an anchor in itself": "a: &a [*a]",
        "methods that are a number": "methods: 5\nseed: 0",
        "methods that are a list of dicts": "methods: [{a: 1}]\nseed: 0",
        "a seed that is a list": "methods: {boot: {}}\nseed: [1]",
        "a dataset that is a list": "methods: {boot: {}}\nseed: 0\ndataset: [1]",
        "a resolution beyond all": "seed: 0\nmethods: {boot: {}}\ndataset: {kind: [1], resolution: 99999999999999999999}",  # noqa: E501
        "merge key": "<<: [1, 2]",
        "date": "2001-99-99: 1",
        "nothing": "\0",
        "keys of lists": "? [1, 2]\n: 3",
    }
    keys = ["../../outside/x", "**", "*", "[", "\0", "a/b", "x" * 5000, "k0\n", ""]
    cases = [(what, whole | {"mine/config.yaml": text.encode()}) for what, text in settings.items()]
    for key in keys:
        file = io.BytesIO()
        pd.DataFrame(toy_rows(0, key=key)).to_parquet(file)
        cases.append((f"key {key[:20]!r}", whole | {"mine/table.parquet": file.getvalue()}))
    for value in VALUES:
        for name in ("columns.json", "environment.json"):
            cases.append((f"{name} {value[:20]}", whole | {f"mine/{name}": value.encode()}))
        cases.append((f"record {value[:20]}", whole | {"cells/c/evaluation-k0.json": value.encode()}))
    return cases


def _csv_run(folder: Path) -> None:
    _run(folder)
    import pandas as pd

    frame = pd.read_parquet(folder / "mine" / "table.parquet")
    (folder / "mine" / "table.parquet").unlink()
    frame.to_csv(folder / "mine" / "table.csv", index=False)


def _published(folder: Path) -> None:
    from distillbench.reports.published import FILE

    lines = FILE.read_text(encoding="utf-8").splitlines(keepends=True)
    _put(folder, {"published.csv": "".join(lines[:12])})


def read_published(folder: Path) -> tuple[str, str]:
    from distillbench.reports.published import read_published

    return "", digest(read_published(folder / "published.csv").to_csv())


def _texts(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["a cat", "a dog", "an ä"]
    rows = io.StringIO()
    csv.writer(rows).writerows([["prompt"], *([text] for text in texts)])
    _put(folder, {
        "a.txt": "\n".join(texts), "a.csv": rows.getvalue(),
        "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
    })  # fmt: skip
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet", write_page_checksum=True)


def read_texts(folder: Path) -> tuple[str, str]:
    from distillbench.builtin.prompts import Prompts

    found = [Prompts(Prompts.Config("prompts", str(folder / f"a{suffix}"))) for suffix in (".txt", ".csv", ".jsonl")]
    found.append(Prompts(Prompts.Config("prompts", str(folder / "a.parquet"))))
    return digest([each.sha256 for each in found]), digest([each.prompts for each in found])


def _hostile_texts(root: Path) -> list[tuple[str, Files]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = _files(root / "whole")
    many = io.BytesIO()
    pq.write_table(
        pa.table(
            {"text": pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), 20_000_000), ["a" * 1000])}
        ),
        many,
    )
    return [
        *((f"line {value[:20]}", whole | {"a.jsonl": value.encode()}) for value in VALUES),
        ("half a surrogate pair", whole | {"a.jsonl": b'"\\ud800"'}),
        ("a field of 2^20 bytes", whole | {"a.csv": b"prompt\n" + b"x" * 2**20}),
        ("zero bytes", whole | {"a.csv": b"prompt\n\0\0\n"}),
        ("open quotes", whole | {"a.csv": b'prompt\n"' + b"x\n" * 10_000}),
        ("fifty million rows", whole | {"a.parquet": many.getvalue()}),
        ("pipe", whole | {"a.txt": FIFO}),
        ("device", whole | {"a.txt": LINK + b"/dev/zero"}),
    ]


WORDS = ["methods=[boot]", "dataset=digits", "seed=1", "methods.boot.lr=0.001", "budget.images=1000", "run_name=x"]
NAMES = [
    *(
        "seed",
        "batch_size",
        "budget",
        "budget.images",
        "methods",
        "methods.boot.lr",
        "methods.boot",
        "dataset",
        "teacher",
    ),
    *(
        "run_name",
        "results_dir",
        "device",
        "evaluation.nfe",
        "evaluation.images",
        "experiment",
        "guidance_range",
        "_target_",
    ),
    *("methods.boot._target_", "dataset.kind", "hydra.run.dir", "hydra/launcher", "seed.x", "a" * 1000, "conditional"),
]
SETTINGS = [
    *("${oc.env:HOME}", "${oc.create:{a:1}}", "${oc.decode:'[1,2]'}", "${seed}", "${run_name}", "${oc.select:seed}"),
    *("${" * 500, "${.}", "${..}", "${oc.env:" * 20 + "x", "???", "null", "os.system", "{_target_:os.system}", "nan"),
    *(
        "inf",
        "-1",
        "9" * 5000,
        "1e999",
        "0x10",
        "[" * 3000,
        "{" * 3000,
        "[" * 300 + "]" * 300,
        "a" * 100_000,
        "\0",
        "\n",
    ),
    *(
        "'\ud800'",
        "../../x",
        "/etc/passwd",
        "range(0,1e9)",
        "range(0,999999999999)",
        "choice(1,2)",
        "glob(*)",
        "glob(**)",
    ),
    *(
        "sort(3,1)",
        "1,2,3",
        ",".join("0123456789" * 200),
        "interval(0,1)",
        "tag(a,1)",
        "extend_list(1)",
        "&a [*a]",
        "!!x",
    ),
    *(
        "{a:{b:{c:{}}}}",
        "[" + "1," * 20_000 + "1]",
        "\x1b[2J",
        "%s%s",
        "int(x)",
        "shuffle(range(5))",
        "${oc.deprecated:x}",
    ),
    *("cells", "..", ".", "con", "", " ", "true", "{}", "[]", "[null]", "[boot,boot]", "[[boot]]", "boot", "@x", "~x"),
]


def _words(folder: Path) -> None:
    _put(folder, {"words": json.dumps(WORDS)})


def read_words(folder: Path) -> tuple[str, str]:
    from distillbench.runs.config import compose_runs, to_yaml

    try:
        words = json.loads((folder / "words").read_text())
    except (ValueError, RecursionError) as error:
        raise Refusal("no list of words") from error
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        raise Refusal("no list of words")
    runs = [to_yaml(run) for run in compose_runs(words, _registry())]
    return digest(runs), digest(runs)


def _registry(cache: list[Any] = []) -> Any:  # noqa: B006
    from distillbench.registry import load_registry

    if not cache:
        cache.append(load_registry())
    return cache[0]


def _hostile_words(root: Path) -> list[tuple[str, Files]]:
    pairs = [f"{name}={value}" for name in NAMES for value in SETTINGS]
    random.Random(0).shuffle(pairs)
    bare = [
        "",
        " ",
        "=",
        "==",
        "+seed=1",
        "~seed",
        "@",
        "seed@x=1",
        "--help",
        "seed",
        "\0",
        "=1",
        "seed=1=2",
        "++a.b=1",
    ]
    return [(word[:60], {"words": json.dumps([*WORDS[:2], word]).encode()}) for word in [*bare, *pairs]]


PLUGIN = '''"""A plugin."""
from dataclasses import dataclass
from distillbench import Dataset, DatasetConfig, hookimpl
from _fuzzed_helper import COUNT
class Toy(Dataset):
    """Nothing."""
    name = "fuzzed_toy"
    licence = "none"
    shape = (1, 8, 8)
    classes = COUNT
    @dataclass
    class Config(DatasetConfig):
        pass
    def __init__(self, config): self.sha256 = "0"
    def __len__(self): return 0
    def read(self, indices): raise NotImplementedError
@hookimpl(api=2)
def register_datasets(register):
    register(Toy)
'''


def _plugin(folder: Path) -> None:
    _put(folder, {"fuzzed_plugin.py": PLUGIN, "_fuzzed_helper.py": "COUNT = 3\n"})


def read_plugin(folder: Path) -> tuple[str, str]:
    from distillbench.registry import in_folders, load_registry

    for name in [name for name in sys.modules if "fuzzed" in name]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != str(folder)]
    sys.path_importer_cache.pop(str(folder), None)
    sys.dont_write_bytecode = True
    registry = load_registry(in_folders([folder]))
    if registry.broken:
        if not registry.broken[0].error:
            raise RuntimeError("broken without a reason")
        raise Refusal(registry.broken[0].error[:LONGEST_MESSAGE])
    entries = [(name, entry.identity(), entry.cls.classes) for name, entry in registry.datasets.items()]
    return digest([entry[1] for entry in entries]), digest(entries)


def _hostile_plugins(root: Path) -> list[tuple[str, Files]]:
    return [
        ("pipe", {"a_fuzzed.py": FIFO}),
        ("device", {"a_fuzzed.py": LINK + b"/dev/zero"}),
        ("dead link", {"a_fuzzed.py": LINK + b"nowhere"}),
        ("folder with the name of a file", {"a_fuzzed.py/x": b"1"}),
        ("no name of a module", {"a-fuzzed b.c.py": b"1"}),
        ("the name of a module of Python", {"json.py": b"raise SystemExit"}),
        ("SystemExit", {"a_fuzzed.py": b"raise SystemExit"}),
        ("nesting", {"a_fuzzed.py": b"(" * 100_000}),
        ("zero bytes", {"a_fuzzed.py": b"\0" * 100}),
        ("recursion", {"a_fuzzed.py": b"def f(): f()\nf()"}),
        ("a long sum", {"a_fuzzed.py": b"x = " + b"1+" * 100_000 + b"1"}),
    ]


def read_nothing(folder: Path) -> tuple[str, str]:
    from distillbench.cli.new_plugin import new_plugin

    name = (folder / "words").read_bytes().decode("utf-8", "replace")
    made = new_plugin(name, "method", folder / "out")
    return digest(name), digest(sorted(path.name for path in made.rglob("*")))


def _name(folder: Path) -> None:
    _put(folder, {"words": "mine"})


SUBJECTS: dict[str, Subject] = {
    "one PNG": Subject(_one_image, dataset(), "checksum", _hostile_images),
    "folder of PNG and labels": Subject(_images, dataset()),
    "folder and captions": Subject(_captioned, dataset(), hostile=_hostile_captions),
    "JPEG, WebP, BMP": Subject(_lossy, dataset()),
    "zip": Subject(
        lambda f: _put(f, {"a.zip": _zip({f"{k}.png": _png(x) for k, x in enumerate(_pixels(3))}
                                         | {"dataset.json": _labels(3)})}),
        dataset("a.zip"), hostile=_hostile_zips),
    "compressed zip": Subject(
        lambda f: _put(f, {"a.zip": _zip({f"{k}.png": _png(x) for k, x in enumerate(_pixels(2))}, zipfile.ZIP_DEFLATED)}),  # noqa: E501
        dataset("a.zip")),
    "GIF, TIFF, PPM": Subject(_other_formats, dataset()),
    "metadata in each split's folder": Subject(_metadata, dataset()),
    "tar of images": Subject(_image_tar, dataset("a.tar"), hostile=_hostile_tars),
    "packed tar of images": Subject(_packed_image_tar, dataset("a.tar.gz")),
    "npy": Subject(_npy_files, dataset(), hostile=_hostile_npy),
    "npz": Subject(_npz, dataset("a.npz"), hostile=_hostile_arrays("images.npy")),
    "npz, mapped": Subject(_large_npz, dataset("a.npz")),
    "npz, compressed": Subject(_packed_npz, dataset("a.npz")),
    "idx": Subject(_idx, dataset(channels=1), hostile=_hostile_idx),
    "idx, gzipped": Subject(_packed_idx, dataset("train-images-idx3-ubyte.gz", channels=1), "checksum"),
    "CIFAR's batches": Subject(_cifar, dataset(), hostile=_hostile_batches),
    "CIFAR's tar": Subject(_tar, dataset("a.tar.gz"), hostile=_hostile_tars),
    "parquet": Subject(_parquet, dataset("a.parquet"), hostile=_hostile_parquet),
    "reference statistics": Subject(_reference, read_reference, hostile=_hostile_references),
    "teacher's safetensors": Subject(_teacher, read_teacher, hostile=_hostile_teachers),
    "features' safetensors": Subject(_features, read_features, "checksum"),
    "weights by SHA-256": Subject(_weights, read_weights, "checksum"),
    "records": Subject(_records, read_records, "checksum"),
    "states": Subject(_state, read_state, "checksum"),
    "pairs": Subject(_pairs, read_pairs, "checksum"),
    "latents": Subject(_latents, read_latents, "checksum"),
    "encoded prompts": Subject(_encoded_prompts, read_encoded_prompts, "checksum"),
    "EDM's pickle": Subject(_edm, read_edm, hostile=_hostile_pickles),
    "diffusers' folder": Subject(_pipeline, read_pipeline, hostile=_hostile_pipelines),
    "run for reports": Subject(_run, read_run, "nothing", _hostile_runs),
    "run for reports, CSV": Subject(_csv_run, read_run, "nothing"),
    "published.csv": Subject(_published, read_published, "nothing"),
    "prompts' files": Subject(_texts, read_texts, hostile=_hostile_texts),
    "words of the command line": Subject(_words, read_words, hostile=_hostile_words),
    "plugins' folder": Subject(_plugin, read_plugin, hostile=_hostile_plugins),
    "name of a new plugin": Subject(_name, read_nothing),
}  # fmt: skip


def table(outcomes: list[Outcome]) -> str:
    """Outcomes by reader and class, as text."""
    columns = [*GOOD, *DEFECTS]
    lines = [f"{'':28}{'inputs':>8}" + "".join(f"{column:>9}" for column in columns)]
    for name in [*dict.fromkeys(outcome.subject for outcome in outcomes), ""]:
        ours = [outcome.outcome for outcome in outcomes if name in ("", outcome.subject)]
        lines.append(
            f"{name or 'all':28}{len(ours):>8}" + "".join(f"{ours.count(column) or '-':>9}" for column in columns)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    work(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:7]))
