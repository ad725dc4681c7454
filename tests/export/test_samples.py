"""Files of samples: those of a row are the images that were scored, and a file has the score of its row."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from distillbench.cli import commands
from distillbench.datasets.array_readers import open_npz
from distillbench.datasets.dataset import to_float
from distillbench.errors import UserError
from distillbench.evaluation.reference_statistics import read_reference
from distillbench.evaluation.sample_files import read_samples, writing
from distillbench.export.run_export import find_teacher
from distillbench.records.sample_grid import unstack_shown
from distillbench.records.settings_file import write_settings
from distillbench.registry import load_registry
from distillbench.runs.config import compose_runs, to_yaml
from recorded_progress import RecordingProgress

DATASET = ["dataset=gmm", "dataset.means=[[-0.5,0.1,0],[0.13,-0.27,0.2],[0.4,0.37,0.1]]", "dataset.count=60"]
WORDS = ["methods=[direct]", "conditional=true", *DATASET, "teacher=gmm", "teacher.width=16", "isolate=false"]
WORDS += ["run_name=run", "batch_size=32", "budget.images=320", "methods.direct.pairs=64", "methods.direct.steps=4"]
WORDS += ["evaluation.images=40", "evaluation.batch_size=16", "evaluation.metrics=[fd_toy]"]
WORDS += ["evaluation.teacher_steps=[4]", "evaluation.timing=off", "device=cpu"]
PIXELS = np.zeros((5, 1, 1, 3), np.uint8)


PLUGIN = """
import torch
from distillbench import FeatureNetwork, WeightsFile, hookimpl
from distillbench.evaluation import FrechetDistance, FrechetDistanceToTeacher, Precision

class Toy(FeatureNetwork):
    name, protocol, width, batch = "toy", "toy/1: six linear features", 6, 16
    weights = WeightsFile("toy", "ab", "", "none", 0)

    @classmethod
    def locate(cls, folder):
        return folder

    def __init__(self, file, device):
        self.matrix = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) / 100

    def __call__(self, images):
        return images.float().flatten(1) @ self.matrix

class FdToy(FrechetDistance):
    name, network = "fd_toy", Toy

class FdTeacherToy(FrechetDistanceToTeacher):
    name, network = "fd_teacher_toy", Toy

class PrecisionToy(Precision):
    name, network = "precision_toy", Toy

@hookimpl(api=2)
def register_metrics(register):
    for cls in (FdToy, FdTeacherToy, PrecisionToy):
        register(cls)
"""


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """A feature network that is fast."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "toy.py").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLBENCH_PLUGINS_DIR", str(folder))
        yield


def call(*words):
    with pytest.raises(SystemExit) as stop:
        commands.main([str(word) for word in words])
        raise SystemExit(0)
    return stop.value.code or 0


@pytest.fixture(scope="module")
def results(tmp_path_factory, toy):
    folder = tmp_path_factory.mktemp("results")
    assert call("run", *WORDS, f'results_dir="{folder}"') == 0
    return folder


@pytest.fixture
def exported(results, tmp_path):
    def export(method, nfe, *more):
        file = tmp_path / "samples.npz"
        assert call("samples", "export", results / "run", "--method", method, "--nfe", nfe, "-o", file, *more) == 0
        with np.load(file, allow_pickle=False) as arrays:
            return file, dict(arrays)

    return export


def shown(results, method, nfe):
    """The 8-bit images of a row, (N,C,H,W), as its evaluation recorded them."""
    for path in results.glob("cells/*/evaluation-*.json"):
        record = json.loads(path.read_text())
        if (record["inputs"].get("sampler") is not None) == method.startswith("teacher"):
            (index,) = (i for i, row in enumerate(record["rows"]) if row["nfe"] == nfe)
            return unstack_shown(load_file(path.with_suffix(".safetensors")))[index]
    raise AssertionError(method)


@pytest.mark.parametrize(("method", "nfe"), [("direct", 1), ("teacher:ddim", 4)])
def test_a_file_has_the_images_that_were_scored_and_their_classes(results, exported, method, nfe):
    file, arrays = exported(method, nfe)
    assert arrays.keys() == {"arr_0", "arr_1"} and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_0"].shape == (40, 1, 1, 3) and arrays["arr_0"].flags.c_contiguous
    assert torch.equal(torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2), shown(results, method, nfe))
    assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].tolist() == [i % 3 for i in range(40)]
    with zipfile.ZipFile(file) as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_a_file_of_samples_has_the_score_of_its_row(results, exported, capsys):
    file, _ = exported("direct", 1)
    table = pd.read_csv(results / "run" / "table.csv").set_index("method")
    metrics = "evaluation.metrics=[fd_toy,teacher_rmse,spread,fd_teacher_toy]"
    capsys.readouterr()
    assert call("samples", "score", file, *DATASET, f'results_dir="{results}"', metrics, "--json", "device=cpu") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"]["fd_toy"] == table.loc["direct", "fd_toy"]
    assert found["images"] == 40 and "frechet/2" in found["protocols"]["fd_toy"]
    assert found["missing"].keys() == {"teacher_rmse", "spread", "fd_teacher_toy"}
    assert all("of a teacher" in reason for reason in found["missing"].values())


