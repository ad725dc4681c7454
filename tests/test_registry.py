"""Every plugin is loaded in the same way; a broken one is named and left out, and everything else works."""

import importlib
import itertools
import textwrap

import pytest

from distillbench.cli import commands
from distillbench.errors import UserError
from distillbench.hookspecs import API, CHANGES
from distillbench.registry import Source, installed, load_registry
from plugin_code import IMPORTS, METHOD, METRIC

SHIPPED = {
    "methods": {"boot", "cm", "direct", "pd"},
    "teachers": {"trained"},
    "datasets": {"digits", "folder"},
    "metrics": {"fd_efficientnet_lite0", "teacher_rmse", "fid", "fid_clean", "kid", "fd_dinov2", "clip_score_vit_l14"},
}
numbers = itertools.count()


@pytest.fixture
def source(tmp_path, monkeypatch):
    """``source(code)``: a third-party plugin with this code, as a module that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(code, name="other", imports=IMPORTS):
        module = f"other_{next(numbers)}"
        (tmp_path / f"{module}.py").write_text(imports + textwrap.dedent(code))
        return Source(name, f"{name}-package", "1.0", lambda: importlib.import_module(module))

    return make


def error_of(registry, name="other"):
    (plugin,) = [plugin for plugin in registry.plugins if plugin.name == name]
    assert plugin in registry.broken
    assert plugin.brings == []
    assert "\n" not in plugin.error
    assert "Traceback" in plugin.traceback
    return plugin.error


# --- what ships ------------------------------------------------------------------------------------------------------


def test_built_in_classes_are_found_by_entry_points():
    registry = load_registry()
    assert not registry.broken
    for kind, names in SHIPPED.items():
        assert names <= set(registry.of_kind(kind))


def test_own_plugins_are_loaded_first():
    first = list(itertools.takewhile(lambda s: s.distribution == "distillbench", installed()))
    assert {s.name for s in first} >= {"boot", "cm", "trained", "digits", "folder", "inception", "efficientnet_lite0"}


def test_the_identity_of_an_entry_changes_with_its_version_and_source(source):
    first, same, other = (load_registry([source(code)]) for code in (METHOD, METHOD, METHOD + "\n# changed\n"))
    identities = [registry.get("methods", "mine").identity() for registry in (first, same, other)]
    assert identities[0] == identities[1] != identities[2]
    assert identities[0]["distribution"] == "other-package"
    assert identities[0]["version"] == "1.0"


def test_an_unknown_name_is_an_error_with_a_suggestion():
    with pytest.raises(UserError, match=r"no method 'bot'\. Did you mean 'boot'\? Possible: boot, cm, ct, ctm, dir"):
        load_registry().get("methods", "bot")


# --- third parties ---------------------------------------------------------------------------------------------------


def test_a_third_party_plugin_is_loaded_like_built_in_ones(source):
    registry = load_registry([*installed(), source(METHOD + METRIC)])
    assert not registry.broken
    assert registry.plugins[-1].brings == ["methods: mine", "metrics: score"]
    assert registry.get("methods", "mine").cls.name == "mine"


def test_an_entry_point_of_another_distribution_is_found(tmp_path, monkeypatch):
    """An installed package of a third party: its metadata and its module are on the path, nothing else."""
    (tmp_path / "other_entry.py").write_text(IMPORTS + METHOD)
    info = tmp_path / "other-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text("[distillbench]\nmine = other_entry\nlost = no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry = load_registry()
    assert registry.get("methods", "mine").plugin.distribution == "other"
    assert registry.get("methods", "mine").plugin.version == "2.5"
    assert error_of(registry, "lost") == "ModuleNotFoundError: No module named 'no_such_module_anywhere'"


BROKEN = {
    "raises on import": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "leaves on import": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "is not Python": ("def (:", "SyntaxError"),
    "misspells a hook": (
        METHOD.replace("register_methods", "register_method"),
        "there is no hook 'register_method'. Did you mean 'register_methods'? Possible: register_methods, ",
    ),
    "forgets the marker": (METHOD.replace(f"@hookimpl(api={API})", ""), "no function is marked with @hookimpl"),
    "uses the marker without a version": (
        METHOD.replace(f"(api={API})", ""),
        f"register_methods was written without a version of the plugin contract, this is version {API}. "
        f"To do: {CHANGES[1]}; {CHANGES[2]}",
    ),
    "is for a later core": (
        METHOD.replace(f"api={API}", f"api={API + 1}"),
        f"register_methods was written for version {API + 1} of the plugin contract, "
        f"distillbench 0.1.0 has version {API}: ",
    ),
    "misspells the argument": (
        METHOD.replace("def register_methods(register)", "def register_methods(registry)"),
        "Argument(s) {'registry'} are declared in the hookimpl but can not be found in the hookspec",
    ),
    "raises in the hook": (METHOD.replace("register(Mine)", "raise KeyError('x')"), "KeyError: 'x'"),
    "registers an instance": (
        METHOD.replace("register(Mine)", "register(3)"),
        "register_methods takes subclasses of Method, got 3",
    ),
    "registers with the wrong hook": (
        METHOD.replace("register_methods", "register_metrics"),
        "register_metrics takes subclasses of Metric",
    ),
    "has no name": (METHOD.replace("name, paper,", "_, paper,"), "Mine does not declare name (str)"),
    "has a name that is no text": (METHOD.replace('"mine"', "7"), "Mine does not declare name (str)"),
    "has no paper": (METHOD.replace("paper,", "_,"), "Mine does not declare paper (str)"),
    "is vague about data": (METHOD.replace("False", '"no"'), "Mine does not declare needs_data (bool)"),
    "has a name that cannot be typed": (METHOD.replace('"mine"', '"My Method"'), "got 'My Method'"),
    "has a name that means something else": (METHOD.replace('"mine"', '"null"'), "got 'null'"),
    "does not define everything": (METHOD.replace("def sample", "def sampel"), "Mine does not define sample"),
    "has no Config": (
        METHOD.replace("Config = MethodConfig", ""),
        "Mine.Config must be a @dataclass derived from MethodConfig",
    ),
    "has a Config of something else": (
        METHOD.replace("Config = MethodConfig", "Config = DatasetConfig"),
        "Mine.Config must be a @dataclass derived from MethodConfig",
    ),
    "forgets @dataclass, so its settings would be none": (
        METHOD.replace("Config = MethodConfig", "class Config(MethodConfig):\n        lr: float = 0.5"),
        "Mine.Config must be a @dataclass derived from MethodConfig",
    ),
    "has a setting that no text can give": (
        METHOD.replace(
            "Config = MethodConfig",
            "@dataclass\n    class Config(MethodConfig):\n        weights: numpy.ndarray = None",
        ),
        "Mine.Config has a setting that cannot be read from text",
    ),
    "takes a name twice": (
        METHOD.replace("register(Mine)", "register(Mine); register(Mine)"),
        "the name 'mine' of methods is taken by plugin other (other-package)",
    ),
    "takes a taken name": (
        METHOD.replace('"mine"', '"boot"'),
        "the name 'boot' of methods is taken by plugin boot (distillbench)",
    ),
    "does not know which way is better": (
        METRIC.replace('"lower"', '"up"'),
        "must be one of lower, higher, none, got 'up'",
    ),
    "takes the name of a column": (
        METRIC.replace('"score",', '"train_seconds",'),
        "the name 'train_seconds' of metrics is taken by a column of every table",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_reported_and_not_used(source, fault):
    code, message = BROKEN[fault]
    registry = load_registry([*installed(), source(code), source(METHOD, name="good")])
    assert message in error_of(registry)
    assert [plugin.name for plugin in registry.broken] == ["other"]
    assert registry.get("methods", "mine").plugin.name == "good"  # what came after works
    assert registry.get("methods", "boot").plugin.distribution == "distillbench"


def test_a_broken_plugin_registers_nothing(source):
    """What it registered before it failed is not kept."""
    registry = load_registry([source(METHOD + METRIC.replace('"lower"', '"up"'))])
    error_of(registry)
    assert registry.methods == registry.metrics == {}


def test_a_class_without_a_source_file_is_not_used(source):
    """Its hash is part of every key; without it, results of two versions could not be told apart."""
    code = f"namespace = {{'__name__': 'nowhere'}}\nexec({IMPORTS + METHOD!r}, namespace)\n"
    registry = load_registry([source(code + "register_methods = namespace['register_methods']")])
    assert "TypeError" in error_of(registry)


def test_two_plugins_with_the_same_class_name(source):
    registry = load_registry([source(METHOD, name="one"), source(METHOD, name="two")])
    assert error_of(registry, "two") == "the name 'mine' of methods is taken by plugin one (one-package)"
    assert registry.get("methods", "mine").plugin.name == "one"


@pytest.mark.parametrize("words", [["list", "methods"], ["describe", "boot"]], ids=" ".join)
def test_the_command_line_warns_of_broken_plugins(tmp_path, monkeypatch, capsys, words):
    (tmp_path / "other_cli.py").write_text("raise RuntimeError('no luck')")
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distillbench]\nmine = other_cli\n")
    monkeypatch.syspath_prepend(tmp_path)
    commands.main(words)
    out, err = capsys.readouterr()
    assert err == "warning: plugin mine (other 1.0) is left out: RuntimeError: no luck\n"
    assert "boot" in out
    commands.main(["plugins"])
    out, err = capsys.readouterr()
    assert "mine                other 1.0; left out: RuntimeError: no luck" in out
    assert "left out: RuntimeError: no luck" in out
    assert err == ""
