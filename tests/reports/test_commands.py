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


def test_report_writes_the_file_that_is_named(run, tmp_path, capsys):
    file = tmp_path / "new" / "Mine.html"
    commands.main(["report", str(run), "-o", str(file)])
    assert list(file.parent.iterdir()) == [file] and "<html" in file.read_text()
    assert capsys.readouterr().out.split() == ["written:", str(file)]
    commands.main(["report", str(run), "-o", str(tmp_path / "paper.tex")])
    assert "tabular" in (tmp_path / "paper.tex").read_text()
    (tmp_path / "old.html").mkdir()
    for folder in ("old.html", "results-1.0", "new.one/"):
        commands.main(["report", str(run), "--as", "csv", "-o", f"{tmp_path}/{folder}"])
        assert (tmp_path / folder / "paper.csv").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.pdf"], "error: --output 'a.pdf' ends in .pdf. Possible: a file that ends in .html, .md, .tex, .csv, or a"),
        (["a.html", "--as", "csv"], "error: --output 'a.html' is one file, of --as html, got --as csv: name a folder"),
    ],
)
def test_report_refuses_a_file_that_fits_no_form(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert done("report", run, "-o", *words) == 2
    assert capsys.readouterr().err.startswith(message) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["list", "methds"], "methods"),
        (["report", "x", "--as", "htm"], "html"),
        (["new-plugin", "x", "--kind", "tacher"], "teacher"),
    ],
)
def test_a_wrong_choice_has_the_nearest(capsys, words, meant):
    assert done(*words) == 2
    assert f"Did you mean '{meant}'?" in capsys.readouterr().err


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


def test_there_is_no_such_run(run, tmp_path, capsys, monkeypatch):
    assert done("report", run.parent / "mime") == 2
    assert "Did you mean 'mine'?" in capsys.readouterr().err
    (tmp_path / "results").symlink_to(run.parent)
    monkeypatch.chdir(tmp_path)
    assert done("show", "mine") == 2
    assert "Did you mean 'results/mine'?" in capsys.readouterr().err


def test_show_compare_and_merge(run, tmp_path, capsys):
    assert done("show", run, "--where", "nfe=1", "--columns", "method,nfe,teacher_rmse", "--csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "method,nfe,teacher_rmse" and any(line.startswith("direct,1,") for line in lines)
    assert done("compare", run, run) == 0
    assert "Nothing in B is worse" in capsys.readouterr().out
    assert done("merge", run, run, "-o", tmp_path / "all") == 0
    assert len(json.loads((tmp_path / "all" / "environment.json").read_text())["merged"]) >= 1
    assert done("compare", run, tmp_path / "all") == 0
