"""docs/ agrees with the code: signatures, names, commands, settings, links, plugins; and the site builds."""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from typing import get_args

import click
import pytest
import torch
from safetensors.torch import save_file

import distillbench
from distillbench import Batch, hookspecs
from distillbench.cli import clean
from distillbench.cli.commands import cli
from distillbench.diffusion import schedules
from distillbench.execution import workers
from distillbench.records.records import FINAL, MIGRATED, SCHEMA, Status
from distillbench.registry import Entry, Plugin, Source, installed, load_registry
from distillbench.runs.config import RunConfig, StatesConfig, compose_runs
from distillbench.runs.plan import plan
from distillbench.system.progress import Progress
from distillbench.testing import methods
from distillbench.testing.conformance import SUITES, assert_conforms
from docs_pages import DOCS, ROOT, page_generator
from level3_tolerances import TOLERANCES

PAGES = sorted(DOCS.glob("*.md"))
CONTRACT = (DOCS / "contract.md").read_text()


FENCE = re.compile(r"^(`{3,})(\S*)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)


def blocks(text, *languages):
    """The fenced blocks of a page in one of `languages`."""
    return [code for _, language, code in FENCE.findall(text) if language in languages]


def prose(text):
    """A page without its fenced blocks."""
    return FENCE.sub("", text)


def modules(page):
    """The plugins on a page: blocks that are whole modules."""
    return [code for code in blocks((DOCS / page).read_text(), "python") if code.startswith('"""')]


def load(code, path):
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# --- the contract ----------------------------------------------------------------------------------------------------

HOME = {"ImageSet": "evaluation", "NoiseSchedule": "diffusion"}  # the others: distillbench
IN_PART = {"Batch", "Condition", "Workspace", "PairStore", "Teacher", "Denoiser", "Noise", "ImageSet"}


def stubs():
    trees = [ast.parse(code) for code in blocks(CONTRACT, "python") if not code.startswith('"""')]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def real(name):
    return getattr(importlib.import_module(f"distillbench.{HOME[name]}" if name in HOME else "distillbench"), name)


def source_of(cls):
    return ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]


def functions(node):
    """name: its arguments and what it returns, as text; properties and functions alike."""
    found = [f for f in node.body if isinstance(f, ast.FunctionDef)]
    text = lambda f: f"({ast.unparse(f.args)}) -> {ast.unparse(f.returns) if f.returns else None}"
    names = ("__init__", "__call__", "__len__", "__getitem__")
    return {f.name: text(f) for f in found if f.name in names or not f.name.startswith("_")}


def annotations(node):
    return {a.target.id: ast.unparse(a.annotation) for a in node.body if isinstance(a, ast.AnnAssign)}


def constants(node):
    return {a.targets[0].id: a.value for a in node.body if isinstance(a, ast.Assign)}


def assigned(node):
    """The public attributes that __init__ gives an object."""
    inits = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    stored = [a for f in inits for a in ast.walk(f) if isinstance(a, ast.Attribute) and isinstance(a.ctx, ast.Store)]
    return {a.attr for a in stored if not a.attr.startswith("_")}


@pytest.mark.parametrize("name", stubs())
def test_what_the_contract_shows_is_the_codes(name):
    """Every member that is shown is there, with that signature and that type."""
    shown, code = stubs()[name], source_of(real(name))
    signatures, types = functions(code), annotations(code)
    assert {f: text for f, text in functions(shown).items() if signatures.get(f) != text} == {}
    assert {a: text for a, text in annotations(shown).items() if types.get(a, text) != text} == {}
    assert set(annotations(shown)) <= set(types) | assigned(code)
    assert set(constants(shown)) == {constant for constant in constants(code) if constant.islower()}


@pytest.mark.parametrize("name", sorted(stubs().keys() - IN_PART))
def test_the_contract_shows_everything_that_a_plugin_writes(name):
    shown, code = stubs()[name], source_of(real(name))
    private = {"__init__"} - set(functions(shown))
    assert set(functions(shown)) == set(functions(code)) - private
    written = {name for name in set(annotations(code)) | assigned(code) if not name.startswith("_")}
    assert set(annotations(shown)) >= written


