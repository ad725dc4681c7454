"""Samples in the run's folder: exact pixels, whatever is damaged is left out, and a copied run still shows them."""

import shutil

import numpy as np
import pytest

from distillbench.records.sample_strips import MOST_IMAGES, SAMPLES, read_strips, write_strips
from distillbench.reports.runs import read_run
from tables_of_runs import finished_run


def images(count, channels, height, width):
    return np.random.default_rng(0).integers(0, 256, (count, channels, height, width), dtype=np.uint8)


@pytest.mark.parametrize(("shape", "kept"), [((20, 1, 8, 8), 16), ((3, 3, 5, 9), 3), ((16, 3, 256, 256), 4)])
def test_strips_keep_pixels_exactly(tmp_path, shape, kept):
    x = images(*shape)
    write_strips(tmp_path, [("a-key", 2, x), ("other", 1, x[:1])])
    assert np.array_equal(read_strips(tmp_path, "a-key")[2], x[:kept]) and kept <= MOST_IMAGES
    assert read_strips(tmp_path, "key") == {}


def test_two_channels_are_red_and_green(tmp_path):
    x = images(2, 2, 4, 4)
    write_strips(tmp_path, [("k", 1, x)])
    found = read_strips(tmp_path, "k")[1]
    assert np.array_equal(found[:, :2], x) and not found[:, 2].any()


def test_strips_of_earlier_cells_are_removed_and_damaged_ones_left_out(tmp_path):
    x = images(2, 1, 4, 4)
    write_strips(tmp_path, [("old", 1, x)])
    (tmp_path / SAMPLES / "mine.png").write_bytes(b"not ours")
    write_strips(tmp_path, [("k", 1, x), ("k", 4, x)])
    assert {file.name for file in (tmp_path / SAMPLES).iterdir()} == {"k-1.png", "k-4.png", "mine.png"}
    (tmp_path / SAMPLES / "k-1.png").write_bytes(b"\x89PNG damaged")
    assert read_strips(tmp_path, "k").keys() == {4}


def test_a_copied_run_shows_its_samples_without_records(tmp_path):
    run = finished_run(tmp_path)
    shown = read_run(run).shown("k0")
    assert [nfe for nfe, _, _ in shown] == [1, 4]
    write_strips(run, [("k0", nfe, x) for nfe, _, x in shown])
    copied = shutil.copytree(run, tmp_path / "elsewhere" / "mine")
    again = read_run(copied).shown("k0")
    assert [(nfe, seed) for nfe, seed, _ in again] == [(nfe, seed) for nfe, seed, _ in shown]
    assert all(np.array_equal(x, y) for (_, _, x), (_, _, y) in zip(again, shown, strict=True))
