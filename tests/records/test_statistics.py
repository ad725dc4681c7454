"""Means and intervals over seeds against arithmetic by hand and against coverage; who leads, and who must not."""

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from scipy import stats

from distillbench.records.statistics import FEWEST, arrow, leaders, summarise, verdict

NAMES = {"dataset": "digits", "teacher": "trained-01234567", "guidance": None, "method": "boot", "settings": ""}
NAMES |= {
    "nfe": 1,
    "images": 2048,
    "budget": "300,000 images",
    "protocol": "p",
    "device": "cpu",
    "status": "ok",
    "reason": "",
    "key": "k",
}
FD = {"fd": "lower"}
nightly = pytest.mark.nightly


def rows(scores, **names):
    """Rows of one group from {(training seed, sampling seed): score}; a score that is a word is a status."""
    made = []
    for (training, sampling), score in scores.items():
        failed = isinstance(score, str)
        row = NAMES | {"training_seed": training, "sampling_seed": sampling, "fd": None if failed else score} | names
        made.append(row | ({"status": score} if failed else {}))
    return made


def table(*groups):
    return pd.DataFrame([row for group in groups for row in group])


def trained(values, **names):
    return rows({(seed, 0): value for seed, value in enumerate(values)}, **names)


def grid(values, **names):
    """Rows of values[training seed][sampling seed]."""
    return rows({(t, s): v for t, line in enumerate(values) for s, v in enumerate(line)}, **names)


def only(frame):
    assert len(frame) == 1
    return frame.iloc[0]


def trials(values):
    """A table in which values (G, training, sampling) are G groups."""
    g, t, s = (index.ravel() for index in np.indices(values.shape))
    frame = pd.DataFrame({"dataset": [f"{i:06}" for i in g], "training_seed": t, "sampling_seed": s})
    return frame.assign(**{name: value for name, value in NAMES.items() if name != "dataset"}, fd=values.ravel())


def coverage(values, truth, kind, **options):
    """The share of G trials (G, training, sampling) in which the interval holds truth, a number or (G,)."""
    summary = summarise(trials(values), FD, **options)
    return ((summary[f"fd_{kind}_low"] <= truth) & (truth <= summary[f"fd_{kind}_high"])).mean()


# --- arithmetic by hand ---------------------------------------------------------------------------------------------


def test_means_deviations_and_t_intervals_match_the_textbook():
    row = only(summarise(table(grid([[1, 3], [4, 8], [6, 6]])), FD))
    # per training seed 2, 6, 6; per sampling seed 11 / 3, 17 / 3
    assert (row["training_seeds"], row["sampling_seeds"], row["status"], row["fd_missing"]) == (3, 2, "ok", 0)
    assert row["fd"] == pytest.approx(14 / 3)
    assert row["fd_training_std"] == pytest.approx((16 / 3) ** 0.5)
    half = 4.302653 * (16 / 3) ** 0.5 / 3**0.5
    assert [row["fd_training_low"], row["fd_training_high"]] == pytest.approx([14 / 3 - half, 14 / 3 + half], rel=1e-6)
    assert row["fd_sampling_std"] == pytest.approx(((2 + 8 + 0) / 3) ** 0.5)
    half = 12.706205 * 1  # values 11/3 and 17/3: std 2 ** 0.5, over 2 ** 0.5
    assert [row["fd_sampling_low"], row["fd_sampling_high"]] == pytest.approx([14 / 3 - half, 14 / 3 + half], rel=1e-6)
    assert (row["fd_training_interval"], row["fd_sampling_interval"]) == ("t", "t")


def test_training_seeds_have_equal_weights_in_a_mean():
    scores = {(0, 0): 1.0, (0, 1): 2.0, (0, 2): 3.0, (1, 0): 10.0, (1, 1): 14.0}
    row = only(summarise(table(rows(scores)), FD))
    assert row["fd"] == 7
    assert row["fd_sampling_std"] == pytest.approx(((2 + 8) / 3) ** 0.5)
    moves = np.array([-1 / 6 - 2 / 4, 2 / 4, 1 / 6])  # of the mean, by each sampling seed
    half = 12.706205 * (2 * np.sum(moves**2)) ** 0.5
    assert row["fd_sampling_high"] - 7 == pytest.approx(half, rel=1e-6)


