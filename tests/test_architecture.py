"""The core knows no method, a plugin needs no core but its contract, and nothing is imported before it is needed."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from distillbench.config import compose_runs
from distillbench.plan import plan
from distillbench.registry import Source, installed, load_registry

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted((ROOT / "distillbench").glob("*.py"))
BUILTIN = sorted((ROOT / "distillbench" / "builtin").glob("*.py"))
PLUGINS = sorted((ROOT / "plugins").glob("*.py"))
METHODS = [path for path in PLUGINS if "register_methods" in path.read_text()]


def tree(path):
    return ast.parse(path.read_text(), str(path))


def imported(path):
    """Full names of all modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def strings(path):
    """The constant strings of a file that are values: everything but docstrings and texts for people.

    A text for people is one with a space in it, such as an error's or a setting's help: a method's name has none.
    """
    texts = [
        node.value for node in ast.walk(tree(path)) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return {text for text in texts if " " not in text.strip()}


def identifiers(path):
    """Every name that a file binds, reads, defines, passes or looks up."""
    fields = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.keyword: "arg", ast.alias: "asname"}
    fields |= dict.fromkeys((ast.FunctionDef, ast.ClassDef), "name")
    nodes = list(ast.walk(tree(path)))
    return {getattr(node, field) for node in nodes for kind, field in fields.items() if isinstance(node, kind)}


@pytest.fixture(scope="module")
def names():
    """The names of the methods that ship, with their classes."""
    registry = load_registry()
    own = {name: entry for name, entry in registry.methods.items() if entry.plugin.distribution == "distillbench"}
    assert len(own) >= 4
    return {name: entry.cls.__name__ for name, entry in own.items()}


# --- the core --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CORE + BUILTIN, ids=lambda path: path.name)
def test_the_core_imports_no_plugin(path):
    assert not [name for name in imported(path) if name.startswith("distillbench_")]


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_does_not_know_what_is_built_in(path):
    """Teachers, datasets and metrics that ship come by the same door as plugins."""
    assert not [name for name in imported(path) if name.startswith("distillbench.builtin")]


@pytest.mark.parametrize("path", CORE + BUILTIN, ids=lambda path: path.name)
def test_the_core_names_no_method(path, names):
    """No value, module, class or variable of the core is called as a method or its class is.

    One local name is exempt because all the world writes ``import pandas as pd``.
    """
    values = strings(path)
    assert not values & set(names)
    assert not values & {plugin.stem for plugin in PLUGINS}
    exempt = {"pd"} if "pandas" in imported(path) else set()
    assert not identifiers(path) & (set(names) | set(names.values())) - exempt


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.name)
def test_the_core_names_no_dataset_teacher_or_metric_but_as_a_default(path):
    """Defaults may name what ships; code that asks "is it this one?" may not."""
    registry = load_registry()
    shipped = {*registry.teachers, *registry.datasets, *registry.metrics}
    compared = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Compare | ast.match_case)]
    texts = {node.value for part in compared for node in ast.walk(part) if isinstance(node, ast.Constant)}
    assert not texts & shipped


def test_importing_the_package_is_light():
    code = "import sys, distillbench; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "pandas", "hydra", "omegaconf", "pydantic", "rich", "click", "pluggy"}
    assert not heavy & set(done.stdout.split())


def test_the_public_names_are_there():
    import distillbench

    for name in distillbench.__all__:
        assert callable(getattr(distillbench, name))
    with pytest.raises(AttributeError, match="no attribute 'Metod'"):
        distillbench.Metod  # noqa: B018


# --- plugins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.name)
def test_plugins_need_only_torch_numpy_and_the_contract(path):
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "numpy", "distillbench"}


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.name)
def test_plugins_do_not_reach_into_the_harness(path):
    """They use the contract and the mathematics; how training is driven, counted and stored is not theirs."""
    allowed = {"conditions", "consistency", "denoiser", "dropout", "losses"}
    allowed |= {"networks", "options", "samplers", "schedules"}
    modules = {name.split(".")[1] for name in imported(path) if name.startswith("distillbench.")}
    submodules = {module for module in modules if (ROOT / "distillbench" / f"{module}.py").exists()}
    assert submodules <= allowed


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_a_method_is_one_short_file(path):
    assert len(path.read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_a_method_names_no_other(path, names):
    own = load_registry([Source("x", "x", "1", lambda: importlib.import_module(path.stem))]).methods
    assert not strings(path) & (set(names) - set(own))


def test_every_method_file_is_a_plugin_of_this_project():
    points = (ROOT / "pyproject.toml").read_text().split("[project.entry-points.distillbench]")[1].split("[tool")[0]
    for path in PLUGINS:
        assert f'"{path.stem}"' in points


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_a_method_can_move_to_a_stranger(path, tmp_path, monkeypatch):
    """The same file, under another module, plugin and distribution, does the same."""
    monkeypatch.syspath_prepend(tmp_path)
    moved = f"a_stranger_s_{path.stem}"
    (tmp_path / f"{moved}.py").write_text(path.read_text())

    others = [source for source in installed() if source.name != path.stem.removeprefix("distillbench_")]

    def with_file(module, plugin, distribution):
        return load_registry([*others, Source(plugin, distribution, "9.9", lambda: importlib.import_module(module))])

    here, there = with_file(path.stem, "own", "distillbench"), with_file(moved, "other_name", "stranger")
    assert not there.broken
    assert there.plugins[-1].brings == here.plugins[-1].brings != []
    for name in there.methods:
        assert there.methods[name].identity()["source_sha256"] == here.methods[name].identity()["source_sha256"]
    name = there.plugins[-1].brings[0].removeprefix("methods: ")
    assert there.methods[name].cls is not here.methods[name].cls
    assert priced(here, name, tmp_path) == priced(there, name, tmp_path)


def priced(registry, name, folder):
    """What a plan says of a method: its settings, its rows, its price."""
    words = [f"methods=[{name}]", "dataset=digits", "experiment=smoke", f"results_dir={folder / 'results'}"]
    configs = compose_runs(words, registry)
    cell = plan(configs, registry)[-1]
    return vars(cell.method_config), cell.nfe, cell.price
