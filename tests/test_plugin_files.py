"""Plugins that are single files, what limits which load, and which version of the contract they were written for."""

import subprocess
import sys

import pandas as pd
import pytest

from distillbench import hookspecs
from distillbench.cli import commands
from distillbench.errors import UserError
from distillbench.registry import in_folders, installed, load_registry
from plugin_code import IMPORTS, METHOD, METRIC


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """``folder(name=code, ...)``: a folder of its own with these files; what loading them changes is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def make(**files):
        for name, code in files.items():
            (tmp_path / f"{name}.py").write_text(code)
        return tmp_path

    yield make
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


def method(name):
    return IMPORTS + METHOD.replace('"mine"', f'"{name}"')


# --- files -----------------------------------------------------------------------------------------------------------


def test_files_are_plugins_and_files_with_an_underscore_are_helpers(folder):
    helped = "from _pf_help import VALUE\n" + method("pf_b")
    here = folder(pf_a=method("pf_a") + METRIC, pf_b=helped, _pf_help="VALUE = 1\n")
    registry = load_registry(in_folders([here, here / "." / ""]))
    assert not registry.broken
    a, b = registry.plugins
    assert (a.name, a.distribution, len(a.version), a.origin) == ("pf_a", "file", 8, str(here / "pf_a.py"))
    assert (a.hooks, a.brings) == (["register_methods", "register_metrics"], ["methods: pf_a", "metrics: score"])
    assert b.brings == ["methods: pf_b"]


def test_the_identity_of_a_file_includes_its_helpers(folder):
    here = folder(pf_c=method("pf_c"), pf_other="")

    def identity():
        return load_registry(in_folders([here])).methods["pf_c"].identity()

    first = identity()
    folder(pf_other="VALUE = 2\n")
    assert identity() == first
    folder(_pf_help2="VALUE = 1\n")
    second = identity()
    assert second["source_sha256"] != first["source_sha256"]
    folder(_pf_help2="VALUE = 2\n")
    assert identity()["source_sha256"] not in (first["source_sha256"], second["source_sha256"])


def test_the_identity_includes_all_modules_of_a_package_and_base_classes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "pf_package"
    package.mkdir()
    (package / "__init__.py").write_text(method("pf_d"))
    (package / "more.py").write_text("VALUE = 1\n")
    derived = METHOD.replace("(Method)", "(Base)").replace("mine", "pf_e")
    derived = f"{IMPORTS}from pf_package import Mine as Base\n{derived}"
    (tmp_path / "pf_e.py").write_text(derived)
    info = tmp_path / "pf-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pf\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[distillbench]\npf_d = pf_package\npf_e = pf_e\n")

    def hashes():
        sources = [source for source in installed() if source.distribution == "pf"]
        methods = load_registry(sources).methods
        return [methods[name].identity()["source_sha256"] for name in ("pf_d", "pf_e")]

    first = hashes()
    (package / "more.py").write_text("VALUE = 2\n")
    second = hashes()
    assert first[0] != second[0] and first[1] == second[1]
    (package / "__init__.py").write_text(method("pf_d") + "# changed\n")
    third = hashes()
    assert second[0] != third[0] and second[1] != third[1]


def test_a_file_named_like_another_module_is_not_used(folder):
    registry = load_registry(in_folders([folder(numpy=method("pf_f"))]))
    (plugin,) = registry.broken
    assert plugin.error.startswith("numpy.py has the name of another module, ") and "rename it" in plugin.error


def test_a_class_name_that_is_taken_is_refused(folder):
    registry = load_registry([*installed(), *in_folders([folder(pf_g=method("boot"))])])
    assert registry.broken[0].error == "the name 'boot' of methods is taken by plugin boot (distillbench)"


@pytest.mark.parametrize("what", ["missing", "file", "empty", "helpers only"])
def test_a_folder_without_plugins_is_a_user_error(tmp_path, what):
    (tmp_path / "file").write_text("")
    (tmp_path / "helpers only").mkdir()
    (tmp_path / "helpers only" / "_help.py").write_text("")
    (tmp_path / "empty").mkdir()
    message = "is not a folder" if what in ("missing", "file") else "holds no plugin, a file NAME.py"
    with pytest.raises(UserError, match=message):
        in_folders([tmp_path / what])


def test_on_the_command_line(folder, capsys, monkeypatch):
    here = folder(pf_h=method("pf_h"), pf_broken="raise RuntimeError('no luck')")
    commands.main(["describe", "pf_h", "--plugins-dir", str(here)])
    out, err = capsys.readouterr()
    assert "method from plugin pf_h (file " in out and "methods.pf_h.lr=" in out
    assert err.startswith("warning: plugin pf_broken (file ") and "Traceback" not in err
    monkeypatch.setenv("DISTILLBENCH_PLUGINS_DIR", str(here))
    commands.main(["plugins", "--debug"])
    out, err = capsys.readouterr()
    assert "left out: RuntimeError: no luck" in " ".join(out.split()) and "Traceback" in err


@pytest.mark.nightly
def test_a_method_from_a_file_is_timed_in_a_fresh_process(folder, tmp_path):
    """The process that measures speed is handed the method, so it must find the file as well."""
    results = tmp_path / "results"
    trained = method("pf_i").replace("batch.noise()", "self.student(batch.noise(), batch.uniform(), batch.c)")
    ones = "x[:, :1, :1, :1].double() * 0 + 1"
    trained = trained.replace("return noise(0)", f"return self.student(x := noise(0), {ones}, c)")
    words = ["run", "--plugins-dir", folder(pf_i=trained), "methods=[pf_i]", "dataset=gmm", "teacher=gmm"]
    words += ["experiment=smoke", "budget.images=64", "batch_size=32", "evaluation.images=64", "run_name=one"]
    words += [f"results_dir={results}"]
    code = "import torch; torch.set_num_threads(1); from distillbench.cli.commands import main; "
    code += f"main({[str(word) for word in words]!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(results / "one" / "table.csv")
    row = table[table["method"] == "pf_i"].iloc[0]
    assert row["status"] == "ok" and row["sample_latency_p50_ms"] > 0


# --- what loads ------------------------------------------------------------------------------------------------------


def test_patterns_limit_what_loads(folder):
    sources = [*installed(), *in_folders([folder(pf_j=method("pf_j"), pf_k=method("pf_k"))])]
    registry = load_registry(sources, ["digits", "pf_?"])
    assert set(registry.methods) == {"pf_j", "pf_k"} and set(registry.datasets) == {"digits"}
    left = {plugin.name: plugin.not_selected for plugin in registry.plugins if plugin.not_selected}
    assert left["boot"] == "DISTILLBENCH_PLUGINS=digits,pf_?" and not registry.broken
    assert set(load_registry(sources, ["file"]).methods) == {"pf_j", "pf_k"}
    assert "pf_j" not in load_registry(sources, ["distillbench"]).methods


def test_a_pattern_without_matches_is_a_user_error(monkeypatch, capsys):
    monkeypatch.setenv("DISTILLBENCH_PLUGINS", "distillbench, bot")
    with pytest.raises(SystemExit) as exit:
        commands.main(["list", "methods"])
    assert exit.value.code == 2
    assert "no plugin or distribution 'bot' (DISTILLBENCH_PLUGINS). Did you mean 'boot'?" in capsys.readouterr().err


# --- versions of the contract ----------------------------------------------------------------------------------------


def test_a_plugin_for_an_older_contract_gets_the_list_of_changes(folder, monkeypatch):
    changes = {1: "begin", 2: "rename a to b", 3: "return c"}
    written = f"api={hookspecs.API}"
    monkeypatch.setattr(hookspecs, "API", 3)
    monkeypatch.setattr(hookspecs, "CHANGES", changes)
    here = folder(
        pf_l=method("pf_l").replace(written, "api=1"),
        pf_m=method("pf_m").replace(written, "api=2"),
        pf_n=method("pf_n").replace(written, "api=3"),
    )
    one, two, three = load_registry(in_folders([here])).plugins
    assert one.error.endswith("for version 1 of the plugin contract, this is version 3. To do: rename a to b; return c")
    assert two.error.endswith("for version 2 of the plugin contract, this is version 3. To do: return c")
    assert three.brings == ["methods: pf_n"]


def test_every_contract_version_has_a_change_note():
    assert set(hookspecs.CHANGES) == set(range(1, hookspecs.API + 1))
