"""Folders, zips and tars: links, names from Windows, formats, transparency, and notes on ignored files."""

import hashlib
import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from distillbench.builtin.folder import Folder
from distillbench.builtin.image_sets import Ffhq
from distillbench.cli.data_check import check
from distillbench.datasets.image_dataset import FileDataset, open_source
from distillbench.errors import UserError
from distillbench.storage.files import canonical_json
from image_sources import edm, make, opened, pixels, png, write_folder, write_zip

PNG = png(pixels(1)[0])


def open_at(path, **settings):
    return open_source(str(path), **settings)


def names(reader):
    return [reader.name(index) for index in range(len(reader))]


def encoded(image, kind, **settings):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, format=kind, **settings)
    return file.getvalue()


def read(files, folder, **settings):
    """(N,H,W,C) uint8 of a folder of `files`."""
    dataset = make(Folder, write_folder(folder, files), resolution=8, **settings)
    return dataset.read(torch.arange(len(dataset))).permute(0, 2, 3, 1).numpy(), dataset


# --- links -----------------------------------------------------------------------------------------------------------


def test_links_to_folders_and_to_images_are_followed(tmp_path):
    images = pixels(12)
    files = {
        f"{name}/{k}.png": png(images[4 * c + k]) for c, name in enumerate(("bird", "cat", "dog")) for k in range(4)
    }
    plain = make(Folder, write_folder(tmp_path / "plain", files), resolution=8, labels="folders")
    write_folder(tmp_path / "set", {name: data for name, data in files.items() if name.startswith("bird")})
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).symlink_to(f"../plain/{name}")
    linked = make(Folder, tmp_path / "set", resolution=8, labels="folders")
    assert (len(linked), linked.classes, linked.sha256) == (12, 3, plain.sha256)
    (tmp_path / "links").mkdir()
    for name in files:
        (tmp_path / "links" / name.replace("/", "-")).symlink_to(tmp_path / "plain" / name)
    assert np.array_equal(opened(open_at(tmp_path / "links")), images)


def test_annotations_and_tables_that_are_links_are_read(tmp_path):
    """As in the cache of the hub, where every file is a link."""
    write_folder(tmp_path / "blobs", {"1": PNG, "2": '{"file_name": "0.png", "text": "a"}'})
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    (tmp_path / "snapshot" / "data" / "0.png").symlink_to("../../blobs/1")
    (tmp_path / "snapshot" / "data" / "metadata.jsonl").symlink_to("../../blobs/2")
    assert open_at(tmp_path / "snapshot").captions == ["a"]


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("set/cat", "../store/cat", r"'cat' is a link to '\.\./store/cat', which does not exist"),
        ("set/0.png", "gone.png", r"'0\.png' is a link to 'gone\.png', which does not exist"),
        ("set/0.png", "0.png", r"'0\.png' is a link to '0\.png', which links back to it"),
        ("set/a/b/up", "..", r"'a/b/up' is a link to a folder that contains it"),
        ("set/a/b/set", "../../../set", r"'a/b/set' is a link to a folder that contains it"),
    ],
)
def test_broken_and_circular_links_are_refused(tmp_path, link, target, message):
    write_folder(tmp_path / "set", {"a/b/1.png": PNG, ".git/1": "x"})
    (tmp_path / "set" / ".git" / "old").symlink_to("gone")  # which is nobody's image
    (tmp_path / link).symlink_to(target)
    with pytest.raises(UserError, match=message):
        open_at(tmp_path / "set")


def test_two_folders_that_link_to_each_other(tmp_path):
    write_folder(tmp_path, {"a/1.png": PNG, "b/1.png": PNG})
    (tmp_path / "a" / "b").symlink_to("../b")
    (tmp_path / "b" / "a").symlink_to("../a")
    with pytest.raises(UserError, match="is a link to a folder that contains it"):
        open_at(tmp_path)


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "cat":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    write_folder(tmp_path, {"cat/1.png": PNG, "dog/1.png": PNG})
    monkeypatch.setattr("distillbench.datasets.image_folders.os.scandir", refusing)
    with pytest.raises(UserError, match="cannot list the folder 'cat/': Permission denied"):
        open_at(tmp_path)