def test_one_seed_has_a_mean_and_no_interval():
    row = only(summarise(table(trained([5.0])), FD))
    assert row["fd"] == 5 and row["training_seeds"] == 1 and row["sampling_seeds"] == 1
    empty = [f"fd_{seed}_{what}" for seed in ("training", "sampling") for what in ("std", "low", "high", "interval")]
    assert row[empty].isna().all()


def test_no_interval_over_sampling_where_a_student_was_sampled_once():
    row = only(summarise(table(rows({(0, 0): 1.0, (0, 1): 2.0, (1, 0): 5.0})), FD))
    assert row["fd_sampling_std"] == pytest.approx(0.5**0.5)
    assert pd.isna(row["fd_sampling_low"]) and pd.isna(row["fd_sampling_interval"])
    assert row["fd_training_low"] < row["fd"] == 3.25


def test_a_teacher_varies_with_sampling_only():
    scores = {(None, seed): value for seed, value in enumerate([1.0, 2.0, 3.0])}
    row = only(summarise(table(rows(scores, method="teacher:ddim", budget=None)), FD))
    assert (row["training_seeds"], row["sampling_seeds"], row["fd"]) == (0, 3, 2)
    assert row["fd_sampling_std"] == 1 and row["fd_sampling_high"] == pytest.approx(2 + 4.302653 / 3**0.5)
    assert pd.isna(row["fd_training_std"]) and pd.isna(row["fd_training_low"])


def test_costs_are_counted_once_for_each_training_seed():
    made = grid([[1, 2, 3], [4, 5, 6]]) + rows({(2, 0): 7.0})
    for row in made:
        row |= {"train_seconds": [0.1, 0.3, 0.5][row["training_seed"]], "train_peak_gpu_mib": None}
        row |= {"sample_latency_ms": 0.1, "train_note": "a word"}
    frame = table(made).astype({"train_peak_gpu_mib": "Float64"})
    row = only(summarise(frame, FD))
    assert row["train_seconds"] == pytest.approx(0.3) and row["sample_latency_ms"] == 0.1
    assert pd.isna(row["train_peak_gpu_mib"]) and "train_note" not in row.index


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 11])
def test_equal_values_have_intervals_of_no_width(count):
    made = trained([0.1] * count), grid([[0.1] * count], method="cm")
    summary = summarise(table(*made), FD).set_index("method")
    for method, seed in (("boot", "training"), ("cm", "sampling")):
        found = summary.loc[method, ["fd", *(f"fd_{seed}_{what}" for what in ("std", "low", "high"))]]
        assert found.tolist() == [0.1, 0, 0.1, 0.1]


def test_infinite_scores_have_no_interval():
    row = only(summarise(table(trained([1.0, 2.0, float("inf")])), FD))
    assert row["fd"] == float("inf") and pd.isna(row["fd_training_low"]) and pd.isna(row["fd_training_interval"])


# --- what must not look complete ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["failed", "diverged"])
def test_failed_rows_are_counted_and_not_averaged(status):
    row = only(summarise(table(rows({(0, 0): 1.0, (1, 0): status, (2, 0): 3.0})), FD))
    assert (row["fd"], row["status"], row["training_seeds"]) == (2, "2 of 3 ok", 2)
    row = only(summarise(table(rows({(0, 0): status})), FD))
    assert (row["status"], row["training_seeds"], row["sampling_seeds"]) == ("0 of 1 ok", 0, 0) and pd.isna(row["fd"])


def test_values_of_failed_rows_are_not_averaged():
    made = rows({(0, 0): 1.0}) + rows({(1, 0): 99.0}, status="diverged")
    assert only(summarise(table(made), FD))["fd"] == 1


