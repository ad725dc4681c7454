"""Readers of images: each format as its own library writes it, and one message for each defect."""

import copy
import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import threading
import time
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from distillbench.datasets import image_folders, tables
from distillbench.datasets.image_dataset import _open_hub, open_source
from distillbench.datasets.image_readers import map_in_order
from distillbench.datasets.tables import HubReader
from distillbench.errors import LONGEST_REASON, UserError
from distillbench.storage.npz import Npz
from image_sources import cifar, edm, idx, old_pickle, opened, pixels, png, write_folder, write_zip


def open_at(path, **settings):
    return open_source(str(path), **settings)


# --- folders and zips ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [write_zip, write_folder])
@pytest.mark.parametrize("labels", [None, [2, 0, 1, 2]])
def test_the_layout_of_edm(tmp_path, pack, labels):
    reader = open_at(pack(tmp_path / "edm", edm(4, labels)))
    assert np.array_equal(opened(reader), pixels(4))
    assert (reader.labels.tolist() if labels else reader.labels) == labels
    assert reader.name(3) == "00000/img00000003.png"


def test_a_zip_and_the_folder_that_it_was_packed_from_are_the_same_data(tmp_path):
    files = edm(5)
    plain = open_at(write_folder(tmp_path / "folder", files))
    zips = [write_zip(tmp_path / f"{m}.zip", files, m) for m in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
    prints = {reader.fingerprint(workers) for reader in [plain, *map(open_at, zips)] for workers in (1, 3)}
    pairs = [(zlib.crc32(files[n]), len(files[n])) for n in sorted(files) if n.endswith(".png")]
    assert plain.checksums() == pairs
    assert prints == {hashlib.sha256(b"".join(struct.pack("<QQ", *pair) for pair in pairs)).hexdigest()}
    swapped = dict(zip(files, [files[list(files)[k]] for k in (1, 0, 2, 3, 4, 5)], strict=True))
    assert open_at(write_zip(tmp_path / "swapped.zip", swapped)).fingerprint() not in prints


def test_images_are_sorted_by_path_and_hidden_files_ignored(tmp_path):
    names = ["b/2.png", "a/9.png", "a-b/1.PNG", "__MACOSX/a/._9.png", ".trash/1.png", "a/._9.png", "a/notes.md"]
    for pack in (write_zip, write_folder):
        reader = open_at(pack(tmp_path / pack.__name__, dict.fromkeys(names, png(pixels(1)[0]))))
        assert [reader.name(i) for i in range(len(reader))] == ["a/9.png", "a-b/1.PNG", "b/2.png"]


def test_folders_as_classes_and_as_splits(tmp_path):
    names = ["afhq/train/wild/1.png", "afhq/train/cat/2.png", "afhq/val/cat/3.png"]
    path = write_zip(tmp_path / "afhq.zip", dict.fromkeys(names, png(pixels(1)[0])))
    reader = open_at(path, split="train", labels="folders")
    assert [reader.name(i) for i in range(2)] == [names[1], names[0]]
    assert (reader.labels.tolist(), reader.class_names) == ([0, 1], ["cat", "wild"])
    assert len(open_at(path, split="test")) == 1
    assert len(open_at(path)) == 3


def test_test_is_preferred_to_val_as_the_test_split(tmp_path):
    files = dict.fromkeys(["train/1.png", "val/2.png", "test/3.png"], png(pixels(1)[0]))
    reader = open_at(write_folder(tmp_path / "x", files), split="test")
    assert [reader.name(i) for i in range(len(reader))] == ["test/3.png"]


def test_captions_of_metadata_and_of_texts_beside_images(tmp_path):
    images = dict.fromkeys(["b.png", "a.png"], png(pixels(1)[0]))
    lines = [{"file_name": "b.png", "text": "a tree"}, {"file_name": "a.png", "text": "two\tcats"}]
    metadata = images | {"metadata.jsonl": "\n".join(map(json.dumps, lines)) + "\n\n"}
    texts = images | {"a.txt": "two\n cats\n", "b.txt": "a tree", "readme.txt": "no caption"}
    assert open_at(write_folder(tmp_path / "m", metadata)).captions == ["two\tcats", "a tree"]
    assert open_at(write_zip(tmp_path / "t.zip", texts)).captions == ["two cats", "a tree"]
    assert open_at(tmp_path / "t.zip", labels="none").captions is None
    both = texts | {"dataset.json": json.dumps({"labels": [["a.png", 1], ["b.png", 0]]})}
    reader = open_at(write_folder(tmp_path / "both", both))
    assert (reader.labels.tolist(), reader.captions) == ([1, 0], None)
    reader = open_at(tmp_path / "both", labels="captions")
    assert (reader.labels, reader.captions) == (None, ["two cats", "a tree"])


def test_a_zip_reader_can_be_copied_and_pickled(tmp_path):
    reader = open_at(write_zip(tmp_path / "a.zip", edm(3, [0, 1, 1])))
    for twin in (copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
        assert np.array_equal(opened(twin), pixels(3))
        assert twin.labels.tolist() == [0, 1, 1]


ONE = {"a.png": png(pixels(1)[0])}


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({}, {}, r"no image \(\.bmp, "),
        ({"a.txt": "text"}, {}, r"no image \(\.bmp, "),
        (ONE | {"dataset.json": "{"}, {}, "dataset.json is not valid JSON"),
        (ONE | {"dataset.json": '{"labels": [1]}'}, {}, r"labels must be a list of \[FILE, CLASS\]"),
        (ONE | {"dataset.json": '{"labels": [["a.png", 0], ["b.png", 1]]}'}, {}, "names 'b.png', which does not exist"),
        (ONE | {"b.png": ONE["a.png"], "dataset.json": '{"labels": [["a.png", 0]]}'}, {}, "lacks a label for 'b.png'"),
        (ONE | {"dataset.json": '{"labels": [["a.png", 0.5]]}'}, {}, "label of 'a.png' must be a class"),
        (ONE | {"dataset.json": '{"labels": [["a.png", -2]]}'}, {}, "label of 'a.png' must be a class"),
        (ONE | {"metadata.jsonl": '{"file_name": "b.png", "text": "x"}'}, {}, "names 'b.png', which does not exist"),
        (ONE | {"metadata.jsonl": '{"file_name": "a.png"}'}, {}, "line 1: needs file_name and one of text, caption"),
        (ONE | {"b.png": ONE["a.png"], "a.txt": "text"}, {}, r"no caption 'b\.txt'"),
        (ONE, {"labels": "folders"}, "'a.png' is not in a folder"),
        (ONE, {"labels": "captions"}, "no captions in"),
        ({"train/a.png": ONE["a.png"]}, {"split": "test"}, "has no split=test, only train"),
    ],
)
@pytest.mark.parametrize("pack", [write_zip, write_folder])
def test_a_damaged_folder_or_zip_is_refused(tmp_path, pack, files, settings, message):
    (tmp_path / "folder").mkdir()
    path = tmp_path / ("folder" if pack is write_folder else "a.zip")
    with pytest.raises(UserError, match=f"dataset.*{message}"):
        open_at(pack(path, files), **settings)


