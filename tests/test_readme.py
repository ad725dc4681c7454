"""What the README says is what happens: its method runs, its commands are the ones that CI and the docs rely on."""

import re
import types
from pathlib import Path

from distillbench.config import compose_runs
from distillbench.plan import plan
from distillbench.progress import Progress
from distillbench.registry import Source, installed, load_registry
from distillbench.run import run
from distillbench.table import FIRST, LAST
from distillbench.testing import assert_conforms

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_method_in_twelve_lines_runs(tmp_path):
    """The README's method, loaded as a stranger's plugin, trains and gets its row."""
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

    registry = load_registry([*installed(), Source("one_step", "stranger", "1.0", load)])
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
    assert_conforms(module.OneStep, law_images=0)
    assert (row["train_images"], row["train_teacher_nfe"], row["train_student_nfe"]) == (256, 2048, 256)


def test_two_commands_are_there():
    commands = re.findall(r"^    (pip install uv && .*)$", README, re.MULTILINE)
    assert [c.split("&& ")[1].split(" ")[:3] for c in commands] == [
        ["uv", "run", "distillbench"],
        ["uv", "run", "pytest"],
    ]


def test_files_of_the_map_exist():
    for words in re.findall(r"^\| (`[^|]*`) \|", README.split("## Map of the code")[1], re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", words):
            assert (ROOT / name).exists() or (ROOT / "distillbench" / name).exists() or name in ("config.yaml",), name


def test_every_column_is_documented():
    documented = re.findall(r"`(\w+)`", (ROOT / "docs" / "columns.md").read_text())
    for column in [*FIRST, *LAST]:
        assert column in documented, column
