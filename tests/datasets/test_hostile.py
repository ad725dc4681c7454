"""Hostile files and settings give one error message: a sample, and known defects. benchmarks/hostile.py has all."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import struct
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from by_day import by_day
from distillbench.builtin.diffusers_pipelines import read_index, weights_files
from distillbench.builtin.trained import METADATA, read_teacher
from distillbench.cli.data_check import printable
from distillbench.datasets.image_dataset import open_source
from distillbench.errors import UserError
from distillbench.evaluation.reference_statistics import read_reference
from distillbench.records.records import TrainRecord, read_record
from distillbench.registry import load_registry
from distillbench.reports.runs import read_run
from distillbench.runs.config import compose_runs
from distillbench.storage.checksummed import read_array, read_tensors, write_checksum, write_tensors
from fuzz import FIFO, GOOD, LINK, RECIPE, _bomb, _npy, _safetensors, _write, _zip, fuzz
from image_sources import pixels, png

ONE = png(pixels(1)[0])


def opened(root, files, name="", **options):
    """Every image of what lies in `root` after `files` are written."""
    _write(root, files)
    reader = open_source(str(root / name), **options)
    return [reader.open(index) for index in range(len(reader))]


@pytest.mark.parametrize("name", by_day(["one PNG", "CIFAR's batches", "reference statistics"], ("CIFAR's batches",)))
def test_a_sample_of_the_full_set(name):
    found = fuzz(name, written=2, drawn=2)
    assert [outcome for outcome in found if outcome.outcome not in GOOD] == [] and len(found) == 4


# --- images ----------------------------------------------------------------------------------------------------------


def test_a_png_with_a_wrong_checksum_is_refused(tmp_path):
    place = ONE.index(b"IDAT") + 8
    bad = ONE[:place] + bytes([ONE[place] ^ 1]) + ONE[place + 1 :]
    with pytest.raises(UserError, match=r"cannot read '0\.png' as an image"):
        opened(tmp_path / "a", {"0.png": bad})


def test_images_that_pillow_would_read_in_part_are_refused(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "png", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="an animation of 2 frames"):
        opened(tmp_path / "a", {"0.png": file.getvalue()})
    with pytest.raises(UserError, match=r"pixels"):
        opened(tmp_path / "a", {"0.png": _bomb(12_000, 12_000)})


@pytest.mark.parametrize("bad", [FIFO, LINK + b"/dev/zero"])
def test_files_that_are_not_regular_are_refused(tmp_path, bad):
    with pytest.raises(UserError, match=r"cannot read '0\.png' as an image: it is not a regular file"):
        opened(tmp_path / "a", {"0.png": bad})


def test_links_of_links_come_to_an_end(tmp_path, monkeypatch):
    """Ten folders that each link to the next one twice are 2^10 folders."""
    monkeypatch.setattr("distillbench.datasets.image_folders.MOST_LINKED", 500)
    for level in range(10):
        (tmp_path / f"{level}").mkdir()
        for name in "ab" if level < 9 else "":
            (tmp_path / f"{level}" / name).symlink_to(f"../{level + 1}")
    (tmp_path / "9" / "0.png").write_bytes(ONE)
    with pytest.raises(UserError, match=r"more than 500 folders below .* are links"):
        open_source(str(tmp_path / "0"))


def member(name, kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(ONE) if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize("bad", [
    member("../0.png"), member("a/..\\..\\0.png"), member("0.png", tarfile.SYMTYPE, "../secret.png"),
    member("cat", tarfile.SYMTYPE, "/etc"), member("0.png", tarfile.LNKTYPE, "/etc/passwd"),
])  # fmt: skip
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_with_a_link_or_a_name_that_leads_out_is_refused(tmp_path, bad, mode):
    (tmp_path / "secret.png").write_bytes(ONE)
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        archive.addfile(member("1.png"), io.BytesIO(ONE))
        archive.addfile(bad, io.BytesIO(ONE))
    with pytest.raises(UserError, match=r"which points outside it|and links in archives are refused"):
        open_source(str(tmp_path / "a.tar"))


def test_a_zip_with_a_link_or_a_name_that_leads_out_is_refused(tmp_path):
    link = zipfile.ZipInfo("cat")
    link.external_attr = 0o120777 << 16
    for name, data, message in (
        (link, "../dogs", "has the link 'cat'"),
        ("a\\..\\..\\0.png", ONE, "points outside it"),
    ):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("1.png", ONE)
            archive.writestr(name, data)
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / "a.zip"))


def test_metadata_that_unpacks_to_very_many_rows_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "0.png").write_bytes(ONE)
    pq.write_table(pa.table({"file_name": pa.repeat("0.png", 10**6)}), tmp_path / "metadata.parquet")
    with pytest.raises(UserError, match="its header declares 1,000,000 rows"):
        open_source(str(tmp_path))


def test_an_absurd_class_is_refused(tmp_path):
    from distillbench.builtin.folder import Folder

    _write(tmp_path / "a", {"0.png": ONE, "dataset.json": json.dumps({"labels": [["0.png", 2**30]]}).encode()})
    with pytest.raises(UserError, match="at most 1,048,576 classes"):
        Folder(Folder.Config("folder", path=str(tmp_path / "a"), resolution=8))


# --- archives and arrays ---------------------------------------------------------------------------------------------


def test_a_zip_member_gives_at_most_its_declared_size(tmp_path):
    lying = bytearray(_zip({"0.png": bytes(2**26)}, zipfile.ZIP_DEFLATED))
    for mark, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", lying, lying.rindex(mark) + place, 100)
    with pytest.raises(UserError, match=r"cannot read '0\.png'"):
        opened(tmp_path / "a", {"a.zip": bytes(lying)}, "a.zip")


def test_a_zip_with_a_name_twice_is_refused(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, pytest.warns(UserWarning):
        archive.writestr("0.png", ONE)
        archive.writestr("0.png", ONE)
    with pytest.raises(UserError, match=r"has '0\.png' twice"):
        opened(tmp_path / "a", {"a.zip": file.getvalue()}, "a.zip")


@pytest.mark.parametrize("shape", ["(1125899906842624,)", "(1, 8, 8, 3)", "(-1, 8, 8, 3)", "(" * 50])
def test_an_npz_whose_header_is_not_what_follows_is_refused(tmp_path, shape):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    with pytest.raises(UserError, match=r"cannot read 'images' of 'a\.npz'"):
        opened(tmp_path / "a", {"a.npz": _zip({"images.npy": _npy(header, bytes(384))})}, "a.npz")


def test_a_mapped_npz_is_compared_with_its_checksum(tmp_path):
    file = io.BytesIO()
    np.savez(file, images=pixels(100, side=64))
    bad = bytearray(file.getvalue())
    bad[len(bad) // 2] ^= 1
    with pytest.raises(UserError, match="CRC-32"):
        opened(tmp_path / "a", {"a.npz": bytes(bad)}, "a.npz")


@pytest.mark.parametrize("sides", [[2**32 - 1] * 3, [1] * 255])
def test_an_idx_of_absurd_sides_is_refused(tmp_path, sides):
    data = bytes([0, 0, 8, len(sides)]) + struct.pack(f">{len(sides)}I", *sides) + b"\0"
    with pytest.raises(UserError):
        opened(tmp_path / "a", {"train-images-idx3-ubyte": data})


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    bomb = gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 1, 8, 8) + bytes(2**27))
    with pytest.raises(UserError, match="but it has more values"):
        opened(tmp_path / "a", {"train-images-idx3-ubyte": bomb})


@pytest.mark.parametrize("bad", [
    b"\x80\x02}r\xff\xff\xff\xff.",  # a memo of 2^32 places
    b"\x80\x02}" + b"N" + b"\x85" * 200_000 + b"K\x01s.",  # a key whose hash overflows the stack
    re.sub(rb"\]q.K\x00a", lambda _: b"K\x01" + b"2\x86" * 40,
           pickle.dumps({"data": np.zeros((1, 12), np.uint8), "labels": [0]}, 2)),  # labels of 2^40 numbers
])  # fmt: skip
def test_a_hostile_batch_of_cifar_is_refused(tmp_path, bad):
    with pytest.raises(UserError, match="data_batch_1"):
        opened(tmp_path / "a", {"data_batch_1": bad})


@pytest.mark.parametrize("path", ["../secret.png", "/dev/zero", "\0"])
def test_a_parquet_file_cannot_refer_to_files_outside_its_folder(tmp_path, path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "secret.png").write_bytes(ONE)
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": None, "path": path}]}), file)
    with pytest.raises(UserError, match="cannot read"):
        opened(tmp_path / "a", {"a.parquet": file.getvalue()}, "a.parquet")


# --- what is kept ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["NaN", "1e400", '"x"', "[]", "-1"])
def test_a_reference_of_no_number_of_images_is_refused(tmp_path, images):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2), provenance=np.array(f'{{"images": {images}}}'))
    with pytest.raises(UserError, match="images in provenance must be their number"):
        read_reference(tmp_path / "a.npz")


@pytest.mark.parametrize("network", [
    {"name": "mlp", "width": 2**40, "depth": 1}, {"name": "mlp", "width": 65536, "depth": 100},
    {"name": "mlp", "width": 8, "depth": 65536}, {"name": ["mlp"]}, 7,
])  # fmt: skip
def test_a_teacher_of_absurd_sizes_takes_no_memory(tmp_path, network):
    told = {"__metadata__": {METADATA: json.dumps({"recipe": RECIPE | {"network": network}})}}
    (tmp_path / "a.safetensors").write_bytes(_safetensors(told))
    began = time.monotonic()
    with pytest.raises(UserError):
        read_teacher(tmp_path / "a.safetensors", (1, 4, 4), 0, "cpu")
    assert time.monotonic() - began < 30


def test_stored_tensors_and_arrays_have_a_checksum(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(4.0)})
    np.save(tmp_path / "a.npy", np.arange(4.0))
    write_checksum(tmp_path / "a.npy", {"of": "nothing"})
    assert read_array(tmp_path / "a.npy")[3] == read_tensors(tmp_path / "a.safetensors")["x"][3] == 3
    for name in ("a.safetensors", "a.npy"):
        data = bytearray((tmp_path / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
    for read, name in ((read_tensors, "a.safetensors"), (read_array, "a.npy")):
        with pytest.raises(ValueError, match="checksum"):
            read(tmp_path / name)


# --- pipelines, runs, words ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "x.bin", 5])
def test_the_parts_of_a_pipeline_lie_in_its_folder(tmp_path, name):
    (tmp_path / "x.safetensors").write_bytes(b"")
    told = {"weight_map": {"a": name}}
    _write(tmp_path / "p", {
        "model_index.json": json.dumps({"_class_name": "P", "unet": ["diffusers", "UNet2DModel"]}).encode(),
        "unet/diffusion_pytorch_model.safetensors.index.json": json.dumps(told).encode(),
    })  # fmt: skip
    with pytest.raises(UserError, match="safetensors files in the same folder"):
        weights_files(read_index(tmp_path / "p"), "unet")


def test_a_billion_laughs_in_a_runs_settings(tmp_path):
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 60))
    _write(tmp_path / "run", {"config.yaml": laughs.encode()})
    run = read_run(tmp_path / "run")
    assert run.configs == [] and any("it has an alias" in problem for problem in run.problems)
    assert run.shown("**") == run.shown("../../x") == []


def test_names_do_not_move_the_cursor():
    assert printable("\x1b[2Jä\n\udcff") == "\\x1b[2Jä\\n\\udcff"


@pytest.fixture(scope="module")
def registry():
    return load_registry()


SPECIAL = st.sampled_from(
    ["${", "}", "oc.env:HOME", "[", "]", "{", "}", "(", ")", ",", "=", "'", '"', "\\", "&a", "*a"]
)
TEXT = st.lists(st.one_of(SPECIAL, st.text(max_size=5), st.integers().map(str)), max_size=12).map("".join)
NAME = st.sampled_from(
    ["seed", "methods", "methods.boot.lr", "dataset", "run_name", "budget.images", "_target_", "a.b"]
)


@settings(max_examples=12, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(name=NAME, value=TEXT)
def test_any_setting_is_read_or_refused(registry, name, value):
    try:
        compose_runs(["methods=[boot]", "dataset=digits", f"{name}={value}"], registry)
    except UserError as error:
        assert 0 < len(str(error)) < 2000


def test_a_sweep_has_a_limited_length(registry):
    with pytest.raises(UserError, match="at most 10,000"):
        compose_runs([f"seed=[{'1,' * 50_000}1]"], registry)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
FIELD = st.sampled_from(
    ["key", "inputs", "status", "cost", "curve", "checkpoints", "missing", "device", "schema_version"]
)


@settings(max_examples=25, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(changes=st.dictionaries(FIELD, JSON, min_size=1, max_size=3))
def test_any_record_is_read_or_refused(tmp_path, changes):
    told = {"key": "0" * 16, "inputs": {"a": 1}, "status": "ok", "device": "cpu", "environment": {}} | changes
    (tmp_path / "train.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"the record train\.json"):
        read_record(tmp_path / "train.json", TrainRecord, {"a": 2})