def test_a_failed_row_without_images_counts_in_every_possible_group():
    made = [*trained([1.0, 2.0]), *trained([1.0, 2.0], images=512), *rows({(2, 0): "failed"}, images=None)]
    made += trained([3.0], method="cm") + rows({(0, 0): "failed"}, method="pd", images=None)
    made += rows({(0, 0): 4.0}, nfe=2)
    summary = summarise(table(made), FD)
    found = summary[["method", "nfe", "images", "status"]].astype(object).fillna("none").to_numpy().tolist()
    assert found == [
        ["boot", 1, 512, "2 of 3 ok"],
        ["boot", 1, 2048, "2 of 3 ok"],
        ["boot", 2, 2048, "ok"],
        ["cm", 1, 2048, "ok"],
        ["pd", 1, "none", "0 of 1 ok"],
    ]


def test_missing_scores_of_ok_rows_are_counted():
    made = trained([1.0, None, 3.0, float("nan")])
    row = only(summarise(table(made), FD))
    assert (row["fd"], row["fd_missing"], row["status"], row["training_seeds"]) == (2, 2, "ok", 4)
    assert row["fd_training_std"] == pytest.approx(2**0.5)


def test_conflicting_rows_are_refused_and_duplicates_are_not():
    made = trained([1.0, 2.0])
    assert_frame_equal(summarise(table(made, made), FD), summarise(table(made), FD))
    with pytest.raises(ValueError, match=r"two different rows for .*method=boot.*training_seed=1"):
        summarise(table(made, rows({(1, 0): 2.5}, key="another")), FD)


# --- tables ---------------------------------------------------------------------------------------------------------


def mixed():
    generator = np.random.default_rng(5)
    made = [grid(generator.normal(size=(7, 3)), method="boot"), grid(generator.normal(size=(3, 7)), method="cm")]
    made += [grid(generator.normal(size=(7, 6)), method="pd", guidance=2.0), trained([1.0, 2.0], settings="lr=1")]
    made += [rows({(None, s): generator.normal() for s in range(6)}, method="teacher:ddim", budget=None)]
    made += [rows({(7, 0): "failed", (8, None): "diverged"}, method="boot", images=None)]
    return table(*made)


def test_a_summary_depends_neither_on_row_order_nor_on_other_groups():
    frame = mixed()
    summary = summarise(frame, FD)
    assert len(summary) == 5
    for seed in range(4):
        assert_frame_equal(summarise(frame.sample(frac=1, random_state=seed), FD), summary)
    alone = summarise(frame[frame["method"] == "cm"], FD)
    assert_frame_equal(alone, summary[summary["method"] == "cm"].reset_index(drop=True))


def test_the_input_is_not_changed_and_a_table_from_a_file_gives_the_same(tmp_path):
    frame = mixed()
    before = frame.copy(deep=True)
    summary = summarise(frame, FD)
    assert_frame_equal(frame, before)
    frame.to_csv(tmp_path / "table.csv", index=False)
    frame.to_parquet(tmp_path / "table.parquet", index=False)
    assert_frame_equal(summarise(pd.read_csv(tmp_path / "table.csv"), FD), summary)
    assert_frame_equal(summarise(pd.read_parquet(tmp_path / "table.parquet"), FD), summary)


def test_an_empty_table_has_the_same_columns_and_types():
    full = summarise(mixed(), FD)
    empty = summarise(mixed().iloc[:0], FD)
    assert len(empty) == 0 and empty.dtypes.tolist() == full.dtypes.tolist() and list(empty) == list(full)
    assert leaders(empty, "fd", "lower").tolist() == []
    assert verdict(empty, "fd", "lower") == "no method has a score"
    assert str(full["fd"].dtype) == str(full["fd_training_low"].dtype) == "Float64"
    assert str(full["fd_missing"].dtype) == str(full["training_seeds"].dtype) == "Int64"
    assert str(full["status"].dtype) == str(full["fd_training_interval"].dtype) == "string"


def test_empty_keys_and_settings_form_groups():
    made = [trained([1.0, 2.0], settings=""), trained([3.0, 4.0], settings="lr=1"), trained([5.0], guidance=2.0)]
    summary = summarise(table(*made), FD)
    assert summary["fd"].tolist() == [5, 1.5, 3.5] and summary["guidance"].isna().tolist() == [False, True, True]


