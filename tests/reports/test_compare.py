"""What changed between two runs: Welch's test against numbers by hand and scipy, costs, rows, words and exit codes."""

import io

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from distillbench.errors import UserError
from distillbench.reports.commands import compare_runs, merge_runs
from distillbench.reports.compare import compare, welch
from distillbench.reports.compare_text import holm, print_comparison, reproduction
from distillbench.reports.labels import COLUMNS as COLUMNS_OF_TABLES
from distillbench.reports.runs import read_run
from tables_of_runs import COLUMNS, FID, NAMES, TEACHER, row, run_data, run_folder, seeds

NOISY = [10.0, 10.4, 9.8, 10.1]
SHIFTED = [11.0, 11.4, 10.8, 11.1]
CONFIG = {"methods": {"boot": {"lr": 0.1, "steps": 8}}, "seed": 0, "results_dir": "x", "budget": {"images": 1000}}


class Runs:
    """Two runs in a folder, and what comparing them says."""

    def __init__(self, tmp_path):
        self.path = tmp_path

    def data(self, a, b, tolerance=0.1, **options):
        return compare(run_data("a", a, **options), run_data("b", b, **options), tolerance)

    def code(self, a, b, **options):
        return told(self.data(a, b, **options))

    def write(self, a, b):
        for name, rows in (("a", a), ("b", b)):
            run_folder(self.path / name, rows)

    def printed(self, tolerance=0.1, all_costs=False):
        """Of the folders a and b, as the command does it."""
        console = Console(file=io.StringIO(), width=200, highlight=False)
        code = compare_runs(str(self.path / "a"), str(self.path / "b"), tolerance, all_costs, console)
        return code, console.file.getvalue()