# --- names of archives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", ".\\", "./", "/"])
@pytest.mark.parametrize("joint", ["\\", "/"])
def test_splits_and_classes_of_a_zip_made_on_windows(tmp_path, prefix, joint):
    files = {f"{prefix}{joint.join(name)}": PNG for name in (("train", "cat", "1.png"), ("test", "dog", "2.png"))}
    path = write_zip(tmp_path / "a.zip", files)
    assert names(open_at(path)) == ["test/dog/2.png", "train/cat/1.png"]
    for split, wanted in (("train", "train/cat/1.png"), ("test", "test/dog/2.png")):
        reader = open_at(path, split=split, labels="folders")
        assert names(reader) == [wanted] and reader.class_names == [wanted.split("/")[1]]
        assert len(opened(reader)) == 1


def test_a_windows_zip_unpacked_on_posix_is_read(tmp_path):
    write_folder(tmp_path, {"train\\cat\\1.png": PNG, "test\\dog\\2.png": PNG})
    reader = open_at(tmp_path, split="train", labels="folders")
    assert (names(reader), reader.class_names, len(opened(reader))) == (["train/cat/1.png"], ["cat"], 1)


def test_duplicate_names_after_cleaning_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"has 'a/1\.png' twice"):
        open_at(write_zip(tmp_path / "a.zip", {"a/1.png": PNG, "a\\1.png": PNG}))


# --- tars ------------------------------------------------------------------------------------------------------------


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_tar_is_the_folder_that_it_was_packed_from(tmp_path, mode, workers):
    files = {f"./{name}": data for name, data in edm(5, [0, 1, 1, 0, 2]).items()}
    reader = open_at(write_tar(tmp_path / "a.tar", files, mode))
    folder = open_at(write_folder(tmp_path / "folder", files))
    assert np.array_equal(opened(reader), pixels(5))
    assert (names(reader), reader.labels.tolist()) == (names(folder), [0, 1, 1, 0, 2])
    assert reader.fingerprint(workers) == folder.fingerprint(workers)


@pytest.mark.parametrize("pack", [write_folder, write_zip])
def test_splits_in_folders_that_are_too_deep_are_refused(tmp_path, pack):
    path = pack(tmp_path / "a", {f"set/images/{split}/cat/0.png": PNG for split in ("train", "test")})
    for split in ("train", "test"):
        with pytest.raises(UserError, match=f"split={split}: the folders of splits may be at most two levels deep"):
            open_at(path, split=split)
    assert len(open_at(path, split="all")) == 2
    inner = pack(tmp_path / "b", {f"train/{name}/test/0.png": PNG for name in "ab"})  # a class, not a split
    assert len(open_at(inner, split="train")) == 2


def test_shards_of_webdataset(tmp_path):
    for shard in range(2):
        files = {f"{2 * shard + k}.png": png(pixels(4)[2 * shard + k]) for k in range(2)}
        files |= {f"{2 * shard + k}.txt": f"picture {2 * shard + k}" for k in range(2)}
        files |= {f"{2 * shard + k}.cls": f"{k}" for k in range(2)} | {f"{2 * shard}.json": "{}"}
        write_tar(tmp_path / f"train-{shard:05}.tar", files)
    write_tar(tmp_path / "val-00000.tar", {"9.png": PNG})
    reader = open_at(tmp_path, split="train")
    assert np.array_equal(opened(reader), pixels(4)) and reader.labels.tolist() == [0, 1, 0, 1]
    assert reader.notes == [
        "ignored, not a supported image format: 2 .json (0.json, 2.json)",
        "4 captions beside images (.txt) are ignored because there are labels: dataset.labels=captions uses them",
    ]
    assert open_at(tmp_path, split="train", labels="captions").captions == [f"picture {k}" for k in range(4)]
    assert len(open_at(tmp_path, split="test")) == 1