@pytest.mark.parametrize("name", [n for n in stubs() if n.endswith(("Config", "Phase", "Plan"))])
def test_the_contracts_defaults_are_the_codes(name):
    cls = real(name)
    for node in stubs()[name].body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            assert ast.literal_eval(node.value) == cls.__dataclass_fields__[node.target.id].default, node.target.id


def test_every_hook_and_its_signature_is_in_the_contract():
    hooks = [name for name in vars(hookspecs) if name.startswith("register_")]
    trees = [ast.parse(code) for code in blocks(CONTRACT, "python") if not code.startswith(("from", '"""'))]
    shown = {f.name: f for tree in trees for f in tree.body if isinstance(f, ast.FunctionDef)}
    for name in hooks:
        code = ast.parse(inspect.getsource(getattr(hookspecs, name))).body[0]
        assert ast.unparse(shown[name].args) == ast.unparse(code.args), name
    assert {f"register_{kind}" for kind in SUITES} == set(hooks)
    assert f"contract, version {hookspecs.API}" in CONTRACT.splitlines()[0]
    assert f"@hookimpl(api={hookspecs.API})" in CONTRACT


def test_every_public_name_is_in_the_contract():
    written = CONTRACT.split("`distillbench.__all__`: ")[1].split("\n\n")[0]
    assert re.findall(r"`(\w+)`", written) == list(distillbench.__all__)


@pytest.mark.parametrize("kind", SUITES)
def test_every_check_is_in_the_contract(kind):
    section = CONTRACT.split(f"\n## {kind.removesuffix('s').capitalize()}\n")[1].split("\n## ")[0]
    table = section.split("| check | promise |")[1]
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")]
    assert [name for row in rows for name in row] == [check.name for check in SUITES[kind].checks]


