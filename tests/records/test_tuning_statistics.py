"""Best of k trials and sensitivity, against all subsets, scipy and numpy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from distillbench import UserError
from distillbench.records import tuning_statistics
from distillbench.records.tuning_statistics import QUANTILES, best_of, best_so_far, sensitivity

SCORES = [3.0, 1.0, None, 2.5, 7.0, 1.0, None, 4.0]
WORST = {"lower": 7.0, "higher": 1.0}
BEST = {"lower": min, "higher": max}


def of_all_subsets(scores, direction, k):
    """The best of each k-subset, with missing scores as the worst; and the share of subsets with no score at all."""
    filled = [WORST[direction] if s is None else s for s in scores]
    best = [BEST[direction](filled[i] for i in chosen) for chosen in itertools.combinations(range(len(scores)), k)]
    none = [all(scores[i] is None for i in chosen) for chosen in itertools.combinations(range(len(scores)), k)]
    return np.array(best), float(np.mean(none))


@pytest.mark.parametrize("direction", ["lower", "higher"])
def test_the_best_of_k_is_that_of_all_subsets(direction):
    found = best_of(SCORES, direction)
    assert found["trials"].tolist() == list(range(1, len(SCORES) + 1))
    for k in range(1, len(SCORES) + 1):
        best, none_ok = of_all_subsets(SCORES, direction, k)
        row = found.iloc[k - 1]
        assert row["mean"] == pytest.approx(best.mean(), rel=1e-12)
        assert row["std"] == pytest.approx(best.std(), rel=1e-9, abs=1e-6)
        assert row["none_ok"] == pytest.approx(none_ok, rel=1e-12)
        for q in QUANTILES:
            expected = np.quantile(best, q, method="inverted_cdf")
            assert row[f"q{round(100 * q):02d}"] == expected, (k, q)


def test_the_mean_of_one_trial_is_that_of_all_and_the_best_of_all_is_the_best():
    found = best_of([5.0, 2.0, 8.0, 1.0], "lower")
    assert found["mean"].iloc[0] == pytest.approx(4.0)
    assert found[["mean", "std", "q05", "q95"]].iloc[-1].tolist() == pytest.approx([1.0, 0.0, 1.0, 1.0], abs=1e-12)


def test_many_trials_are_exact_too():
    """The mean of the largest of k of the integers 1, ..., n is k (n + 1) / (k + 1)."""
    n = 500
    found = best_of(list(range(1, n + 1)), "higher")
    k = found["trials"]
    np.testing.assert_allclose(found["mean"], k * (n + 1) / (k + 1), rtol=1e-9)


def test_without_a_score_there_is_nothing_to_expect():
    assert best_of([None, None], "lower").empty and best_of([], "lower").empty
    assert best_of([math.nan, 1.0], "lower")["none_ok"].tolist() == [0.5, 0.0]
    assert best_so_far([None, None], "lower") == [None, None]


def test_best_so_far_is_the_running_best():
    assert best_so_far([None, 3.0, 5.0, 1.0, None, 2.0], "lower") == [None, 3.0, 3.0, 1.0, 1.0, 1.0]
    assert best_so_far([3.0, 5.0, math.inf, 1.0], "higher") == [3.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize("function", [best_of, best_so_far, lambda s, d: sensitivity([1] * len(s), s, d)])
def test_a_score_without_a_direction_is_refused(function):
    with pytest.raises(UserError, match="lower or higher is better, got direction 'none'"):
        function([1.0] * 6, "none")


# --- sensitivity -----------------------------------------------------------------------------------------------------


def test_choices_explain_what_kruskal_and_wallis_find():
    """H = (n - 1) times the share of the variance of ranks, ties included."""
    rng = np.random.default_rng(0)
    values = [["a", "b", None][i % 3] for i in range(17)]
    scores = [float(np.round(rng.normal() + 2 * (v == "a"), 1)) for v in values]
    groups = [[s for v, s in zip(values, scores, strict=True) if v == choice] for choice in ("a", "b", None)]
    found = sensitivity(values, scores, "lower")
    assert found.share == pytest.approx(stats.kruskal(*groups).statistic / 16, rel=1e-12)
    assert found.by_chance == pytest.approx(2 / 16)


@pytest.mark.parametrize("direction", ["lower", "higher"])
def test_numbers_explain_what_a_parabola_through_the_ranks_does(direction):
    rng = np.random.default_rng(1)
    values = (10 ** rng.uniform(-4, -2, 20)).tolist()
    scores = [(math.log10(v) + 3) ** 2 + 0.1 * rng.normal() for v in values]
    x, y = stats.rankdata(values), stats.rankdata(scores)
    left = y - np.polyval(np.polyfit(x, y, 2), x)
    found = sensitivity(values, scores, direction)
    assert found.share == pytest.approx(1 - left.var() / y.var(), rel=1e-9)
    assert found.share > found.chance_95 > found.by_chance == pytest.approx(2 / 19)
    assert abs(stats.spearmanr(values, scores).statistic) ** 2 < found.chance_95  # a rank correlation does not see it


def test_the_share_by_chance_is_that_of_a_setting_without_influence(monkeypatch):
    monkeypatch.setattr(tuning_statistics, "PERMUTATIONS", 999)
    rng = np.random.default_rng(2)
    shares, below = [], []
    for seed in range(200):
        found = sensitivity(rng.uniform(size=12).tolist(), rng.normal(size=12).tolist(), "lower", seed)
        shares.append(found.share)
        below.append(found.p_value < 0.1)
    assert np.mean(shares) == pytest.approx(found.by_chance, abs=3 * np.std(shares) / 200**0.5)
    assert 0.04 < np.mean(below) < 0.17


def test_the_test_by_permutation_is_that_of_scipy():
    values, scores = [1, 1, 1, 2, 2, 2, 2], [1.0, 2.0, 3.5, 3.0, 5.0, 6.0, 7.0]
    exact = stats.permutation_test(
        ([1.0, 2.0, 4.0], [3.0, 5.0, 6.0, 7.0]),
        lambda a, b: abs(np.mean(a) - np.mean(b)),
        n_resamples=np.inf,
        alternative="greater",
    )
    assert sensitivity(values, scores, "lower").p_value == pytest.approx(exact.pvalue, abs=0.01)


def test_trials_without_a_score_rank_worst():
    """A setting that decides whether trials fail is seen, whatever is better."""
    values, scores = [True, False] * 6, [1.0, None, 2.0, None, 3.0, None, 4.0, None, 5.0, None, 6.0, None]
    for direction in ("lower", "higher"):
        assert sensitivity(values, scores, direction).p_value < 0.01
    worse_and_worse = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, None, None]
    assert sensitivity(list(range(8)), worse_and_worse, "lower").share > 0.98
    assert sensitivity(list(range(8)), worse_and_worse, "higher").share < 0.98


def test_where_nothing_can_be_said_there_is_no_sensitivity():
    assert sensitivity([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0], "lower") is None  # too few
    assert sensitivity([1] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "lower") is None  # never changed
    assert sensitivity([1, 2, 3, 4, 5, 6], [1.0] * 6, "lower") is None  # all equal
    assert sensitivity([1, 2, 3, 4, 5, 6], [None] * 6, "lower") is None