def test_shards_whose_keys_repeat(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard:05}.tar", {f"cat/{k}.png": png(pixels(4)[2 * shard + k]) for k in range(2)})
    reader = open_at(tmp_path)
    assert np.array_equal(opened(reader), pixels(4)) and names(reader)[2] == "00001/cat/0.png"
    with pytest.raises(UserError, match="the tars have files of the same name"):
        open_at(tmp_path, labels="folders")


def test_a_tar_of_tars_says_what_is_in_it(tmp_path):
    with pytest.raises(UserError, match=r"no image .*; there is 'n01440764\.tar', which may be given as dataset\.path"):
        open_at(write_tar(tmp_path / "a.tar", {"n01440764.tar": "x"}))


# --- formats ---------------------------------------------------------------------------------------------------------


def test_every_format_of_8_bits_is_read(tmp_path):
    image = Image.fromarray(pixels(1)[0])
    grey = image.convert("L")
    files = {f"{k}.png": encoded(image, "png") for k in range(2)} | {"a.tif": encoded(image, "tiff")}
    files |= {"b.TIFF": encoded(image, "tiff", compression="tiff_lzw"), "c.ppm": encoded(image, "ppm")}
    files |= {"d.jfif": encoded(image, "jpeg"), "e.gif": encoded(image.quantize(256), "gif")}
    files |= {
        "f.pgm": encoded(grey, "ppm"),
        "g.pbm": encoded(image.convert("1"), "ppm"),
        "h.bmp": encoded(image, "bmp"),
    }
    images, dataset = read(files, tmp_path)
    assert dataset.notes == []
    for index in (0, 1, 2, 3, 4, 9):
        assert np.array_equal(images[index], pixels(1)[0])
    assert np.array_equal(images[7, ..., 0], np.asarray(grey))
    assert check(dataset).ok


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.tif", encoded(np.full((8, 8), 700, np.uint16), "tiff")),
        ("b.ppm", b"P6 1 1 65535\n" + bytes(range(6))),
        ("c.pgm", b"P5 1 1 65535\n" + bytes(2)),
        ("d.ppm", b"P3 1 1 1000\n 1 2 3\n"),
    ],
)
def test_more_than_8_bits_is_refused_in_every_format(tmp_path, name, data):
    with pytest.raises(UserError, match="more than 8 bits per channel"):
        read({name: data}, tmp_path)


def test_tiff_of_16_bits_of_colour_is_refused(tmp_path):
    """Pillow would read it and drop half of the bits. Written by hand: Pillow writes none."""
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 3, 134), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 6), (284, 3, 1, 1)]
    data = b"II*\0" + struct.pack("<IH", 8, len(tags))
    data += b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    assert len(data) == 134
    data += struct.pack("<3H", 16, 16, 16) + struct.pack("<3H", 257, 514, 771)
    assert Image.open(io.BytesIO(data)).mode == "RGB"
    with pytest.raises(UserError, match="more than 8 bits per channel"):
        read({"a.tif": data}, tmp_path)


def test_colours_that_are_not_converted_are_refused_by_name(tmp_path, monkeypatch):
    """As CIELAB is not by older versions of Pillow."""

    def refusing(image, mode):
        raise ValueError(f"conversion from LAB to {mode} not supported")

    monkeypatch.setattr(Image.Image, "convert", refusing)
    with pytest.raises(UserError, match=r"cannot read '0\.png' as an image: conversion from LAB to RGB not supported"):
        read({"0.png": PNG}, tmp_path)


@pytest.mark.parametrize("kind", ["gif", "tiff", "webp", "png"])
def test_files_with_several_frames_are_refused(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"(an animation|a file) of 2 frames"):
        read({f"a.{kind}": data}, tmp_path)


