"""Datasets of files: cropping and resizing, the cache in memory, the hash of the data, and published datasets."""

import copy
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from distillbench.builtin.folder import Folder
from distillbench.builtin.image_sets import (
    AfhqV2,
    CelebaHq,
    Cifar10,
    FashionMnist,
    Ffhq,
    ImageNet64,
    LsunBedroom,
    Mnist,
)
from distillbench.datasets.image_dataset import CROPS, RESIZES, FileDataset, Fit
from distillbench.errors import UserError
from distillbench.evaluation.sampling_speed import LazyDataset
from distillbench.registry import Source, load_registry
from distillbench.storage.sources import of_dataset
from image_sources import edm, idx, make, pixels, png, write_folder, write_zip

SETS = [Cifar10, Ffhq, ImageNet64, LsunBedroom, CelebaHq, AfhqV2, Mnist, FashionMnist]


def everything(dataset):
    return dataset.read(torch.arange(len(dataset)))


def photo(width, height, mode="RGB"):
    """Smooth waves: a picture that resizes of every kind leave recognisable."""
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    waves = [127 + 100 * np.sin(5 * x + 3 * k) * np.cos(4 * y + k) for k in range(3)]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


def fitted(image, crop="center", resize="pillow_bicubic", side=8, channels=3):
    return Fit(channels, side, crop, resize)(image, "image")


# --- crop and resize -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("resize", RESIZES)
def test_images_of_the_right_size_are_not_resized(crop, resize):
    image = pixels(1)[0]
    for given in (image, Image.fromarray(image)):
        assert np.array_equal(fitted(given, crop, resize), image.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["bicubic", "lanczos", "box"])
def test_pillow_resizes_the_centred_square(name):
    image = photo(50, 32)
    square = image.crop((9, 0, 41, 32))
    expected = np.asarray(square.resize((8, 8), Image.Resampling[name.upper()]))
    assert np.array_equal(fitted(image, resize=f"pillow_{name}").transpose(1, 2, 0), expected)


def test_box_is_the_mean_of_blocks():
    image = photo(32, 32)
    means = np.asarray(image, dtype=float).reshape(8, 4, 8, 4, 3).mean((1, 3))
    distance = np.abs(fitted(image, resize="pillow_box").transpose(1, 2, 0) - means)
    assert distance.max() <= 1 and distance.mean() < 0.35  # Pillow rounds twice: rows of pixels, then columns


def test_adm_halves_by_means_then_resizes_then_crops():
    image = photo(32, 32)  # two halvings, and nothing else to do
    means = np.asarray(image, dtype=float)
    for side in (16, 8):
        means = np.floor(means.reshape(2 * side, side, 2, 3).mean(2) + 0.5)  # Pillow rounds after either direction
        means = np.floor(means.reshape(side, 2, side, 3).mean(1) + 0.5)
    assert np.array_equal(fitted(image, resize="adm").transpose(1, 2, 0), means)
    image = photo(43, 25)  # 25 >= 16 is halved once, 12 < 16 is resized to 8, and 14 are cropped to 8
    halved = image.resize((21, 12), Image.Resampling.BOX)
    expected = np.asarray(halved.resize((14, 8), Image.Resampling.BICUBIC))[:, 3:11]
    assert np.array_equal(fitted(image, resize="adm").transpose(1, 2, 0), expected)


def test_resizes_differ_and_all_resemble_the_picture():
    image = photo(37, 37)
    results = {name: fitted(image, resize=name).astype(int) for name in RESIZES if name != "none"}
    assert len({result.tobytes() for result in results.values()}) == len(results)
    for result in results.values():
        assert np.abs(result - results["pillow_box"]).mean() < 12


def test_without_resize_or_crop_other_sizes_are_refused():
    assert np.array_equal(fitted(photo(8, 12), resize="none"), np.asarray(photo(8, 12))[2:10].transpose(2, 0, 1))
    with pytest.raises(
        UserError, match=r"'image' is 9x9, but dataset\.resolution=8: .*dataset\.resize=pillow_bicubic\|"
    ):
        fitted(photo(9, 9), resize="none")
    for resize in RESIZES:
        with pytest.raises(UserError, match=r"'image' is not square \(8x12\): set dataset\.crop=center"):
            fitted(photo(8, 12), crop="none", resize=resize)