def test_a_folder_with_nothing_but_a_zip_says_so(tmp_path):
    write_zip(tmp_path / "faces.zip", ONE)
    with pytest.raises(UserError, match=r"there is 'faces\.zip', which may be given as dataset\.path"):
        open_at(tmp_path)


def test_a_truncated_zip(tmp_path):
    whole = write_zip(tmp_path / "a.zip", edm(4)).read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="a damaged or truncated zip"):
        open_at(tmp_path / "a.zip")


def test_a_damaged_image_in_the_middle_is_named_when_it_is_read(tmp_path):
    files = edm(3)
    data = bytearray(write_zip(tmp_path / "a.zip", files).read_bytes())
    data[data.index(files["00000/img00000001.png"]) + 60] ^= 255
    (tmp_path / "a.zip").write_bytes(data)
    reader = open_at(tmp_path / "a.zip")
    reader.open(0), reader.open(2)
    with pytest.raises(UserError, match=r"cannot read '00000/img00000001\.png' as an image: Bad CRC-32"):
        reader.open(1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no image format is recognised"),
        (b"GIF89a" + bytes(100), "no image format is recognised"),  # no decoder but those of the suffixes is asked
        (ONE["a.png"][:-30], "truncated|broken|Truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no image format is recognised"),
    ],
)
def test_files_that_are_not_images_are_refused(tmp_path, data, message):
    reader = open_at(write_folder(tmp_path, {"a.png": data}))
    with pytest.raises(UserError, match=rf"cannot read 'a\.png' as an image: .*({message})") as caught:
        reader.open(0)
    assert "0x" not in str(caught.value)