@pytest.mark.parametrize("name", ["a b", "100 %", "train_loss", "sample_score", 'µ\n"x"', "fd_training_st", "low", ""])
def test_metrics_may_have_any_name(name):
    frame = table(trained([1.0, 2.0])).rename(columns={"fd": name})
    summary = summarise(frame, {name: "lower"})
    assert only(summary)[name] == 1.5 and list(summary).count(name) == 1
    assert not leaders(summary, name, "lower").any()


def test_any_text_may_be_a_key():
    texts = ["", "a,b\n", "nan", "<NA>", "0 of 1 ok", "[x]", "%s{}", "teacher"]
    summary = summarise(table(*(trained([i, i + 0.01], method=text) for i, text in enumerate(texts))), FD)
    assert sorted(summary["method"]) == sorted(texts)
    assert summary.loc[leaders(summary, "fd", "higher"), "method"].tolist() == ["teacher"]


@pytest.mark.parametrize("name", ["status", "method", "training_seed", "training_seeds", "sampling_seeds"])
def test_metrics_named_like_a_column_are_refused(name):
    with pytest.raises(ValueError, match=name):
        summarise(table(trained([1.0])).assign(training_seeds=1, sampling_seeds=1), {name: "lower"})


def test_metrics_whose_columns_would_collide_are_refused():
    with pytest.raises(ValueError, match="fd_training_std"):
        summarise(table(trained([1.0])).assign(fd_training_std=1), {"fd": "lower", "fd_training_std": "lower"})


def test_invalid_arguments_are_refused():
    frame = table(trained([1.0]))
    with pytest.raises(ValueError, match="no column kid"):
        summarise(frame, {"kid": "lower"})
    with pytest.raises(ValueError, match="no direction 'down'"):
        summarise(frame, {"fd": "down"})
    with pytest.raises(ValueError, match="confidence"):
        summarise(frame, FD, confidence=95)
    with pytest.raises(ValueError, match="no direction"):
        leaders(summarise(frame, FD), "fd", "")


def test_arrows():
    assert [arrow(direction) for direction in ("lower", "higher", "none")] == ["↓", "↑", ""]
    with pytest.raises(ValueError, match="no direction"):
        arrow("down")


# --- intervals ------------------------------------------------------------------------------------------------------


def test_the_bootstrap_starts_at_six_values_and_matches_scipy():
    values = np.random.default_rng(2).exponential(size=FEWEST)
    made = [trained(values), trained(values[:-1], method="cm"), grid([values], method="pd")]
    summary = summarise(table(*made), FD).set_index("method")
    assert summary["fd_training_interval"].fillna("").tolist() == ["bootstrap", "t", ""]
    assert summary["fd_sampling_interval"].fillna("").tolist() == ["", "", "bootstrap"]
    level = 1 - 2 * stats.norm.sf(stats.t.ppf(0.975, FEWEST - 1) * (FEWEST / (FEWEST - 1)) ** 0.5)
    generator = np.random.default_rng(7)
    plain = stats.bootstrap((values,), np.mean, confidence_level=level, rng=generator, n_resamples=50000)
    expected = pytest.approx(list(plain.confidence_interval), abs=0.1 * values.std())
    assert summary.loc["boot", ["fd_training_low", "fd_training_high"]].tolist() == expected
    both = summary.loc["pd", ["fd_sampling_low", "fd_sampling_high"]].tolist()
    assert both == pytest.approx(summary.loc["boot", ["fd_training_low", "fd_training_high"]].tolist())


def test_an_interval_shifts_and_scales_with_its_values():
    values = np.random.default_rng(2).exponential(size=8)
    low, high = only(summarise(table(trained(values)), FD))[["fd_training_low", "fd_training_high"]]
    for scale, shift in ((1e-12, 0), (1e12, 0), (3, 1e4)):
        moved = only(summarise(table(trained(values * scale + shift)), FD))
        found = [moved["fd_training_low"], moved["fd_training_high"]]
        expected = [low * scale + shift, high * scale + shift]  # but for rounding, which may part equal resamples
        assert found == pytest.approx(expected, abs=0.01 * scale * values.std())


