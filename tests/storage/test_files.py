"""Atomic writes, stable hashes of content, and hard links."""

import hashlib
import math
import stat
from pathlib import Path

import pytest
import torch

from distillbench.storage.files import canonical_json, key_of, sha256_file, sha256_tensors, write_atomically
from distillbench.storage.links import link_or_copy


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_key_does_not_depend_on_the_order_of_a_mapping():
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1})
    assert key_of([1, 2]) != key_of([2, 1])
    assert key_of({"a": 1}) != key_of({"a": "1"})
    assert key_of({"a": 1}) != key_of({"a": 1.5})


def test_keys_are_those_of_existing_records():
    """A change of this function would make every finished cell be run again."""
    text = '{"a":[1,2.5,null,true],"b":"\\u00fc"}'
    assert canonical_json({"b": "ü", "a": [1, 2.5, None, True]}) == text
    assert key_of({"b": "ü", "a": [1, 2.5, None, True]}) == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_infinities_and_nan_are_refused(value):
    with pytest.raises(ValueError):
        key_of({"a": value})


def test_hash_of_tensors_sees_names_types_shapes_and_values_but_not_order_or_strides():
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2)
    reference = sha256_tensors({"a": a, "b": b})
    assert sha256_tensors({"b": b, "a": a}) == reference
    assert sha256_tensors({"a": a.T.contiguous().T, "b": b.requires_grad_()}) == reference
    others = [
        {"a": a, "c": b},
        {"a": a, "b": b.double()},
        {"a": a.view(3, 2), "b": b},
        {"a": a + 1, "b": b},
        {"a": a},
    ]
    assert len({sha256_tensors(other) for other in others} | {reference}) == 1 + len(others)


def test_hash_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_writing_makes_folders_and_replaces_the_whole_file(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    for text in ("a longer first text", "second"):
        write_atomically(path, lambda temporary, text=text: Path(temporary).write_text(text))
        assert path.read_text() == text
    assert names(path.parent) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(temporary):
        Path(temporary).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.txt"])


def test_readers_never_see_a_partial_file(tmp_path):
    path = tmp_path / "a.txt"

    def write(temporary):
        Path(temporary).write_text("part")
        assert not path.exists()

    write_atomically(path, write)
    assert path.exists()


def test_written_files_have_the_permissions_of_ordinary_ones(tmp_path):
    (tmp_path / "ordinary").write_text("")
    write_atomically(tmp_path / "atomic", lambda temporary: None)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "atomic")}
    assert len(modes) == 1


def test_the_temporary_file_has_the_suffix_of_the_target(tmp_path):
    """Some writers choose their format by it."""
    seen = []
    write_atomically(tmp_path / "a.png", seen.append)
    assert seen[0].endswith(".png")


def test_a_link_replaces_what_was_there(tmp_path):
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_text("first")
    link_or_copy(source, target)
    other = tmp_path / "other"
    other.write_text("second")
    link_or_copy(other, target)
    assert (target.read_text(), source.read_text()) == ("second", "first")


def test_where_files_cannot_be_linked_they_are_copied(tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", fail)
    (tmp_path / "source").write_text("text")
    link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "text"