def test_bombs_are_refused(tmp_path, monkeypatch):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))
    with pytest.raises(UserError, match=r"cannot read 'a\.png' as an image: Image size \(900000000 pixels\) exceeds"):
        open_at(write_folder(tmp_path, {"a.png": bomb})).open(0)
    monkeypatch.setattr(image_folders, "LARGEST_FILE", 10_000)
    path = write_zip(tmp_path / "a.zip", {"a.png": bytes(10_001)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1000
    with pytest.raises(UserError, match=r"cannot read 'a\.png' as an image: it has 10,001 bytes"):
        open_at(path).open(0)


def test_a_missing_path_suggests_a_similar_name(tmp_path):
    write_zip(tmp_path / "ffhq-64x64.zip", ONE)
    with pytest.raises(UserError, match=r"no file or folder '.*ffhq-64\.zip'\. Did you mean 'ffhq-64x64\.zip'\?"):
        open_at(tmp_path / "ffhq-64.zip")
    with pytest.raises(UserError, match=r"The folder '.*absent' does not exist either"):
        open_at(tmp_path / "absent" / "a.zip")


def test_an_unsupported_file_and_a_single_image_are_refused(tmp_path):
    (tmp_path / "a.npz").write_text("text")
    with pytest.raises(UserError, match=r"is not a supported kind of file.*Possible: EDM's dataset zip"):
        open_at(tmp_path / "a.npz")
    (tmp_path / "a.png").write_bytes(ONE["a.png"])
    with pytest.raises(UserError, match="is a single image: give its folder"):
        open_at(tmp_path / "a.png")


# --- CIFAR's batches -------------------------------------------------------------------------------------------------


PICKLERS = [old_pickle, *(lambda value, p=protocol: pickle.dumps(value, p) for protocol in range(6))]


@pytest.mark.parametrize("dumps", PICKLERS, ids=["python2", *map(str, range(6))])
def test_cifar_of_every_protocol(tmp_path, dumps):
    images, files = cifar(dumps)
    path = write_folder(tmp_path, files) / "cifar-10-batches-py"
    train, test, every = (open_at(path, split=split) for split in ("train", "test", "all"))
    assert np.array_equal(opened(train), images[:5]) and train.labels.tolist() == [1, 2, 3, 4, 5]
    assert np.array_equal(opened(test), images[5:]) and test.labels.tolist() == [9]
    assert every.labels.tolist() == [1, 2, 3, 4, 5, 9]
    assert len(open_at(tmp_path, split="test")) == 1  # the folder above


def test_cifar_in_its_archive(tmp_path):
    images, files = cifar()
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name, data in reversed(files.items()):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    reader = open_at(tmp_path / "cifar-10-python.tar.gz", split="train")
    assert np.array_equal(opened(reader), images[:5]) and reader.labels.tolist() == [1, 2, 3, 4, 5]
    assert reader.fingerprint() == open_at(write_folder(tmp_path / "x", files), split="train").fingerprint()
    whole = (tmp_path / "cifar-10-python.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or truncated"):
        open_at(tmp_path / "cut.tar.gz")


class Calls:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("place", ["alone", "inside", "argument"])
def test_a_hostile_pickle_is_refused_and_executes_nothing(tmp_path, place, protocol):
    evil = Calls(os.system, f"touch {tmp_path}/executed")
    value = {"alone": evil, "inside": {"data": evil, "labels": [0]}, "argument": {"data": Calls(np.dtype, evil)}}[place]
    write_folder(tmp_path, {"data_batch_1": pickle.dumps(value, protocol)})
    with pytest.raises(UserError, match=r"'data_batch_1' refers to (posix|nt)\.system.*nothing was executed"):
        open_at(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "value",
    [
        Calls(eval, "1 + 1"),
        Calls(__import__, "os"),
        Calls(np.load, "x"),
        Calls(np.fromfile, "x"),
        np.array([1, "a"], dtype=object),
        Image.new("L", (2, 2)),
    ],
)
def test_nothing_but_plain_arrays_is_built(tmp_path, value):
    write_folder(tmp_path, {"data_batch_1": pickle.dumps({"data": value, "labels": [0]})})
    with pytest.raises(
        UserError, match=r"dataset\.path: 'data_batch_1' (refers to|is not a CIFAR batch|holds a damaged array)"
    ):
        open_at(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not a CIFAR batch"),
        (b"\x80\x02garbage", "is not a CIFAR batch"),
        (pickle.dumps([1, 2]), "must hold a dictionary"),
        (pickle.dumps({"data": [1]}), "must hold a dictionary with an array"),
        (pickle.dumps({"data": np.zeros((2, 3072))}), "must hold 8-bit values"),
        (pickle.dumps({"data": np.zeros((2, 3073), np.uint8)}), "must be images"),
        (pickle.dumps({"data": np.zeros((2, 12), np.uint8), "labels": [1]}), "must be 2 whole numbers"),
        (pickle.dumps({"data": np.zeros((2, 12), np.uint8), "labels": [[1], [2, 3]]}), "must be (2 )?whole numbers"),
    ],
)
def test_a_damaged_batch(tmp_path, data, message):
    write_folder(tmp_path, {"data_batch_1": data})
    with pytest.raises(UserError, match=message):
        open_at(tmp_path)


# --- npz -------------------------------------------------------------------------------------------------------------


def test_arrays_with_channels_first_last_or_missing(tmp_path):
    images = pixels(3)
    np.savez(tmp_path / "last.npz", images=images, labels=np.array([1, 0, 1], dtype=np.uint8))
    np.savez_compressed(tmp_path / "first.npz", arr_0=images.transpose(0, 3, 1, 2), arr_1=np.array([[1], [0], [1]]))
    last, first = open_at(tmp_path / "last.npz"), open_at(tmp_path / "first.npz")
    assert np.array_equal(opened(last), images) and np.array_equal(opened(first), images)
    assert last.labels.tolist() == first.labels.tolist() == [1, 0, 1]
    assert last.fingerprint() == first.fingerprint() == hashlib.sha256(images.tobytes()).hexdigest()
    np.savez(tmp_path / "grey.npz", images=images[..., 0])
    assert open_at(tmp_path / "grey.npz").open(1).shape == (8, 8, 1)


def test_large_arrays_are_mapped_and_not_loaded(tmp_path):
    images = pixels(100, side=64)
    np.savez(tmp_path / "a.npz", images=images)
    reader = open_at(tmp_path / "a.npz")
    assert isinstance(reader.parts[0].images, np.memmap)
    assert np.array_equal(opened(reader), images)


def test_named_batches_and_the_layout_of_keras(tmp_path):
    images = pixels(13)
    arrays = {f"data_batch_{k}_images": images[k : k + 1].transpose(0, 3, 1, 2) for k in (10, 2, 1)}
    arrays |= {f"data_batch_{k}_labels": np.array([k]) for k in (10, 2, 1)}
    arrays |= {"test_batch_images": images[12:], "test_batch_labels": np.array([7])}
    np.savez(tmp_path / "cifar.npz", **arrays)
    reader = open_at(tmp_path / "cifar.npz", split="train")
    assert reader.labels.tolist() == [1, 2, 10]
    assert np.array_equal(opened(reader), images[[1, 2, 10]])
    assert open_at(tmp_path / "cifar.npz", split="test").labels.tolist() == [7]
    assert open_at(tmp_path / "cifar.npz").labels.tolist() == [1, 2, 10, 7]
    np.savez(tmp_path / "mnist.npz", x_train=images[:4, ..., 0], y_train=np.arange(4), x_test=images[4:5, ..., 0])
    assert open_at(tmp_path / "mnist.npz", split="train").labels.tolist() == [0, 1, 2, 3]
    assert np.array_equal(open_at(tmp_path / "mnist.npz", split="test").open(0)[..., 0], images[4, ..., 0])


def test_downsampled_imagenet(tmp_path):
    images = pixels(4, side=64)
    flat = images.transpose(0, 3, 1, 2).reshape(4, -1)
    for name, rows, labels in [("train_data_batch_10", [2], [3]), ("train_data_batch_2", [0, 1], [1, 2])]:
        np.savez(tmp_path / f"{name}.npz", data=flat[rows], labels=np.array(labels), mean=np.zeros(12288))
    np.savez(tmp_path / "val_data.npz", data=flat[3:], labels=np.array([2]))
    reader = open_at(tmp_path, split="train")
    assert np.array_equal(opened(reader), images[:3])
    assert reader.labels.tolist() == [0, 1, 2]
    assert open_at(tmp_path, split="test").labels.tolist() == [1]
    (tmp_path / "map_clsloc.txt").write_text("n02119789 1 kit_fox\nn01440764 2 tench\nn03000000 3 thing\n")
    assert open_at(tmp_path, split="train").labels.tolist() == [1, 0, 2]  # the order of WordNet ids


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": pixels(1)}, "has no array images.*it has pictures"),
        ({"images": pixels(1).astype(float)}, "must hold 8-bit values"),
        ({"images": pixels(1)[0, 0]}, "must be images"),
        ({"images": pixels(1, channels=2)}, "must be images"),
        ({"images": pixels(2), "labels": np.zeros(3, int)}, "must be 2 whole numbers"),
        ({"images": pixels(2), "labels": np.array([0, -1])}, "must be classes"),
        ({"images": pixels(2)[:0]}, "no images in"),
        ({"images": np.array([Evil()], dtype=object)}, "cannot read 'images'"),
    ],
)
def test_an_unsupported_npz_is_refused(tmp_path, monkeypatch, arrays, message):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_at(tmp_path / "a.npz")
    assert not (tmp_path / "executed").exists()


