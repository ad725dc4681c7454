"""Augmentation against sums written out pixel by pixel, linear and band-limited images, and the laws of its numbers."""

import itertools
import math

import numpy as np
import pytest
import torch

from distillbench.datasets import augmentation
from distillbench.datasets.augmentation import (
    FILTER,
    TRANSFORMS,
    AugmentConfig,
    Transformations,
    draw_transformations,
    flipped,
)
from distillbench.errors import UserError

COLUMNS = ("x_flip", "y_flip", "u", "theta", "v", "r", "m", "n")
pytestmark = pytest.mark.usefixtures("float64")


def transformations(count=1, **values):
    """The same transformations for `count` images; what is not named is not applied."""
    return Transformations(torch.tensor([[float(values.get(name, 0)) for name in COLUMNS]] * count))


def pictures(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def position(q, *, u=0.0, theta=0.0, v=0.0, r=0.0, m=0.0, n=0.0, side=(0, 0)):
    """p = R(theta) R(-r) diag(1/a, a) R(r) (q - b) / s for the position q = (x, y) of a pixel."""
    turn = lambda angle: np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    a, b = 2 ** (v / 5), np.array([m * side[0] / 8, n * side[1] / 8])
    return turn(theta) @ turn(-r) @ np.diag([1 / a, a]) @ turn(r) @ (np.asarray(q) - b) / 2 ** (u / 5)


# --- images ----------------------------------------------------------------------------------------------------------


def test_the_filter_is_a_symlet_of_six_vanishing_moments():
    """Orthonormal to its shifts by 2, and its alternating sums with polynomials of degree 0 to 5 are 0."""
    h = np.array(FILTER)
    assert h.sum() == pytest.approx(math.sqrt(2), abs=1e-9)
    assert [h[: 12 - 2 * k] @ h[2 * k :] for k in range(6)] == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-9)
    at = (np.arange(12) - 5.5) / 5.5
    assert [(-1.0) ** np.arange(12) @ (h * at**degree) for degree in range(6)] == pytest.approx([0] * 6, abs=1e-8)


def test_flips_are_exact_and_no_transformation_is_the_identity():
    x = pictures(4, 3, 6, 5)
    assert torch.equal(flipped(x, torch.tensor([True, False, False, True]))[0], x[0].flip(2))
    assert torch.equal(flipped(x, torch.tensor([True, False, False, True]))[1:3], x[1:3])
    torch.testing.assert_close(transformations(4)(x), x, rtol=0, atol=1e-9)
    torch.testing.assert_close(transformations(4, x_flip=1)(x), x.flip(3), rtol=0, atol=1e-9)
    torch.testing.assert_close(transformations(4, y_flip=1, x_flip=1)(x), x.flip(2, 3), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("right", "down"), [(1, 0), (0, 2), (-3, 1), (5, -4)])
def test_whole_pixels_are_moved_exactly_and_reflected_at_the_border(right, down):
    """The border's pixels are not repeated: beyond the first pixel comes the second."""
    x = pictures(1, 2, 8, 16)
    moved = transformations(m=8 * right / 16, n=8 * down / 8)(x)
    wider = np.pad(x.numpy(), [(0, 0), (0, 0), (7, 7), (7, 7)], mode="reflect")
    expected = wider[:, :, 7 - down : 15 - down, 7 - right : 23 - right]
    np.testing.assert_allclose(moved.numpy(), expected, rtol=0, atol=1e-9)


