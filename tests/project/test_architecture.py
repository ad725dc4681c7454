"""The core names no method, a plugin imports only the contract, and importing the package is light."""

import ast
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

from distillbench.registry import Source, installed, load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "distillbench"
BUILTIN = sorted((PACKAGE / "builtin").glob("*.py"))
CORE = [
    path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in ("builtin", "configs")
]
PLUGINS = sorted((ROOT / "plugins").glob("*.py"))
METHODS = [path for path in PLUGINS if "register_methods" in path.read_text()]


@functools.cache
def nodes(path):
    """All nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text(), str(path))))


@functools.cache
def imported(path):
    """Full names of all modules that a file imports, wherever in the file."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules(path):
    """The modules and packages below distillbench that a file imports."""
    places = {name: ROOT / name.replace(".", "/") for name in imported(path) if name.startswith("distillbench.")}
    return {name for name, place in places.items() if place.with_suffix(".py").exists() or place.is_dir()}


def strings(path):
    """The constant strings of a file that are values: everything but docstrings and texts for people.

    A text for people, such as an error message or the help of a setting, has a space in it; a method's name has none.
    """
    texts = [node.value for node in nodes(path) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return {text for text in texts if " " not in text.strip()}


def identifiers(path):
    """Every name that a file binds, reads, defines, passes or looks up."""
    fields = {ast.Name: "id", ast.Attribute: "attr", ast.arg: "arg", ast.keyword: "arg", ast.alias: "asname"}
    fields |= dict.fromkeys((ast.FunctionDef, ast.ClassDef), "name")
    return {getattr(node, fields[type(node)]) for node in nodes(path) if type(node) in fields}


def compared(path):
    """All constants in the comparisons and match cases of a file."""
    parts = [node for node in nodes(path) if isinstance(node, ast.Compare | ast.match_case)]
    return {node.value for part in parts for node in ast.walk(part) if isinstance(node, ast.Constant)}


def found(paths, search):
    """By file, what `search` finds in it; files without a finding are left out."""
    return {str(path.relative_to(ROOT)): what for path in paths if (what := search(path))}


@pytest.fixture(scope="module")
def registry():
    return load_registry()


@pytest.fixture(scope="module")
def names(registry):
    """The names of the built-in methods, with their classes."""
    own = {name: entry for name, entry in registry.methods.items() if entry.plugin.distribution == "distillbench"}
    assert len(own) >= 4
    return {name: entry.cls.__name__ for name, entry in own.items()}


# --- the core --------------------------------------------------------------------------------------------------------


def test_the_core_is_found_wherever_its_modules_lie():
    assert len(CORE) > 100 and PACKAGE / "diffusion" / "samplers.py" in CORE


def test_the_core_imports_no_plugin():
    assert not found(CORE + BUILTIN, lambda path: {n for n in imported(path) if n.startswith("distillbench_")})


def test_the_core_imports_nothing_built_in():
    """Built-in teachers, datasets and metrics are registered like plugins."""
    assert not found(CORE, lambda path: {name for name in imported(path) if name.startswith("distillbench.builtin")})


def test_the_core_names_no_method(names):
    """No value, module, class or variable of the core is called like a method or its class.

    One local name is exempt, because everyone writes ``import pandas as pd``.
    """
    taken = set(names) | set(names.values())

    def search(path):
        exempt = {"pd"} if "pandas" in imported(path) else set()
        return strings(path) & (set(names) | {plugin.stem for plugin in PLUGINS}) | identifiers(path) & taken - exempt

    assert not found(CORE + BUILTIN, search)


def test_the_core_compares_with_no_dataset_teacher_or_metric(registry):
    """Defaults may name what is built in; code that asks "is it this one?" may not."""
    shipped = {*registry.teachers, *registry.datasets, *registry.metrics}
    assert not found(CORE, lambda path: compared(path) & shipped)


def test_packages_import_only_from_lower_layers(capsys):
    """The contracts of [tool.importlinter] in pyproject.toml: layers, no plugins, no circles."""
    assert lint_imports(str(ROOT / "pyproject.toml")) == 0, capsys.readouterr().out


def test_importing_the_package_is_light():
    code = "import sys, distillbench; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "pandas", "hydra", "omegaconf", "pydantic", "rich", "click", "pluggy"}
    assert not heavy & set(done.stdout.split())


def test_the_public_names_exist():
    import distillbench

    for name in distillbench.__all__:
        assert callable(getattr(distillbench, name))
    with pytest.raises(AttributeError, match="no attribute 'Metod'"):
        distillbench.Metod  # noqa: B018


# --- plugins ---------------------------------------------------------------------------------------------------------


def test_plugins_import_only_torch_numpy_and_distillbench():
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "distillbench"}
    assert not found(PLUGINS, lambda path: {name.split(".")[0] for name in imported(path)} - allowed)


def test_plugins_import_only_public_packages():
    """How training is run, counted and stored is not their concern."""
    allowed = {"distillbench.diffusion", "distillbench.networks", "distillbench.options"}
    assert not found(PLUGINS, lambda path: modules(path) - allowed)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_a_method_is_one_short_file(path):
    assert len(path.read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_a_method_names_no_other(path, names):
    own = load_registry([Source("x", "x", "1", lambda: importlib.import_module(path.stem))]).methods
    assert not strings(path) & (set(names) - set(own))


def test_every_method_file_is_registered_in_pyproject():
    points = (ROOT / "pyproject.toml").read_text().split("[project.entry-points.distillbench]")[1].split("[tool")[0]
    for path in PLUGINS:
        assert f'"{path.stem}"' in points


def planned(registry, folder):
    """What a plan says of each method: its settings, its rows and its cost."""
    words = [f"methods=[{','.join(registry.methods)}]", "dataset=digits", "experiment=smoke"]
    cells = plan(compose_runs([*words, f"results_dir={folder / 'results'}"], registry), registry)
    return {cell.name: (vars(cell.method_config), cell.nfe, cell.cost) for cell in cells if cell.entry}


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """The registry as it is, one with all methods' files in modules of another distribution, and their plans."""
    folder = tmp_path_factory.mktemp("moved")
    others = [source for source in installed() if f"distillbench_{source.name}" not in {path.stem for path in METHODS}]

    def registry(prefix, distribution):
        modules = [f"{prefix}{path.stem}" for path in METHODS]
        own = [Source(name, distribution, "9.9", functools.partial(importlib.import_module, name)) for name in modules]
        return load_registry([*others, *own])

    for path in METHODS:
        (folder / f"another_{path.stem}.py").write_text(path.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        here, there = registry("", "distillbench"), registry("another_", "elsewhere")
        assert not there.broken
        yield here, there, planned(here, folder), planned(there, folder)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.name)
def test_a_method_can_move_to_another_package(path, moved):
    """The same file in another module, plugin and distribution gives the same identity and the same plan."""
    here, there, planned_here, planned_there = moved
    brings = {plugin.name.removeprefix("another_"): plugin.brings for plugin in there.plugins}[path.stem]
    name = brings[0].removeprefix("methods: ")
    assert brings == {plugin.name: plugin.brings for plugin in here.plugins}[path.stem] != []
    assert there.methods[name].identity()["source_sha256"] == here.methods[name].identity()["source_sha256"]
    assert there.methods[name].cls is not here.methods[name].cls
    assert planned_here[name] == planned_there[name]


# --- the tests -------------------------------------------------------------------------------------------------------


def test_files_of_tests_import_no_other():
    """What they share is in tests/support."""
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert not found(files, lambda path: {name for name in imported(path) if name.startswith("test_")})