def test_the_bars_in_the_contract_are_the_codes():
    text = " ".join(CONTRACT.split())
    assert f"below {methods.LARGEST_RMSE} standard deviations of the distribution" in text
    assert f"distance to the distribution below {methods.LARGEST_KS}" in text
    assert f"within {methods.LARGEST_STD_ERROR:.0%} of the distribution's".replace("%", " %") in text
    assert f"does not apply to more than {methods.WALKED_PHASES} phases" in text


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_what_the_contract_says_of_schedules(name):
    """A method that works in noise levels, and the types and ranges of what a schedule gives."""
    schedule = schedules.SCHEDULES[name]()
    t = torch.linspace(schedule.t_min, schedule.t_max, 101, dtype=torch.float64).view(-1, 1, 1, 1)
    alpha, sigma, lam, tau = schedule.alpha(t), schedule.sigma(t), schedule.lam(t), schedule.noise_level(t)
    assert alpha.dtype == sigma.dtype == torch.float32 and lam.dtype == tau.dtype == torch.float64
    assert {f.shape for f in (alpha, sigma, lam, tau)} == {t.shape}
    assert (alpha > 0).all() and (alpha <= 1).all() and (alpha.diff(dim=0) <= 0).all()
    assert (sigma > 0).all() and (sigma.diff(dim=0) >= 0).all() and (lam.diff(dim=0) > 0).all()
    found = schedule.t_of_lam(tau.log())
    assert found.dtype == torch.float64
    torch.testing.assert_close(schedule.noise_level(found), tau, rtol=1e-6, atol=0)
    x_0, eps = torch.randn(2, len(t), 3, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = schedule.alpha(found) * (x_0 + tau.to(x_0) * eps)
    torch.testing.assert_close(theirs, alpha * x_0 + sigma * eps, rtol=1e-4, atol=1e-4)
    assert schedule.t_of_lam(lam.max() + 1) == schedule.t_max and schedule.t_of_lam(lam.min() - 1) == schedule.t_min
    narrow = schedule.restricted(*sorted(lam.flatten()[[30, 70]].tolist()))
    assert schedule.t_min < narrow.t_min < narrow.t_max < schedule.t_max


def test_a_normal_number_for_each_image_is_one():
    batch = Batch(100_000, (1, 1, 1), torch.Generator().manual_seed(0), "cpu", None)
    written = re.search(r"`torch.special.ndtri\((batch.uniform\(.*?\))\)`", CONTRACT).group(1)
    found = torch.special.ndtri(eval(written, {"batch": batch}))
    assert found.shape == (100_000, 1, 1, 1) and found.isfinite().all()
    assert abs(found.mean().item()) < 0.02 and abs(found.std().item() - 1) < 0.02


def test_the_contracts_examples_of_tests_pass(tmp_path, monkeypatch):
    """Two files of tests; the second is of the metric on another page."""
    examples = [code for code in modules("contract.md") if code.startswith('"""test_')]
    assert len(examples) == 2
    load(modules("new_metric.md")[0], tmp_path / "grey.py")
    ran = []
    for code in examples:
        module = load(code, tmp_path / re.match(r'"""(\w+\.py)', code).group(1))
        for name, function in vars(module).items():
            if name.startswith("test_"):
                function()
                ran.append(name)
    assert len(ran) == 2
    monkeypatch.delitem(sys.modules, "grey")


def test_the_contracts_method_is_the_one_that_is_tested():
    (code,) = (code for code in modules("contract.md") if not code.startswith('"""test_'))
    assert code == (ROOT / "tests" / "support" / "adversarial.py").read_text()


# --- interruptions ---------------------------------------------------------------------------------------------------

SURVIVES = (DOCS / "interruptions.md").read_text()


def test_every_status_is_explained():
    """Those of records, and the two that only tables have; which are tried again is the code's."""
    rows = re.findall(r"^\| `(\w+)` \| .* \| (yes|no) \| (.*) \|$", SURVIVES, re.MULTILINE)
    recorded = get_args(Status)
    assert {name for name, kept, _ in rows if kept == "yes"} == set(recorded)
    assert {name for name, kept, _ in rows if kept == "no"} == {"interrupted", "skipped"}
    assert {name for name, _, written in rows if "--retry-failed" in written} == set(recorded) - set(FINAL)
    written = (DOCS / "columns.md").read_text().split("| `status` | ")[1].splitlines()[0]
    assert {name for name, _, _ in rows} <= set(re.findall(r"`(\w+)`", written))


def test_the_defaults_on_the_page_of_interruptions_are_the_codes():
    rows = re.findall(r"^\| `([a-z_.]+)` \| `?([\w.]+)`? \| ", SURVIVES, re.MULTILINE)
    written = {name: ast.literal_eval(value.capitalize()) for name, value in rows if value not in ("ok",)}
    config = RunConfig()
    states = {f"states.{name}": value for name, value in vars(config.states or StatesConfig()).items()}
    assert written == states | {"isolate": config.isolate, "cell_seconds": config.cell_seconds}
    assert f"up to {workers.SECONDS_OF_GRACE:.0f} seconds" in SURVIVES
    assert f"schema {SCHEMA};" in SURVIVES
    assert [f"those of schema {old}," in " ".join(SURVIVES.split()) for old in MIGRATED] == [True]


def test_every_folder_of_the_cache_is_on_the_page_of_interruptions():
    table = SURVIVES.split("| in `results/cache` |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(clean.CACHES)


def test_every_kind_that_can_be_cleaned_is_on_its_page():
    table = (DOCS / "doctor.md").read_text().split("| kind | what |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` ", table, re.MULTILINE)) == set(clean.KINDS)


# --- public names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["api", "commands", "gallery"])
def test_generated_pages_are_those_of_this_code(name):
    made = page_generator(f"generate_{name}").page()
    assert (DOCS / f"{name}.md").read_text() == made, f"docs/{name}.md is stale: python docs/generate_{name}.py"


@pytest.mark.parametrize("name", ["experiments", "results", "two_dimensions"])
def test_generated_tables_are_those_of_their_sources(name):
    """Of the reference runs, and of the headers of the prepared experiments."""
    text, generator = (DOCS / f"{name}.md").read_text(), page_generator(f"generate_{name}")
    before, after = generator.MARKS
    assert text.count(before) == text.count(after) == 1
    assert text == generator.page(text), f"docs/{name}.md is stale: python docs/generate_{name}.py"


EXPERIMENTS = sorted((ROOT / "configs" / "experiment").glob("*.yaml"))
OF_THE_SCORES = {"seeds", "teacher_steps"}  # settings that choose what is measured beside the published score


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_an_experiments_header_has_its_differences(file):
    """Every setting that its comment calls ours is named in a row, unless nothing is published."""
    rows, text = page_generator("generate_experiments").differences(file), file.read_text()
    assert bool(rows) == (file.stem not in ("compare_cifar10", "smoke"))
    named = set(re.findall(r"\w+", " ".join(setting for setting, *_ in rows)))
    ours = set(re.findall(r"^ *(\w+): [^#\n]*# ours\b", text, re.MULTILINE)) - OF_THE_SCORES
    assert not rows or ours <= named, sorted(ours - named)
    assert "Other than published" not in text


TABLE = (
    "# | setting | published | here | why |\n# |---|---|---|---|\n# | lr | 1 | 2 | ours |\n# | mu | 0 | 1 | ours |\n"
)


@pytest.mark.parametrize(
    "header, line, message",
    [
        (
            TABLE.replace("| 2 | ours", "| 2"),
            4,
            r"a row has 4 cells \(setting, published, here, why\), got \['lr', '1', '2'\]",
        ),
        (TABLE.replace("| 2 | ours", "| 2 | ours | |"), 4, "a row has 4 cells"),
        (TABLE.replace("| 2 | ours", "| | ours"), 4, "a row has 4 cells"),
        (TABLE.replace("here", "ours"), 2, r"begins with the lines \| setting \| published \| here \| why \|"),
        (TABLE.replace("# |---|---|---|---|\n", ""), 2, "begins with the lines"),
        ("".join(TABLE.splitlines(keepends=True)[:2]), 2, "and has rows"),
        (TABLE.replace("# | mu", "# and\n# | mu"), 2, "do not follow each other"),
        ("# Published: FID 3\n", 1, "neither a table of differences nor a line '# Published: nothing'"),
    ],
)
def test_a_wrong_header_is_refused_with_its_line(tmp_path, header, line, message):
    differences, file = page_generator("generate_experiments").differences, tmp_path / "one.yaml"
    file.write_text(f"# @package _global_\n{TABLE}defaults:\n# | not | a | header |\n")
    assert differences(file) == [["lr", "1", "2", "ours"], ["mu", "0", "1", "ours"]]
    file.write_text(f"# @package _global_\n{header}defaults:\n")
    with pytest.raises(SystemExit, match=f"^{re.escape(str(file))}:{line}: .*{message}"):
        differences(file)


def test_a_row_that_experiments_share_is_written_once(tmp_path, monkeypatch):
    generator = page_generator("generate_experiments")
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    (tmp_path / "a.yaml").write_text(TABLE)
    (tmp_path / "b.yaml").write_text(TABLE.replace("| 1 | 2 |", "| 1 | 3 |"))
    (tmp_path / "c.yaml").write_text("# Published: nothing.\n")
    assert generator.table().splitlines()[2:] == [
        "| `a` | lr | 1 | 2 | ours |",
        "| `a`, `b` | mu | 0 | 1 | ours |",
        "| `b` | lr | 1 | 3 | ours |",
    ]


def test_every_subpackage_is_on_the_page_of_the_architecture():
    page = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"^\| \d+ \| `(\w+)` \|", page, re.MULTILINE))
    folders = {file.parent.name for file in (ROOT / "distillbench").glob("*/__init__.py")}
    assert folders <= named  # not ==: the page is of the layout in subpackages, which the code is moving to


