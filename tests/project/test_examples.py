"""The example plugins: each as a single file, and all three as packages in a clean environment.

The clean environment is a new one with distillbench and the examples built and installed, as a user installs them. Only
their dependencies (torch, ...) come from the environment that runs the tests.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from distillbench.registry import in_folders, load_registry

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {  # folder of examples/: what it brings
    "distillbench-shortcut": {"methods: shortcut"},
    "distillbench-sliced-wasserstein": {"metrics: sliced_wasserstein"},
    "distillbench-checkerboard": {"datasets: checkerboard", "teachers: checkerboard"},
}
NO_HATCHLING = re.compile(
    r"hatchling.*(not found|no version)|not found in the cache|failed to (fetch|download)", re.I | re.S
)
SECONDS = 600  # of a command, on a machine that does other work


def source_of(name: str) -> Path:
    (file,) = (ROOT / "examples" / name / "src").glob("*.py")
    return file


def outside(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would: without the variables of the test run."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DISTILLBENCH", "PYTHONPATH", "PYTEST"))}
    command = [str(word) for word in words]
    env = kept | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=SECONDS)


# --- as single files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "brings"), EXAMPLES.items(), ids=EXAMPLES)
def test_an_example_is_a_plugin_as_a_single_file(name, brings, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    registry = load_registry(in_folders([source_of(name).parent]))
    for module in set(sys.modules) - before:
        if module == source_of(name).stem:
            del sys.modules[module]
    assert not registry.broken, registry.broken
    assert set(registry.plugins[0].brings) == brings


def test_the_core_knows_no_example():
    own = {"distillbench_shortcut", "sliced_wasserstein", "checkerboard"}
    for file in [*(ROOT / "distillbench").rglob("*.py"), *(ROOT / "plugins").glob("*.py")]:
        assert not own & set(re.findall(r"\w+", file.read_text().lower())), file


@pytest.mark.nightly
def test_the_examples_pass_their_own_tests(tmp_path):
    """All in one process, because importing torch takes most of the time."""
    folders = [ROOT / "examples" / name for name in EXAMPLES]
    sources = " ".join(str(folder / "src") for folder in folders)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {sources}\naddopts = --import-mode=importlib\n")
    tests = [folder / "tests" for folder in folders]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", tmp_path / "pytest.ini"]
    done = outside(*command, *tests, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# --- installed -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    folder: Path

    def run(self, *words: object) -> str:
        """The output of `distillbench WORDS`, run outside the checkout."""
        done = outside(self.folder / "bin" / "distillbench", *words, cwd=self.folder)
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Environment:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv, which creates the clean environment, is not installed")
    folder = tmp_path_factory.mktemp("clean") / "venv"
    made = outside(uv, "venv", "--python", sys.executable, folder, cwd=ROOT)
    assert made.returncode == 0, made.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "borrowed.pth").write_text("\n".join(sorted(borrowed)))
    packages = [ROOT, *(ROOT / "examples" / name for name in EXAMPLES)]
    install = [uv, "pip", "install", "--no-deps", "--python", folder / "bin" / "python"]
    done = outside(*install, *packages, cwd=folder)
    if done.returncode and NO_HATCHLING.search(done.stderr):  # which builds them, from uv's cache or the index
        if not importlib.util.find_spec("hatchling"):
            pytest.skip(f"hatchling, which builds the packages, is not available: {' '.join(done.stderr.split())}")
        done = outside(*install, "--no-build-isolation", "--offline", *packages, cwd=folder)
    assert done.returncode == 0, done.stderr
    return Environment(folder)


@pytest.mark.nightly
@pytest.mark.slow
def test_installed_examples_are_listed_like_built_in_plugins(clean):
    """In lists and descriptions, with their distributions."""
    where = outside(
        clean.folder / "bin" / "python", "-c", "import distillbench as d; print(d.__file__)", cwd=clean.folder
    )
    assert Path(where.stdout.strip()).is_relative_to(clean.folder)  # not the checkout
    commands = {
        "plugins": ("plugins",),
        "methods": ("list", "methods"),
        "shortcut": ("describe", "shortcut"),
    }
    with ThreadPoolExecutor(2) as pool:
        said = dict(zip(commands, pool.map(lambda words: clean.run(*words), commands.values()), strict=True))
    for name, brings in EXAMPLES.items():
        assert name in said["plugins"] and all(what.partition(": ")[2] in said["plugins"] for what in brings), said[
            "plugins"
        ]
    assert re.search(r"^\W*shortcut\b", said["methods"], re.MULTILINE), said["methods"]
    for words in ("arXiv:2410.12557", "mu", "decay of the target", "distillbench-shortcut"):
        assert words in said["shortcut"], said["shortcut"]


@pytest.mark.nightly
@pytest.mark.slow
def test_installed_examples_run_together(clean):
    """A third-party method, dataset, teacher and metric in one run: configuration, table, report."""
    words = ["methods=[shortcut]", "dataset=checkerboard", "teacher=checkerboard", "experiment=smoke"]
    words += ["budget.images=512", "teacher.width=32"]
    words += ["evaluation.metrics=[teacher_rmse,sliced_wasserstein]", "run_name=together"]
    clean.run("run", *words)
    results = clean.folder / "results" / "together"
    table = pd.read_csv(results / "table.csv")
    ours = table[table["method"] == "shortcut"]
    assert ours["nfe"].tolist() == [1, 2, 4]
    assert (ours["status"] == "ok").all() and (ours["sliced_wasserstein"] > 0).all()
    assert (ours["train_teacher_nfe"] == 512).all()
    (record,) = (clean.folder / "results" / "cells").glob("*/train.json")
    assert '"distillbench-shortcut"' in record.read_text()  # the distribution of the method
    clean.run("report", results)
    html = (results / "report.html").read_text()
    for name in ("shortcut", "sliced_wasserstein", "checkerboard"):
        assert name in html, name


@pytest.mark.slow
def test_a_setting_of_an_installed_example_is_checked(clean):
    run = ["run", "methods=[shortcut]", "dataset=checkerboard", "teacher=checkerboard", "methods.shortcut.muu=.5"]
    done = outside(clean.folder / "bin" / "distillbench", *run, "--dry-run", cwd=clean.folder)
    assert done.returncode != 0
    assert "Did you mean 'mu'?" in " ".join((done.stdout + done.stderr).split()), done.stderr