def test_a_truncated_npz(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(4))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:-50])
    with pytest.raises(UserError, match="a damaged or truncated npz"):
        open_at(tmp_path / "a.npz")


# --- idx -------------------------------------------------------------------------------------------------------------


def test_idx_files_gzipped_or_not(tmp_path):
    images, labels = pixels(5, side=28)[..., 0], np.array([3, 1, 4, 1, 5], dtype=np.uint8)
    plain = {"train-images-idx3-ubyte": images[:3], "train-labels-idx1-ubyte": labels[:3]}
    zipped = {"t10k-images-idx3-ubyte.gz": images[3:], "t10k-labels-idx1-ubyte.gz": labels[3:]}
    write_folder(tmp_path, {name: idx(array) for name, array in plain.items()})
    write_folder(tmp_path, {name: gzip.compress(idx(array)) for name, array in zipped.items()})
    train, test = open_at(tmp_path, split="train"), open_at(tmp_path, split="test")
    assert np.array_equal(opened(train)[..., 0], images[:3]) and train.labels.tolist() == [3, 1, 4]
    assert np.array_equal(opened(test)[..., 0], images[3:]) and test.labels.tolist() == [1, 5]
    assert open_at(tmp_path).labels.tolist() == [3, 1, 4, 1, 5]
    assert len(open_at(tmp_path / "t10k-images-idx3-ubyte.gz")) == 2


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(pixels(2)[..., 0])[:-1], idx(np.zeros(2, np.uint8)), "is damaged or truncated"),
        (idx(pixels(2)[..., 0]), idx(np.zeros(3, np.uint8)), "must be 2 whole numbers"),
        (idx(pixels(2)[..., 0]), b"nothing", "not an idx file"),
        (gzip.compress(idx(pixels(2)[..., 0]))[:-20], idx(np.zeros(2, np.uint8)), "cannot read"),
    ],
)
def test_damaged_idx_files(tmp_path, images, labels, message):
    write_folder(tmp_path, {"train-images-idx3-ubyte": images, "train-labels-idx1-ubyte": labels})
    with pytest.raises(UserError, match=message):
        open_at(tmp_path)