def test_tolerances_of_level_3_are_the_tests():
    rows = re.findall(
        r"^\| (\w+) \| [.\d]+ \| [.\d]+ \| ([.\d]+), ([.\d]+) \|", (DOCS / "validation.md").read_text(), re.M
    )
    assert {name: (float(rmse), float(median)) for name, rmse, median in rows} == TOLERANCES


def test_every_public_name_is_on_its_page():
    """With its parameters; each module has a heading, each name one below it, and no two the same."""
    page = (DOCS / "api.md").read_text()
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    assert len(headings) == len(set(map(str.lower, headings)))
    for name in distillbench.PUBLIC_PACKAGES:
        section = page.split(f"\n## distillbench.{name}\n")[1].split("\n## ")[0]
        module = importlib.import_module(f"distillbench.{name}")
        shown = re.findall(r"^### `(?:[\w.]+\.)?(\w+)`\n\n```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        assert sorted(public for public, _ in shown) == sorted(module.__all__), name
        for public, code in shown:
            value = getattr(module, public)
            ast.parse(code)
            if inspect.isfunction(value):
                assert list(inspect.signature(value).parameters) == parameters(code, public)
    assert set(re.findall(r"^\[(\w+)\]\(#|^`(\w+)`[,.]$", page, re.MULTILINE)) >= {
        (name, "") for name in distillbench.__all__ if name not in ("Noise", "hookimpl")
    }


def parameters(code, name):
    (function,) = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef) and node.name == name]
    args = function.args
    every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return [argument.arg for argument in every if argument is not None]


