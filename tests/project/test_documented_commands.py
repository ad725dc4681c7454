"""Every `distillbench ...` of the README, docs/ and examples/ works: it is run, or planned, or at least composed.

All go through the command line in this process, in a folder of their own. HOW says how much of a command is run; what
needs files, a network, hardware or minutes is checked as far as it goes without them.
"""

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import sys
from pathlib import Path

import click
import pytest
import torch
import yaml

from distillbench.cli import command_options, plugin_table, result_commands
from distillbench.cli.commands import cli, main
from distillbench.cli.fetch_command import weighted_networks
from distillbench.registry import Entry, Plugin, Source, installed, load_registry
from distillbench.storage import sources
from distillbench.testing.bench_networks import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "results" / "reference" / "digits"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "examples").glob("*/README.md"))

# how each command is tried: "run" as written; "plan" with --dry-run; "parse" its words and the settings among them
HOW = {
    "run": "plan",
    "score": "plan",
    "tune": "plan",
    "list": "run",
    "describe": "run",
    "plugins": "run",
    "new-plugin": "run",
    "clean": "run",
    "show": "run",
    "report": "run",
    "leaderboard": "run",
    "compare": "run",
    "merge": "run",
    "check": "parse",  # seconds to minutes; tests/testing/test_conformance.py runs it
    "doctor": "parse",  # seconds; tests/cli/test_doctor.py runs it
    "fetch": "parse",  # downloads
    "export": "parse",  # needs trained weights; tests/export/test_export.py runs it
    "tune-levels": "parse",  # the same; tests/runs/test_level_tuning.py runs it
    "data check": "parse",  # reads the user's files
    "teacher train": "parse",  # trains
    "reference export": "parse",
    "reference import": "parse",  # needs another tool's file
    "reference show": "parse",
    "samples export": "parse",  # needs trained weights; tests/export/test_samples.py runs it
    "samples score": "parse",
}
NEEDS = re.compile(
    r"\.(path|base|evaluation_path|download)=|references=|cuda"
)  # settings of files and devices not here
WATCHES = "--watch"  # runs until it is interrupted
VARIABLES = {"gpu": "0", "seed": "0", "method": "boot"}
PREFIX = re.compile(
    r"(\$ |do |exec |uv run |pip install uv && uv run |(torchrun|accelerate launch) .*-m |[A-Z_]+=\S+ )*"
)
FENCE = re.compile(r"^(`{3,})(\S*)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)


def lines_of(text):
    """The logical lines of a page's blocks of shell commands, fenced or indented."""
    fenced = [code for _, language, code in FENCE.findall(text) if language in ("bash", "console", "sh")]
    found = [code for code in fenced if "\nerror: " not in code]  # those are for test_documented_errors_are_printed
    found += re.findall(r"(?:^ {4,}\S.*\n)+", FENCE.sub("", text), re.MULTILINE)
    return [line.strip() for code in found for line in re.sub(r"\\\n\s*", " ", code).splitlines()]


def words_of(line):
    """The words behind `distillbench` of each command in a line."""
    line = re.sub(r"\$\{?(\w+)\}?", lambda v: VARIABLES.get(v.group(1), v.group(1)), line)
    for part in re.split(r"(?<!uv) && |; |\|| & | &$", line):
        before, command, after = part.strip().partition("distillbench ")
        if command and PREFIX.fullmatch(before):
            with contextlib.suppress(ValueError):  # a quotation mark that does not close: prose
                yield [word for word in shlex.split(after, comments=True) if word != "..."]


def documented():
    """(page, words) of every command, each once per page."""
    found = {}
    for page in PAGES:
        for line in lines_of(page.read_text()):
            for words in words_of(line):
                if words and re.fullmatch(r"--?[a-z]+|[a-z-]+", words[0]) and "[OPTIONS]" not in words:
                    found[str(page.relative_to(ROOT)), tuple(words)] = None
    return [
        pytest.param(*key, id=f"{key[0]}: {' '.join(key[1])}", marks=[pytest.mark.nightly] if at_night(*key) else [])
        for key in found
    ]


def at_night(page, words):
    """Figures take seconds: by day docs/commands.md has a command that makes them."""
    return "figures" in words and page == "docs/recipes.md"


def module(path):
    """The module in a file, by a name that no other test gives it."""
    spec = importlib.util.spec_from_file_location(f"documented_{path.stem}", path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """The plugins that ship, those written on pages, those of examples/, and one made from the template."""
    sources, folder = list(installed()), tmp_path_factory.mktemp("plugins")
    files = sorted((ROOT / "examples").glob("*/src/distillbench_*.py"))
    for page in ("README.md", "docs/new_dataset.md", "docs/new_teacher.md", "docs/new_metric.md"):
        codes = [code for _, language, code in FENCE.findall((ROOT / page).read_text()) if language == "python"]
        for number, code in enumerate(code for code in codes if "def register_" in code):
            files.append(folder / f"{Path(page).stem.lower()}_{number}.py")
            files[-1].write_text(code)
    there = {source.name for source in sources}
    for file in files:
        if file.stem.removeprefix("distillbench_") not in there:
            sources.append(Source(file.stem, "documented", "0", lambda f=file: module(f)))
    found = load_registry(sources)
    assert not [plugin.error for plugin in found.broken if plugin.distribution == "documented"]
    cls = type("MyMethod", (found.methods["boot"].cls,), {"name": "my_method"})
    found.methods["my_method"] = Entry(cls, Plugin("my_method", "documented", "0"))
    return found


@pytest.fixture
def command_line(registry, monkeypatch, tmp_path):
    """Runs a command in an empty folder with the plugins of `registry`: its exit code and what it printed."""
    for module in (command_options, plugin_table, result_commands):
        monkeypatch.setattr(module, "load_plugins", lambda folders: registry)
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.chdir(tmp_path)

    def run(*words):
        printed, code = io.StringIO(), 0
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                main(list(words))
            except SystemExit as end:
                code = end.code or 0
        return code, printed.getvalue()

    return run


def parsed(words):
    """The command, its full name and its parameters; click raises for an option or argument that it does not take."""
    command, rest, names = cli, list(words), []
    while isinstance(command, click.Group):
        names.append(rest.pop(0))
        assert names[-1] in command.commands, f"no command {' '.join(names)}"
        command = command.commands[names[-1]]
    name = " ".join(names)
    return name, command.make_context(name, rest).params


DONE = {}  # what was tried, by its words: pages repeat each other


@pytest.mark.parametrize(("page", "words"), documented())
def test_documented_commands_work(page, words, command_line, registry):
    if "--help" in words or "-h" in words:
        assert command_line(*words)[0] == 0
        return
    name, params = parsed(words)
    how = HOW[name]
    if words in DONE or WATCHES in words:
        assert not DONE.get(words), DONE[words]
        return
    if how == "run":
        code, printed = as_written(command_line, words, params)
    elif how == "plan":
        code, printed = command_line(*words, "--show-config")
        if not code:
            here = not any(NEEDS.search(word) for word in words) and "--show-config" not in words
            composed = assert_paths_are_given(printed)
            here = here and not any(is_fetched(settings, "dataset") for settings in composed)
            if here and unplanned(composed):
                code, printed = command_line(*words, "estimate_seconds=0", "--dry-run")
    else:
        code, printed = names_and_settings(command_line, registry, name, params)
    DONE[words] = printed if code else ""
    assert code == 0, printed


def as_written(command_line, words, params):
    """Run it, with a copy of the reference run in every folder that it reads."""
    read = ["results/digits", *params.get("runs", ()), *(params[side] for side in ("a", "b") if side in params)]
    for folder in read:
        shutil.copytree(REFERENCE, str(folder).lstrip("/"), dirs_exist_ok=True)
    Path("results/cache/pairs").mkdir(parents=True, exist_ok=True)
    words = [re.sub(r"^/", "", re.sub(r"\bfid\b", "fd_efficientnet_lite0", word)) for word in words]
    if words[0] == "new-plugin":  # the name of a plugin that `registry` has from another page
        words[1] += "_too"
    return command_line(*words)


def names_and_settings(command_line, registry, name, params):
    """Compose the settings of a command that is not run, and look its names up."""
    settings = list(params.get("settings", ()))
    network = params.get("network")
    if name == "fetch":
        known = {*weighted_networks(registry), *sources.known(), "tiny"}
        assert {word for word in params["names"] if "=" not in word} <= known
        settings = [word for word in params["names"] if "=" in word]
    elif network and name == "check":
        assert network in ARCHITECTURES, network
    elif network:
        known = {entry.cls.network.name for entry in registry.metrics.values() if entry.cls.network}
        assert network in known | {"tiny"}, network  # docs/new_metric.md has one whose weights do not exist
    if name == "export":
        assert params["method"] in registry.methods
    if name == "check":
        kinds = [
            kind for kind in ("methods", "teachers", "datasets", "metrics") if params["name"] in registry.of_kind(kind)
        ]
        assert kinds, f"nothing is called {params['name']}"
        choice = {"methods": "methods=[{}]", "teachers": "teacher={}", "datasets": "dataset={}"}
        settings = [choice[kind].format(params["name"]) for kind in kinds if kind in choice] + settings
        settings = settings if any(word.startswith("dataset=") for word in settings) else ["dataset=digits", *settings]
    if not settings:
        return 0, ""
    composes = "run" if any(word.startswith("methods=") for word in settings) else "score"
    code, printed = command_line(composes, *dict.fromkeys(settings), "--show-config")
    if not code and name != "check":
        assert_paths_are_given(printed)
    return code, printed


def assert_paths_are_given(printed):
    """Datasets and teachers that are files have a path or a download; a teacher that is trained needs none."""
    composed = list(yaml.load_all(printed, yaml.CSafeLoader))
    for settings in composed:
        for group in ("dataset", "teacher"):
            chosen = settings[group]
            if "path" in chosen and chosen["kind"] != "trained":
                given = chosen["path"] or is_fetched(settings, group)
                assert given, f"{group}={chosen['kind']} without {group}.path"
    return composed


def is_fetched(settings, group):
    """Whether the dataset or teacher of these settings is read from a file that `distillbench fetch` gets."""
    dataset, teacher = settings["dataset"], settings["teacher"]
    if settings[group].get("path"):
        return False
    if group == "dataset":
        return sources.of_dataset(dataset["kind"], dataset) is not None
    side, conditional = dataset.get("resolution", 0), settings["conditional"]
    return (
        sources.of_teacher(dataset["kind"], side, conditional, teacher["kind"], teacher.get("release", "")) is not None
    )


PLANNED = set()  # methods with all that their plan depends on: each is planned once


def unplanned(composed):
    """Whether any of these settings has a method, or the teacher alone, that was not planned before."""
    keys = set()
    for settings in composed:
        shared = [settings[name] for name in ("dataset", "teacher", "conditional", "guidance", "guidance_range")]
        shared += [settings["evaluation"][name] for name in ("nfe", "teacher_samplers", "metrics", "references")]
        keys |= {repr((method, shared)) for method in list(settings["methods"].items()) or [""]}
    new = keys - PLANNED
    PLANNED.update(keys)
    return new


def test_most_commands_are_found():
    """A change of the pages' form that hid them from the tests would show here."""
    assert len(documented()) > 120


def messages():
    """(words, what is printed) of every command of a ```console block that shows an error."""
    for page in PAGES:
        for _, language, code in FENCE.findall(page.read_text()):
            if language == "console":
                command, _, printed = code.partition("\n")
                if printed.startswith("error: "):
                    yield pytest.param(*words_of(command), printed, id=command)


@pytest.mark.parametrize(("words", "printed"), list(messages()))
def test_documented_errors_are_printed(words, printed, command_line):
    """Word for word, up to "..." where the page leaves the rest out."""
    if "device=cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, found = command_line(*words, *(["--dry-run"] if words[0] == "run" else []))
    assert code == 2
    expected, found = " ".join(printed.split()), " ".join(found.split())
    if expected.endswith("..."):  # the page leaves the rest out
        expected = expected[:-3].strip()
        found = found[: len(expected)]
    assert found == expected