@pytest.mark.parametrize("pack", [write_folder, write_zip, write_tar])
def test_ignored_files_are_counted_with_the_reason(tmp_path, pack):
    files = dict.fromkeys(["train/1.png", "extra/2.png", "a.jp2", "b.JP2", "c.md", ".trash/3.png", "._1.png"], PNG)
    files |= {"train/1.txt": "a caption", "train/readme.txt": "no caption", "__MACOSX/1.png": PNG, "Thumbs.db": PNG}
    reader = open_at(pack(tmp_path / "a", files), split="train", labels="none")
    assert names(reader) == ["train/1.png"]
    assert reader.notes == [
        "ignored, not a supported image format: 2 .jp2 (a.jp2, b.JP2), 1 .md (c.md), 1 .txt (train/readme.txt)",
        "ignored, hidden by a dot: 1 .png (.trash/3.png)",
        "ignored, not in the folder of a split: 1 .png (extra/2.png)",
    ]


def test_images_beside_arrays_are_ignored_with_a_note(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(2), weights=np.zeros(2))
    write_folder(tmp_path, {"0.png": PNG})
    assert open_at(tmp_path).notes == [
        "ignored arrays (1): a.npz:weights",
        "ignored beside npz arrays: 1 .png (0.png)",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.h5", "np.savez"), ("a.mdb", "write its images to a folder"), ("a.7z", "unpack it"), ("a.arrow", "to_parquet")],
)
def test_unsupported_files_say_what_to_do(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(UserError, match=rf"For \.\w+ files: .*{message}.*Possible: "):
        open_at(tmp_path / name)
    with pytest.raises(UserError, match=r"no image .*; there are 1 \."):
        open_at(tmp_path)


@pytest.mark.parametrize("name", ["0.png", "a.npz", "a.parquet", "a.zip"])
def test_a_git_lfs_pointer_is_recognised(tmp_path, name):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n")
    with pytest.raises(UserError, match=r"it is a pointer of Git LFS.*`git lfs pull`"):
        make(Folder, tmp_path if name == "0.png" else tmp_path / name, resolution=8)


# --- transparency ----------------------------------------------------------------------------------------------------


def over(alpha, colour):
    """Porter and Duff's over, on white, in floating point."""
    share = alpha[..., None] / 255
    return share * colour + (1 - share) * 255


def rgba():
    image = pixels(1, channels=4, seed=3)[0]
    image[0, 0, 3], image[0, 1, 3] = 0, 255
    return image


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "npz", "tall"])
def test_transparent_images_are_composited_over_white(tmp_path, kind):
    image = rgba()
    if kind == "npz":
        np.savez(tmp_path / "a.npz", images=image[None])
        dataset = make(Folder, tmp_path / "a.npz", resolution=8)
    elif kind == "tall":  # before the crop and the resize: hidden colours do not bleed into others
        data = png(np.repeat(np.repeat(np.concatenate([image] * 3), 4, 0), 4, 1))
        dataset = make(Folder, write_folder(tmp_path, {"0.png": data}), resolution=8, resize="pillow_box")
    else:
        settings = {"lossless": True, "exact": True} if kind == "webp" else {}
        dataset = make(Folder, write_folder(tmp_path, {f"0.{kind}": encoded(image, kind, **settings)}), resolution=8)
    found = dataset.read(torch.tensor([0]))[0].permute(1, 2, 0).numpy()
    assert np.abs(found - over(image[..., 3], image[..., :3].astype(float))).max() <= 1
    assert found[0, 0].tolist() == [255] * 3 and np.array_equal(found[0, 1], image[0, 1, :3])
    assert dataset.resizer.startswith("alpha over white, centre crop, ")


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_transparency(tmp_path, channels):
    grey = pixels(1, channels=2)[0]
    palette = Image.fromarray(pixels(1)[0]).quantize(16)
    index = int(np.asarray(palette)[0, 0])
    files = {
        "grey.png": encoded(Image.merge("LA", [Image.fromarray(grey[..., k]) for k in range(2)]), "png"),
        "key.png": encoded(Image.fromarray(pixels(1)[0]), "png", transparency=tuple(map(int, pixels(1)[0][0, 0]))),
        "palette.gif": encoded(palette, "gif", transparency=index),
        "palette.png": encoded(palette, "png", transparency=bytes(0 if k == index else 128 for k in range(16))),
    }  # fmt: skip
    images, dataset = read(files, tmp_path, channels=channels)
    assert np.abs(images[0][..., 0] - over(grey[..., 1], grey[..., :1].astype(float))[..., 0]).max() <= 1
    for image in images[1:]:
        assert (image[0, 0] == 255).all()
    assert dataset.resizer.startswith("alpha over white") and check(dataset).ok