def test_a_higher_confidence_gives_a_wider_interval():
    for values in (range(3), range(9)):
        frame = table(trained(list(values)))
        wide, narrow = (only(summarise(frame, FD, confidence=c)) for c in (0.99, 0.5))
        assert wide["fd_training_low"] < narrow["fd_training_low"] < narrow["fd"]
        assert wide["fd_training_high"] > narrow["fd_training_high"] > narrow["fd"]


# Standard error of a coverage of 0.95 in 800 trials: 0.008.


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=nightly), 5, 6, pytest.param(10, marks=nightly)])
def test_coverage_over_training_seeds_of_normal_scores(count):
    values = np.random.default_rng(count).normal(170, 5, size=(800, count, 1))
    assert 0.91 < coverage(values, 170, "training", resamples=1999) < 0.975


@pytest.mark.parametrize(("count", "least"), [(3, 0.85), (6, 0.86), pytest.param(10, 0.88, marks=nightly), (20, 0.9)])
def test_coverage_over_training_seeds_of_skewed_scores(count, least):
    values = np.random.default_rng(count).exponential(size=(800, count, 1))
    assert least < coverage(values, 1, "training", resamples=1999) < 0.98


@pytest.mark.parametrize(
    ("training", "sampling"), [pytest.param(1, 3, marks=nightly), (4, 3), (4, 6), pytest.param(2, 10, marks=nightly)]
)
@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_coverage_over_sampling_seeds_with_correlated_students(training, sampling, shared):
    """`shared`: the part of the variance that a sampling seed gives to all students alike. The truth is the mean of
    these students over all sampling seeds."""
    generator = np.random.default_rng(training + 10 * sampling)
    students = generator.normal(170, 20, size=(800, training, 1))
    together = generator.normal(size=(800, 1, sampling)) * shared**0.5
    values = students + together + generator.normal(size=(800, training, sampling)) * (1 - shared) ** 0.5
    assert 0.91 < coverage(values, students.mean(axis=(1, 2)), "sampling", resamples=1999) < 0.975


def test_coverage_over_training_seeds_with_sampling_noise():
    generator = np.random.default_rng(3)
    values = generator.normal(170, 2, size=(800, 4, 1)) + generator.normal(0, 5, size=(800, 4, 3))
    assert 0.925 < coverage(values, 170, "training") < 0.975


# --- who leads ------------------------------------------------------------------------------------------------------

LOW, MIDDLE, HIGH = [10.0, 11.0, 12.0], [12.0, 13.0, 14.0], [50.0, 51.0, 52.0]  # half widths of 2.48


def judged(*groups, direction="lower"):
    """(methods that lead, verdict) of one comparable group."""
    summary = summarise(table(*groups), {"fd": direction})
    marks = leaders(summary, "fd", direction)
    assert marks.dtype == bool and marks.index.equals(summary.index)
    return summary.loc[marks, "method"].tolist(), verdict(summary, "fd", direction)


def test_a_disjoint_interval_leads():
    both = trained(LOW, method="boot"), trained(HIGH, method="cm")
    assert judged(*both) == (["boot"], "boot 8.5 to 13.5 leads: no other interval reaches its own")
    assert judged(*both, direction="higher")[0] == ["cm"]
    assert judged(*both, direction="none") == ([], "direction none: neither is better")


def test_an_overlapping_interval_does_not_lead():
    three = trained(LOW, method="boot"), trained(MIDDLE, method="cm"), trained(HIGH, method="pd")
    assert judged(*three) == ([], "intervals overlap: boot 8.5 to 13.5, cm 10.5 to 15.5")
    assert judged(*three, direction="higher")[0] == ["pd"]
    assert judged(trained(LOW, method="boot"), trained(LOW, method="cm"))[0] == []
    assert judged(trained([1, 1], method="boot"), trained([1, 1, 1], method="cm"))[0] == []  # a tie of no width


