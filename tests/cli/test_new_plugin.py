"""``new-plugin``: the package of each kind is complete, passes ruff and its tests; refusals leave no files."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from distillbench import UserError, hookspecs
from distillbench.cli import new_plugin
from distillbench.cli.new_plugin import KINDS, LONGEST_NAME, TEMPLATE
from distillbench.cli.new_plugin import new_plugin as write
from distillbench.registry import Source, load_registry

ODD = 'Ann "A." O\'Neil {{ 1 + 1 }} \\ Ü'
LONG = "q" * LONGEST_NAME
PYTHONPATH = os.pathsep.join(filter(None, sys.path))
RUFF = shutil.which("ruff", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def name_of(kind: str) -> str:
    return f"fresh_{kind}"


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Path]:
    """One package of each kind."""
    folder = tmp_path_factory.mktemp("packages")
    return {kind: write(name_of(kind), kind, folder / kind) for kind in KINDS}


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_is_complete(packages, kind):
    name = name_of(kind)
    module, test = f"src/distillbench_{name}.py", f"tests/test_{name}.py"
    assert files(packages[kind]) == [".gitignore", "README.md", "pyproject.toml", module, test]
    assert [path.name for path in packages[kind].parent.iterdir() if path.name.startswith(".")] == []
    for file in files(packages[kind]):
        text = (packages[kind] / file).read_text()
        assert "{{" not in text and "{%" not in text
        assert text.endswith("\n") and not text.endswith("\n\n")
        assert "\n\n\n\n" not in text
    project = tomllib.loads((packages[kind] / "pyproject.toml").read_text())
    assert project["project"]["name"] == f"distillbench-fresh-{kind}"
    assert project["project"]["entry-points"]["distillbench"] == {name: f"distillbench_{name}"}
    assert "license" not in project["project"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_plugin_of_this_version_of_the_contract(packages, kind, monkeypatch):
    monkeypatch.syspath_prepend(packages[kind] / "src")
    module, name = f"distillbench_{name_of(kind)}", name_of(kind)
    registry = load_registry([Source(name, f"distillbench-{name}", "0.1.0", lambda: importlib.import_module(module))])
    assert not registry.broken, registry.broken
    assert registry.plugins[0].brings == [f"{kind}s: {name}"]
    assert f"@hookimpl(api={hookspecs.API})" in (packages[kind] / "src" / f"{module}.py").read_text()
    assert registry.get(f"{kind}s", name).cls.__name__ == f"Fresh{kind.capitalize()}"


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("dataset", "metric"), pytest.param(KINDS, marks=pytest.mark.nightly)], ids=len)
def test_its_own_tests_pass(kinds, packages, tmp_path):
    """All in one process, because importing torch takes most of the time."""
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    chosen = [packages[kind] for kind in kinds]
    paths = [str(package / "src") for package in chosen]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, PYTHONPATH]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-c", str(tmp_path / "pytest.ini")]
    tests = [str(package / "tests") for package in chosen]
    done = subprocess.run([*command, *tests], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(RUFF is None, reason="ruff is not installed")
@pytest.mark.parametrize("name", [None, "a", LONG], ids=["usual", "short", "long"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_ruff(packages, kind, name, tmp_path):
    """Also with names that change the length of lines."""
    package = packages[kind] if name is None else write(name, kind, tmp_path / "package")
    rules = ["--select=E,F,W,I,UP,B,SIM,RUF", "--ignore=E731,RUF001,RUF002,RUF003,RUF009,RUF012", "--no-cache"]
    for command in (["check", *rules], ["format", "--check", "--no-cache"]):
        done = subprocess.run([RUFF, *command, "."], cwd=package, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_templates_use_public_names_only():
    """Names in the ``__all__`` of distillbench or of one of its modules."""
    texts = [path.read_text() for path in TEMPLATE.rglob("*.py.jinja")]
    imports = [
        found
        for text in texts
        for found in re.findall(r"^from (distillbench[.\w]*) import ([^(]*?|\(.*?\))$", text, re.M | re.S)
    ]
    assert len(imports) > 10
    for home, imported in imports:
        names = re.findall(r"\w+", imported)
        assert not set(names) - set(importlib.import_module(home).__all__), (home, names)


# --- answers ---------------------------------------------------------------------------------------------------------


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def git_says(monkeypatch, name: str, email: str) -> None:
    monkeypatch.setattr(new_plugin, "_git", {"user.name": name, "user.email": email}.__getitem__)


@pytest.mark.parametrize(
    ("name", "email", "authors"),
    [
        (ODD, "ann@x.org", [{"name": ODD, "email": "ann@x.org"}]),
        ("Ann", "root", [{"name": "Ann"}]),
        ("", "ann@x.org", [{"email": "ann@x.org"}]),
        ("", "", None),
    ],
)
def test_the_author_comes_from_git(tmp_path, monkeypatch, name, email, authors):
    git_says(monkeypatch, name, email)
    folder = write("fresh", "metric", tmp_path / "package")
    assert project(folder).get("authors") == authors
    readme = (folder / "README.md").read_text()
    assert f"by {name}." in readme if name else "Written 2" not in readme


def test_neither_git_nor_a_home_is_needed(tmp_path, monkeypatch):
    """copier looks for git; the user's settings of copier, here damaged, are not read; no files are left behind."""
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    (home / ".config" / "copier").mkdir(parents=True)
    (home / ".config" / "copier" / "settings.yml").write_text("defaults: [damaged")
    scratch.mkdir()
    code = (
        "import pathlib; from distillbench.cli.new_plugin import new_plugin; "
        "new_plugin('fresh', 'metric', pathlib.Path('p'))"
    )
    environment = {"PATH": str(tmp_path), "HOME": str(home), "TMPDIR": str(scratch), "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""
    assert len(files(tmp_path / "p")) == 5
    assert "authors" not in project(tmp_path / "p")
    assert files(home) == [".config/copier/settings.yml"] and files(scratch) == []


@pytest.mark.parametrize(
    ("version", "requirement"),
    [("0.1.0", ">=0.1,<0.2"), ("0.9.3", ">=0.9,<0.10"), ("1.4.2", ">=1.4,<2"), ("0.2.0rc1", ">=0.2,<0.3")],
)
def test_versions_of_distillbench(tmp_path, monkeypatch, version, requirement):
    monkeypatch.setattr("distillbench.__version__", version)
    folder = write("fresh", "metric", tmp_path / "package")
    assert project(folder)["dependencies"] == [f"distillbench{requirement}"]
    assert f"distillbench {version}" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "kind", "cls", "distribution"),
    [
        ("my_method_2", "method", "MyMethod2", "distillbench-my-method-2"),
        ("a__b_", "method", "AB", "distillbench-a-b"),
        ("method", "method", "MethodMethod", "distillbench-method"),
        ("tensor", "dataset", "TensorDataset", "distillbench-tensor"),
        ("none", "metric", "NoneMetric", "distillbench-none"),
        ("pixel_gaussian", "teacher", "PixelGaussianTeacher", "distillbench-pixel-gaussian"),
    ],
)
def test_names_that_follow_from_the_name(tmp_path, monkeypatch, name, kind, cls, distribution):
    folder = write(name, kind, tmp_path / "package")
    assert project(folder)["name"] == distribution
    monkeypatch.syspath_prepend(folder / "src")
    registry = load_registry([Source(name, "x", "1", lambda: importlib.import_module(f"distillbench_{name}"))])
    assert not registry.broken, registry.broken
    assert registry.get(f"{kind}s", name).cls.__name__ == cls