# --- tables ----------------------------------------------------------------------------------------------------------


def write_parquet(path, columns, rows_in_group=2, metadata=None):
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=rows_in_group)


def test_parquet_files(tmp_path, monkeypatch):
    encoded = [png(image) for image in pixels(5)]
    structs = [{"bytes": data, "path": None} for data in encoded]
    features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    names = {"huggingface": json.dumps(features)}
    write_parquet(tmp_path / "train-00000-of-00002.parquet", {"image": structs[:3], "label": [0, 1, 0]}, metadata=names)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", {"image": structs[3:4], "label": [1]}, metadata=names)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", {"image": structs[4:], "label": [1]}, metadata=names)
    monkeypatch.setattr(tables, "CACHED_BYTES", 1)  # one group at a time
    reader = open_at(tmp_path, split="train")
    assert np.array_equal(opened(reader), pixels(5)[:4])
    assert (reader.labels.tolist(), list(reader.class_names)) == ([0, 1, 0, 1], ["cat", "dog"])
    assert reader.name(3) == "train-00001-of-00002.parquet row 3"
    assert len(reader._cache) == 1
    assert len(open_at(tmp_path, split="test")) == 1
    assert np.array_equal(opened(copy.deepcopy(reader)), pixels(5)[:4])
    beside = write_folder(tmp_path / "folder", {f"{k}.png": data for k, data in enumerate(encoded[:4])})
    assert reader.fingerprint() == open_at(beside).fingerprint()


