"""The pictures and scores of two-dimensional distributions: every method, and measures against closed forms."""

import importlib
import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from docs_pages import DOCS, ROOT, page_generator
from shipped import METHODS

BENCHMARKS = ROOT / "benchmarks"
TABLE = ROOT / "results" / "reference" / "two_dimensions" / "scores.csv"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("two_dimensions")


@pytest.fixture
def generator():
    return page_generator("generate_two_dimensions")


def test_the_table_has_every_method_on_every_distribution(benchmark):
    table = pd.read_csv(TABLE)
    found = set(table[["distribution", "method"]].itertuples(index=False, name=None))
    assert found == {(name, method) for name in benchmark.DISTRIBUTIONS for method in (*METHODS, "teacher")}
    assert set(benchmark.METHODS) == set(METHODS)
    scores = table[["sliced_wasserstein", "outside", "missed", "teacher_rmse", "unrelated_rmse"]]
    assert np.isfinite(scores.to_numpy()).all()
    assert table.query("method == 'teacher' and nfe == 256")["outside"].lt(0.02).all()


def test_the_page_shows_every_method():
    page = (DOCS / "two_dimensions.md").read_text()
    for method in METHODS:
        section = page.split(f"### `{method}`\n")[1].split("###")[0]
        picture = DOCS / "two_dimensions" / f"{method}.png"
        assert f"(two_dimensions/{method}.png)" in section and picture.stat().st_size < 250_000


def test_a_picture_has_a_panel_for_each_method_at_its_fewest_evaluations(generator, tmp_path):
    names = ["noise", "true", "teacher@4", "teacher@256", "cm@4", "cm@1", "moment@4"]
    points = {name: np.full((3, 2), 0.1 + place / 10, np.float16) for place, name in enumerate(names)}
    figure = generator.picture(points)
    titles = [ax.get_title() for ax in figure.axes if ax.collections]
    assert titles == ["noise", "true distribution", "teacher, 256 steps", "teacher, 4 steps", "cm", "moment, 4 steps"]
    np.testing.assert_allclose(figure.axes[4].collections[0].get_offsets(), 0.6, atol=1e-3)
    generator.save(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P" and picture.width > picture.height


def test_a_strip_has_both_ends_of_every_distribution(generator):
    points = {"noise": np.ones((3, 2)), "cm@1": np.zeros((3, 2)), "cm@4": np.zeros((3, 2))}
    titles = [ax.get_title() for ax in generator.strip("cm", {"mixture": points, "spiral": points}).axes]
    assert titles == ["mixture, 1 step", "mixture, 4 steps", "spiral, 1 step", "spiral, 4 steps"]


def test_colours_tell_directions_apart(generator):
    """Opposite and neighbouring directions differ; the length of the noise does not matter."""
    angle = np.arange(8) * math.pi / 4
    noise = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    shades = generator.colours(noise)
    np.testing.assert_allclose(generator.colours(3 * noise), shades)
    apart = np.abs(shades[:, None] - shades).max(axis=2)
    assert shades.min() >= 0 and shades.max() <= 1 and apart[~np.eye(8, dtype=bool)].min() > 0.1


def test_the_sliced_distance_of_a_shift_is_two_thirds_of_it(benchmark):
    """The mean of |cos| over directions is 2 / pi."""
    points = np.random.default_rng(0).random((50, 2))
    assert benchmark.sliced_wasserstein(points, points + np.array([0, 0.3])) == pytest.approx(0.6 / math.pi, rel=1e-3)


def test_drawn_points_have_the_moments_of_their_distribution(benchmark):
    """The circle of clusters has variance r^2 / 2 + std^2 in each value, the board of side 1.6 has 1.6^2 / 12."""
    for name, variance in [("mixture", 0.7**2 / 2 + 0.06**2), ("checkerboard", 1.6**2 / 12)]:
        points = benchmark.draw(name, 100_000, np.random.default_rng(0))
        np.testing.assert_allclose(points.var(axis=0), variance, rtol=0.02)
        np.testing.assert_allclose(points.mean(axis=0), 0, atol=0.01)