def test_nobody_leads_if_a_student_was_trained_once():
    expected = "no interval over retraining: cm (1 training seed)"
    assert judged(trained(LOW), trained([99.0], method="cm")) == ([], expected)
    often = grid([range(99, 104)], method="cm")  # sampled often says nothing of that
    assert judged(trained(LOW), often) == ([], expected)
    _, why = judged(trained([10.0]), trained([99.0], method="cm"))
    assert why == "no interval over retraining: boot (1 training seed), cm (1 training seed)"


def test_a_single_method_does_not_lead():
    assert judged(trained(LOW)) == ([], "no other method to compare with boot")
    teacher = rows({(None, seed): 99.0 + seed for seed in range(3)}, method="teacher:ddim")
    assert judged(trained(LOW), teacher) == ([], "no other method to compare with boot")
    assert judged(teacher) == ([], "no method has a score")
    failed = trained(["failed", "failed"], method="cm")
    assert judged(trained(LOW), failed) == ([], "no other method to compare with boot; failed: cm")
    without = trained([None, None], method="sid")
    assert judged(trained(LOW), without) == ([], "no other method to compare with boot; no score: sid")


def test_teachers_are_ignored():
    teacher = rows({(None, seed): 1.0 + seed / 9 for seed in range(3)}, method="teacher:ddim")
    assert judged(trained(LOW), trained(HIGH, method="cm"), teacher)[0] == ["boot"]


def test_failed_methods_are_named_and_not_compared():
    leading, why = judged(trained(LOW), trained(HIGH, method="cm"), trained(["diverged"], method="pd"))
    assert leading == ["boot"] and why.endswith("; failed: pd")


def test_incomplete_methods_are_compared_and_do_not_lead():
    part, whole = trained([*LOW, "diverged"], method="boot"), trained(HIGH, method="cm")
    expected = "boot 8.5 to 13.5 is best, but incomplete; incomplete: boot (3 of 4 ok)"
    assert judged(part, whole) == ([], expected)
    assert judged(part, whole, direction="higher")[0] == ["cm"]
    part = trained([*LOW, None], method="boot")
    assert judged(part, whole)[1].endswith("incomplete: boot (1 without a score)")


@pytest.mark.parametrize(
    "other",
    [
        {"images": 512},
        {"nfe": 2},
        {"guidance": 2.0},
        *({name: "x"} for name in ["dataset", "teacher", "budget", "protocol"]),
    ],
    ids=lambda names: next(iter(names)),
)
def test_only_comparable_rows_are_compared(other):
    made = [trained(LOW), trained(HIGH, method="cm"), trained([0.0, 0.1, 0.2], method="pd", **other)]
    summary = summarise(table(*made), FD)
    assert summary.loc[leaders(summary, "fd", "lower"), "method"].tolist() == ["boot"]
    with pytest.raises(ValueError, match="equal in"):
        verdict(summary, "fd", "lower")


def test_settings_of_one_method_are_compared_and_named():
    leading, why = judged(trained(LOW), trained(HIGH, settings="lr=1"))
    assert leading == ["boot"] and why.startswith("boot 8.5")
    _, why = judged(trained(LOW, settings="lr=1"), trained(MIDDLE, settings="lr=1", device="cuda"))
    assert why == "intervals overlap: boot [lr=1] [cpu] 8.5 to 13.5, boot [lr=1] [cuda] 10.5 to 15.5"


def test_marks_follow_the_index_of_the_rows():
    made = [trained(LOW), trained(HIGH, method="cm"), trained(HIGH, nfe=2), trained(LOW, method="cm", nfe=2)]
    summary = summarise(table(*made), FD).sample(frac=1, random_state=3)
    summary.index = [7] * len(summary)
    marks = leaders(summary, "fd", "lower")
    assert marks.index.equals(summary.index)
    assert sorted(summary[["method", "nfe"]][marks.tolist()].to_numpy().tolist()) == [["boot", 1], ["cm", 2]]