def test_another_number_of_images_and_noise(exported):
    _, few = exported("direct", 1, "--images", "16")
    _, other = exported("direct", 1, "--images", "16", "--sampling-seed", "1")
    _, plain = exported("direct", 1)
    assert np.array_equal(few["arr_0"], plain["arr_0"][:16]) and not np.array_equal(few["arr_0"], other["arr_0"])


def test_which_of_several_guidances_is_written_is_said(tmp_path):
    """It is the first, as for a student, and not the last."""
    registry, progress = load_registry(), RecordingProgress()
    (tmp_path / "run").mkdir()
    configs = compose_runs([*WORDS, "guidance=2,3", f'results_dir="{tmp_path}"'], registry)
    (tmp_path / "run" / "config.yaml").write_text(write_settings(configs, to_yaml))
    cell, _ = find_teacher(tmp_path / "run", "teacher:ddim", registry, progress)
    assert cell.shared.config.guidance == 2
    assert progress.lines == ["teacher:ddim: the run has guidance=2.0 and guidance=3.0; the first is used"]


def test_images_that_are_no_pictures_are_refused(tmp_path, capsys):
    configs = compose_runs(["methods=[]", "dataset=gmm", "teacher=gmm", "device=cpu"], load_registry(), False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(write_settings(configs, to_yaml))
    words = ["--method", "teacher:ddim", "--nfe", 1, "-o", tmp_path / "x.npz"]
    assert call("samples", "export", tmp_path / "run", *words) == 2
    assert "holds images of 1 or 3 channels, the run's have 2" in capsys.readouterr().err
    assert not (tmp_path / "x.npz").exists()


def test_a_missing_file_is_said_before_anything_is_downloaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distillbench.runs.scored_files.fetch_asked", lambda *given: 1 / 0)
    assert call("samples", "score", tmp_path / "x.npz", *DATASET) == 2
    assert "no file of samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "direct", "--nfe", 2], "direct does not sample with 2 evaluations. It does 1"),
        (["--method", "dirct", "--nfe", 1], "Did you mean 'direct'?"),
        (["--method", "teacher:heun", "--nfe", 3], "no row of the teacher 'teacher:heun'"),
        (["--method", "direct", "--nfe", 1, "--seed", 7], "no weights of direct (seed 7)"),
    ],
)
def test_a_row_that_cannot_be_sampled_is_one_message(results, tmp_path, capsys, words, message):
    assert call("samples", "export", results / "run", *words, "-o", tmp_path / "x.npz") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def pickled(path):
    np.savez(path, arr_0=np.array([None, 1], dtype=object))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no file of samples"),
        (lambda path: path.write_bytes(b"PNG"), "damaged or truncated npz file"),
        (lambda path: path.write_bytes(b""), "damaged or truncated npz file"),
        (pickled, "it holds Python objects"),
        (lambda path: np.savez(path, mu=np.zeros(3)), "has no array images, arr_0"),
        (lambda path: np.savez(path, PIXELS / 255), "between 0 and 1: save (255 * images).round().astype('uint8')"),
        (lambda path: np.savez(path, PIXELS[0]), "must be images (N,H,W,C)"),
        (lambda path: np.savez(path, PIXELS[:0]), "no images in"),
        (lambda path: np.savez(path, np.zeros((5, 2, 2, 3), np.uint8)), "must hold images of 1x1 with 1 or 3 channels"),
        (lambda path: np.savez(path, np.zeros((5, 1, 1, 4), np.uint8)), "must hold images of 1x1 with 1 or 3 channels"),
        (lambda path: np.savez(path, PIXELS, np.zeros(4, np.int64)), "arr_1 must be 5 whole numbers"),
    ],
)
def test_garbage_is_one_message(tmp_path, write, message):
    write(tmp_path / "samples.npz")
    with pytest.raises(UserError, match=re.escape(message)) as found:
        read_samples(tmp_path / "samples.npz", (1, 1))
    assert "dataset." not in str(found.value) and "\n" not in str(found.value)


def test_garbage_on_the_command_line(tmp_path, capsys):
    pickled(tmp_path / "samples.npz")
    assert call("samples", "score", tmp_path / "samples.npz", *DATASET, f'results_dir="{tmp_path}"') == 2
    error = capsys.readouterr().err
    assert error == "error: samples.npz: cannot read 'arr_0' of 'samples.npz': it holds Python objects\n"
    assert call("samples", "score", tmp_path / "samples.npz", *DATASET, "threads=1,2") == 2
    assert "a file is scored by one group of settings, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["methods=[cm]", "methods.cm.lr=1", "evaluation.images=9", "seed=0", "teacher=gmm"])