def test_modes_become_colour_or_grey_and_more_than_8_bits_is_refused():
    grey = photo(8, 8, "L")
    assert np.array_equal(fitted(grey), np.stack(3 * [np.asarray(grey)]))
    assert np.array_equal(fitted(grey.convert("LA")), fitted(grey))
    assert np.array_equal(fitted(photo(8, 8, "RGBA")), fitted(photo(8, 8)))
    assert np.array_equal(fitted(photo(8, 8), channels=1)[0], np.asarray(grey))
    assert np.array_equal(fitted(pixels(1, channels=1)[0])[2], pixels(1, channels=1)[0][..., 0])
    for mode in ("I;16", "I", "F"):
        with pytest.raises(UserError, match=f"'image' has more than 8 bits per channel .*{mode}"):
            fitted(Image.new(mode, (8, 8)))


def test_the_resizer_does_not_depend_on_the_images(tmp_path):
    path = write_zip(tmp_path / "a.zip", edm(2))
    words = {"center": "centre crop, ", "none": "no crop, "}
    for crop in CROPS:
        found = [make(Folder, path, resolution=8, crop=crop, resize=resize).resizer for resize in RESIZES]
        assert len(set(found)) == len(RESIZES)
        assert all(word.startswith(words[crop]) and word.endswith(", 8 bits") for word in found[:-1])
    assert make(Folder, path, resolution=8).resizer == "centre crop, Pillow bicubic, 8 bits"
    assert make(Folder, path, resolution=8, crop="none", resize="none").resizer == "none"


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_mib", [0, 1024])
def test_results_do_not_depend_on_order_workers_or_cache(tmp_path, memory_mib):
    images = torch.from_numpy(pixels(20)).permute(0, 3, 1, 2)
    path = write_zip(tmp_path / "a.zip", edm(20))
    for workers in (1, 3, 64):
        dataset = make(Folder, path, resolution=8, memory_mib=memory_mib, workers=workers)
        for indices in ([5, 0, 5, 19], [1], [], list(range(20)), [19, 18, 5]):
            read = dataset.read(torch.tensor(indices, dtype=torch.int64))
            assert read.dtype == torch.uint8 and torch.equal(read, images[indices])