def test_the_page_of_names_is_plain_and_the_same_everywhere():
    page = (DOCS / "api.md").read_text()
    assert not re.search(r" at 0x[0-9a-f]+|(?<![\w.>)/:])/[a-z]+/[a-z]|\{eval-rst\}|:(class|meth|func|mod):", page)
    assert len([line for line in page.splitlines() if len(line) > 120 and not line.startswith("|")]) == 0


# --- commands --------------------------------------------------------------------------------------------------------

VARIABLES = {"gpu": "0", "seed": "0", "method": "boot"}


def lines_of(text):
    """Logical lines of shell blocks and of indented blocks."""
    found = blocks(text, "bash") + re.findall(r"(?:^ {4,}\S.*\n)+", prose(text), re.MULTILINE)
    return [line.strip() for code in found for line in re.sub(r"\\\n\s*", " ", code).splitlines()]


def words_of(line):
    """The words of each `distillbench ...` in a line. Usage lines of click, with [OPTIONS], are no commands."""
    line = re.sub(r"\$\{?(\w+)\}?", lambda v: VARIABLES.get(v.group(1), v.group(1)), line)
    for part in re.split(r"&&|;|\|| & | &$", line):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:
            continue
        words = words[words.index("distillbench") :] if "distillbench" in words and "[OPTIONS]" not in words else []
        if words and part.split("distillbench")[0].strip() in ("", "uv run", "do", "exec", "pip install uv"):
            yield words[1:]


def commands():
    return [(page.name, words) for page in PAGES for line in lines_of(page.read_text()) for words in words_of(line)]


