"""The tutorial works: its files are written, its commands are run, and what it puts together is the example plugin.

Comments in docs/tutorial.md, which no reader sees, say what a block is:

| comment            | the block after it                                                                        |
|--------------------|-------------------------------------------------------------------------------------------|
| write: FILE        | the content of FILE, in the folder that the tutorial works in                             |
| change: FILE       | lines of FILE, "-" before and "+" after                                                   |
| file: FILE         | a part of FILE, which is written when all parts are together                              |
| run, run: CODE     | commands, which must end with exit code CODE (0 where there is none)                      |
| prints             | lines that the commands before it print, whatever numbers are in them; "..." leaves out   |
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "tutorial.md").read_text()
EXAMPLE = ROOT / "examples" / "distillbench-shortcut"
BLOCK = re.compile(r"^<!-- (\w+)(?:: (.*?))? -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 600  # of a block, on a machine that does other work


@dataclass(frozen=True)
class Block:
    what: str
    of: str
    text: str


BLOCKS = [Block(*match.groups(default="")) for match in BLOCK.finditer(TEXT)]


def put_together(file: str) -> str:
    """The parts of a file, with the blank lines that stand between them."""
    whole = ""
    for part in (block.text for block in BLOCKS if (block.what, block.of) == ("file", file)):
        apart = "\n\n" if part.startswith(("class ", "def ", "@")) else "\n"
        whole += (apart if whole else "") + part
    return whole


def changed(source: str, diff: str) -> str:
    """`source` with each run of "-" lines, which must be there once, replaced by the "+" lines that follow."""
    for removed, added in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE):
        old, new = (re.sub(r"^[-+]", "", lines, flags=re.MULTILINE) for lines in (removed, added))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


def plain(text: str) -> str:
    """Words, however the lines were broken, with N for every number."""
    return " ".join(re.sub(r"\d[\d.,]*", "N", text).split())


def test_every_marked_block_is_known():
    assert len(BLOCKS) == len(re.findall(r"^<!-- (?!fmt)", TEXT, re.MULTILINE))
    assert {block.what for block in BLOCKS} == {"write", "change", "file", "run", "prints"}


def test_the_parts_are_the_example():
    assert put_together("distillbench_shortcut.py") == (EXAMPLE / "src" / "distillbench_shortcut.py").read_text()


@pytest.mark.nightly
def test_the_tutorial_can_be_followed(tmp_path):
    """From the first file to the package, in order, in an empty folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DISTILLBENCH", "PYTEST"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = kept | {"PATH": path, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    said, whole = "", {block.of: put_together(block.of) for block in BLOCKS if block.what == "file"}
    left = {name: sum((b.what, b.of) == ("file", name) for b in BLOCKS) for name in whole}
    for block in BLOCKS:
        file = tmp_path / block.of
        if block.what == "write":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.what == "change":
            file.write_text(changed(file.read_text(), block.text))
        elif block.what == "file":
            left[block.of] -= 1
            if not left[block.of]:
                (tmp_path / "my_plugins").mkdir(exist_ok=True)
                (tmp_path / "my_plugins" / block.of).write_text(whole[block.of])
        elif block.what == "run":
            done = subprocess.run(
                ["bash", "-e", "-c", block.text], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=SECONDS
            )
            said = done.stdout + done.stderr
            assert done.returncode == int(block.of or 0), f"{block.text}\n{said}"
        else:
            for line in block.text.splitlines():
                assert line.strip() == "..." or plain(line) in plain(said), f"{line!r} is not in\n{said}"
