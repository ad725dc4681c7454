"""clean --downloads: what it removes of downloads and weights, and what it keeps."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from command_line import exit_code
from distillbench.cli.clean_downloads import clean_downloads
from distillbench.errors import UserError
from distillbench.evaluation import pretrained_weights
from distillbench.storage import downloads
from distillbench.storage.locks import try_lock

KEPT = {"downloads/ffhq/data/a.parquet", "downloads/ffhq.json", "downloads/cifar10/a.tar.gz", "weights/net.pth"}
LEFT = {
    "downloads/ffhq/data/b.parquet.part", "downloads/ffhq/data/b.parquet.part.etag", "downloads/cifar10/x.refused",
    "downloads/ffhq/.cache/huggingface/download/b.incomplete", "weights/other.pth.part",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two sources and a network, each with something left over of two days ago."""
    monkeypatch.setenv(downloads.VARIABLE, str(tmp_path / "downloads"))
    monkeypatch.setenv(pretrained_weights.VARIABLE, str(tmp_path / "weights"))
    for name in KEPT | LEFT:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    return tmp_path


def files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".claim")
    return {path.relative_to(folder).as_posix() for path in found}


def clean(*names: str, days: float | None = None, yes: bool = True, agrees: bool = False) -> tuple[int, str]:
    said = io.StringIO()
    console = Console(file=said, width=200)
    return clean_downloads(names, days, yes, console, lambda text: agrees), said.getvalue()


def test_only_what_is_left_over_is_removed(folder):
    code, said = clean()
    assert code == 0 and files(folder) == KEPT
    assert "cifar10" in said and "ffhq" in said and "left over of downloads: 5 files, " in said
    assert "nothing to remove" in clean()[1]


def test_what_may_still_be_written_to_stays(folder):
    part = folder / "weights" / "other.pth.part"
    os.utime(part)
    with try_lock(folder / "downloads" / "ffhq"):
        clean()
        assert files(folder) == KEPT | {name for name in LEFT if "ffhq" in name} | {"weights/other.pth.part"}
    clean(days=0.0)
    assert files(folder) == KEPT


def test_nothing_is_removed_without_consent(folder):
    code, said = clean("ffhq", yes=False)
    assert code == 0 and files(folder) == KEPT | LEFT and "nothing was removed" in said
    clean("ffhq", yes=False, agrees=True)
    assert files(folder) == {name for name in KEPT if "ffhq/" not in name}  # the record of its hashes stays


def test_a_download_that_another_process_works_on_stays(folder):
    with try_lock(folder / "downloads" / "ffhq"):
        code, said = clean("ffhq")
    assert code == 1 and "a process is downloading ffhq: skipped" in said and files(folder) >= KEPT


def test_wrong_words_are_refused(folder):
    with pytest.raises(UserError, match=r"no stored download 'fhq'\. Did you mean 'ffhq'\?"):
        clean("fhq")
    with pytest.raises(UserError, match="must not be negative"):
        clean(days=-1.0)


def test_on_the_command_line(folder, capsys):
    assert exit_code("clean", "--downloads", "--yes") == 0
    assert "left over of downloads" in capsys.readouterr().out and files(folder) == KEPT
