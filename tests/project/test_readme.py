"""What the README says is what happens: its method runs, its commands are the ones that CI and the docs rely on."""

import re
import types

from distillbench.execution.run import run
from distillbench.records.table import FIRST, LAST
from distillbench.registry import Source, installed, load_registry
from distillbench.runs.config import compose_runs
from distillbench.runs.plan import plan
from distillbench.system.progress import Progress
from distillbench.testing.conformance import assert_conforms
from docs_pages import ROOT, page_generator

README = (ROOT / "README.md").read_text()


def test_the_method_runs(tmp_path):
    """The README's method, loaded as a third-party plugin, trains and gets its row."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    source = tmp_path / "my_module.py"
    source.write_text(code)
    module = types.ModuleType("my_module")
    module.__file__ = str(source)

    def load():
        import sys

        sys.modules["my_module"] = module
        exec(compile(code, str(source), "exec"), module.__dict__)
        return module

    registry = load_registry([*installed(), Source("one_step", "third party", "1.0", load)])
    assert not registry.broken
    words = [
        "methods=[one_step]",
        "dataset=digits",
        "experiment=smoke",
        "budget.images=256",
        "evaluation.metrics=[teacher_rmse]",
    ]
    configs = compose_runs([*words, f"results_dir={tmp_path}"], registry)
    table = run(plan(configs, registry), configs, Progress(None), lambda rows: None).table
    row = table[table["method"] == "one_step"].iloc[0]
    assert row["status"] == "ok"
    assert_conforms(module.OneStep, distribution_images=0)
    assert (row["train_images"], row["train_teacher_nfe"], row["train_student_nfe"]) == (256, 2048, 256)


def test_two_commands_are_there():
    commands = re.findall(r"^    (pip install uv && .*)$", README, re.MULTILINE)
    assert [c.split("&& ")[1].split(" ")[:3] for c in commands] == [
        ["uv", "run", "distillbench"],
        ["uv", "run", "pytest"],
    ]


def test_it_is_as_short_as_it_should_be():
    """One screenful per topic; what is longer has a page. The method has as many lines as the text says."""
    assert len(README.splitlines()) <= 150
    (lines,) = re.findall(r"a whole method, in (\d+) lines", README)
    assert len(re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1).splitlines()) == int(lines)


def test_links_lead_somewhere():
    for page in (README, (ROOT / "CONTRIBUTING.md").read_text(), (ROOT / "CHANGELOG.md").read_text()):
        for target in re.findall(r"\]\(([^)\s]+)\)", page):
            assert "://" in target or (ROOT / target.partition("#")[0]).exists(), target


def test_table_is_that_of_the_reference_run():
    """Every number of a method's row, as docs/generate_results.py writes it from summary.csv."""
    rows = page_generator("generate_results").short_table().splitlines()[2:]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        shown = [line for line in README.splitlines() if line.startswith((f"| [`{cells[0]}`]", "| teacher, "))]
        shown = [[cell.strip() for cell in line.strip("|").split("|")][1:5] for line in shown]
        assert cells[1:5] in shown, row


def test_every_method_has_a_row():
    methods = load_registry([source for source in installed() if source.distribution == "distillbench"]).methods
    assert re.findall(r"^\| \[`(\w+)`\]", README, re.MULTILINE) == sorted(methods)


def test_every_column_is_documented():
    documented = re.findall(r"`(\w+)`", (ROOT / "docs" / "columns.md").read_text())
    for column in [*FIRST, *LAST]:
        assert column in documented, column