def test_a_parquet_file_with_captions(tmp_path):
    encoded = [png(image) for image in pixels(3)]
    write_parquet(tmp_path / "a.parquet", {"caption": ["a", "b", "c"], "jpg": encoded})
    reader = open_at(tmp_path / "a.parquet")
    assert np.array_equal(opened(reader), pixels(3))
    assert reader.captions == ["a", "b", "c"]


def test_damaged_parquet_files_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", {"url": ["x"]})
    with pytest.raises(UserError, match=r"a\.parquet has no column image or .*it has url"):
        open_at(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", {"image": [png(pixels(1)[0])], "label": [0.5]})
    with pytest.raises(UserError, match="labels must be classes"):
        open_at(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(UserError, match=r"cannot read 'c\.parquet' as parquet"):
        open_at(tmp_path / "c.parquet")
    write_parquet(tmp_path / "d.parquet", {"image": [{"bytes": None, "path": None}]})
    with pytest.raises(UserError, match="it holds no image"):
        open_at(tmp_path / "d.parquet").open(0)


class Rows:
    """What the `datasets` library gives, as far as it is used."""

    def __init__(self, columns, features=None):
        self.columns, self.features, self.column_names = columns, features or {}, list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: values[key] for name, values in self.columns.items()}

    def cast_column(self, name, feature):
        assert (name, feature) == ("img", ("Image", False))
        return self


class Names:
    def __init__(self, names):
        self.names = names


def library(load):
    return SimpleNamespace(load_dataset=load, Image=lambda decode: ("Image", decode), ClassLabel=Names)


def test_a_hub_dataset_is_loaded_by_name_and_split():
    asked = []
    encoded = [{"bytes": png(image), "path": "x.png"} for image in pixels(2)]

    def load(name, split):
        asked.append((name, split))
        return Rows({"img": encoded, "label": [1, 0], "text": ["a", "b"]}, {"label": Names(["cat", "dog"])})

    reader = _open_hub("owner/name", "train", True, library(load))
    assert asked.pop() == ("owner/name", "train") and not asked
    assert np.array_equal(opened(reader), pixels(2))
    assert (reader.labels.tolist(), reader.class_names, reader.captions) == ([1, 0], ["cat", "dog"], None)
    reader = _open_hub("owner/name", "train", True, library(load), "captions")
    assert (reader.labels, reader.captions) == (None, ["a", "b"])


def test_a_hub_dataset_says_at_once_all_that_it_needs_and_its_errors_are_reported(monkeypatch):
    def load(name, split):
        raise ConnectionError("no route\nto the hub")

    line = r"The whole line: .*dataset\.path=hub:owner/name dataset\.download=true$"
    package = r"the package 'datasets' \(pip install 'distillbench\[hub\]'\) and "
    folder, installed = SimpleNamespace(origin=None), SimpleNamespace(origin="datasets/__init__.py")
    for found, needed in ((None, package), (folder, package), (installed, "")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        with pytest.raises(UserError, match=f"hub:owner/name needs {needed}dataset.download=true. {line}"):
            open_source("hub:owner/name")
        with pytest.raises(UserError, match=f"no file or folder 'owner/name'.*a dataset of the hub: .* needs {needed}"):
            open_source("owner/name")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package 'datasets' \(pip install 'distillbench\[hub\]'\)\. The"):
        open_source("hub:owner/name", download=True)
    with pytest.raises(UserError, match=r"cannot load 'owner/name', split 'train': no route$"):
        _open_hub("owner/name", "train", True, library(load))
    with pytest.raises(UserError, match="has no column image"):
        _open_hub("owner/name", "train", True, library(lambda name, split: Rows({"url": ["x"]})))


def test_the_library_itself_loads_a_local_folder(tmp_path, monkeypatch):
    config = pytest.importorskip("datasets.config", reason="the optional library 'datasets' is not installed")
    for number, image in enumerate(pixels(4)):
        write_folder(tmp_path / "data", {f"train/{'ab'[number % 2]}/{number}.png": png(image)})
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    reader = open_source(f"hub:{tmp_path / 'data'}", "train")
    assert isinstance(reader, HubReader)
    assert (sorted(reader.labels.tolist()), reader.class_names) == ([0, 0, 1, 1], ["a", "b"])
    assert {image.tobytes() for image in opened(reader)} == {image.tobytes() for image in pixels(4)}


# --- threads ---------------------------------------------------------------------------------------------------------


def test_results_of_threads_come_in_order():
    seen = set()

    def slow(number):
        seen.add(threading.get_ident())
        time.sleep(0.001 * (10 - number))
        return number * number

    assert map_in_order(slow, range(10), 4) == [number * number for number in range(10)]
    assert 2 <= len(seen) <= 4
    assert map_in_order(slow, [], 4) == []


def test_the_error_of_threads_is_that_of_the_first_item():
    def fail(number):
        time.sleep(0.001 * (10 - number))
        if number in (3, 8):
            raise UserError(f"item {number}")

    for workers in (1, 3):
        with pytest.raises(UserError, match="item 3"):
            map_in_order(fail, range(10), workers)


def test_long_messages_of_libraries_are_truncated(tmp_path):
    """zipfile quotes the names that differ, of any length."""
    path, name = tmp_path / "long.npz", "n" * 60_000
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"")
    data = path.read_bytes()
    path.write_bytes(data.replace(name.encode(), name.replace("n", "m").encode(), 1))
    with pytest.raises(ValueError, match="in directory") as raised:
        Npz(path)[name]
    assert len(str(raised.value)) <= LONGEST_REASON