def by_sums(image, **values):
    """The transformed image (H,W), from the definition: loops over pixels, and an image continued without end."""
    height, width = image.shape
    upsampled = {}

    def up(i, j):
        """Pixel (i, j) of the upsampled image, whose even pixels lie on the image's own."""
        if (i, j) not in upsampled:
            rows, columns = ([k for k in range(e // 2 - 4, e // 2 + 5) if 0 <= e + 5 - 2 * k < 12] for e in (i, j))
            upsampled[i, j] = sum(
                FILTER[i + 5 - 2 * a] * FILTER[j + 5 - 2 * b] * image[reflected(a, height), reflected(b, width)]
                for a, b in itertools.product(rows, columns)
            )
        return upsampled[i, j]

    def reflected(k, side):
        k = abs(k) % (2 * side - 2)
        return min(k, 2 * side - 2 - k)

    def read(i, j):
        """At pixel (i, j) of the upsampled new image, by bilinear interpolation of the old one."""
        centre = np.array([width - 1, height - 1]) / 2
        y, x = reversed(2 * (position(np.array([j, i]) / 2 - centre, side=(width, height), **values) + centre))
        i, j, s, t = math.floor(y), math.floor(x), y - math.floor(y), x - math.floor(x)
        ends = (1 - s) * (1 - t) * up(i, j) + (1 - s) * t * up(i, j + 1)
        return ends + s * (1 - t) * up(i + 1, j) + s * t * up(i + 1, j + 1)

    new = np.array([[read(i - 5, j - 5) for j in range(2 * width + 10)] for i in range(2 * height + 10)])
    taps = np.outer(FILTER, FILTER)
    windows = np.lib.stride_tricks.sliding_window_view(new, (12, 12))[::2, ::2]
    return (taps * windows).sum(axis=(2, 3))


@pytest.mark.parametrize(
    "values",
    [
        {"theta": 0.4},
        {"u": 1.3, "m": 0.3},
        {"v": 1.5, "r": 0.9},
        {"u": 0.7, "theta": -2.0, "v": -1.2, "r": -0.5, "m": 0.2, "n": -0.35},
    ],
)
def test_transformed_images_are_the_sums_of_the_definition(values):
    x = pictures(1, 1, 12, 13)
    np.testing.assert_allclose(
        transformations(**values)(x)[0, 0].numpy(), by_sums(x[0, 0].numpy(), **values), atol=1e-9
    )


@pytest.mark.parametrize(
    "values", [{"u": 1.0}, {"theta": 0.5}, {"v": 1.0, "r": 0.7}, {"u": -0.5, "theta": 0.3, "n": 0.2}]
)
def test_a_linear_image_is_read_at_the_position_of_the_matrix(values):
    """Where nothing is reflected. The filter's centre of mass lies d pixels beside the middle: f(A (q - d - b) + d)."""
    side, slope = 48, np.array([0.02, -0.013])
    centre = (side - 1) / 2
    d = sum(h * (5 - i) / 2 for i, h in enumerate(FILTER)) / math.sqrt(2)
    y, x = np.mgrid[:side, :side] - centre
    image = torch.from_numpy(slope[0] * x + slope[1] * y + 0.1).view(1, 1, side, side)
    found = transformations(**values)(image)[0, 0].numpy()
    for i, j in itertools.product(range(18, 30, 3), repeat=2):
        p = position(np.array([j, i]) - centre - d, side=(side, side), **values) + d
        assert found[i, j] == pytest.approx(slope @ p + 0.1, abs=1e-8)


def test_a_band_limited_image_is_that_function_at_the_new_positions():
    """A wave of 16 pixels, turned, enlarged and moved: what interpolation adds is below a hundredth."""
    side, values = 64, {"u": 0.8, "theta": 0.6, "v": 0.5, "r": 1.1, "m": 0.4, "n": -0.3}
    centre, wave = (side - 1) / 2, 2 * math.pi / 16 * np.array([0.8, 0.6])
    y, x = np.mgrid[:side, :side] - centre
    image = torch.from_numpy(np.cos(wave[0] * x + wave[1] * y)).view(1, 1, side, side)
    found = transformations(**values)(image)[0, 0].numpy()
    around = list(itertools.product(range(22, 42, 4), repeat=2))
    expected = [math.cos(wave @ position(np.array([j, i]) - centre, side=(side, side), **values)) for i, j in around]
    assert [found[i, j] for i, j in around] == pytest.approx(expected, abs=0.02)
    assert min(expected) < -0.9 and max(expected) > 0.9


def test_an_image_depends_on_no_other_and_memory_on_no_batch(monkeypatch):
    x, rows = pictures(5, 3, 8, 8), draw_transformations(5, generator(), 1.0)
    whole = Transformations(rows)(x)
    alone = torch.cat([Transformations(rows[k : k + 1])(x[k : k + 1]) for k in range(5)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-12)
    monkeypatch.setattr(augmentation, "VALUES_AT_ONCE", 1)
    torch.testing.assert_close(Transformations(rows)(x), whole, rtol=0, atol=1e-12)


# --- numbers and labels ----------------------------------------------------------------------------------------------


def test_labels_say_what_was_done():
    """In EDM's order; an angle as cos - 1 and sin, so that 0 is none."""
    values = {"x_flip": 1, "y_flip": 1, "u": 0.3, "theta": 0.5, "v": -0.4, "r": 2.0, "m": 0.7, "n": -0.2}
    angles = [math.cos(0.5) - 1, math.sin(0.5), -0.4 * math.cos(2), -0.4 * math.sin(2)]
    assert transformations(**values).labels[0].tolist() == pytest.approx([1, 1, 0.3, *angles, 0.7, -0.2])
    assert transformations().labels.tolist() == [[0.0] * 9]


def test_numbers_have_their_distributions():
    """Within five standard errors. An x flip needs no luck but its own, and r is 0 in half of the stretchings."""
    count, p = 100_000, 0.12
    rows = draw_transformations(count, generator(), p)
    share = dict(zip(COLUMNS, (rows != 0).double().mean(dim=0).tolist(), strict=True))
    expected = {"x_flip": 0.5, "y_flip": p / 2, "u": p, "theta": p, "v": p, "r": p / 2, "m": p, "n": p}
    for name, probability in expected.items():
        assert abs(share[name] - probability) < 5 * math.sqrt(probability * (1 - probability) / count), name
    assert torch.equal(rows[:, 6] != 0, rows[:, 7] != 0)  # both or none
    for column, std in ((2, 1), (4, 1), (6, 1), (7, 1), (3, math.pi / math.sqrt(3)), (5, math.pi / math.sqrt(3))):
        drawn = rows[:, column][rows[:, column] != 0]
        assert drawn.std().item() == pytest.approx(std, rel=0.05) and abs(drawn.mean()) < 5 * std / math.sqrt(
            len(drawn)
        )
    assert rows[:, 3].abs().max() < math.pi
    assert (rows[:, 2] != 0).logical_and(rows[:, 3] != 0).double().mean().item() == pytest.approx(p**2, rel=0.2)


def test_transformations_that_are_not_chosen_change_nothing_else():
    every, some = (draw_transformations(50, generator(), 0.5, names) for names in (TRANSFORMS, ["scale", "translate"]))
    assert torch.equal(some[:, [2, 6, 7]], every[:, [2, 6, 7]]) and not some[:, [0, 1, 3, 4, 5]].any()


# --- settings --------------------------------------------------------------------------------------------------------


def test_plain_settings_are_those_that_change_images():
    assert AugmentConfig().plain() == AugmentConfig(transforms=["scale"]).plain() == {}
    assert AugmentConfig(flip=True, probability=0.12).plain() == {"flip": True, "probability": 0.12}
    some = AugmentConfig(probability=0.12, transforms=["translate", "xflip"])
    assert some.plain() == {"probability": 0.12, "transforms": ["xflip", "translate"]} and some.transforms_images
    with pytest.raises(UserError, match=r"transforms must name some of xflip, .* with probability=0\.5, got \[\]"):
        AugmentConfig(probability=0.5, transforms=[])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probability": 1.5}, "probability must lie between 0 and 1, got 1.5"),
        ({"transforms": ["xflip", "rotation"]}, "no transformation 'rotation'.* Possible: aniso, rotate, scale"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AugmentConfig(**settings)