def parsed(words):
    """The command of `words`, its options and its arguments; an assertion fails for what does not exist."""
    command, words = cli, list(words)
    while isinstance(command, click.Group):
        if words[0] == "--help":
            return command, {}, []
        name = words.pop(0)
        assert name in command.commands, f"no command {name}: {sorted(command.commands)}"
        command = command.commands[name]
    context = click.Context(command)
    options, _, _ = command.make_parser(context).parse_args(list(words))
    positional = {p.name for p in command.params if isinstance(p, click.Argument)}
    for parameter in command.params:
        value = options.get(parameter.name)
        if isinstance(parameter.type, click.Choice) and isinstance(value, str | list | tuple):
            for one in [value] if isinstance(value, str) else value:
                assert one in parameter.type.choices, f"{one} is none of {parameter.type.choices}"
    given = []
    for name in positional:
        value = options.get(name)
        given += [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    return command, options, given


def test_there_are_many_commands():
    assert len(commands()) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_and_commands_in_the_text_exist(page):
    every = set(cli.commands)
    every_option = {name for command in _all(cli) for p in command.params for name in (*p.opts, *p.secondary_opts)}
    text = prose(page.read_text())
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if re.fullmatch(r"--[a-z][\w-]*( .*)?", span):
            assert span.split()[0] in every_option | {"--help"}, span
        if re.match(r"distillbench [a-z]", span) and "." not in span.split()[1]:
            assert span.split()[1] in every, span


def _all(command):
    yield command
    for child in command.commands.values() if isinstance(command, click.Group) else []:
        yield from _all(child)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """What ships, the plugins on the pages, the examples, and the one that a page makes from the template."""
    folder, sources = tmp_path_factory.mktemp("plugins"), list(installed())
    for page in ("new_dataset.md", "new_teacher.md", "new_metric.md"):
        for number, code in enumerate(modules(page)):
            name = f"docs_{page.removesuffix('.md')}_{number}"
            sources.append(Source(name, "docs", "0", lambda c=code, p=folder / f"{name}.py": load(c, p)))
    for file in sorted((ROOT / "examples").glob("*/src/distillbench_*.py")):
        copied = folder / f"example_{file.name}"
        sources.append(Source(file.stem, "examples", "0", lambda f=file, p=copied: load(f.read_text(), p)))
    found = load_registry(sources)
    assert not [plugin for plugin in found.broken if plugin.distribution == "docs"]
    cls = type("MyMethod", (found.methods["boot"].cls,), {"name": "my_method"})
    found.methods["my_method"] = Entry(cls, Plugin("my_method", "docs", "0"))
    return found


WITH_SETTINGS = {"run": True, "score": False, "train": False, "check": False, "export": False, "import": False}


def settings_in_text():
    """`budget.limit=images`, `evaluation.checkpoints=4`, `seed=0,1,2`, `experiment=smoke` and the like."""
    spans = {
        span for page in PAGES for span in re.findall(r"(?<!`)`([a-z][\w.]*=[^`\n]+)`(?!`)", prose(page.read_text()))
    }
    groups = ("budget.", "evaluation.", "seed=", "energy=", "conditional=", "guidance", "experiment=")
    return sorted(s for s in spans if s.startswith(groups) and not re.search(r"NAME|FILE|=K$|=\.\.\.|methods\.", s))


@pytest.mark.parametrize("span", settings_in_text())
def test_settings_in_the_text_compose(span, registry):
    if span.startswith("experiment=") and "smoke" not in span:
        before, after = [], ["dataset.path=FILE", "teacher.path=FILE"]
    else:
        before, after = ["methods=[boot]", "dataset=digits", "conditional=true"], []
    compose_runs([*before, *shlex.split(span), *after], registry)


# --- links -----------------------------------------------------------------------------------------------------------


def slugs(text):
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", page.read_text())):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        other = DOCS / file if file else page
        assert other.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in slugs(other.read_text()), f"{page.name}: {target}"


def test_every_page_is_in_the_table_of_contents():
    listed = "\n".join(blocks((DOCS / "index.md").read_text(), "{toctree}")).split()
    assert {page.stem for page in PAGES} - {"index"} <= set(listed)


def test_tests_that_the_rules_name_exist():
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for page in ("fairness.md", "measures.md", "interruptions.md"):
        for name in re.findall(r"`(test_\w+)`", (DOCS / page).read_text()):
            assert f"def {name}(" in tests, name


FOLDERS = ("distillbench", "plugins", "tests", "benchmarks", "docs", "examples")
SOURCES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def test_files_that_pages_and_comments_name_exist():
    """With a folder: that file. A file of tests without one: a file of that name. NAME stands for any name."""
    paths, names = {file.relative_to(ROOT).as_posix() for file in SOURCES}, {file.name for file in SOURCES}
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SOURCES]:
        text = prose(page.read_text()) if page.suffix == ".md" else page.read_text()
        for path in re.findall(r"(?<![\w./-])(?:\w+/)*\w+\.py\b", text):
            *folders, name = path.split("/")
            if "NAME" not in name and folders[:1] in (["tests"], ["benchmarks"], ["distillbench"]):
                assert path in paths, f"{page.name}: {path}"
            elif name.startswith("test_") and "NAME" not in name and not folders:
                assert name in names, f"{page.name}: {path}"


