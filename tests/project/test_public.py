"""Public names are listed, typed and documented, and plugins use no others."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import distillbench

ROOT = Path(__file__).resolve().parents[2]
MODULES = [f"distillbench.{name}" for name in distillbench.PUBLIC_PACKAGES]
THIRD_PARTY = sorted((ROOT / "plugins").glob("*.py")) + sorted((ROOT / "examples").glob("*/src/*.py"))


def exported(module):
    """The public names of a module with what they are."""
    found = importlib.import_module(module)
    return {name: getattr(found, name) for name in found.__all__}


def public():
    """(module.name, value) of every public name."""
    for module in ["distillbench", *MODULES]:
        for name, value in exported(module).items():
            yield f"{module}.{name}", value


CALLABLE = {name: value for name, value in public() if inspect.isclass(value) or inspect.isfunction(value)}


def functions(value):
    """A function itself, or the public methods that a class defines."""
    if inspect.isfunction(value):
        return [value]
    members = (member for name, member in vars(value).items() if not name.startswith("_") or name == "__init__")
    return [unwrapped for member in members if (unwrapped := unwrap(member)) is not None]


def unwrap(member):
    if isinstance(member, property):
        return member.fget
    if isinstance(member, classmethod | staticmethod):
        return member.__func__
    member = getattr(member, "func", member)  # a cached property
    return member if inspect.isfunction(member) else None


@pytest.mark.parametrize("module", MODULES)
def test_every_public_module_lists_its_public_names(module):
    names = list(importlib.import_module(module).__all__)
    assert names and len(set(names)) == len(names)
    assert all(not name.startswith("_") for name in names)
    assert inspect.getdoc(importlib.import_module(module))


@pytest.mark.parametrize("name", CALLABLE)
def test_public_names_are_documented(name):
    assert inspect.getdoc(CALLABLE[name]), name
    if inspect.isclass(CALLABLE[name]):
        text = vars(CALLABLE[name])["__doc__"]
        assert text and not text.startswith(f"{CALLABLE[name].__name__}("), f"{name} has no docstring of its own"


@pytest.mark.parametrize("name", CALLABLE)
def test_public_names_are_typed(name):
    for function in functions(CALLABLE[name]):
        parameters = list(inspect.signature(function).parameters.values())
        untyped = [p.name for p in parameters if p.annotation is p.empty and p.name not in ("self", "cls")]
        assert not untyped, f"{function.__qualname__}: {untyped}"
        returned = inspect.signature(function).return_annotation
        assert returned is not inspect.Signature.empty or function.__module__ == "dataclasses", function.__qualname__


def test_the_package_is_marked_as_typed():
    assert (ROOT / "distillbench" / "py.typed").is_file()


@pytest.mark.parametrize("path", THIRD_PARTY, ids=lambda path: path.stem)
def test_plugins_use_public_names_only(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.startswith("distillbench.")]
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "distillbench":
            assert node.module in ["distillbench", *MODULES], f"{node.module} is private"
            possible = exported(node.module)
            assert not [alias.name for alias in node.names if alias.name not in possible], node.module