def test_images_that_fit_are_decoded_once(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", edm(20))
    opened = []
    image = FileDataset.image
    monkeypatch.setattr(FileDataset, "image", lambda self, index: opened.append(index) or image(self, index))
    dataset = make(Folder, path, resolution=256, memory_mib=4)  # 20 images are 3.75 MiB
    opened.clear()
    dataset.read(torch.tensor([3, 3, 4])), dataset.read(torch.tensor([4, 3, 7]))
    assert sorted(opened) == [3, 4, 7]
    dataset = make(Folder, path, resolution=256, memory_mib=3)
    opened.clear()
    dataset.read(torch.tensor([3, 4])), dataset.read(torch.tensor([4, 3]))
    assert sorted(opened) == [3, 3, 4, 4]


def test_changing_a_returned_image_does_not_change_the_cache(tmp_path):
    dataset = make(Folder, write_zip(tmp_path / "a.zip", edm(3)), resolution=8)
    dataset.read(torch.tensor([1])).zero_()
    assert torch.equal(dataset.read(torch.tensor([1]))[0], torch.from_numpy(pixels(3)[1]).permute(2, 0, 1))


def test_datasets_can_be_copied_pickled_and_compared(tmp_path):
    path = write_zip(tmp_path / "a.zip", edm(4, [1, 0, 2, 1]))
    dataset = make(Folder, path, resolution=8)
    known = pickle.loads(pickle.dumps(LazyDataset(dataset, dataset.config)))
    for twin in (copy.deepcopy(dataset), pickle.loads(pickle.dumps(dataset)), known):
        assert (twin.sha256, twin.split, twin.resizer, twin.classes) == (dataset.sha256, "all", dataset.resizer, 3)
        assert torch.equal(everything(twin), everything(dataset))
        assert twin.labels(torch.tensor([2, 0])).tolist() == [2, 1]


def test_a_damaged_image_is_an_error_when_it_is_read_and_the_first_one_at_once(tmp_path):
    files = {name: data for name, data in edm(4).items() if name.endswith("png")}
    first, *_, last = sorted(files)
    dataset = make(Folder, write_folder(tmp_path / "a", files | {last: files[last][:60]}), resolution=8)
    dataset.read(torch.tensor([0, 1, 2]))
    for _ in range(2):  # nothing half-read is kept
        with pytest.raises(UserError, match=f"cannot read '{last}' as an image"):
            everything(dataset)
    with pytest.raises(UserError, match=f"cannot read '{first}' as an image"):
        make(Folder, write_folder(tmp_path / "b", files | {first: files[first][:60]}), resolution=8)


# --- what identifies the data ----------------------------------------------------------------------------------------


def test_the_hash_depends_on_stored_data_and_on_settings_that_change_pixels(tmp_path):
    files = edm(4, [0, 1, 2, 3])
    path = write_zip(tmp_path / "a.zip", files)
    plain = make(Folder, path, resolution=8).sha256
    same = [
        make(Folder, write_folder(tmp_path / "folder", files), resolution=8),
        make(Folder, write_zip(tmp_path / "b.zip", files, zipfile.ZIP_DEFLATED), resolution=8),
        make(Folder, path, resolution=8, workers=1, memory_mib=0),
    ]
    assert {dataset.sha256 for dataset in same} == {plain}
    settings = [
        {"resolution": 4},
        {"channels": 1},
        {"crop": "none"},
        {"resize": "adm"},
        {"labels": "none"},
        {"split": "train"},
    ]
    others = [make(Folder, path, **({"resolution": 8} | setting)).sha256 for setting in settings]
    relabelled = write_zip(tmp_path / "c.zip", edm(4, [0, 1, 3, 2]))
    others.append(make(Folder, relabelled, resolution=8).sha256)
    assert len({plain, *others}) == 8
    assert re.fullmatch("[0-9a-f]{64}", plain)


def test_every_caption_is_a_class(tmp_path):
    files = {f"{k}.png": png(image) for k, image in enumerate(pixels(3))}
    files |= {f"{k}.txt": text for k, text in enumerate(["a cat", "a dog", "a cat"])}
    dataset = make(Folder, write_folder(tmp_path / "a", files), resolution=8)
    assert (list(dataset.prompts), dataset.classes) == (["a cat", "a dog", "a cat"], 3)
    assert dataset.labels(torch.tensor([2, 0, 1])).tolist() == [2, 0, 1]
    (tmp_path / "a" / "1.txt").write_text("a bird")
    assert make(Folder, tmp_path / "a", resolution=8).sha256 != dataset.sha256


# --- the sets of the field -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", SETS, ids=lambda cls: cls.name)
def test_a_dataset_without_files_says_what_to_do(cls, monkeypatch):
    monkeypatch.setattr(cls, "installed", "")
    with pytest.raises(UserError) as caught:
        make(cls)
    message = str(caught.value)
    if of_dataset(cls.name, {}) is not None:
        first, download, *_ = message.splitlines()
        assert first.startswith(f"dataset={cls.name} has no files yet") and cls.licence in first
        line = f"distillbench run 'methods=[boot,cm]' dataset={cls.name} dataset.download=true teacher.download=true"
        assert line in download and f"dataset={cls.name} dataset.path={cls.usual}" in message
        assert cls.origin in message and "EDM's dataset zip" in message
        return
    assert message.startswith(f"dataset={cls.name} needs dataset.path=PATH")
    for part in (cls.title, cls.origin, "EDM's dataset zip", "a folder of images", "hub:OWNER/NAME"):
        assert part in message
    assert f"distillbench run 'methods=[boot,cm]' dataset={cls.name} dataset.path={cls.usual}" in message
    assert "dataset.download=true" in message
    assert "\n" not in message


@pytest.mark.parametrize("cls", SETS, ids=lambda cls: cls.name)
def test_every_dataset_declares_its_facts_and_reads_its_files(cls, tmp_path):
    config = cls.Config()
    assert config.split in cls.count and all(cls.count.values())
    assert cls.licence and cls.title and f"{cls.count[config.split]:,}" in cls.__doc__ + cls.title
    image = pixels(1, side=config.resolution, channels=cls.channels)[0]
    image = image[..., 0] if cls.channels == 1 else image
    dataset = make(cls, write_zip(tmp_path / "a.zip", {"0.png": png(image), "1.png": png(255 - image)}))
    assert dataset.shape == (cls.channels, config.resolution, config.resolution)
    assert torch.equal(everything(dataset)[0], 255 - everything(dataset)[1])
    assert dataset.split == f"{config.split} (2 of {cls.count[config.split]:,})"
    assert (dataset.classes, dataset.class_names) == (0, cls.known_names)


@pytest.mark.parametrize("cls", [Ffhq, AfhqV2, CelebaHq, LsunBedroom], ids=lambda cls: cls.name)
def test_folder_numbers_are_not_classes_of_an_unlabelled_dataset(cls, tmp_path):
    path = write_zip(tmp_path / "a.zip", edm(3, [0, 1, 1]))
    dataset = make(cls, path, resolution=8)
    assert dataset.classes == 0
    assert dataset.sha256 == make(cls, write_zip(tmp_path / "b.zip", edm(3)), resolution=8).sha256
    assert make(cls, path, resolution=8, labels="auto").classes == 2


def test_they_are_registered_under_their_names_with_typed_settings():
    from distillbench.builtin import image_sets

    registry = load_registry([Source("image_sets", "distillbench", "0", lambda: image_sets)])
    assert not registry.broken
    assert set(registry.datasets) == {cls.name for cls in SETS}


@pytest.mark.parametrize("cls", [Cifar10, Mnist])
def test_a_dataset_keeps_its_ten_classes_if_images_have_fewer(cls, tmp_path):
    side, channels = cls.Config().resolution, cls.channels
    np.savez(tmp_path / "a.npz", images=pixels(3, side, channels), labels=np.array([2, 0, 2]))
    dataset = make(cls, tmp_path / "a.npz")
    assert dataset.classes == 10 and dataset.labels(torch.tensor([0, 1])).tolist() == [2, 0]
    np.savez(tmp_path / "b.npz", images=pixels(3, side, channels), labels=np.array([2, 0, 10]))
    with pytest.raises(UserError, match=f"a label is 10, and {cls.name} has the classes 0 to 9"):
        make(cls, tmp_path / "b.npz")


def test_a_complete_split_has_its_plain_name(tmp_path, monkeypatch):
    monkeypatch.setattr(Cifar10, "count", {"train": 2, "test": 1})
    np.savez(tmp_path / "a.npz", images=pixels(2, 32))
    assert make(Cifar10, tmp_path / "a.npz").split == "train"


def test_an_installed_package_is_found_without_a_path(tmp_path, monkeypatch):
    images = pixels(2, 28, 1)[..., 0]
    write_folder(tmp_path, {"t10k-images-idx3-ubyte": idx(images), "t10k-labels-idx1-ubyte": idx(np.uint8([9, 1]))})
    monkeypatch.setattr(FashionMnist, "installed", str(tmp_path))
    dataset = make(FashionMnist, split="test")
    assert torch.equal(everything(dataset)[:, 0], torch.from_numpy(images))
    assert dataset.class_names[dataset.labels(torch.tensor([0]))] == "ankle boot"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "tset"}, "split must be one of train, test, all, got 'tset'. Did you mean 'test'?"),
        ({"crop": "centre"}, "crop must be one of center, none, got 'centre'"),
        ({"resize": "bicubic"}, "resize must be one of pillow_bicubic"),
        ({"labels": "folder"}, "labels must be one of auto, folders, captions, none, got 'folder'"),
        ({"workers": 0}, "workers must lie between 1 and 64, got 0"),
        ({"memory_mib": -1}, "memory_mib must lie between 0 and"),
        ({"resolution": 0}, "resolution must be positive, got 0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Ffhq.Config(**settings)


def test_an_unknown_split_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.split must be one of train for ffhq, got 'test'"):
        make(Ffhq, write_zip(tmp_path / "a.zip", edm(2)), split="test")


def test_labels_of_folders_need_folders(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(2, 8))
    with pytest.raises(
        UserError, match=r"dataset\.labels=folders needs a folder, zip or tar of images, .* is npz arrays"
    ):
        make(Folder, tmp_path / "a.npz", resolution=8, labels="folders")
