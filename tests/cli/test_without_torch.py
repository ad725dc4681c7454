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
from distillbench.cli.plugin_state import PATH, depends_on, state_of
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


@pytest.fixture
def kept(table, registry, cache, tmp_path, monkeypatch):
    """``kept()``: write a table that depends on the folder tmp_path/plugins alone, and return its file."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "mine.py").write_text("x = 1")
    monkeypatch.setattr(plugin_table, "depends_on", lambda registry: [(str(folder), True)])
    monkeypatch.setattr(plugin_table, "load_plugins", lambda folders: registry)

    def keep():
        plugin_table.keep(table, registry, began=time.time() + 60)
        monkeypatch.delitem(sys.modules, "distillbench.registry", raising=False)
        return next(cache.rglob("*.json"))

    return keep


def test_a_kept_table_is_read_until_something_changes(kept, table, tmp_path):
    kept()
    assert kept_table() == table and kept_table([str(tmp_path)]) is None
    (tmp_path / "plugins" / "mine.py").write_text("x = 12")
    assert kept_table() is None


def test_a_process_that_has_loaded_plugins_reads_no_kept_table(kept, monkeypatch, table):
    kept()
    monkeypatch.setitem(sys.modules, "distillbench.registry", sys.modules["distillbench"])
    assert kept_table() is None


def test_tables_that_nobody_reads_are_deleted(kept):
    old = kept().with_name("old.json")
    old.write_text("{}")
    os.utime(old, (time.time() - 31 * 86400,) * 2)
    kept()
    assert not old.exists()


def same_size_and_time(folder):
    file = folder / "mine.py"
    before = file.stat()
    file.write_text("x = 2")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "content of the same size and time": same_size_and_time,
    "new module": lambda folder: (folder / "other.py").write_text(""),
    "new data file": lambda folder: (folder / "data.csv").write_text(""),
    "module gone": lambda folder: (folder / "mine.py").unlink(),
    "folder gone": lambda folder: folder.rename(folder.with_name("elsewhere")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_in_a_folder_of_plugins_is_seen(kept, tmp_path, change):
    kept()
    assert kept_table() is not None
    change(tmp_path / "plugins")
    assert kept_table() is None


def write(file, text=""):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


INSTALLS = {
    "another entry point": lambda site: write(site / "a-1.dist-info" / "entry_points.txt", "[distillbench]\nb = b"),
    "another version": lambda site: write(site / "a-1.dist-info" / "METADATA", "Version: 2"),
    "installed again": lambda site: write(site / "a-1.dist-info" / "RECORD"),
    "installed as a checkout": lambda site: write(site / "a.pth", "/elsewhere"),
    "another package": lambda site: write(site / "b-1.dist-info" / "METADATA"),
    "a package without metadata": lambda site: write(site / "b" / "__init__.py"),
    "a module": lambda site: write(site / "b.py"),
}


@pytest.mark.parametrize("install", INSTALLS.values(), ids=INSTALLS.keys())
def test_installing_and_updating_packages_is_seen(tmp_path, install):
    site = tmp_path / "site-packages"
    write(site / "a-1.dist-info" / "entry_points.txt", "[distillbench]\na = a")
    paths = [(str(site), False)]
    before = state_of(paths)
    write(site / "results" / "log.txt")  # what runs write does not count
    write(site / "log.txt")
    write(site / "__pycache__" / "a.pyc")
    assert state_of(paths) == before
    install(site)
    assert state_of(paths)[0] != before[0]


def test_all_files_of_a_plugin_package_count_and_a_missing_folder_can_appear(tmp_path):
    package = tmp_path / "mine"
    paths = [(str(package), True)]
    missing = state_of(paths)
    write(package / "__init__.py")
    first = state_of(paths)
    write(package / "data" / "table.csv", "1")
    assert len({missing[0], first[0], state_of(paths)[0]}) == 3


def test_a_table_depends_on_modules_their_packages_and_the_path(registry):
    paths = dict(depends_on(registry))
    package = os.path.dirname(plugin_table.__file__).removesuffix("/cli")
    assert paths[package] is True and __file__ in paths
    assert all(entry in paths for entry in PATH if entry)


def test_a_table_is_not_kept_if_a_file_may_have_changed_while_it_loaded(table, registry, cache, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("")
    monkeypatch.setattr(plugin_table, "depends_on", lambda registry: [(str(tmp_path / "mine.py"), False)])
    plugin_table.keep(table, registry, began=time.time())  # a second change could have the same time
    assert not list(cache.rglob("*.json"))


@pytest.mark.parametrize("damage", ["", "null", "[]", "[" * 100_000, '{"table": {}}', b"\xff\x00", "cut", "changed"])
def test_a_damaged_table_is_not_read(kept, damage):
    file = kept()
    text = {"cut": file.read_text()[:-9], "changed": file.read_text().replace('"boot"', '"boat"')}.get(damage, damage)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert kept_table() is None


@pytest.mark.parametrize("cache_home", ["/dev/null", "/dev/full", ""])
def test_without_a_place_for_it_the_table_is_made_anew(table, registry, tmp_path, monkeypatch, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    monkeypatch.setattr(os.path, "expanduser", str)  # a user without a home
    monkeypatch.chdir(tmp_path)
    plugin_table.keep(table, registry, began=time.time() + 60)
    monkeypatch.delitem(sys.modules, "distillbench.registry", raising=False)
    assert kept_table() is None and not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_table(table, registry, cache, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    plugin_table.keep(table, registry, began=time.time() + 60)
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_a_table_with_a_broken_plugin_is_not_kept(cache):
    registry = load_registry([])
    registry.selection = Selection()
    registry.plugins = [plugin_table_plugin()]
    plugin_table.keep(table_of(registry), registry, began=time.time() + 60)
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


def test_the_scripts_of_shells_are_those_that_were_tried():
    """Click's templates are changed in one place each; if Click changes them, this fails."""
    assert completion.WITHOUT_BLANK in completion.BashWithoutBlank.source_template
    assert completion.ZSH_WITHOUT_BLANK in completion.ZshWithoutBlank.source_template
    assert completion.FISH_SPLIT_ONCE in completion.FishWithCommas.source_template


def test_the_version_names_what_a_report_of_a_fault_needs(capsys):
    import torch

    assert exit_code("--version") == 0
    line = capsys.readouterr().out
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "no CUDA"
    assert re.fullmatch(r"distillbench \S+ \(.*\)\n", line)
    assert f"torch {torch.__version__.partition('+')[0]}" in line and built in line
