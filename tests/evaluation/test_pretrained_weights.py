"""Weights are believed by their SHA-256 alone, wherever they come from; nothing else gets into their folder."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest
import torch

from distillbench import Unavailable, UserError
from distillbench.evaluation.features import FeatureNetwork, Networks
from distillbench.evaluation.pretrained_weights import VARIABLE, WeightsFile, locate, weights_folder
from distillbench.evaluation.pretrained_weights import fetch as fetch_weights
from distillbench.system.progress import Progress

CONTENT, OTHER = b"the right bytes", b"other bytes"


def pinned(content: bytes, file: str = "net.pth", url: str = "", others: tuple[str, ...] = ()) -> WeightsFile:
    return WeightsFile(file, hashlib.sha256(content).hexdigest(), url, "MIT", 1, others)


WEIGHTS = pinned(CONTENT, others=("old-name.pth",))


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch) -> Path:
    """Where torch.hub keeps its files; empty, and not the user's."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "weights"


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def files(folder: Path) -> list[str]:
    """The files below `folder` but those of locks."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".claim")
    return sorted(str(path.relative_to(folder)) for path in found)


def fetch(network: str, weights: WeightsFile, folder: Path, source: Path | None) -> Path:
    return fetch_weights(network, weights, folder, source, Progress(None))


# --- finding ---------------------------------------------------------------------------------------------------------


def test_a_missing_file_gives_the_command_that_fetches_it(folder):
    with pytest.raises(Unavailable) as caught:
        locate("net", WEIGHTS, folder)
    assert str(caught.value) == (
        f"the weights of net are not there: net.pth, sha256 {WEIGHTS.sha256[:8]}... (distillbench fetch net, or "
        "evaluation.download=true in a run)"
    )


@pytest.mark.parametrize("name", ["net.pth", "old-name.pth"])
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_the_file_is_found_by_its_names_in_the_folder_and_in_torch_hubs(folder, hub, place, name):
    path = put((folder if place == "folder" else hub) / name, CONTENT)
    assert locate("net", WEIGHTS, folder) == path


def test_the_hash_decides_and_then_the_folder_comes_before_torch_hubs(folder, hub):
    first, second = put(folder / "old-name.pth", CONTENT), put(hub / "net.pth", CONTENT)
    assert locate("net", WEIGHTS, folder) == first
    put(first, OTHER)
    assert locate("net", WEIGHTS, folder) == second


def test_another_file_under_the_name_is_named_and_refused(folder):
    put(folder / "net.pth", OTHER)
    found = hashlib.sha256(OTHER).hexdigest()[:8]
    with pytest.raises(Unavailable, match=rf"net\.pth is not the file that net is defined by: sha256 {found}"):
        locate("net", WEIGHTS, folder)


def test_a_file_that_changes_is_read_again(folder):
    path = put(folder / "net.pth", CONTENT)
    assert locate("net", WEIGHTS, folder) == path
    before = path.stat()
    path.write_bytes(CONTENT[::-1])  # as long as before
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(Unavailable):
        locate("net", WEIGHTS, folder)
    path.write_bytes(CONTENT)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 2))
    assert locate("net", WEIGHTS, folder) == path


def test_a_folder_is_not_a_file_of_weights(folder):
    (folder / "net.pth").mkdir(parents=True)
    with pytest.raises(Unavailable, match="not there"):
        locate("net", WEIGHTS, folder)


def test_an_environment_variable_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert weights_folder() == tmp_path
    for nothing in ("", None):
        monkeypatch.setenv(VARIABLE, nothing) if nothing is not None else monkeypatch.delenv(VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert "distillbench" in weights_folder().parts and weights_folder().name == "weights"


# --- fetching --------------------------------------------------------------------------------------------------------


def test_fetch_copies_a_file_with_the_right_hash(folder, tmp_path):
    source = put(tmp_path / "elsewhere" / "any-name.bin", CONTENT)
    path = fetch("net", WEIGHTS, folder, source)
    assert path == folder / "net.pth" == locate("net", WEIGHTS, folder)
    assert source.read_bytes() == CONTENT and files(folder) == ["net.pth"]


def test_fetch_copies_a_file_from_a_folder(folder, tmp_path):
    weights = pinned(CONTENT, "model-1/model.safetensors")
    put(tmp_path / "download" / "model.safetensors", CONTENT)
    assert fetch("net", weights, folder, tmp_path / "download") == folder / "model-1" / "model.safetensors"
    assert locate("net", weights, folder) == folder / "model-1" / "model.safetensors"


@pytest.mark.parametrize("old", [None, CONTENT, OTHER])
def test_fetch_refuses_other_bytes_and_leaves_the_folder_as_it_was(folder, tmp_path, old):
    if old is not None:
        put(folder / "net.pth", old)
    source = put(tmp_path / "net.pth", OTHER + b".")
    found = hashlib.sha256(OTHER + b".").hexdigest()
    with pytest.raises(UserError, match=f"net.pth is not net: its sha256 is {found}, not {WEIGHTS.sha256}"):
        fetch("net", WEIGHTS, folder, source)
    assert files(folder) == ([] if old is None else ["net.pth"])
    assert old is None or (folder / "net.pth").read_bytes() == old


def test_fetch_of_a_path_that_is_not_there(folder, tmp_path):
    for source in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(UserError, match="no file"):
            fetch("net", WEIGHTS, folder, source)


def test_fetch_replaces_a_wrong_file(folder, tmp_path):
    put(folder / "net.pth", OTHER)
    fetch("net", WEIGHTS, folder, put(tmp_path / "net.pth", CONTENT))
    assert locate("net", WEIGHTS, folder).read_bytes() == CONTENT


def test_fetch_of_the_file_that_is_already_there_keeps_it(folder, tmp_path):
    path = put(folder / "net.pth", CONTENT)
    (tmp_path / "link.pth").symlink_to(path)
    for source in (path, folder, tmp_path / "link.pth"):
        assert fetch("net", WEIGHTS, folder, source) == path and path.read_bytes() == CONTENT


def served(path: Path, content: bytes, expected: bytes = CONTENT, file: str = "net.pth") -> WeightsFile:
    """Weights with a URL that gives `content`."""
    return pinned(expected, file, put(path, content).as_uri())


@pytest.mark.parametrize("file", ["net.pth", "model-1/model.safetensors"])
def test_fetch_downloads(folder, tmp_path, file):
    weights = served(tmp_path / "server" / "net.pth", CONTENT, file=file)
    assert fetch("net", weights, folder, None) == folder / file
    assert locate("net", weights, folder).read_bytes() == CONTENT and files(folder) == [file]


@pytest.mark.parametrize("old", [None, OTHER])
def test_a_download_of_other_bytes_is_refused_and_set_aside(folder, tmp_path, old):
    if old is not None:
        put(folder / "net.pth", old)
    weights = served(tmp_path / "server" / "net.pth", OTHER + b".")
    with pytest.raises(UserError, match=re.escape(weights.url)):
        fetch("net", weights, folder, None)
    assert files(folder) == ([] if old is None else ["net.pth"]) + ["net.pth.refused"]
    assert old is None or (folder / "net.pth").read_bytes() == old


def test_a_download_that_fails_leaves_nothing_behind(folder, tmp_path):
    weights = served(tmp_path / "server" / "net.pth", CONTENT)
    (tmp_path / "server" / "net.pth").unlink()
    with pytest.raises(UserError, match="cannot download"):
        fetch("net", weights, folder, None)
    assert files(folder) == []


# --- without a published hash -----------------------------------------------------------------------------------------


def unpublished(url: str = "") -> WeightsFile:
    return WeightsFile("net.pth", "", url, "MIT", 1)


def test_the_first_hash_is_written_down_and_later_files_must_have_it(folder, tmp_path):
    given = tmp_path / "by_hand.pth"
    given.write_bytes(CONTENT)
    assert fetch("net", unpublished(), folder, given) == folder / "net.pth"
    assert (folder / "net.pth.sha256").read_text().strip() == hashlib.sha256(CONTENT).hexdigest()
    assert locate("net", unpublished(), folder) == folder / "net.pth"
    given.write_bytes(b"other")
    with pytest.raises(
        UserError, match=r"by_hand\.pth is not net: .* as first fetched; if you trust it, remove .*sha256"
    ):
        fetch("net", unpublished(), folder, given)
    assert (folder / "net.pth").read_bytes() == CONTENT
    (folder / "net.pth").write_bytes(b"other")
    with pytest.raises(Unavailable, match=r"net\.pth is not the file that net is defined by"):
        locate("net", unpublished(), folder)


@pytest.mark.parametrize("record", [None, "", "ab", "not a hash " * 10])
def test_a_file_that_nobody_fetched_is_not_used(folder, record):
    folder.mkdir(exist_ok=True)
    with pytest.raises(Unavailable, match=r"^the weights of net are not there: net\.pth \(distillbench fetch net, or"):
        locate("net", unpublished(), folder)
    (folder / "net.pth").write_bytes(CONTENT)
    if record is not None:
        (folder / "net.pth.sha256").write_text(record)
    with pytest.raises(Unavailable, match=r"was not fetched, .*\(distillbench fetch net --from .*net\.pth\)"):
        locate("net", unpublished(), folder)
    fetch("net", unpublished(), folder, folder / "net.pth")
    assert locate("net", unpublished(), folder) == folder / "net.pth"


def test_a_download_without_a_published_hash_is_trusted_once(folder, tmp_path):
    (tmp_path / "net.pth").write_bytes(CONTENT)
    weights = unpublished((tmp_path / "net.pth").as_uri())
    fetch("net", weights, folder, None)
    (tmp_path / "net.pth").write_bytes(b"replaced by its publisher")
    fetch("net", weights, folder, None)  # there already
    assert locate("net", weights, folder).read_bytes() == CONTENT
    (folder / "net.pth").unlink()
    with pytest.raises(UserError, match="not the file that was expected"):
        fetch("net", weights, folder, None)


# --- networks --------------------------------------------------------------------------------------------------------


class Net(FeatureNetwork):
    name, protocol, width, weights = "net", "net/1", 1, WEIGHTS
    also = (pinned(b"words", "net.txt"),)

    def __init__(self, file: Path, device: str) -> None:
        self.content = file.read_bytes()

    def __call__(self, images):
        raise NotImplementedError


def test_a_network_is_loaded_once_with_the_right_files(folder):
    put(folder / "net.pth", CONTENT)
    networks = Networks(folder, "cpu")
    with pytest.raises(Unavailable, match=r"net\.txt"):
        networks.get(Net)
    assert Net.identity(folder)["weights_sha256"] is None
    put(folder / "net.txt", b"words")
    assert networks.get(Net) is networks.get(Net) and networks.get(Net).content == CONTENT
    assert Net.identity(folder) == {"network": "net", "protocol": "net/1", "weights_sha256": WEIGHTS.sha256}