def test_a_setting_that_does_not_decide_the_scores_of_a_file_is_refused(tmp_path, capsys, word):
    np.savez(tmp_path / "samples.npz", PIXELS)
    assert call("samples", "score", tmp_path / "samples.npz", *DATASET, word) == 2
    assert f"samples score makes no use of '{word}': nothing is trained or sampled" in capsys.readouterr().err


def test_an_npy_file_is_not_called_a_damaged_npz(tmp_path):
    for name in ("samples.npy", "samples.npz"):
        with open(tmp_path / name, "wb") as file:
            np.save(file, PIXELS)
        with pytest.raises(UserError, match=rf"^{name}: it is an \.npy file, which holds one .* Write"):
            read_samples(tmp_path / name, (1, 1))
    with pytest.raises(UserError, match=r"cannot be read as a reference .*: it is an \.npy file"):
        read_reference(tmp_path / "samples.npy")
    with pytest.raises(UserError, match=r"samples\.npz' is no npz file: it is an \.npy file"):
        open_npz([tmp_path / "samples.npz"], "all", True)


def test_grey_images_are_written_in_colour_and_large_files_are_mapped(tmp_path):
    x_0 = 2 * torch.rand(9, 1, 200, 200, generator=torch.Generator().manual_seed(0)) - 1
    file = tmp_path / "samples.npz"
    with writing(str(file), 9, (200, 200), None) as add:
        for part in x_0.split(4):
            add(part)
    found = read_samples(file, (200, 200))
    images = torch.cat(list(found.batches()))
    assert found.count == 9 and found.labels is None and isinstance(found.reader.parts[0].images, np.memmap)
    assert images.shape == (9, 3, 200, 200) and (to_float(images) - x_0).abs().max() <= 1 / 255 + 1e-6


# --- reference batches of guided-diffusion ---------------------------------------------------------------------------


def test_a_reference_batch_gives_statistics_of_all_and_features_of_its_images(tmp_path, capsys):
    """mu and sigma are of other images than `arr_0`, as in the released batches; mu_s and sigma_s are named."""
    random = np.random.RandomState(0)
    width, where = 6, f'results_dir="{tmp_path}"'
    images = random.randint(0, 256, (12, 1, 1, 3)).astype(np.uint8)
    sigma = np.eye(width)
    theirs, imported, file = (tmp_path / name for name in ("VIRTUAL.npz", "imported.npz", "samples.npz"))
    np.savez(theirs, arr_0=images, mu=np.full(width, 0.5), sigma=sigma, mu_s=np.zeros(7), sigma_s=np.eye(7))
    words = [*DATASET, where, "--network", "toy", "--images", 1000, "-o", imported]
    assert call("reference", "import", theirs, *words) == 0
    printed = capsys.readouterr().out
    assert "statistics of 1000 images of gmm, with features of its 12 images; not imported: mu_s, sigma_s" in printed
    assert call("reference", "show", imported) == 0
    assert "with features of 12 single images" in capsys.readouterr().out
    found = read_reference(Path(imported))
    assert found.statistics.n == 1000 and torch.equal(found.statistics.covariance, torch.from_numpy(sigma))
    assert found.features.shape == (12, width) and found.features.dtype is torch.float32

    np.savez(file, images)
    metrics = "evaluation.metrics=[precision_toy,fd_toy]"
    asked = [*DATASET, where, metrics, f'evaluation.references=["{imported}"]', "evaluation.real_features=5"]
    assert call("samples", "score", file, *asked, "--json") == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["scores"]["precision_toy"] == 1  # its own images
    mean, covariance = found.features.double().mean(0).numpy(), np.cov(found.features.double().numpy().T)
    roots = np.sqrt(np.linalg.eigvalsh(covariance).clip(0))
    expected = np.square(mean - 0.5).sum() + np.trace(covariance) + width - 2 * roots.sum()
    assert scored["scores"]["fd_toy"] == pytest.approx(expected)
    assert scored["protocols"]["precision_toy"].endswith("features of 12 real images in imported.npz")
    assert call("samples", "score", file, *DATASET, where, metrics, "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["scores"]["precision_toy"] < 1 and plain["scores"]["fd_toy"] != pytest.approx(expected)


def test_images_of_another_size_in_a_reference_are_refused(tmp_path, capsys):
    arrays = {"arr_0": np.zeros((5, 2, 2, 3), np.uint8), "mu": np.zeros(6), "sigma": np.eye(6)}
    np.savez(tmp_path / "theirs.npz", **arrays)
    words = [*DATASET, f'results_dir="{tmp_path}"', "--network", "toy", "--images", 9]
    assert call("reference", "import", tmp_path / "theirs.npz", *words, "-o", tmp_path / "x.npz") == 2
    assert "must hold images of 1x1" in capsys.readouterr().err and not (tmp_path / "x.npz").exists()
