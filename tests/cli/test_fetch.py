"""From a fresh machine to a table: the message, `fetch`, and `run ... download=true`, with a server on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import subprocess
import sys

import pytest
import torch

from command_line import exit_code
from distillbench.builtin.dinov2 import DinoV2
from distillbench.builtin.inception import InceptionV3
from distillbench.cli import command_options, fetch_command
from distillbench.errors import UserError
from distillbench.evaluation.pretrained_weights import WeightsFile
from distillbench.registry import load_registry
from distillbench.runs import run_downloads
from distillbench.runs.config import compose_runs
from distillbench.runs.distances import Lpips
from distillbench.runs.run_downloads import needs_of
from distillbench.storage import downloads, sources
from distillbench.system.progress import Progress
from file_server import serving
from image_sources import edm, write_zip

HEADLINE = ["methods=[boot,cm]", "dataset=ffhq", "dataset.download=true", "teacher.download=true"]
SMALL = ["dataset.resolution=8", "experiment=smoke", "evaluation.metrics=[teacher_rmse]", "run_name=faces"]
SMALL += ["budget.images=64", "batch_size=32", "evaluation.images=8", "evaluation.teacher_steps=[1]"]
SMALL += ["evaluation.timing=off", "evaluation.nfe=[1]"]
ENTRIES = """
[faces]
part = "dataset"
plugin = "ffhq"
settings = {{ resolution = 8 }}
teacher = "edm-faces"
title = "Faces"
licence = "CC0"
publisher = "a third party"
kind = "hub dataset"
repository = "owner/faces"
patterns = ["faces.zip"]
images = 12
example = "faces.zip"
by_hand = "draw them"
note = "these are no faces"

