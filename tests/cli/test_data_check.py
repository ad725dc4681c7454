"""``distillbench data check``: facts on the dataset, damaged images, and a picture."""

import importlib
import io

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from distillbench.builtin.digits import Digits
from distillbench.builtin.folder import Folder
from distillbench.builtin.image_sets import Cifar10, Ffhq
from distillbench.builtin.prompts import Prompts
from distillbench.cli.data_check import check, command, grid_picture
from distillbench.errors import UserError
from distillbench.registry import Source, load_registry
from image_sources import edm, make, pixels, png, write_folder, write_zip


@pytest.fixture(scope="module")
def registry():
    names = ["folder", "image_sets", "digits", "prompts", "trained"]
    modules = {name: importlib.import_module(f"distillbench.builtin.{name}") for name in names}
    return load_registry(Source(name, "distillbench", "0", lambda m=module: m) for name, module in modules.items())


def facts(report):
    return dict(report.lines())


def test_the_report_describes_the_dataset(tmp_path):
    images = pixels(6, 32)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 0, 3, 3, 3, 9]))
    dataset = make(Cifar10, tmp_path / "a.npz")
    report = check(dataset)
    told = facts(report)
    assert told["source"] == f"npz arrays, {tmp_path / 'a.npz'}"
    assert told["images"] == "6 (50,000 are published)"
    assert told["shape"] == "3 channels, 32x32"
    assert told["split"] == "train (6 of 50,000)"
    assert told["classes"].startswith("10, 0 to 3 images each, 7 without any: airplane 2, automobile 0, bird 0, cat 3")
    assert (told["sha256"], told["resizer"], told["licence"]) == (dataset.sha256, "none", Cifar10.licence)
    assert (told["read"], told["duplicates"], told["damaged"]) == ("6 of 6 images", "none", "none")
    values = images / 127.5 - 1
    assert np.allclose(report.mean, values.mean((0, 1, 2))) and np.allclose(report.std, values.std((0, 1, 2)))
    assert torch.equal(report.shown, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert report.ok


def test_damaged_images_are_listed_by_name_and_the_others_counted(tmp_path):
    files = {name: data for name, data in edm(20).items() if name.endswith("png")}
    whole = sorted(files)[:5]
    files |= {name: data[:70] for name, data in files.items() if name not in whole}
    report = check(make(Folder, write_folder(tmp_path / "a", files), resolution=8))
    assert not report.ok and len(report.damaged) == 15
    told = facts(report)
    assert told["read"] == "5 of 20 images"
    assert told["damaged"].startswith("15: cannot read '00000/img00000005.png' as an image: ")
    assert told["damaged"].count("00000/img") == 10 and told["damaged"].endswith("; and 5 more")
    assert np.allclose(report.mean, (pixels(20)[:5] / 127.5 - 1).mean((0, 1, 2)))
    assert len(report.shown) == 5


def test_duplicates_are_found(tmp_path):
    a, b = (png(image) for image in pixels(2))
    path = write_zip(tmp_path / "a.zip", {"1.png": a, "2.png": b, "3.png": a, "4.png": a})
    report = check(make(Folder, path, resolution=8))
    assert report.duplicates == [["1.png", "3.png", "4.png"]]
    assert facts(report)["duplicates"] == "2: 1.png = 3.png = 4.png"
    assert report.ok


def test_datasets_with_captions_with_prompts_and_without_files(tmp_path):
    files = {f"{k}.png": png(image) for k, image in enumerate(pixels(4))}
    files |= {f"{k}.txt": text for k, text in enumerate("abcd")}
    assert facts(check(make(Folder, write_folder(tmp_path / "a", files), resolution=8)))["captions"] == (
        "4: 'a', 'b', 'c', ..."
    )
    (tmp_path / "p.txt").write_text("a cat\na dog")
    told = facts(check(Prompts(Prompts.Config(path=str(tmp_path / "p.txt"), evaluation_path=str(tmp_path / "p.txt")))))
    assert told["prompts"] == "4, 2 of them for evaluation: 'a cat', 'a dog', 'a cat', ..."
    assert "read" not in told
    report = check(Digits(Digits.Config()))
    assert facts(report)["read"] == "1,797 of 1,797 images"
    assert sum(int(part.split()[-1]) for part in facts(report)["classes"].split(": ")[1].split(", ")) == 1797


def test_the_picture_shows_the_images(tmp_path):
    images = torch.from_numpy(pixels(11, 64)).permute(0, 3, 1, 2)
    picture = np.asarray(grid_picture(images)).astype(int)
    blocks = np.lib.stride_tricks.sliding_window_view(picture, (64, 64), axis=(0, 1))
    for image in images[[0, 7, 10]]:
        corner = image[:, 0, 0].numpy()
        found = [at for at in zip(*np.where((picture[:-63, :-63] == corner).all(-1)), strict=True)]
        assert any(np.array_equal(blocks[at], image.numpy()) for at in found)
    assert grid_picture(torch.cat([images] * 8)).size[1] == 8 * 68 + 4


def run(registry, *words, grid=None):
    out = io.StringIO()
    code = command(words, registry, grid, Console(file=out, width=100, highlight=False))
    return code, out.getvalue()


def test_the_command(tmp_path, registry):
    path = write_zip(tmp_path / "ffhq.zip", edm(3))
    words = "dataset=ffhq", f"dataset.path={path}", "dataset.resolution=8"
    code, out = run(registry, *words, grid=tmp_path / "out" / "grid.png")
    assert code == 0
    assert "train (3 of 70,000)" in out and "written: " in out
    assert make(Ffhq, path, resolution=8).sha256 in out.replace("\n", "").replace(" ", "")
    assert max(map(len, out.splitlines()[:-1])) <= 100
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.format == "PNG"


def test_the_command_fails_where_images_are_damaged(tmp_path, registry):
    files = {"a.png": png(pixels(1)[0]), "b.png": b"[red]nothing[/red]"}
    code, out = run(registry, "dataset=folder", f"dataset.path={write_folder(tmp_path / 'x', files)}")
    assert code == 1
    assert "cannot read 'b.png' as an image" in out


def test_what_the_command_refuses(tmp_path, registry):
    with pytest.raises(UserError, match=r"dataset=ffhq has no files yet"):
        run(registry, "dataset=ffhq")
    with pytest.raises(UserError, match=r"--grid must name a \.png file"):
        run(registry, "dataset=digits", grid=tmp_path / "a.jpg")
    with pytest.raises(UserError, match="data check takes one dataset, but the settings describe 2 runs"):
        run(registry, "dataset=digits", "seed=0,1")
    with pytest.raises(UserError, match=r"no setting 'pth' in 'dataset'.*Did you mean 'path'"):
        run(registry, "dataset=ffhq", "dataset.pth=x")
    with pytest.raises(UserError, match=r"hub:owner/name needs .*dataset\.download=true"):
        run(registry, "dataset=ffhq", "dataset.path=hub:owner/name")


def test_ignored_files_are_noted_in_data_check_in_a_dry_run_and_in_a_run(tmp_path, registry, monkeypatch):
    from distillbench.cli.terminal import print_plan
    from distillbench.execution import run as running
    from distillbench.registry import load_registry
    from distillbench.runs.config import compose_runs
    from distillbench.runs.plan import plan
    from distillbench.system.progress import Progress

    files = {"0.png": png(pixels(1)[0]), "1.jp2": b"x", "\x1b[2J.jp2": b"x"}
    words = ["dataset=folder", f"dataset.path={write_folder(tmp_path / 'x', files)}", "dataset.resolution=8"]
    _, out = run(registry, *words)
    note = "ignored, not a supported image format: 2 .jp2 (\\x1b[2J.jp2, 1.jp2)"
    assert note in " ".join(out.split())
    every = load_registry()
    words += ["methods=[boot]", f"results_dir={tmp_path / 'results'}", "estimate_seconds=0"]
    cells = plan(compose_runs(words, every), every)
    console = Console(file=io.StringIO(), width=200, highlight=False)
    print_plan(console, cells)
    assert f"dataset folder: {note}\n" in console.file.getvalue()

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    console = Console(file=io.StringIO(), width=200, highlight=False)
    monkeypatch.setattr(running, "executor_of", stop)
    with pytest.raises(Stopped):
        running.run(cells, [cells[0].shared.config], Progress(console), print)
    assert console.file.getvalue().startswith(f"dataset folder: {note}\n")