def test_opaque_images_are_unchanged_and_have_no_note(tmp_path):
    image = Image.fromarray(pixels(1)[0])
    files = {"0.png": encoded(image.convert("RGBA"), "png"), "1.png": encoded(image, "png", transparency=(1, 2, 3))}
    files |= {"2.png": encoded(image.quantize(16), "png", transparency=bytes([255] * 16))}
    for channels, mode in ((3, "RGB"), (1, "L")):
        images, dataset = read(files, tmp_path, channels=channels)
        wanted = np.asarray(image.convert(mode)).reshape(8, 8, channels)
        assert np.array_equal(images[0], wanted) and np.array_equal(images[1], wanted)
        assert np.array_equal(images[2], np.asarray(image.quantize(16).convert(mode)).reshape(8, 8, channels))
        assert "alpha" not in dataset.resizer


@pytest.mark.parametrize("pack", [write_folder, write_zip, write_tar])
def test_the_hash_changes_only_with_the_pixels(tmp_path, pack):
    """The hash before transparency was looked at is that of what is stored, and of the settings."""

    def before(dataset):
        told = {"stored": dataset.reader.fingerprint(), "shape": [3, 8, 8]}
        told |= {"fit": ["center", "pillow_bicubic"], "split": "all"}
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()

    image = rgba()
    opaque = image.copy()
    opaque[..., 3] = 255
    for name, data, same in (
        ("a", png(opaque), True),
        ("b", png(image), False),
        ("c", encoded(image[..., :3], "jpeg"), True),
    ):
        for workers in (1, 3):
            path = tmp_path / f"{name}{workers}"
            dataset = make(Folder, pack(path, {"0.png": data, "1.png": PNG}), resolution=8, workers=workers)
            assert (dataset.sha256 == before(dataset)) == same == ("alpha" not in dataset.resizer)


def test_images_in_edms_zip_are_not_opened_to_check_transparency(tmp_path, monkeypatch):
    files, members, open_member = edm(3), [], zipfile.ZipFile.open

    def watched(archive, name, *rest, **settings):
        members.append(name)
        return open_member(archive, name, *rest, **settings)

    path = write_zip(tmp_path / "a.zip", files)
    monkeypatch.setattr(zipfile.ZipFile, "open", watched)
    make(Ffhq, path, resolution=8)
    assert len(members) == 1  # the first image, which is decoded before a run begins
    monkeypatch.undo()
    path = write_zip(tmp_path / "b.zip", files | {"00000/img00000002.png": png(rgba())})
    dataset = make(Ffhq, path, resolution=8)
    with pytest.raises(UserError, match="it is transparent, but images of this name must be opaque"):
        dataset.read(torch.tensor([2]))


