"""What the command line tells without torch: from a table of the plugins, which says the same as the plugins do."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from command_line import exit_code
from distillbench.cli import commands, completion, plugin_table
from distillbench.cli.completion import completions
from distillbench.cli.plugin_table import kept_table, table_of
from distillbench.cli.settings_check import check_words
from distillbench.errors import UserError
from distillbench.registry import Selection, load_registry
from distillbench.runs.config import compose_runs, describe_options
from distillbench.runs.overrides import experiments

DIGITS = ["methods=[boot,cm]", "dataset=digits"]


@pytest.fixture(scope="module")
def registry():
    return Selection().load()


@pytest.fixture(scope="module")
def table(registry):
    return table_of(registry)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fails(call, *arguments):
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return ""


WRONG = [
    ["methods=[bot]", "dataset=digits"],
    ["methods=boot,bot", "dataset=digits"],
    ["methods=[boot]", "dataset=digit"],
    ["methods=[boot]"],
    ["dataset=digits"],
    ["boot"],
    ["+dataset=digits"],
    ["methods=[boot", "dataset=digits"],
    [*DIGITS, "teacher=traind"],
    ["experiment=smok"],
    [*DIGITS, "sed=1"],
    [*DIGITS, "accumulate=2"],
    [*DIGITS, "budget.image=3"],
    [*DIGITS, "budget.images.x=3"],
    [*DIGITS, "budget.images=abc"],
    [*DIGITS, "guidance=much"],
    [*DIGITS, "conditional=maybe"],
    [*DIGITS, "methods.boot.lrr=3"],
    [*DIGITS, "methods.pd.lr=3"],
    [*DIGITS, "methods.boot.lr=fast,1"],
    [*DIGITS, "dataset.sise=8"],
    [*DIGITS, "teacher.budget.image=8"],
    [*DIGITS, "teacher.widht=8"],
    ["methods=[boot]", "dataset=gmm", "dataset.cuont=8"],
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_is_wrong_is_told_in_the_words_of_the_full_check(words, table, registry):
    told = fails(check_words, words, table)
    assert told and told == fails(compose_runs, words, registry)


RIGHT = [
    [*DIGITS, "seed=0,1", "methods.boot.lr=3e-4,1e-3", "budget.images=1_000", "budget.limit=seconds"],
    ["methods=[]", "dataset=digits,gmm", "seed=range(3)"],
    [*DIGITS, "executor=local", "executor.workers=2", "evaluation.timing=off", "teacher.width=16", "run_name=2024_01"],
    [*DIGITS, "conditional=true", "guidance_range=[1,2]", "guidance=1.5", "augment.flip=true"],
    ["experiment=smoke", *DIGITS, "methods.boot.steps=8", "results_dir=~/x"],
    ["methods=[boot]", "dataset=ffhq", "dataset.download=true", "teacher.download=true", "teacher.path=x"],
]


@pytest.mark.parametrize("words", RIGHT, ids=" ".join)
def test_what_is_right_passes(words, table):
    check_words(words, table, need_methods=words[0] != "methods=[]")


def test_experiments_pass_and_have_a_summary(table):
    for name in experiments():
        check_words([f"experiment={name}"], table)
    summaries = commands.list_.callback.__globals__["experiment_summaries"]()
    assert all(summaries.values()) and "BOOT on FFHQ 64x64" in summaries["boot_ffhq64"]


def test_the_table_has_what_the_plugins_declare(table, registry):
    for kind, entries in table.kinds.items():
        assert entries.keys() == registry.of_kind(kind).keys()
    boot = table.kinds["methods"]["boot"]
    assert [(one.name, one.default, one.help) for one in boot.settings] == describe_options(
        registry.methods["boot"].cls.Config
    )
    assert boot.facts["paper"] == registry.methods["boot"].cls.paper and boot.facts["label"] == "BOOT"
    assert (boot.learned, boot.facts["nfe"]) == ("trajectory", "1")
    assert table.names == sorted(set(table.names))
    error = str(table.no("method, teacher, dataset or metric", "bott", table.names))
    assert "Did you mean 'boot'" in error and "more" in error and error.count("gmm") <= 1


def test_a_kept_table_is_read_until_something_changes(table, registry, cache, tmp_path, monkeypatch):
    module = tmp_path / "mine.py"
    module.write_text("")
    monkeypatch.setattr(plugin_table, "_depends_on", lambda registry: [module])
    plugin_table.keep(table, registry)
    assert kept_table() is None  # this process has loaded plugins, which may be others
    monkeypatch.delitem(sys.modules, "distillbench.registry")
    assert kept_table() == table
    assert kept_table([str(tmp_path)]) is None
    (file,) = cache.rglob("*.json")
    old = file.with_name("old.json")
    old.write_text("{}")
    os.utime(old, (time.time() - 31 * 86400,) * 2)
    plugin_table.keep(table, registry)
    assert not old.exists()
    module.write_text("x = 1")
    assert kept_table() is None
    file.write_text(file.read_text()[:-9])
    assert kept_table() is None


def test_a_table_with_a_broken_plugin_is_not_kept(cache):
    registry = load_registry([])
    registry.selection = Selection()
    registry.plugins = [plugin_table_plugin()]
    plugin_table.keep(table_of(registry), registry)
    assert not list(cache.rglob("*.json"))


def plugin_table_plugin():
    from distillbench.registry import Plugin

    return Plugin("mine", "d", "1", error="ImportError: gone")


def test_commands_answer_without_torch_once_the_table_is_kept(cache, tmp_path):
    """In processes: the first one loads the plugins, the others import no torch."""
    code = (
        "import sys; from distillbench.cli.commands import main\n"
        "try: main(sys.argv[1:])\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )

    def call(*words):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        return done.returncode, done.stdout, done.stderr.splitlines()

    assert call("run", "methods=[bot]", "dataset=digits")[2][-1] == "True"
    status, out, err = call("list", "--json")
    assert (status, err) == (0, ["False"])
    listed = json.loads(out)
    assert {"methods", "experiments", "samplers", "schedules"} <= listed.keys()
    assert next(one for one in listed["methods"] if one["name"] == "pd")["title"] == "progressive distillation"
    status, out, err = call("describe", "gmm", "--json")
    assert (status, err) == (0, ["False"]) and [one["kind"] for one in json.loads(out)] == ["teacher", "dataset"]
    status, out, err = call("plugins", "--json")
    assert err == ["False"] and any(one["name"] == "boot" and one["hooks"] for one in json.loads(out))
    status, out, err = call("run", "methods=[bot]", "dataset=digits")
    assert (status, out, err[-1]) == (2, "", "False") and "Did you mean 'boot'?" in err[0]


# --- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "incomplete", "found"),
    [
        ([], "dat", ["dataset="]),
        ([], "meth", ["methods=["]),
        ([], "dataset=di", ["dataset=digits"]),
        ([], "methods=[bo", ["methods=[boot]"]),
        ([], "methods=[boot,c", ["methods=[boot,cm]", "methods=[boot,ct]", "methods=[boot,ctm]"]),
        ([], "experiment=smo", ["experiment=smoke"]),
        ([], "budget.im", ["budget.images="]),
        (["methods=[boot]"], "methods.boot.lr_w", ["methods.boot.lr_warmup="]),
        (["dataset=gmm"], "dataset.co", ["dataset.count="]),
        ([], "conditional=", ["conditional=true", "conditional=false"]),
        # as Bash splits them
        (["dataset", "="], "di", ["digits"]),
        (["methods", "="], "[bo", ["[boot]"]),
        (["methods", "=", "[boot]", "dataset"], "", None),
        (["methods", "=", "[boot]"], "methods.boot.lr_w", ["methods.boot.lr_warmup="]),
    ],
)
def test_settings_are_completed(table, before, incomplete, found):
    offered = completions(table, before, incomplete)
    assert offered == (sorted(table.of_kind("datasets")) if found is None else found)


def test_bash_adds_no_blank_where_a_value_follows():
    """Click's template is changed in one place; if Click changes it, this fails."""
    assert completion.WITHOUT_BLANK in completion.BashWithoutBlank.source_template


def test_the_version_names_what_a_report_of_a_fault_needs(capsys):
    import torch

    assert exit_code("--version") == 0
    line = capsys.readouterr().out
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "no CUDA"
    assert re.fullmatch(r"distillbench \S+ \(.*\)\n", line)
    assert f"torch {torch.__version__.partition('+')[0]}" in line and built in line