def told(found, all_costs=False, width=200):
    """Exit code and text."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_comparison(console, found, all_costs)
    return found.code, console.file.getvalue()


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def verdicts(found):
    return {(one.row[3], one.name): one.verdict for one in found.scores}


# --- Welch -----------------------------------------------------------------------------------------------------------


def test_welch_is_that_of_the_textbook():
    # means 2 and 6, variances 1 and 4, n = 3: standard error (5 / 3) ** 0.5 and (5/3)^2 / ((1/3)^2/2 + (4/3)^2/2)
    # = 50 / 17 degrees of freedom
    low, high, p = welch([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    half = stats.t.ppf(0.975, 50 / 17) * (5 / 3) ** 0.5
    assert (low, high) == pytest.approx((4 - half, 4 + half))
    assert p == pytest.approx(2 * stats.t.sf(4 / (5 / 3) ** 0.5, 50 / 17))


def test_welch_agrees_with_the_p_value_of_scipy():
    generator = np.random.default_rng(0)
    for n, m in ((2, 3), (5, 4), (7, 7)):
        for _ in range(20):
            a, b = generator.normal(0, 1, n), generator.normal(1.5, 2, m)
            low, high, _ = welch(a.tolist(), b.tolist())
            assert (low > 0 or high < 0) == (stats.ttest_ind(a, b, equal_var=False).pvalue < 0.05)


def test_welch_of_equal_values_has_no_width():
    assert welch([0.1] * 3, [0.1] * 3) == (0, 0, 1) and welch([1.0, 1.0], [2.0, 2.0]) == (1, 1, 0)
    low, high, _ = welch([1.0, 1.0, 1.0], [2.0, 2.2, 2.4])
    assert low == pytest.approx(1.2 - stats.t.ppf(0.975, 2) * 0.2 / 3**0.5) and low + high == pytest.approx(2.4)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "a", "b", "verdict", "code"),
    [
        ("fid", NOISY, SHIFTED, "worse", 1),
        ("fid", SHIFTED, NOISY, "better", 0),
        ("recall", NOISY, SHIFTED, "better", 0),
        ("recall", SHIFTED, NOISY, "worse", 1),
        ("spread", NOISY, SHIFTED, "changed", 0),
        ("fid", NOISY, [10.2, 10.3, 9.9, 10.0], "within noise", 0),
        ("fid", NOISY, NOISY, "same", 0),
        ("fid", [10.0], [99.0], "one seed: not known", 0),
        ("fid", [10.0], [99.0, 98.0], "one seed: not known", 0),
        ("fid", [10.0], [10.0], "same", 0),
        ("fid", [10.0, 10.0], [10.1, 10.1], "worse", 1),
        ("fid", NOISY, [None] * 4, "no value any more", 1),
        ("fid", [None] * 4, NOISY, "new", 0),
        ("fid", NOISY, [float("inf"), 1.0], "not finite: not known", 0),
    ],
)
def test_a_score_is_worse_only_beyond_noise(runs, metric, a, b, verdict, code):
    columns = COLUMNS | {"spread": FID | {"direction": "none"}}
    old, new = ([row(training_seed=k, **{metric: x}) for k, x in enumerate(values)] for values in (a, b))
    found = runs.data(old, new, columns=columns)
    assert verdicts(found) == {("boot", metric): verdict}
    exit_code, text = told(found)
    assert exit_code == code and verdict in text
    assert ("Worse in B: 1 values worse." in text) == (code == 1)


def test_the_interval_is_of_the_means_of_training_seeds_over_sampling_seeds(runs):
    def grid(values):
        return [
            row(training_seed=t, sampling_seed=s, fid=v) for t, line in enumerate(values) for s, v in enumerate(line)
        ]

    found = runs.data(grid([[1, 3], [4, 8], [6, 6]]), grid([[9, 11], [10, 14], [12, 12]])).scores[0]
    truth = stats.ttest_ind([10, 12, 12], [2, 6, 6], equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high))
    assert (found.before, found.after) == pytest.approx((14 / 3, 34 / 3)) and found.seeds == (3, 3)
    assert found.relative == pytest.approx(20 / 14)


def test_several_sampling_seeds_of_one_student_are_one_seed(runs):
    old, new = ([row(sampling_seed=k, fid=x + k) for k in range(4)] for x in (1.0, 50.0))
    assert verdicts(runs.data(old, new)) == {("boot", "fid"): "one seed: not known"}


def test_the_teacher_varies_with_its_samples_only(runs):
    old, new = ([row(fid=x, **TEACHER | {"sampling_seed": k}) for k, x in enumerate(v)] for v in (NOISY, SHIFTED))
    assert verdicts(runs.data(old, new)) == {("teacher:ddim", "fid"): "worse"}


def test_other_training_seeds_can_be_compared(runs):
    new = [row(training_seed=9 + k, fid=x) for k, x in enumerate(SHIFTED)]
    code, text = runs.code(seeds(NOISY), new)
    assert code == 1 and "4, 4" in text and "vanished" not in text


def test_a_change_is_in_per_cent_or_absolute_where_there_was_nothing(runs):
    _, text = runs.code([row(fid=200.0, recall=0.0)], [row(fid=150.0, recall=0.25)])
    lines = {line.split()[3]: line for line in text.splitlines() if line.startswith("boot, 1 NFE")}
    assert "-25.0%" in lines["fid"] and "+0.25" in lines["recall"] and "%" not in lines["recall"]


def test_how_many_would_be_beyond_noise_by_chance_is_said(runs):
    rows = [row(training_seed=k, fid=x, recall=-x) for k, x in enumerate(NOISY)]
    other = [row(training_seed=k, fid=x + 0.01, recall=-x) for k, x in enumerate(NOISY[::-1])]
    _, text = runs.code(rows, other)
    assert "2 tests at 95 %: where nothing changed, 0.1 of them are expected beyond noise." in text


# --- whether a run is reproduced --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "line"),
    [
        (NOISY, NOISY, "B reproduces A exactly: 1 score is equal."),
        (NOISY, [10.2, 10.3, 9.9, 10.0], "B reproduces A: none of 1 score differs beyond noise"),
        (NOISY, SHIFTED, "B does not reproduce A: 1 of 1 score differs beyond noise: fid of boot, 1 NFE (+"),
        (NOISY, [None] * 4, "B does not reproduce A: 1 of 1 score differs"),
        ([10.0], [99.0], "It is not known whether B reproduces A: they differ, and one seed does not say"),
        ([10.0], [10.0], "B reproduces A exactly"),
    ],
)
def test_the_first_line_says_whether_a_run_is_reproduced(runs, a, b, line):
    old, new = ([row(training_seed=k, fid=x) for k, x in enumerate(values)] for values in (a, b))
    assert told(runs.data(old, new))[1].startswith(line)


def test_missing_rows_and_seeds_are_said_in_the_first_line(runs):
    old = [*seeds(NOISY), *seeds(NOISY, method="pd"), row(fid=1.0, method="cm")]
    new = [*seeds([10.2, 10.3, 9.9, 10.0]), row(fid=2.0, method="cm")]
    line = reproduction(runs.data(old, new))
    assert (
        "Of 1 score with one seed it is not known." in line
        and line.startswith("Of the rows that both have, B")
        and "1 row of A failed or is missing in B." in line
    )


def test_chance_alone_does_not_say_that_a_run_is_not_reproduced(runs):
    """Of 60 scores of two seeds some differ at 95 %; corrected, none does. One that is truly other is found."""
    random = np.random.default_rng(3)
    old, new = ([one for m in range(60) for one in seeds(random.normal(10, 1, 4), method=f"m{m}")] for _ in range(2))
    found = runs.data(old, new)
    assert any(one.verdict in ("worse", "better") for one in found.scores)
    assert reproduction(found).startswith("B reproduces A: none of 60 scores differs beyond noise")
    other = [one | {"fid": one["fid"] + 30 * (one["method"] == "m7")} for one in new]
    assert "1 of 60 scores differs beyond noise: fid of m7, 1 NFE" in reproduction(runs.data(old, other))


def test_holm_s_steps_and_its_rate_of_errors():
    """0.01 <= 0.05 / 4, 0.013 <= 0.05 / 3, 0.03 > 0.05 / 2: the rest is kept, also 0.04 (Holm 1979)."""
    assert holm([0.04, 0.01, 0.03, 0.013]) == [False, True, False, True]
    draws = np.random.default_rng(0).uniform(size=(4000, 10))
    assert np.mean([any(holm(one)) for one in draws]) == pytest.approx(1 - (1 - 0.05 / 10) ** 10, abs=0.012)


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "a", "b", "tolerance", "verdict"),
    [
        ("train_seconds", 100.0, 111.0, 0.1, "worse"),
        ("train_seconds", 100.0, 109.0, 0.1, "within tolerance"),
        ("train_seconds", 100.0, 111.0, 0.2, "within tolerance"),
        ("train_seconds", 100.0, 89.0, 0.1, "better"),
        ("train_seconds", 100.0, 100.0, 0.0, "same"),
        ("train_seconds", 100.0, 101.0, 0.0, "worse"),
        ("sample_images_per_second", 100.0, 89.0, 0.1, "worse"),
        ("sample_images_per_second", 100.0, 120.0, 0.1, "better"),
        ("sample_peak_rss_mib", 100.0, 200.0, 0.1, "worse"),
        ("train_teacher_nfe", 0, 5, 0.1, "worse"),
        ("train_joules", 100.0, None, 0.1, "no value any more"),
        ("train_joules", None, 100.0, 0.1, "new"),
    ],
)
def test_costs_are_flagged_beyond_the_tolerance(runs, cost, a, b, tolerance, verdict):
    found = runs.data([row(**{cost: a})], [row(**{cost: b})], tolerance)
    assert [one.verdict for one in found.costs if one.name == cost] == [verdict]
    code, text = told(found)
    assert code == (verdict == "worse")
    label = COLUMNS_OF_TABLES[cost]
    assert (label.heading in text) == (verdict not in ("same", "within tolerance"))
    if verdict == "worse":
        assert f"worse: {label.short} of boot, 1 NFE by " in text
    assert label.heading in told(found, all_costs=True)[1]


def test_what_depends_on_the_device_is_compared_on_equal_devices_only(runs):
    costs = {"sample_latency_p50_ms": 90.0, "train_seconds": 9000.0, "train_images": 5}
    found = runs.data([row(fid=1.0, train_images=5)], [row(fid=1.0, device="cuda (a GPU)", **costs)])
    assert [one.name for one in found.costs] == ["train_images"] and verdicts(found) == {("boot", "fid"): "same"}
    code, text = told(found)
    assert code == 0 and "cpu (a model) in A, cuda (a GPU) in B: speed and memory are not compared" in text


def test_merged_runs_are_compared_on_each_device(runs, tmp_path):
    for name, seconds in (("a", 100.0), ("b", 200.0)):
        one = run_folder(tmp_path / name / "one", [row(fid=1.0, training_seed=0)])
        two = run_folder(tmp_path / name / "two", [row(fid=2.0, training_seed=1, device="gpu", train_seconds=seconds)])
        merge_runs([str(one), str(two)], str(tmp_path / f"m{name}"), None, Console(file=io.StringIO()))
    found = compare(read_run(tmp_path / "ma"), read_run(tmp_path / "mb"))
    flagged = {one.device: one.verdict for one in found.costs if one.name == "train_seconds"}
    assert flagged == {NAMES["device"]: "same", "gpu": "worse"}
    assert found.scores[0].seeds == (2, 2) and found.environment == []


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_a_row_that_was_ok_and_failed_is_worse(runs, status):
    bad = row(status=status, reason="no [memory]", training_seed=1)
    code, text = runs.code(seeds([1.0, 2.0]), [row(fid=1.0), bad])
    assert code == 1 and f"boot, 1 NFE: was ok, {status}: no [memory] (seed 1, noise 0)" in text
    assert "Worse in B: 1 rows lost." in text


def test_a_row_that_failed_before_is_no_news_and_recovery_is_said(runs):
    bad = row(status="failed", reason="no memory", training_seed=1)
    code, text = runs.code([row(fid=1.0), bad], [row(fid=1.0), bad])
    assert code == 0 and "failed: no memory (seed 1, noise 0), as before" in text
    code, text = runs.code([row(fid=1.0), bad], seeds([1.0, 2.0]))
    assert code == 0 and "boot, 1 NFE: ok now (seed 1, noise 0)" in text


def test_a_row_that_vanished_is_worse_and_one_that_appeared_is_not(runs):
    two = [row(fid=1.0), row(method="cm", fid=2.0)]
    code, text = runs.code(two, two[:1])
    assert code == 1 and "  cm, 1 NFE: was ok, vanished\n" in text
    code, text = runs.code(two[:1], two)
    assert code == 0 and "  cm, 1 NFE: appeared\n" in text
    failed = row(method="cm", status="failed", reason="x")
    code, text = runs.code([two[0], failed], two[:1])
    assert code == 0 and "cm, 1 NFE: was not ok, vanished" in text


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("settings", "lr=1", "settings none → lr=1"),
        ("budget", "9 images", "budget 1000 images → 9 images"),
        ("guidance", 2.0, "guidance none → 2"),
        ("images", 64, "images 2048 → 64"),
        ("teacher", "t", "teacher trained-01234567 → t"),
    ],
)
def test_rows_match_in_all_that_decides_them(runs, name, value, words):
    code, text = runs.code([row(fid=1.0)], [row(fid=1.0, **{name: value})])
    assert code == 1 and f"was ok, vanished (B has it with {words})" in text and "rows: 0 in both" in text


def test_nothing_is_compared_across_protocols(runs):
    code, text = runs.code(seeds(NOISY), seeds(SHIFTED, protocol="bbbb", images=64))
    assert code == 2 and "boot, 1 NFE: cannot be compared, images 2048 → 64; protocol aaaa → bbbb" in text
    assert text.startswith("Nothing can be compared: protocols differ.\n") and "95 % interval" not in text


def test_the_rest_is_compared_where_some_protocols_differ(runs):
    old = [*seeds(NOISY), row(method="cm", fid=1.0)]
    code, text = runs.code(old, [*seeds(SHIFTED), row(method="cm", fid=99.0, protocol="bbbb")])
    assert code == 1 and "cm, 1 NFE: cannot be compared, protocol aaaa → bbbb" in text and "cm, 1 NFE  " not in text
    assert "Protocols differ: scores of the rows named above are not compared." in text


def test_a_score_that_is_declared_differently_is_not_compared():
    other = COLUMNS | {"fid": FID | {"protocol": "frechet/3"}}
    found = compare(run_data("a", [row(fid=1.0, recall=1.0)]), run_data("b", [row(fid=9.0, recall=1.0)], other))
    assert verdicts(found) == {("boot", "recall"): "same"}
    assert "fid is not compared: the runs declare another protocol" in told(found)[1]


def test_an_empty_text_is_none_whether_from_csv_or_parquet(runs, tmp_path):
    rows = [row(fid=80.0, **TEACHER), *seeds(NOISY)]
    runs.write(rows, rows)
    (tmp_path / "b" / "table.parquet").unlink()
    code, text = runs.printed()
    assert code == 0 and "rows: 2 in both\n" in text and "2 scores compared: 2 same." in text


# --- settings, environment, words ------------------------------------------------------------------------------------


def test_what_differs_in_settings_and_environment_is_said(runs, tmp_path):
    rows = [row(fid=1.0)]
    here = {"git": {"commit": "0123456789abcdef", "dirty": True}, "packages": {"torch": "2.14"}, "cpu": "x"}
    there = {"git": {"commit": "fedcba9876543210", "dirty": True}, "packages": {"torch": "2.15"}, "cpu": "x"}
    changed = {"methods": {"boot": {"lr": 0.2, "steps": 8}, "cm": {"lr": 1, "mu": 2}}, "seed": 1, "results_dir": "y"}
    run_folder(tmp_path / "a", rows, configs=[CONFIG], environment=here)
    run_folder(
        tmp_path / "b", rows, configs=[CONFIG, changed | {"budget": {"images": 1000}}],
        environment=there,
    )  # fmt: skip
    code, text = runs.printed()
    assert code == 0 and text.startswith(
        "B reproduces A exactly: 1 score is equal.\n"
        "A: a, commit 01234567 and changes, 1 row\nB: b, commit fedcba98 and changes, 1 row\n"
    )
    lines = [line.strip() for line in text.splitlines()]
    settings = lines[lines.index("settings:") + 1 : lines.index("environment:")]
    assert settings == ["methods.boot.lr: 0.1 → 0.1, 0.2", "seed: 0 → 0, 1", "methods.cm: only in B"]
    environment = lines[lines.index("environment:") + 1 : lines.index("rows: 1 in both")]
    assert environment == ["git.commit: 0123456789abcdef → fedcba9876543210", "packages.torch: 2.14 → 2.15"]


def test_equal_runs_differ_in_nothing(runs):
    rows = [row(fid=80.0, **TEACHER), *seeds(NOISY)]
    code, text = runs.code(rows, rows)
    assert code == 0 and "settings: no difference\nenvironment: no difference\nrows: 2 in both\n" in text
    assert text.endswith("Nothing in B is worse beyond noise.\n")


def test_unknown_scores_are_said_to_be_unknown(runs):
    code, text = runs.code([row(fid=1.0)], [row(fid=2.0)])
    assert code == 0 and "Of 1 scores it is not known: train several seeds (seed=0,1,2)." in text


def test_lost_settings_and_environment_are_said(runs, tmp_path):
    runs.write([row(fid=1.0)], [row(fid=1.0)])
    (tmp_path / "a" / "config.yaml").unlink(), (tmp_path / "b" / "environment.json").unlink()
    _, text = runs.printed()
    assert "settings of A are not known" in text and "the environment of B is not known" in text


def test_rows_are_named_by_what_tells_them_apart(runs):
    rows = [row(fid=1.0), row(fid=2.0, settings="lr=1"), row(fid=3.0, nfe=2)]
    text = runs.code(rows, rows)[1]
    assert "boot, 1 NFE, settings lr=1" in text and "boot, 2 NFE " in text and "dataset" not in text


def test_hostile_names_do_nothing(runs):
    name = "[red]x[/red]\x1b[31m\n"
    code, text = runs.code([row(method=name, fid=1.0), row(fid=1.0)], [row(method=name, fid=2.0)])
    assert code == 1 and "\x1b" not in text and r"[red]x[/red]\x1b[31m\n, 1 NFE" in text


def test_a_narrow_terminal_loses_nothing(runs):
    text = told(runs.data(seeds(NOISY), seeds(SHIFTED)), width=50)[1]
    assert "…" not in text and "worse" in text


# --- bad input -------------------------------------------------------------------------------------------------------


def test_nothing_in_common_and_nothing_lost_is_bad_input(runs):
    code, text = runs.code([], [row(fid=1.0)])
    assert code == 2 and "Nothing can be compared: the runs have no row in common." in text
    assert runs.code([row(fid=1.0)], [])[0] == 1


def test_bad_input_is_one_message(runs, tmp_path):
    runs.write([row(fid=1.0)], [row(fid=2.0, status="failed")])
    assert runs.printed()[0] == 1
    for tolerance in (-0.1, float("nan")):
        with pytest.raises(UserError, match="--tolerance must not be negative"):
            runs.printed(tolerance)
    with pytest.raises(UserError, match="no run"):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "c"), 0.1, False, Console(file=io.StringIO()))
