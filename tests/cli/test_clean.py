"""What clean removes, and above all what it keeps, on real folders."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from rich.console import Console

from distillbench import UserError
from distillbench.cli import clean
from distillbench.cli.clean import KINDS, find, freed, results_folder, size_of
from distillbench.storage.locks import try_lock

FINISHED, CUT, FAILED, ORPHAN = ("a" * 16, "b" * 16, "c" * 16, "d" * 16)
EVALUATION = "1" * 16
DAY = 86400


def put(path: Path, content: bytes | str | dict = b"x", days_old: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    age(path, days_old)
    return path


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then), follow_symlinks=False)


@pytest.fixture
def root(tmp_path) -> Path:
    """A finished cell that a run names, a training that was cut off, a cell that failed, and caches."""
    root = tmp_path / "results"
    cells, cache = root / "cells", root / "cache"
    student = put(cells / FINISHED / "student.safetensors", b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    put(cells / FINISHED / "train.json", {"status": "ok", "weights_sha256": sha256})
    put(cells / FINISHED / f"evaluation-{EVALUATION}.json", {"rows": [{"status": "ok"}, {"status": "diverged"}]})
    put(cells / FINISHED / f"evaluation-{EVALUATION}.safetensors")
    put(cells / CUT / "resume" / "1" / "state-000000000010-0000000000000000.safetensors", b"state")
    put(cells / FAILED / "train.json", {"status": "failed"})
    put(cells / FAILED / "error.txt", "Traceback")
    put(cells / FAILED / f"evaluation-{'2' * 16}.json", {"rows": [{"status": "failed"}]})
    put(cells / FAILED / f"evaluation-{'2' * 16}.safetensors")
    put(cache / "teachers" / "f.safetensors", b"teacher")
    put(cache / "pairs" / "e" / "manifest.json", {"seconds": 61.4, "teacher_nfe": 65536})
    put(cache / "pairs" / "e" / "targets.safetensors", b"pairs")
    cache.joinpath("latents").mkdir()
    np.save(cache / "latents" / "set-0.npy", np.zeros((12, 1, 2, 2), np.float32))
    put(cache / "references" / "net-0.npz")
    put(cache / "references" / ".net-0.npz.claim", days_old=9)
    run = root / "run"
    run.mkdir()
    pd.DataFrame({"method": ["a"], "key": [EVALUATION]}).to_parquet(run / "table.parquet")
    pd.DataFrame({"method": ["a"], "key": [EVALUATION]}).to_csv(run / "table.csv", index=False)
    run.joinpath("weights").mkdir()
    os.link(student, run / "weights" / f"a-seed0-{FINISHED}.safetensors")
    return root


def orphan(root: Path, days_old: float = 2.0) -> Path:
    cell = root / "cells" / ORPHAN
    put(cell / "train.json", {"status": "ok"}, days_old)
    put(cell / "student.safetensors", b"nobody's", days_old)
    age(cell, days_old)
    return cell


def left(root: Path) -> list[str]:
    """What is there, but for the locks of cells."""
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    return [name for name in found if not re.fullmatch(r"cells/\..*\.claim", name)]


def names(root: Path, *what: str, days: float | None = None) -> list[str]:
    """What would be removed, as paths."""
    return sorted(str(file.relative_to(root)) for removal in find(root, what, days) for file in removal.files)


class Heard:
    """A run of clean, and what it printed."""

    def __init__(
        self, root: Path, *what: str, yes: bool = True, answer: bool = False, days: float | None = None
    ) -> None:
        console = Console(width=80, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
        self.asked: list[str] = []
        self.code = clean.clean(root, what, days, yes, console, lambda text: bool(self.asked.append(text)) or answer)
        self.text = "\n".join(line.rstrip() for line in console.export_text().splitlines())


# --- what is safe ----------------------------------------------------------------------------------------------------


def test_a_clean_folder_has_nothing_to_remove(root):
    before = left(root)
    heard = Heard(root, yes=False)
    assert (heard.code, heard.asked) == (0, [])
    told = "".join(heard.text.split())  # it may be broken anywhere, as the folder's name is long
    assert told == f"{root}:nothingtoremove(temporary,states)"
    assert left(root) == before


def test_temporary_files_are_removed_after_a_day_in_any_folder(root):
    before = left(root)
    for place in ("cells/" + FINISHED, "cache/pairs/e", "run", "run/weights", "."):
        put(root / place / ".writing-abc.json", days_old=1.1)
    assert Heard(root).code == 0
    assert left(root) == before


def test_young_temporary_files_are_skipped_with_a_note(root):
    put(root / "run" / ".writing-young", days_old=0.01)
    heard = Heard(root)
    assert (root / "run" / ".writing-young").exists()
    assert "temporary: 1 file that may still be written to: skipped" in heard.text


def test_a_file_that_no_process_has_open_counts_as_abandoned(root, monkeypatch):
    monkeypatch.setattr(clean, "file_system", lambda path: ("ext4", "rw"))
    monkeypatch.setattr(psutil, "process_iter", lambda: [psutil.Process()])  # all that this test may look at everywhere
    path = put(root / "run" / ".writing-quiet", days_old=0.2)
    with open(path, "rb"):
        assert names(root) == []
    assert names(root) == ["run/.writing-quiet"]


def test_an_open_file_is_never_removed(root, monkeypatch):
    monkeypatch.setattr(psutil, "process_iter", lambda: [psutil.Process()])
    path = put(root / "run" / ".writing-now", days_old=0.001)
    with open(path, "rb"):
        assert names(root, days=0.0) == []
        assert find(root, (), 0.0)[0].notes == ["1 file that may still be written to: skipped"]
    assert names(root, days=0.0) == ["run/.writing-now"]


@pytest.mark.parametrize("kind", ["nfs4", "lustre", "fuse.sshfs", ""])
def test_on_a_network_file_system_files_must_be_a_day_old(root, monkeypatch, kind):
    monkeypatch.setattr(clean, "file_system", lambda path: (kind, "rw"))
    put(root / "run" / ".writing-quiet", days_old=0.2)
    assert names(root) == []


def test_files_are_kept_if_open_files_cannot_be_determined(root, monkeypatch):
    monkeypatch.setattr(clean, "file_system", lambda path: ("ext4", "rw"))
    monkeypatch.setattr(clean, "_open_files", lambda owner: None)
    put(root / "run" / ".writing-quiet", days_old=0.2)
    assert names(root) == []


def test_folders_of_interrupted_exports_are_removed(root):
    before = left(root)
    for folder, inner in ((".boot.ab12_x9z", "folder"), (".all.abcdefgh", "run"), (".writing-probe", "")):
        put(root / folder / inner / "deep" / "file", days_old=2)
        for path in [*(root / folder).rglob("*"), root / folder]:
            age(path, 2)
    put(root / ".mine.abcdefgh" / "notes.txt", days_old=2)  # somebody's own
    put(root / ".new.abcdefgh" / "folder" / "file")  # is being written
    assert Heard(root).code == 0
    kept = [name for name in left(root) if name not in before]
    new = ".new.abcdefgh"
    assert kept == [".mine.abcdefgh", ".mine.abcdefgh/notes.txt", new, f"{new}/folder", f"{new}/folder/file"]


def test_states_of_finished_trainings_are_removed_and_others_kept(root):
    before = left(root)
    for name in ("state-000000000001-0.safetensors", "1/aside-state-000000000002-0.safetensors"):
        put(root / "cells" / FINISHED / "resume" / name, days_old=0.1)
    aside = put(root / "cells" / CUT / "resume" / "1" / "aside-state-000000000003-0.safetensors")
    assert len(names(root)) == 3 and str(aside.relative_to(root)) in names(root)
    assert Heard(root).code == 0
    assert left(root) == before


def test_states_are_kept_if_weights_are_damaged_or_training_runs_again(root):
    put(root / "cells" / FINISHED / "resume" / "state-000000000001-0.safetensors", days_old=-0.1)
    assert names(root, "states") == []  # younger than train.json
    age(root / "cells" / FINISHED / "resume" / "state-000000000001-0.safetensors", 1)
    assert len(names(root, "states")) == 1
    put(root / "cells" / FINISHED / "student.safetensors", b"other")
    assert names(root, "states") == []
    (root / "cells" / FINISHED / "student.safetensors").unlink()
    assert names(root, "states") == []


def test_a_cell_in_use_is_skipped(root):
    put(root / "cells" / FINISHED / "resume" / "aside-state-1-0.safetensors")
    orphan(root)
    what = ("states", "failed", "orphans")
    assert find(root, what, 0.0)[0].files
    assert [removal.files for removal in find(root, what, 0.0, busy=lambda cell: True)] == [[], [], []]


def test_a_locked_cell_is_skipped(root, tmp_path):
    """Before it is listed, and between listing and removing."""
    path = put(root / "cells" / FINISHED / "resume" / "1" / "aside-state-1-0.safetensors")
    removal = find(root, ["states"])[0]
    assert removal.files == [path]
    put(root / "cells" / FINISHED / ".writing-old", days_old=3)
    with try_lock(root / "cells" / FINISHED) as mine:
        assert mine and names(root) == []
        assert clean._remove(root, removal.files, removal.folders) == [f"a process is working on {FINISHED}: skipped"]
    assert path.exists() and clean._remove(root, removal.files, removal.folders) == [] and not path.exists()


# --- only when asked -------------------------------------------------------------------------------------------------


def test_failed_records_are_removed_when_asked(root):
    heard = Heard(root, "failed")
    assert (heard.code, left(root / "cells" / FAILED)) == (0, [])
    assert (root / "cells" / FINISHED / "train.json").exists()


def test_orphans_are_removed_when_asked(root):
    cell = orphan(root)
    assert names(root) == []
    heard = Heard(root, "orphans")
    assert heard.code == 0 and not cell.exists()
    assert (root / "cells" / FINISHED).exists() and (root / "cells" / CUT).exists()  # named; changed lately
    assert f"1 cell: {ORPHAN}. A run that needs them trains again" in heard.text.replace("\n", " ")
    assert "orphans: 2 cells changed recently or in use: skipped" in heard.text.replace("\n", " ")


def test_interrupted_trainings_are_noted(root):
    heard = Heard(root, "orphans", days=0.0, yes=False)
    assert "orphans: including 1 interrupted training that could be resumed" in heard.text
    assert (root / "cells" / CUT).exists()


@pytest.mark.parametrize("lost", ["table.parquet", "weights"])
def test_one_reference_of_a_run_keeps_a_cell(root, lost):
    if lost == "weights":
        (root / "run" / "weights" / f"a-seed0-{FINISHED}.safetensors").unlink()
    else:
        (root / "run" / "table.parquet").unlink()
    assert not [name for name in names(root, "orphans", days=0.0) if FINISHED in name]


def test_a_table_that_cannot_be_read_keeps_every_cell(root):
    orphan(root)
    put(root / "nested" / "run2" / "table.parquet", b"damaged")
    heard = Heard(root, "orphans")
    assert (root / "cells" / ORPHAN).exists()
    assert "nested/run2/table.parquet cannot be read" in heard.text


def test_caches_are_removed_when_asked_with_a_note_on_their_cost(root):
    heard = Heard(root, "pairs", "latents", "references")
    assert left(root / "cache") == [
        "latents", "pairs", "references", "references/.net-0.npz.claim", "teachers", "teachers/f.safetensors",
    ]  # fmt: skip
    assert "pairs: computing them took 61 s and 65,536 network evaluations" in heard.text
    assert "latents: computing them again encodes 12 images" in heard.text
    assert "references: computing them again reads the real images 1 time" in heard.text


def test_older_than_counts_for_every_kind(root):
    what = [kind for kind in KINDS if kind != "temporary"]
    assert names(root, *what, days=1.0) == []
    assert len(names(root, *what, days=0.0)) == len(set(names(root, *what, days=0.0))) > 8


def test_no_kind_removes_files_of_a_runs_folder(root):
    kept = {path: path.read_bytes() for path in (root / "run").rglob("*") if path.is_file()}
    (root / "run" / "table.parquet").touch()
    Heard(root, *KINDS, days=0.0)
    assert kept == {path: path.read_bytes() for path in (root / "run").rglob("*") if path.is_file()}


# --- telling first ---------------------------------------------------------------------------------------------------


def test_nothing_is_removed_before_confirmation(root):
    path = put(root / "run" / ".writing-abc", b"x" * 2**20, days_old=2)
    heard = Heard(root, yes=False)
    assert path.exists() and heard.asked == ["Remove this?"] and heard.code == 0
    assert heard.text.endswith("nothing was removed (--yes removes without asking)")
    heard = Heard(root, yes=False, answer=True)
    assert not path.exists() and heard.text.endswith("removed: 1 file, 1.0 MiB")


def test_what_is_printed(root):
    put(root / "run" / ".writing-abc", b"x" * 2**20, days_old=2)
    put(root / "cells" / FINISHED / "resume" / "aside-state-1-0.safetensors", b"x" * 2**19)
    text = Heard(root, yes=False).text
    words = [" ".join(line.split()) for line in text.splitlines()]
    assert "temporary 1 file 1.0 MiB temporary files of processes that were killed" in words
    assert any(line.startswith("states 1 file 0.5 MiB resume states of finished") for line in words)
    assert "in all 2 files 1.5 MiB" in words
    assert max(map(len, text.splitlines())) <= 80


def test_what_changed_before_confirmation_is_kept(root):
    path = put(root / "run" / ".writing-abc", days_old=2)
    console = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    assert clean.clean(root, (), None, False, console, lambda text: not os.utime(path)) == 0
    assert path.exists()


def test_hard_links_free_space_only_with_the_last_name(tmp_path):
    a, b = put(tmp_path / "a", b"x" * 1000), tmp_path / "b"
    os.link(a, b)
    assert (size_of([a, b]), freed([a]), freed([a, b]), freed([tmp_path / "gone"])) == (1000, 0, 1000, 0)


def test_shared_weights_are_reported_not_to_free_space(root):
    (root / "run" / "table.csv").unlink()
    (root / "run" / "table.parquet").unlink()
    student = root / "cells" / FINISHED / "student.safetensors"
    student.write_bytes(b"x" * 2**20)
    (root / "run" / "weights" / f"a-seed0-{FINISHED}.safetensors").rename(root / "run" / "weights" / "mine")
    heard = Heard(root, "orphans", days=0.0)
    assert "1.0 MiB of it have other hard links and stay on the disk" in heard.text
    assert (root / "run" / "weights" / "mine").stat().st_size == 2**20
    assert "no run in this folder refers to any cell" in heard.text


# --- links, other folders, trouble -----------------------------------------------------------------------------------


def test_links_are_not_followed_out_of_the_folder(root, tmp_path):
    outside = put(tmp_path / "outside" / ".writing-mine", days_old=9)
    put(tmp_path / "outside" / ORPHAN / "student.safetensors", days_old=9)
    put(tmp_path / "outside" / "resume" / "aside-state-1-0.safetensors", days_old=9)
    (root / "run" / "elsewhere").symlink_to(tmp_path / "outside")
    (root / "cells" / ORPHAN).symlink_to(tmp_path / "outside" / ORPHAN)
    (root / "cells" / FINISHED / "resume").symlink_to(tmp_path / "outside" / "resume")
    (root / ".writing-link").symlink_to(outside)
    age(root / ".writing-link", 9)
    before = left(tmp_path / "outside")
    assert Heard(root, *KINDS, days=0.0).code == 0
    assert left(tmp_path / "outside") == before


@pytest.mark.parametrize("linked", ["cells", "cache"])
def test_a_linked_part_is_skipped(root, tmp_path, linked):
    (root / linked).rename(tmp_path / "moved")
    (root / linked).symlink_to(tmp_path / "moved")
    before = left(tmp_path / "moved")
    Heard(root, *KINDS, days=0.0)
    assert left(tmp_path / "moved") == before


def test_a_link_created_meanwhile_is_not_followed(root, tmp_path):
    folder = root / "cache" / "pairs" / "e"
    removal = find(root, ["pairs"])[0]
    folder.rename(tmp_path / "e")
    folder.symlink_to(tmp_path / "e")
    troubles = clean._remove(root, removal.files, removal.folders)
    assert [line for line in troubles if "a link leads out of the results folder" in line]
    assert len(left(tmp_path / "e")) == 2


@pytest.mark.parametrize(
    "content", ["", "cells/notes.txt", "cells/my_cells/train.json", "cache/npm/x", "src/.writing-x"]
)
def test_another_folder_is_refused(tmp_path, content):
    folder = tmp_path / "home"
    put(folder / (content or "file"), days_old=9)
    with pytest.raises(UserError, match="is not a results folder: it has no cells/ or cache/ of a run"):
        Heard(folder)
    assert (folder / (content or "file")).exists()


def test_the_parent_folder_suggests_the_results_folder(root):
    with pytest.raises(UserError, match=re.escape(f"Did you mean {str(root)!r}?")):
        results_folder(root.parent)
    with pytest.raises(UserError, match="no results folder"):
        results_folder(root / "nowhere")


def test_wrong_words_are_refused(root):
    with pytest.raises(UserError, match=r"no kind 'state'\. Did you mean 'states'\?"):
        Heard(root, "state")
    for days in (-1.0, float("nan")):
        with pytest.raises(UserError, match="--older-than must not be negative"):
            Heard(root, days=days)


def test_files_that_vanish_meanwhile_are_no_error(root):
    removal = find(root, ["pairs"])[0]
    for file in removal.files:
        file.unlink()
    assert clean._remove(root, removal.files, removal.folders) == []
    assert clean._remove(root, removal.files, removal.folders) == []


def test_failures_to_remove_are_reported(root, monkeypatch):
    for k in range(7):
        put(root / "run" / f".writing-{k}", days_old=2)
    unlink = Path.unlink

    def refusing(path, missing_ok=False):
        if path.name != ".writing-3":
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing)
    heard = Heard(root)
    assert heard.code == 1 and not (root / "run" / ".writing-3").exists()
    assert "cannot remove run/.writing-0: Permission denied" in heard.text
    assert heard.text.endswith("and 1 more could not be removed\nremoved, but not everything")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may remove anything")
def test_a_read_only_folder_is_reported(root):
    put(root / "run" / ".writing-a", days_old=2)
    (root / "run").chmod(0o500)
    try:
        assert Heard(root).code == 1
    finally:
        (root / "run").chmod(0o700)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe", b'{"rows": 3}', b'{"status": []}'])
def test_damaged_records_remove_nothing(root, content):
    for path in [*(root / "cells").glob("*/*.json"), root / "cache" / "pairs" / "e" / "manifest.json"]:
        path.write_bytes(content)
    put(root / "cells" / FINISHED / "resume" / "state-000000000001-0.safetensors", days_old=1)
    assert names(root, "states") == []
    assert names(root, "failed") == [f"cells/{FAILED}/error.txt"]
    assert len(names(root, "pairs")) == 2