def test_the_folder_is_named_after_the_distribution(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write("my_score", "metric") == tmp_path / "distillbench-my-score"
    assert len(files(tmp_path / "distillbench-my-score")) == 5


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("MyMethod", "method", "got 'MyMethod'. Did you mean 'my_method'?"),
        ("my-method", "method", "Did you mean 'my_method'?"),
        ("9lives", "method", "lower-case letters, digits and underscores, got '9lives'."),
        ("", "method", "got ''."),
        ("../up", "method", "Did you mean 'up'?"),
        ("a\nb", "method", "Did you mean 'a_b'?"),
        ("a" * (LONGEST_NAME + 1), "method", f"at most {LONGEST_NAME} characters, got {LONGEST_NAME + 1}"),
        ("true", "method", "reads 'true' as a value: it cannot be a name. Choose another, such as 'my_true'"),
        ("known", "method", "a method called 'known' is already registered. Choose another, such as 'my_known'"),
        ("nfe", "metric", "every table has a column 'nfe'"),
        ("boot", "dataset", "a module distillbench_boot is already installed"),
        ("fresh", "methods", "no kind of plugin 'methods'. Did you mean 'method'? Possible: dataset, method, metric"),
    ],
)
def test_bad_names_and_kinds(tmp_path, name, kind, message):
    with pytest.raises(UserError) as refused:
        write(name, kind, tmp_path / "package", taken=["known"])
    assert message in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_not_changed(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in {"full": "is not empty", "file": "is not a folder", "link": "is not a folder"}.items():
        with pytest.raises(UserError, match=message):
            write("fresh", "metric", tmp_path / name)
    with pytest.raises(UserError, match="cannot write to"):
        write("fresh", "metric", tmp_path / "file" / "below")
    assert files(tmp_path) == ["file", "full/mine.txt"]


def test_an_empty_target_is_filled_and_a_missing_parent_created(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert write("fresh", "metric", Path(".")) == here
    assert len(files(here)) == 5 and Path.cwd() == here
    assert len(files(write("fresh", "metric", tmp_path / "a" / "b"))) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "here"]


class Stopped(BaseException):
    """Such as an interrupt."""


def stop(*_, **__) -> None:
    raise Stopped


STEPS = ("copier.run_copy", "pathlib.Path.chmod", "pathlib.Path.rename")


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
@pytest.mark.parametrize("step", STEPS)
def test_writing_that_stops_leaves_nothing(tmp_path, monkeypatch, step, there):
    target = tmp_path / "package"
    if there:
        target.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(step, stop)
        with pytest.raises(Stopped):
            write("fresh", "metric", target)
    assert [path.name for path in tmp_path.rglob("*")] == (["package"] if there else [])


@pytest.mark.parametrize("last", range(1, 5))
def test_filling_an_empty_folder_that_stops_midway_empties_it(tmp_path, monkeypatch, last):
    rename, moved = Path.rename, []

    def stopping(path: Path, to: Path) -> Path:
        moved.append(path.name)
        return stop() if len(moved) > last else rename(path, to)

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.rename", stopping)
        with pytest.raises(Stopped):
            write("fresh", "metric", tmp_path)
    assert len(moved) == last + 1 and not list(tmp_path.iterdir())


def test_a_full_disk_is_reported(tmp_path, monkeypatch):
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("copier.run_copy", full)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        write("fresh", "metric", tmp_path / "package")
    assert not list(tmp_path.iterdir())


def test_copier_is_imported_only_when_needed():
    code = "import sys, distillbench.cli.new_plugin; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"copier", "torch", "jinja2"} & set(done.stdout.split())
