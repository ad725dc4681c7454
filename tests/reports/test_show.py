"""The table in the terminal: which rows and columns are shown, what is refused, and that hostile names do nothing."""

import io
import json
import re

import pandas as pd
import pytest
from rich.console import Console

from distillbench.errors import UserError
from distillbench.records.table import make_table, write_table
from distillbench.reports.commands import show_runs
from distillbench.reports.runs import read_run
from distillbench.reports.show import select
from distillbench.reports.terminal_table import number, plain
from tables_of_runs import TEACHER, row, run_folder, seeds

ROWS = [row(fid=80.0, **TEACHER), *seeds([10.0, 11.0]), *seeds([20.0, 21.0], method="cm")]
ROWS += [row(method="cm", nfe=2, fid=15.0)]
FAILED = row(method="pd", status="failed", reason="out of [memory]", nfe=4, key="p")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that tests leave as it is."""
    return run_folder(tmp_path_factory.mktemp("results") / "digits", [*ROWS, FAILED])


@pytest.fixture(scope="module")
def data(run):
    return read_run(run)


def shown(*folders, columns=(), sort=(), where=(), rows="summary", form="table", width=200):
    console = Console(file=io.StringIO(), width=width, highlight=False, force_terminal=False)
    assert show_runs([str(folder) for folder in folders], columns, sort, where, rows, form, console) == 0
    return console.file.getvalue()


def frame(*folders, **asked):
    return pd.read_csv(io.StringIO(shown(*folders, form="csv", **asked)))


# --- which rows ------------------------------------------------------------------------------------------------------


def test_the_summary_has_a_row_for_each_method_in_the_order_of_the_run(run):
    found = frame(run)
    assert list(zip(found["method"], found["nfe"], strict=True)) == [
        ("teacher:ddim", 1), ("boot", 1), ("cm", 1), ("cm", 2), ("pd", 4),
    ]  # fmt: skip
    assert found["fid"].tolist()[:4] == [80, 10.5, 20.5, 15]
    assert list(found.columns) == list(read_run(run).summary.columns)


def test_all_rows_are_those_of_the_table(run):
    pd.testing.assert_frame_equal(frame(run, rows="all"), pd.read_csv(run / "table.csv"))


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (["method=boot,cm"], [(10.5, 1), (20.5, 1), (15, 2)]),
        (["method=boot,cm", "nfe<=1"], [(10.5, 1), (20.5, 1)]),
        (["nfe<2", "fid>10.5"], [(80, 1), (20.5, 1)]),
        (["fid>=20.5"], [(80, 1), (20.5, 1)]),
        ([" fid  <  15.5 "], [(10.5, 1), (15, 2)]),
        (["nfe=2,4", "status=ok"], [(15, 2)]),
        (["method!=cm,pd"], [(80, 1), (10.5, 1)]),
        (["nfe!=1", "fid!="], [(15, 2)]),
        (["train_seconds="], [(80, 1)]),
        (["budget=1000 images", "fid<inf", "nfe>1"], [(15, 2)]),
        (["budget=", "fid!="], [(80, 1)]),
    ],
)
def test_filters_keep_the_rows_that_meet_all_of_them(data, where, kept):
    found = select([data], [], [], where, "summary").frame.dropna(subset="fid")
    assert list(zip(found["fid"], found["nfe"], strict=True)) == kept


def test_a_text_with_a_comma_is_taken_whole_where_a_row_has_it(tmp_path):
    folder = run_folder(tmp_path / "r", [row(fid=1.0, settings="a=1, b=2"), row(fid=2.0, settings="a=1", key="l")])
    assert frame(folder, where=["settings=a=1, b=2"])["fid"].tolist() == [1]
    assert frame(folder, where=["settings!=a=1, b=2"])["fid"].tolist() == [2]


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        (["fid"], ["boot1", "cm2", "cm1", "teacher:ddim1", "pd4"]),
        (["-fid"], ["teacher:ddim1", "cm1", "cm2", "boot1", "pd4"]),
        (["-nfe,fid"], ["pd4", "cm2", "boot1", "cm1", "teacher:ddim1"]),
        (["method", "-nfe"], ["boot1", "cm2", "cm1", "pd4", "teacher:ddim1"]),
    ],
)
def test_rows_are_sorted_by_the_first_name_first_and_what_has_no_value_comes_last(data, sort, order):
    found = select([data], [], [name for names in sort for name in names.split(",")], [], "summary").frame
    assert [f"{method}{nfe}" for method, nfe in zip(found["method"], found["nfe"], strict=True)] == order


def test_several_runs_are_told_apart(run, tmp_path):
    other = run_folder(tmp_path / "other", [row(method="boot", fid=7.0)])
    found = frame(run, other, where=["method=boot"])
    assert found[["run", "fid"]].values.tolist() == [["digits", 10.5], ["other", 7.0]]
    assert frame(run, other, where=["run=other"])["fid"].tolist() == [7]
    namesake = run_folder(tmp_path / "elsewhere" / "digits", [row(fid=3.0)])
    assert set(frame(run, namesake)["run"]) == {str(run), str(namesake)}
    assert "digits: pd, seed 0, 4 NFE, noise 0: failed" in shown(run, other)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"columns": ["method", "fdi"]}, "no column of the summary 'fdi'.*Did you mean 'fid'"),
        ({"columns": ["reason"]}, "no column of the summary 'reason'.*--rows all"),
        ({"sort": ["-recal"]}, "'recal'.*Did you mean 'recall'"),
        ({"where": ["metod=boot"]}, "'metod'.*Did you mean 'method'"),
        (
            {"where": ["method=bot"]},
            "no row has method 'bot'. Did you mean 'boot'.*Possible: boot, cm, pd, teacher:ddim",
        ),
        ({"where": ["method=boot,bot"]}, "'bot'"),
        ({"where": ["method<boot"]}, "method holds text"),
        ({"where": ["nfe=two"]}, "nfe holds numbers, got 'two'"),
        ({"where": ["fid<nan"]}, "fid holds numbers"),
        ({"where": ["fid<"]}, "compared with nothing"),
        ({"where": ["nfe"]}, "--where takes COLUMN"),
        ({"where": ["=2"]}, "--where takes COLUMN"),
        ({"where": ["nfe==2"]}, "nfe holds numbers"),
        ({"columns": ["traning_seed"], "rows": "all"}, "no column 'traning_seed'.*'training_seed'"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest_name(data, asked, message):
    asked = {"columns": [], "sort": [], "where": [], "rows": "summary"} | asked
    with pytest.raises(UserError, match=message):
        select([data], **asked)


def test_no_run_is_refused(tmp_path, run):
    with pytest.raises(UserError, match="one run or more"):
        shown()
    with pytest.raises(UserError, match=r"no run .*digit'.*Did you mean 'digits'"):
        shown(run.parent / "digit")


def test_a_run_with_two_values_for_one_measurement_is_refused_in_one_message(tmp_path):
    folder = run_folder(tmp_path / "r", [row(fid=1.0)])
    write_table(make_table([row(fid=1.0), row(fid=2.0)], ["fid", "recall"]), folder)
    with pytest.raises(UserError, match=r"two different rows for .*method=boot"):
        shown(folder)


# --- how it looks ----------------------------------------------------------------------------------------------------


def test_the_table_says_what_is_common_and_marks_who_leads(run):
    text = shown(run)
    assert text.startswith("dataset digits, teacher trained-01234567, budget 1000 images, device cpu (a model)\n")
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    half = 12.7062 * 0.5  # std 0.5 ** 0.5 over 2 ** 0.5; t of one degree of freedom
    assert f"10 ± {half:.0f}*" in lines["boot"]
    assert "*: the only leader by pairwise comparison" in text  # although 20.5 less 6.35 is below 16.9
    assert "±: half of the 95 % interval of the mean over training seeds" in text


def test_a_star_is_where_the_statistics_say_so_whatever_is_filtered(tmp_path):
    folder = run_folder(tmp_path / "r", [*seeds([10.0, 10.1]), *seeds([20.0, 20.1], method="cm")])
    for where in ([], ["method=boot"]):
        line = next(line for line in shown(folder, where=where).splitlines() if line.startswith("boot"))
        assert re.search(r"± \d\.\d+\*", line)
    assert not re.search(r"\d\*", shown(folder, where=["method=cm"]))


def test_methods_are_parted_by_a_blank_line_where_their_rows_are_together(run):
    def blank_after(text):
        lines = text.split("\n\n")
        return [part.splitlines()[-1].split()[0] for part in lines[:-1]]

    assert blank_after(shown(run)) == ["teacher:ddim", "boot", "cm"]
    assert blank_after(shown(run, sort=["-nfe", "fid"])) == []


def test_colours_are_for_terminals_alone_and_the_teacher_is_dim(tmp_path, monkeypatch):
    folder = run_folder(
        tmp_path / "r", [row(fid=80.0, **TEACHER), *seeds([10.0, 10.1]), *seeds([20.0, 20.1], method="cm")]
    )
    for no_color, expected in (("", "\x1b[1;32m"), ("1", "\x1b[1m")):
        monkeypatch.setenv("NO_COLOR", no_color)
        console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard", highlight=False)
        assert show_runs([str(folder)], [], [], [], "summary", "table", console) == 0
        lines = console.file.getvalue().splitlines()
        assert any(line.startswith("\x1b[2mteacher:ddim") for line in lines)
        assert any(f"{expected}10.1 ± 0.6*" in line for line in lines)
    assert "\x1b" not in shown(folder)


def test_lines_end_without_blanks_in_a_pipe(run):
    assert not [line for line in shown(run, columns=["method", "nfe"]).splitlines() if line != line.rstrip()]


def test_failed_rows_stay_visible_with_their_reasons_unless_a_filter_names_others(run):
    line = "pd, seed 0, 4 NFE, noise 0: failed: out of [memory]"
    assert line in shown(run) and line in shown(run, rows="all") and line in shown(run, columns=["method"])
    assert line in shown(run, where=["fid<100"]) and "0 of 1 ok" in shown(run)
    assert line not in shown(run, where=["method=boot"]) and line not in shown(run, where=["nfe<4"])


def test_columns_that_do_not_fit_are_said_and_those_asked_for_are_whole(run):
    narrow = shown(run, width=60)
    assert "not shown, as too wide: recall, training time" in narrow
    assert max(map(len, narrow.split("not shown")[0].splitlines()[1:])) <= 60
    asked = shown(run, columns=["method,device,budget,teacher"], width=40)
    assert "…" not in asked and "".join(asked.split()).count("01234567") >= 5


def test_an_empty_run_is_said_to_be_empty(tmp_path, capsys):
    folder = run_folder(tmp_path / "r", [])
    assert shown(folder) == "no rows\n"
    assert len(frame(folder)) == 0


def test_what_is_wrong_with_a_run_goes_to_stderr(tmp_path, capsys):
    run = run_folder(tmp_path / "digits", [*ROWS, FAILED])
    (run / "environment.json").unlink()
    (run / "table.parquet").write_bytes(b"PAR1 damaged")
    assert len(frame(run)) == 5
    said = capsys.readouterr().err
    assert "digits: environment.json is missing\n" in said and "digits: table.parquet is damaged" in said


def test_hostile_names_are_printed_as_they_are_and_do_nothing(tmp_path):
    name, status = "[red]x[/red] :smile: \x1b[31m\r\n\u202e", "failed"
    rows = [
        row(method=name, fid=1.0),
        row(method=name, nfe=2, status=status, reason="[link=http://x]y[/link]\x07", key="h"),
    ]
    text = shown(run_folder(tmp_path / "r[bold]", rows))
    literal = r"[red]x[/red] :smile: \x1b[31m\r\n\u202e"
    assert text.count(literal) == 3 and r"[link=http://x]y[/link]\x07" in text
    assert not any(c in text for c in "\x1b\x07\r\u202e")
    assert frame(tmp_path / "r[bold]", rows="all")["method"].tolist() == [name] * 2
    with pytest.raises(UserError) as error:
        shown(tmp_path / "r[bold]", where=["method=x"])
    assert literal in str(error.value)


def test_plain_leaves_what_can_be_printed():
    assert plain("é ∞ [b]") == "é ∞ [b]" and plain("a\tb\n") == r"a\tb\n"


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [
        (176.84304, 7.7658, "177"), (176.84304, 2.1, "176.8"), (338.398, 60.9, "338"), (0.16719137, 0.0052, "0.167"),
        (1e-6, 2e-8, "1.000e-06"),
        (1870.51, None, "1,871"), (0.504904, None, "0.5049"),
        (12345.678, 0.3, "12,345.68"), (2.01, None, "2.010"), (866.0, 250.4, "866"),
        (float("inf"), 1.0, "inf"), (float("nan"), None, "-"), (pd.NA, None, "-"), (None, None, "-"),
        (2048, None, "2,048"), (5.0, 0.0, "5"), (5.0, float("nan"), "5"), ("a\x1b", None, r"a\x1b"),
    ],
)  # fmt: skip
def test_numbers_have_the_digits_that_their_interval_allows(value, width, text):
    assert number(value, width) == text


def test_select_gives_the_frame_that_is_printed(run):
    found = select([read_run(run)], ["fid"], [], ["method=boot"], "summary")
    assert found.frame["fid"].tolist() == [10.5] and found.columns == ["fid"] and not found.several


def test_a_note_is_shown_once_for_all_its_rows(tmp_path):
    noted = [row(fid=80.0, sampling_seed=seed, note="unstable [so] few", **TEACHER) for seed in range(3)]
    run = run_folder(tmp_path / "noted", [*ROWS, *noted[1:], row(fid=9.0, nfe=7, note="unstable [so] few")])
    text = shown(run)
    assert text.count("unstable [so] few") == 1
    assert "note on teacher:ddim, 1 NFE; boot, 7 NFE: unstable [so] few" in text
    assert "unstable" not in shown(run, where=["method=cm"])


def test_json_has_all_digits_and_the_names_for_people(run):
    found = json.loads(shown(run, form="json", where=["method=boot"]))
    (only,) = found["rows"]
    assert (only["method"], only["fid"], only["teacher"]) == ("boot", 10.5, "trained-01234567")
    assert found["columns"]["fid"] == {"short": "fid", "long": "fid", "unit": "", "arrow": "↓"}
    assert found["columns"]["train_seconds"]["unit"] == "s" and found["methods"]["boot"]["short"] == "boot"