[edm-faces]
part = "teacher"
plugin = "edm"
settings = {{ dataset = "ffhq", resolution = 8, conditional = false }}
title = "EDM, faces"
licence = "CC BY-NC-SA 4.0"
publisher = "nobody"
kind = "url"
files = [{{ url = "{url}/edm-faces.pkl" }}]
"""


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture
def call(tmp_path, monkeypatch, capsys, registry):
    """``call(*words)``: exit code, output and errors of distillbench in an empty folder, without a terminal."""
    monkeypatch.setattr(command_options, "load_plugins", lambda folders: registry)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(downloads.VARIABLE, str(tmp_path / "downloads"))
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path / "weights"))

    def run(*words):
        return exit_code(*words), *capsys.readouterr()

    return run


@pytest.fixture
def server(call, tmp_path, monkeypatch, edm_writer):
    """A server with twelve images and their teacher, which the settings in SMALL choose."""
    from huggingface_hub import constants

    with serving() as files:
        monkeypatch.setattr(constants, "ENDPOINT", files.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", files.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        files.repositories["owner/faces"] = {"faces.zip": write_zip(tmp_path / "a.zip", edm(12)).read_bytes()}
        files.files["/edm-faces.pkl"] = edm_writer.network()[1].read_bytes()
        (tmp_path / "own.toml").write_text(ENTRIES.format(url=files.url))
        monkeypatch.setenv(sources.VARIABLE, str(tmp_path / "own.toml"))
        yield files


# --- before anything is there ----------------------------------------------------------------------------------------


def test_the_message_begins_with_the_whole_line_and_needs_no_torch(tmp_path):
    """In its own process: torch, which takes seconds to load, is not imported."""
    code = (
        "import sys\nfrom distillbench.cli.commands import main\n"
        "try: main(['run', 'methods=[boot,cm]', 'dataset=ffhq'])\nexcept SystemExit as done: print(done.code)\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    status, modules = done.stdout.splitlines()
    assert status == "2" and not {"torch", "hydra", "numpy", "huggingface_hub"} & set(modules.split())
    lines = done.stderr.splitlines()
    assert lines[0].startswith(
        "error: dataset=ffhq has no files yet: FFHQ, 70,000 faces, 64x64 (licence: CC BY-NC-SA 4.0"
    )
    assert lines[1].split(maxsplit=1)[1] == "distillbench run " + " ".join([f"'{HEADLINE[0]}'", *HEADLINE[1:]])
    for part in (
        "Dmini/FFHQ-64x64 on the hub",
        "third party's mirror",
        "about 0.9 GB",
        "trains one",
        "dataset_tool.py",
    ):
        assert part in done.stderr
    assert lines[-1].endswith("dataset=digits")


@pytest.mark.parametrize("words, part", [
    (["dataset=ffhq", "dataset.resolution=256"], "dataset=ffhq dataset.resolution=256 dataset.download=true\n"),
    (["dataset=imagenet64"], "dataset.download=true teacher.download=true conditional=true\n"),
    (["dataset=imagenet64", "dataset.split=test"], "50,000 photographs for validation"),
    (["dataset=cifar10"], "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz, by University of Toronto, 170.5"),
    (["experiment=boot_ffhq64"], "experiment=boot_ffhq64 dataset.download=true teacher.download=true\n"),
    (["experiment=cd_cifar10", "teacher.path=x"], "experiment=cd_cifar10 teacher.path=x dataset.download=true\n"),
    (["dataset=ffhq", "seed=0,1", "teacher=gmm"], "dataset=ffhq seed=0,1 teacher=gmm dataset.download=true\n"),
    (["dataset=ffhq", "dataset.path=hub:a/b"], "hub:a/b needs the package 'datasets' (pip install 'distillbench[hub]')"
     " and dataset.download=true. The whole line: distillbench run 'methods=[boot,cm]' dataset=ffhq "
     "dataset.path=hub:a/b dataset.download=true\n"),
    (["dataset=ffhq", "dataset.path=hub:a/b", "dataset.download=true"], "hub:a/b needs the package 'datasets'"),
    (["dataset=digits", "teacher.download=true"], "no released teacher is known for dataset=digits and condit"),
    (["dataset=imagenet64", "dataset.path=x", "teacher.download=true"],
     "for dataset=imagenet64 at 64x64 and conditional=false (for conditional=true there is edm-imagenet-64)"),
])  # fmt: skip
def test_one_message_says_all_that_is_missing(call, monkeypatch, words, part):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, errors = call("run", "methods=[boot,cm]", *words)
    assert code == 2 and part in errors


def test_the_settings_of_the_headline_choose_the_released_files(registry):
    def chosen(*words):
        (config,) = compose_runs([*words], registry)
        return config.teacher.kind, [source.name for source in needs_of(config, registry).sources]

    assert chosen(*HEADLINE) == ("edm", ["ffhq", "edm-ffhq-64"])
    assert chosen("methods=[cm]", "dataset=cifar10", "teacher.download=true", "conditional=true")[1] == [
        "cifar10",
        "edm-cifar10-32-cond",
    ]
    assert chosen("methods=[cm]", "dataset=ffhq", "dataset.path=a.zip") == ("trained", [])
    assert chosen("experiment=cd_cifar10", "teacher.download=true") == ("edm", ["cifar10", "edm-cifar10-32-ve"])
    with pytest.raises(UserError, match=r"no setting 'download' in 'teacher'"):
        compose_runs([*HEADLINE, "teacher=trained"], registry)


# --- fetch -----------------------------------------------------------------------------------------------------------


def test_fetch_lists_everything_without_the_network(call):
    code, out, _ = call("fetch")
    assert code == 0
    assert re.search(
        r"  ffhq +missing, about 0\.9 GB: dataset=ffhq, FFHQ, 70,000 faces, 64x64\n +CC BY-NC-SA 4\.0", out
    )
    assert re.search(r"  edm-ffhq-64 +missing, of unknown size: teacher=edm", out)
    assert re.search(r"  inception +missing, 91 MiB: .*\n +Apache-2\.0; https://github\.com/toshas/\S+\.pth\n", out)
    assert "efficientnet_lite0      present" in out


def test_fetch_asks_or_needs_yes(call, server, tmp_path, monkeypatch):
    code, out, errors = call("fetch", "faces", "edm-faces")
    assert code == 2 and "there is no terminal to ask at whether to download this: add --yes" in errors
    assert not server.asked  # a network may be slow, or not there
    assert f"download edm-faces, of unknown size: EDM, faces, from {server.url}/edm-faces.pkl, by nobody" in out
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("click.confirm", lambda question: False)
    code, out, _ = call("fetch", "faces", "edm-faces")
    size = len(server.files["/edm-faces.pkl"]) / 1e6
    assert code == 2 and f"download edm-faces, {size:.1f} MB: EDM, faces, from {server.url}/edm-faces.pkl, by" in out
    assert "download faces, 0.0 MB: Faces, from owner/faces on the hub" in out and "these are no faces" in out
    monkeypatch.setattr("click.confirm", lambda question: True)
    assert call("fetch", "faces")[0] == 0
    assert call("fetch", "edm-faces", "--yes")[0] == 0
    code, out, _ = call("fetch", "faces", "edm-faces")  # nothing to ask about
    assert code == 0 and out.count("already there") == 2
    assert re.search(r"faces +present, ", call("fetch")[1])


def test_fetch_of_an_experiment_names_all_that_it_reads(call, server, monkeypatch):
    lacking = run_downloads.lacking
    monkeypatch.setattr(fetch_command, "lacking", lambda cls: [] if cls is InceptionV3 else lacking(cls))
    words = [
        "experiment=smoke",
        "dataset=ffhq",
        "dataset.resolution=8",
        "teacher=edm",
        "evaluation.metrics=[fid,fd_dinov2]",
        "methods=[cm]",
        "methods.cm.metric=lpips",
    ]
    code, out, errors = call("fetch", *words)
    assert code == 2 and "--yes" in errors
    named = re.findall(r"^download (\S+),", out, re.M)
    assert named == ["faces", "edm-faces", "dinov2", "lpips"] and "1161 MiB" in out
    code, out, _ = call("fetch", "dataset=lsun_bedroom", "teacher=diffusers", "evaluation.metrics=[fid]")
    assert code == 0 and "dataset=lsun_bedroom has no known download for these settings: give dataset.path" in out
    assert "teacher=diffusers has no known download" in out
    code, out, errors = call("fetch", "dataset=digits", "evaluation.metrics=[fd_dinov2]")
    assert code == 2 and "no terminal to ask at" in errors and "download dinov2, 1161 MiB: weights, from" in out


def test_weights_that_cannot_be_reached_and_nothing_to_fetch(call, server, monkeypatch):
    missing = dataclasses.replace(Lpips.weights, url=f"{server.url}/none.pth")
    monkeypatch.setattr(Lpips, "weights", missing)
    code, _, out = call("fetch", "lpips")
    assert code == 2 and "404" in out
    assert f"curl -LO {server.url}/none.pth; then here: distillbench fetch lpips --from FOLDER/none.pth" in out
    code, *said = call("fetch", "dataset=digits")
    assert code == 0 and "nothing to download" in "".join(said)


def test_what_fetch_refuses(call, tmp_path):
    assert "no dataset, teacher or network 'fhq'. Did you mean 'ffhq'?" in call("fetch", "fhq")[2]
    assert "come with an installed package: there is nothing to fetch" in call("fetch", "efficientnet_lite0")[2]
    assert "--from takes one name" in call("fetch", "ffhq", "cifar10", "--from", str(tmp_path))[2]
    assert "no file cifar-10-python.tar.gz in" in call("fetch", "cifar10", "--from", str(tmp_path))[2]
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"x")
    assert "is not cifar10: its sha256 is" in call("fetch", "cifar10", "--from", str(tmp_path))[2]


@pytest.fixture
def small_dinov2(server, monkeypatch):
    """The first features of DINOv2 are pixels, and its weights a few bytes of the server."""
    server.files["/dinov2.pth"] = b"weights"
    sha256 = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(DinoV2, "weights", WeightsFile("dinov2.pth", sha256, f"{server.url}/dinov2.pth", "MIT", 3))
    monkeypatch.setattr(DinoV2, "__init__", lambda self, file, device: None)
    monkeypatch.setattr(DinoV2, "__call__", lambda self, images: images.flatten(1).float())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "nowhere")


DIGITS = ["run", "methods=[cm]", "dataset=digits", "experiment=smoke", *SMALL[3:], "evaluation.metrics=[fd_dinov2]"]


def test_weights_are_downloaded_only_when_the_settings_ask(registry, server, tmp_path, small_dinov2):
    words = ["methods=[]", "dataset=digits", "evaluation.metrics=[fd_dinov2,fd_efficientnet_lite0,teacher_rmse]"]
    configs, asking = (compose_runs([*words, *more], registry, False) for more in ([], ["evaluation.download=true"]))
    assert not run_downloads.asked(configs, registry).lines()
    downloads = run_downloads.asked(asking, registry)
    assert downloads.lines() == [f"download dinov2, 3 MiB: weights, from {server.url}/dinov2.pth; licence: MIT"]
    assert downloads.sizes == [3 * 2**20] and not downloads.needed_to_plan and not server.asked
    downloads.fetch(Progress(None))
    assert (tmp_path / "weights" / "dinov2.pth").read_bytes() == b"weights"
    assert not run_downloads.asked(asking, registry).lines()  # there now
    trained = compose_runs(
        ["methods=[cm]", "methods.cm.metric=lpips", *words[1:], "evaluation.download=true"], registry
    )
    downloads = run_downloads.asked(trained, registry)
    assert downloads.networks == (Lpips,) and downloads.needed_to_plan


@pytest.mark.nightly
def test_a_dry_run_says_what_weights_it_would_download(call, server, tmp_path, small_dinov2):
    words = DIGITS
    code, out, errors = call(*words, "--dry-run")
    assert code == 0, errors
    advice = r"fd_dinov2 would be empty: .*\(distillbench fetch dinov2, or evaluation\.download=true in a run\)"
    assert code == 0 and re.search(advice, out, re.S) and not server.asked
    code, out, _ = call(*words, "evaluation.download=true", "--dry-run")  # the plan needs no weights
    line = f"download dinov2, 3 MiB: weights, from {server.url}/dinov2.pth; licence: MIT"
    assert code == 0 and line in out and "fd_dinov2 would be empty" in out and not (tmp_path / "weights").exists()


@pytest.mark.nightly
def test_a_run_downloads_the_weights_of_its_scores_when_asked(call, server, tmp_path, small_dinov2):
    words = DIGITS
    line = f"download dinov2, 3 MiB: weights, from {server.url}/dinov2.pth; licence: MIT"
    code, out, errors = call(*words, "evaluation.download=true")
    file = tmp_path / "weights" / "dinov2.pth"
    assert code == 0, errors
    assert out.index(line) < out.index(f"downloaded: {file} (MIT)") and file.read_bytes() == b"weights"
    server.asked.clear()  # found, and the same cells, without the setting
    code, out, _ = call(*words, "evaluation.download=true")
    assert code == 0 and not server.asked and "download dinov2" not in out
    assert (tmp_path / "results" / "faces" / "columns.json").is_file()
    records = sorted((tmp_path / "results" / "cells").rglob("*.json"))
    assert call(*words)[0] == 0 and sorted((tmp_path / "results" / "cells").rglob("*.json")) == records


def test_a_dry_run_ends_before_a_plan_that_needs_weights(call, server, monkeypatch):
    words = ["run", "methods=[cm]", "methods.cm.metric=lpips", "dataset=digits", "experiment=smoke"]
    code, out, _ = call(*words, "evaluation.download=true", "--dry-run")
    assert code == 0 and "download lpips, 529 MiB" in out
    assert out.endswith("dry run: nothing was downloaded. The plan is made from these files\n")


# --- the headline ----------------------------------------------------------------------------------------------------


def test_the_headline_downloads_trains_and_needs_no_network_again(call, server, tmp_path):
    code, out, _ = call("run", *HEADLINE, *SMALL, "--dry-run")
    assert code == 0 and "download faces, " in out and "download edm-faces, " in out
    assert out.endswith("dry run: nothing was downloaded. The plan is made from these files\n")
    assert not (tmp_path / "downloads").exists()

    code, out, errors = call("run", "methods=[cm]", *HEADLINE[1:], *SMALL)
    assert code == 0, errors
    assert out.index("download faces, ") < out.index("downloaded: ") < out.index("cm")
    assert (tmp_path / "results" / "faces" / "table.csv").is_file()

    server.asked.clear()  # what was downloaded is found without download=true, too
    code, out, _ = call("run", *HEADLINE[:2], "teacher=edm", *SMALL, "--dry-run")
    assert code == 0 and not server.asked and "dataset ffhq, teacher edm: edm-faces.pkl" in out
    assert "teacher edm: EDM, faces, by nobody, from http" in out
    assert "images from owner/faces on the hub, commit cccccccccccc, by a third party" in out
    assert "these are no faces" in out


def test_a_download_with_another_number_of_images_is_refused(call, server, tmp_path):
    server.repositories["owner/faces"] = {"faces.zip": write_zip(tmp_path / "b.zip", edm(11)).read_bytes()}
    words = ["dataset=ffhq", "dataset.download=true", "dataset.resolution=8"]
    code, _, errors = call("data", "check", *words)
    assert code == 2 and "owner/faces on the hub has 11 images and Faces has 12: it is not the published set" in errors
    path = tmp_path / "downloads" / "faces" / "faces.zip"
    assert call("data", "check", *words, f"dataset.path={path}")[0] == 0