def test_reading_a_transparent_image_gives_no_warning(tmp_path):
    data = encoded(Image.fromarray(pixels(1)[0]).quantize(16), "png", transparency=bytes([9] * 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read({"0.png": data}, tmp_path)


def test_warnings_of_pillow_are_a_line_of_data_check(tmp_path, monkeypatch, capfd):
    _, dataset = read({"0.png": PNG, "1.png": PNG}, tmp_path)
    image = FileDataset.image

    def warning(self, index):
        warnings.warn_explicit("Corrupt EXIF\ndata", UserWarning, Image.__file__, 1)
        return image(self, index)

    monkeypatch.setattr(FileDataset, "image", warning)
    report = check(dataset)
    assert dict(report.lines())["warnings of Pillow"] == "Corrupt EXIF data" and report.ok
    assert "EXIF" not in "".join(capfd.readouterr())


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_in_files_of_their_own(tmp_path):
    images = pixels(5, side=64)
    for labels, numbers in ((np.arange(5), [0, 1, 2, 3, 4]), (np.eye(5), [0, 1, 2, 3, 4])):
        np.save(tmp_path / "images.npy", images)
        np.save(tmp_path / "labels.npy", labels)
        for path in (tmp_path, tmp_path / "images.npy"):
            reader = open_at(path)
            assert np.array_equal(opened(reader), images) and reader.labels.tolist() == numbers
    np.savez(tmp_path / "a.npz", images=images)
    assert open_at(tmp_path / "a.npz").fingerprint() == open_at(tmp_path / "images.npy").fingerprint()
    (tmp_path / "faces").mkdir()
    np.save(tmp_path / "faces" / "faces.npy", np.asfortranarray(images.transpose(0, 3, 1, 2)))
    assert np.array_equal(opened(open_at(tmp_path / "faces")), images)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pixels(1)[0][:7], r"looks like a single image: use np\.stack"),
        (pixels(2) / 255, r"between 0 and 1: save \(255 \* images\)\.round"),
        (pixels(2) / 127.5 - 1, r"between -1 and 1: save \(127\.5"),
        (pixels(2).astype(int), r"of values between 0 and 255: save images\.astype"),
        (np.array([{}]), "holds Python objects"),
    ],
)
def test_arrays_that_are_not_images_say_what_to_do(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=message):
        open_at(tmp_path / "a.npy")


def test_a_truncated_npy_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", pixels(3))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"cannot read 'a\.npy' as an array: its header says uint8"):
        open_at(tmp_path / "a.npy")


def test_one_image_per_npy_file_says_how_to_stack_them(tmp_path):
    for k in range(2):
        np.save(tmp_path / f"{k}.npy", pixels(2)[k])
    with pytest.raises(UserError, match=r"has 2 \.npy files, but none is called images.*np\.stack"):
        open_at(tmp_path)


@pytest.mark.parametrize("pack", [write_folder, lambda path, files: write_tar(path, files, "w:gz")])
def test_cifar_100_has_its_fine_classes_and_a_note(tmp_path, pack):
    images = pixels(3, side=32)
    rows = images.transpose(0, 3, 1, 2).reshape(3, -1)

    def batch(which, fine):
        told = {b"data": rows[which], b"fine_labels": fine, b"coarse_labels": [0] * len(fine), b"filenames": []}
        return pickle.dumps(told, 2)

    names = {b"fine_label_names": [b"apple"]}
    files = {"cifar-100-python/meta": pickle.dumps(names, 2), "cifar-100-python/train": batch([0, 1], [19, 99])}
    path = pack(tmp_path / "a", files | {"cifar-100-python/test": batch([2], [7])})
    for split, numbers, which in (("train", [19, 99], [0, 1]), ("test", [7], [2])):
        reader = open_at(path, split=split)
        assert reader.labels.tolist() == numbers and np.array_equal(opened(reader), images[which])
        assert reader.notes == ["labels are the 100 fine classes of CIFAR-100; its 20 coarse classes are ignored"]
    assert open_at(path, labels="none").notes == []
    if path.is_dir():
        (path / "cifar-100-python").rename(path / "renamed")
        assert open_at(path, split="test").labels.tolist() == [7]
