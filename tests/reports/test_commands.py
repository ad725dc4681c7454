"""report, compare, merge and show from the command line, on a run made by the harness."""

import json

import pytest

from distillbench.cli import commands


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    words = ["methods=[direct]", "dataset=digits", "experiment=smoke", "budget.images=200", "evaluation.images=16"]
    words += ["evaluation.metrics=[teacher_rmse]", "evaluation.timing=off", "run_name=mine", f"results_dir={results}"]
    commands.main(["run", *words])
    return results / "mine"


def done(*words):
    with pytest.raises(SystemExit) as ended:
        commands.main([str(word) for word in words])
    return ended.value.code


def test_report_writes_the_requested_forms(run, tmp_path, capsys):
    forms = [word for form in ("html", "markdown", "latex", "csv", "figures") for word in ("--as", form)]
    commands.main(["report", str(run), *forms, "-o", str(tmp_path / "out"), "--precision", "teacher_rmse=2"])
    written = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert {"report.html", "table.md", "table.tex", "paper.csv", "figures/samples.png"} <= written
    assert "http" not in (tmp_path / "out" / "table.md").read_text()
    assert "direct" in (tmp_path / "out" / "report.html").read_text()
    assert capsys.readouterr().out.count("written: ") == len(written)


def test_report_is_written_beside_the_table(run):
    commands.main(["report", str(run)])
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "teacher_rmse"], "error: --precision reads NAME=DECIMALS, such as fid=2, got 'teacher_rmse'"),
        (["--as", "markdown", "--columns", "methud"], "error: no column 'methud'. Did you mean 'method'?"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, words, message):
    assert done("report", run, "-o", tmp_path / "out", *words) == 2
    assert capsys.readouterr().err.startswith(message)


def test_there_is_no_such_run(run, capsys):
    assert done("report", run.parent / "mime") == 2
    assert "Did you mean 'mine'?" in capsys.readouterr().err


def test_show_compare_and_merge(run, tmp_path, capsys):
    assert done("show", run, "--where", "nfe=1", "--columns", "method,nfe,teacher_rmse", "--csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "method,nfe,teacher_rmse" and any(line.startswith("direct,1,") for line in lines)
    assert done("compare", run, run) == 0
    assert "Nothing in B is worse" in capsys.readouterr().out
    assert done("merge", run, run, "-o", tmp_path / "all") == 0
    assert len(json.loads((tmp_path / "all" / "environment.json").read_text())["merged"]) >= 1
    assert done("compare", run, tmp_path / "all") == 0
