"""The built-in datasets digits and folder, and the conversion of pixels."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from distillbench.builtin.digits import Digits
from distillbench.builtin.folder import Folder
from distillbench.datasets.dataset import to_float, to_uint8
from distillbench.errors import UserError


def everything(dataset):
    return dataset.read(torch.arange(len(dataset)))


def folder(path, **settings):
    return Folder(Folder.Config(kind="folder", path=str(path), **settings))


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, **options)


@pytest.fixture(scope="module")
def digits():
    return Digits(Digits.Config(kind="digits"))


# --- values ----------------------------------------------------------------------------------------------------------


def test_every_grey_level_survives_conversion_to_float_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    x = to_float(levels)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), levels)


def test_samples_are_clipped_and_rounded_to_the_nearest_of_256_levels():
    levels = torch.arange(256) / 127.5 - 1
    assert to_uint8(levels).tolist() == list(range(256))
    assert to_uint8(levels + 0.49 / 127.5).tolist() == list(range(256))  # truncation would do as well here ...
    assert to_uint8(levels - 0.49 / 127.5).tolist() == list(range(256))  # ... but not here
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn(digits):
    from sklearn.datasets import load_digits

    images = everything(digits)
    assert images.dtype == torch.uint8
    assert images.shape == (len(digits), *digits.shape) == (1797, 1, 8, 8)
    restored = images[:, 0].double() * 16 / 255  # 17 levels, spread over 256
    assert np.array_equal(restored.round().numpy(), load_digits().images)
    assert (images.min(), images.max()) == (0, 255)
    assert len(images.unique()) == 17


def test_hash_of_digits_is_that_of_their_pixels(digits):
    """The shipped teacher is found by this hash: with another one, it would be trained anew."""
    assert digits.sha256 == hashlib.sha256(everything(digits).numpy().tobytes()).hexdigest()
    assert digits.sha256 == "b41ca9fd335466eee997366c2e6f6bbe0a1b4582afe091fc4eba35f4a254182f"


def test_digits_by_index(digits):
    indices = torch.tensor([5, 0, 5, 1796])
    assert torch.equal(digits.read(indices), everything(digits)[indices])


# --- folder ----------------------------------------------------------------------------------------------------------


def test_an_image_of_the_right_size_is_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3))
    save(tmp_path / "a.png", pixels)
    dataset = folder(tmp_path, resolution=8)
    assert (dataset.shape, len(dataset)) == ((3, 8, 8), 1)
    assert torch.equal(everything(dataset)[0], torch.tensor(pixels, dtype=torch.uint8).permute(2, 0, 1))


def test_images_are_sorted_by_path_below_the_folder(tmp_path):
    for level, name in [(30, "c.png"), (10, "a.PNG"), (20, "b/x.bmp"), (25, "b/y.webp")]:
        save(tmp_path / name, np.full((4, 4), level), **({"lossless": True} if name.endswith("webp") else {}))
    (tmp_path / "notes.txt").write_text("not an image")
    assert everything(folder(tmp_path, resolution=4, channels=1))[:, 0, 0, 0].tolist() == [10, 20, 25, 30]


def test_the_centred_square_is_cropped(tmp_path):
    wide = np.zeros((4, 10), dtype=np.uint8)
    wide[:, 3:7] = 200
    save(tmp_path / "wide.png", wide)
    save(tmp_path / "tall.png", wide.T)
    images = everything(folder(tmp_path, resolution=4, channels=1))
    assert images.unique().tolist() == [200]


def test_resizing_keeps_a_flat_colour_and_makes_the_wanted_side(tmp_path):
    save(tmp_path / "big.png", np.full((33, 50, 3), (10, 100, 200)))
    save(tmp_path / "small.png", np.full((3, 2, 3), (10, 100, 200)))
    images = everything(folder(tmp_path, resolution=16))
    assert images.shape == (2, 3, 16, 16)
    assert images.unique().tolist() == [10, 100, 200]
    assert images[:, 1].unique().tolist() == [100]


def test_colour_and_grey(tmp_path):
    save(tmp_path / "a.png", np.full((4, 4, 3), (255, 0, 0)))
    assert everything(folder(tmp_path, resolution=4))[0, :, 0, 0].tolist() == [255, 0, 0]
    assert everything(folder(tmp_path, resolution=4, channels=1)).unique().tolist() == [76]  # 0.299 * 255


def test_palette_and_alpha_are_read_as_colour(tmp_path):
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), (1, 2, 3)).quantize().save(tmp_path / "b.png")
    images = everything(folder(tmp_path, resolution=4))
    assert torch.equal(images[0], images[1])
    assert images[0, :, 0, 0].tolist() == [1, 2, 3]


def test_the_hash_depends_on_pixels_and_not_on_the_path(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3))
    for place in ("one", "two"):
        for name, image in zip("ab", pixels, strict=True):
            save(tmp_path / place / f"{name}.png", image)
    one, two = folder(tmp_path / "one", resolution=8), folder(tmp_path / "two", resolution=8)
    assert one.sha256 == two.sha256
    assert folder(tmp_path / "two", resolution=4).sha256 != one.sha256
    save(tmp_path / "two" / "a.png", 255 - pixels[0])
    assert folder(tmp_path / "two", resolution=8).sha256 != one.sha256


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "dataset.path: no file or folder"),
        (lambda path: path.write_text("a file"), "is not a supported kind of file"),
        (lambda path: path.mkdir(), "no image"),
        (lambda path: save(path / "a.png.d" / "a.tga", np.zeros((4, 4))), r"no image .*; there are 1 \.tga \(a\.png"),
    ],
)
def test_a_path_without_images_is_an_error(tmp_path, make, message):
    make(tmp_path / "images")
    with pytest.raises(UserError, match=message):
        folder(tmp_path / "images")


def test_no_path_is_an_error():
    with pytest.raises(UserError, match=r"needs dataset\.path"):
        folder("")


def test_a_damaged_image_is_an_error_that_names_it(tmp_path):
    save(tmp_path / "good.png", np.zeros((4, 4)))
    (tmp_path / "garbage.png").write_bytes(b"no image at all")
    with pytest.raises(UserError, match=r"'garbage\.png'"):
        folder(tmp_path)
    save(tmp_path / "garbage.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    whole = (tmp_path / "garbage.png").read_bytes()
    (tmp_path / "garbage.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"'garbage\.png'"):
        folder(tmp_path)


@pytest.mark.parametrize("settings", [{"resolution": 0}, {"resolution": -1}, {"channels": 2}])
def test_impossible_settings_are_errors_that_name_the_setting(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Folder.Config(path="images", **settings)