# --- the plugins on the pages ----------------------------------------------------------------------------------------


def test_the_dataset_conforms_and_runs(registry, tmp_path):
    cls = registry.datasets["discs"].cls
    assert_conforms(cls)
    words = ["methods=[boot]", "dataset=discs", "dataset.count=500", "experiment=smoke", f"results_dir={tmp_path}"]
    assert not [cell.cost_error for cell in plan(compose_runs(words, registry), registry) if cell.cost_error]


@pytest.mark.nightly
def test_the_teacher_conforms(registry, tmp_path):
    """After a short training of the page's network, by the page's own conventions."""
    entry, digits = registry.teachers["small_conv"], registry.datasets["digits"].cls
    dataset = digits(digits.Config())
    source = entry.cls(entry.cls.Config(), dataset, tmp_path, "cpu")
    teacher = source.untrained()
    teacher.denoiser.requires_grad_(True)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(teacher.denoiser.parameters(), lr=5e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 300)
    x_0 = dataset.images.float() / 127.5 - 1
    for _ in range(300):
        x, t, eps = x_0[torch.randint(len(x_0), (64,))], torch.rand(64, 1, 1, 1).double(), torch.randn(64, 1, 8, 8)
        alpha, sigma = teacher.schedule.alpha(t), teacher.schedule.sigma(t)
        loss = (teacher.denoiser.output(alpha * x + sigma * eps, t) - (alpha * eps - sigma * x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    save_file(teacher.denoiser.network.state_dict(), tmp_path / "weights.safetensors")
    config = entry.cls.Config(path=str(tmp_path / "weights.safetensors"))
    assert_conforms(entry.cls, config, dataset=dataset)
    loaded = entry.cls(config, dataset, tmp_path, "cpu").load(Progress(None))
    assert loaded.label.startswith("small_conv-")


def test_the_metrics_conform(registry):
    assert_conforms(registry.metrics["grey_distance"].cls)


def test_the_network_gives_scores(tmp_path, registry):
    """The page's zeros, replaced by the hash of a file: its column gets values."""
    import hashlib

    from distillbench.evaluation.features import ImageSet, Networks

    network = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.SiLU(), torch.nn.Conv2d(16, 16, 3))
    file = tmp_path / "tiny.safetensors"
    save_file(network.state_dict(), file)
    code = modules("new_metric.md")[1].replace("0" * 64, hashlib.sha256(file.read_bytes()).hexdigest())
    module = load(code, tmp_path / "docs_tiny.py")
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    seen = ImageSet(lambda: [images], 40, (1, 8, 8), Networks(tmp_path, "cpu"))
    assert seen.features(module.Tiny).shape == (40, 16)
    assert seen.statistics(module.Tiny).n == 40


# --- the site --------------------------------------------------------------------------------------------------------


FETCHED = ("stylesheet", "icon", "shortcut icon", "preload", "preconnect")  # relations of links


class Fetched(HTMLParser):
    """The addresses that a browser fetches to show a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        followed = tag == "link" and given.get("rel") in FETCHED
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(given.get("src") or "")
        if followed:
            self.addresses.append(given.get("href") or "")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    for package in ("sphinx", "furo", "myst_parser", "sphinx_copybutton"):
        pytest.importorskip(package, reason=f"the site needs {package}: the dependency group docs")
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, tmp_path / "html"]
    words += ["-d", tmp_path / "doctrees"]
    built = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "html").rglob("*.html"))
    assert {page.stem for page in PAGES} <= {page.stem for page in pages}
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text())
        assert not [a for a in parser.addresses if a.startswith(("http:", "https:", "//"))], page.name
    for style in (tmp_path / "html").rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style.name
