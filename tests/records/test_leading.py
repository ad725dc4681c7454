"""Who leads: pairwise comparisons against known distributions, by hand, and against how often they are wrong."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from distillbench.records.influences import InfluenceFiles, run_file, tensor_name
from distillbench.records.leading import leading_groups
from distillbench.records.pairwise import PRIOR, compare, moderated, shared_covariance, typical_variance

NAMES = {"dataset": "digits", "teacher": "trained-01234567", "guidance": None, "settings": "", "nfe": 1, "images": 500}
NAMES |= {"budget": "300,000 images", "protocol": "p", "device": "cpu", "status": "ok", "sampling_seed": 0}
FD = {"fd": "lower"}


def table(scores, **others):
    """Rows of {method: scores by training seed}; None is a row that failed."""
    rows = [
        NAMES | {"method": method, "training_seed": seed, "fd": score, "key": f"{method}{seed}"}
        | ({} if score is not None else {"status": "failed"}) | others
        for method, by_seed in scores.items() for seed, score in enumerate(by_seed)
    ]  # fmt: skip
    return pd.DataFrame(rows)


class Given:
    """Influences by (key, score)."""

    def __init__(self, values):
        self.values = values

    def of(self, key, nfe, sampling_seed, score):
        return self.values.get(key)


def only(groups):
    (group,) = groups
    return group


def labels(standings):
    return [one.label for one in standings]


# --- the statistics --------------------------------------------------------------------------------------------------


def test_two_methods_and_no_influences_are_a_paired_t_test():
    """With one pair there is nothing to share: the interval is Student's, apart from the draws of its quantile."""
    values = np.array([[100.0, 104.0, 101.0, 98.0, 103.0], [103.0, 106.0, 103.5, 101.5, 106.5]])
    pairs = compare(values)
    theirs = stats.ttest_rel(*values)
    low, high = theirs.confidence_interval()
    assert pairs.difference[0, 1] == pytest.approx((low + high) / 2)
    assert pairs.half_width[0, 1] == pytest.approx((high - low) / 2, rel=0.05)
    assert pairs.p[0, 1] == pytest.approx(theirs.pvalue, rel=0.5, abs=2e-4)
    assert pairs.apart[0, 1]


def test_images_alone_give_tukeys_interval():
    """Independent methods of equal variance: the studentised range with infinitely many degrees of freedom."""
    random = np.random.default_rng(0)
    influences = random.standard_normal((5, 1, 40_000))
    pairs = compare(np.arange(5.0)[:, None], influences)
    expected = stats.studentized_range.ppf(0.95, 5, np.inf) / np.sqrt(40_000)
    assert pairs.half_width[np.triu_indices(5, 1)] == pytest.approx(expected, rel=0.03)


def test_what_images_have_in_common_cancels():
    """Two methods whose images err alike can be told apart by less than either's own uncertainty."""
    random = np.random.default_rng(1)
    common, own = 50 * random.standard_normal((1, 1, 1000)), random.standard_normal((2, 1, 1000))
    values = np.array([[10.0], [10.2]])
    assert compare(values, common + own).apart[0, 1]
    assert not compare(values, 50 * random.standard_normal((2, 1, 1000))).apart[0, 1]


def test_the_variance_between_seeds_is_not_counted_twice():
    """Of influences that differ between the seeds of a method only what they share is the images' variance."""
    random = np.random.default_rng(2)
    shared, own = 3 * random.standard_normal((4, 1, 20_000)), 2 * random.standard_normal((4, 3, 20_000))
    found = shared_covariance(shared + own) * 20_000
    assert found.diagonal() == pytest.approx(9, rel=0.05)
    assert shared_covariance(own).diagonal() * 20_000 == pytest.approx(0, abs=0.05)


def test_variances_of_pairs_are_moderated_towards_a_typical_one():
    """v0 is the harmonic mean of the moderated variances, relative to the square of the larger mean."""
    random = np.random.default_rng(3)
    variances = random.chisquare(1, 40)
    v0 = typical_variance(variances, 1)
    assert 1 / np.mean(1 / ((PRIOR * v0 + variances) / (PRIOR + 1))) == pytest.approx(v0)
    assert typical_variance(np.zeros(3), 1) == 0
    values = np.array([[10.0, 10.0], [20.0, 20.2], [40.0, 41.0]])
    size, own = np.array([20.1, 40.5, 40.5]) ** 2, np.array([0.02, 0.5, 0.32])
    v0 = typical_variance(own / size, 1)
    assert moderated(values) == pytest.approx((PRIOR * v0 * size + own) / (PRIOR + 1), rel=1e-3)


def test_the_draws_do_not_depend_on_a_common_effect_of_a_seed():
    values = np.array([[10.0, 11.0], [10.5, 11.6], [14.0, 14.9]])
    assert compare(values + np.array([0.0, 0.001])).difference == pytest.approx(compare(values).difference)
    assert moderated(values + np.array([-0.2, 0.2])) == pytest.approx(moderated(values))


def error_rate(methods, seeds, spread, share, trials=1000):
    """How often equal methods are told from the best. `share`: variance over images as a share of that over seeds."""
    random, wrong = np.random.default_rng(4), 0
    images = 64
    for _ in range(trials):
        own = np.exp(spread * random.standard_normal((methods, 1))) * random.standard_normal((methods, seeds))
        values, influences = 100 + 0.5 * own, None
        if share:
            influences = np.repeat(random.standard_normal((methods, 1, images)), seeds, axis=1)
            values = values + 0.5 * (share / seeds) ** 0.5 * random.standard_normal((methods, 1))
            influences *= 0.5 * (share / seeds * images) ** 0.5
        pairs = compare(values, influences)
        best = values.mean(axis=1).argmin()
        wrong += pairs.apart[best].any()
    return wrong / trials


@pytest.mark.nightly
@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize(("spread", "most"), [(0, 0.05), (0.7, 0.065), (1.0, 0.09)])
@pytest.mark.parametrize("share", [0, 1])
def test_equal_methods_are_rarely_told_apart(seeds, spread, most, share):
    """5 % at most if standard deviations of methods differ by a factor of e^+-1 (spread 0.5); 8.5 % for e^+-2."""
    assert error_rate(7, seeds, spread, share) <= most


@pytest.mark.nightly
def test_it_finds_more_than_disjoint_intervals_do():
    """Six methods 8 standard deviations behind: the rule of intervals that must not overlap finds next to none."""
    random, found, old = np.random.default_rng(5), 0.0, 0.0
    for _ in range(400):
        values = 100 + 0.5 * random.standard_normal((7, 2)) + np.r_[0, np.full(6, 4.0)][:, None]
        found += compare(values).apart[0, 1:].mean() / 400
        reach = stats.t.ppf(0.975, 1) * values.std(axis=1, ddof=1) / 2**0.5
        old += (values.mean(axis=1) - reach > values.mean(axis=1)[0] + reach[0])[1:].mean() / 400
    assert found > 0.7 and old < 0.4


# --- groups ----------------------------------------------------------------------------------------------------------


def test_the_best_is_first_and_the_rest_trail():
    group = only(leading_groups(table({"a": [20.0, 20.4], "b": [10.0, 10.2], "c": [10.1, 10.2], "d": [30, 31]}), FD))
    assert (labels(group.leaders), labels(group.trailing)) == (["b", "c"], ["a", "d"])
    assert (group.rule, group.training_seeds, group.images, group.leads) == ("seeds", 2, 0, False)
    assert group.best.mean == pytest.approx(10.1) and group.best.difference is None
    trails = group.trailing[0]
    assert trails.difference == pytest.approx(10.1) and trails.low > 0 and trails.p < 0.05
    assert trails.low + trails.high == pytest.approx(2 * trails.difference)
    assert group.group["nfe"] == 1 and group.group["guidance"] is None and trails.row["method"] == "a"
    up = only(leading_groups(table({"a": [0.9, 0.91], "b": [0.1, 0.12]}), {"fd": "higher"}))
    assert up.best.label == "a" and up.leaders[0].mean > 0.9


def test_one_seed_is_compared_by_images_and_says_so():
    random = np.random.default_rng(6)
    noise = random.standard_normal(500)
    given = Given({"a0": noise, "b0": noise + 0.1 * random.standard_normal(500), "c0": 0 * noise})
    group = only(leading_groups(table({"a": [5.0], "b": [5.1]}), FD, [Given({}), given]))
    assert (group.rule, group.images, labels(group.trailing), group.leads) == ("images", 500, ["b"], True)
    assert "does not include variation between trainings" in group.said and "500 images" in group.said
    without = only(leading_groups(table({"a": [5.0], "b": [50.0]}), FD))
    assert (without.rule, labels(without.leaders), without.leads) == ("none", ["a", "b"], False)
    assert "one training seed, and no influences" in without.said


def test_images_without_influences_of_one_method_are_left_aside():
    random = np.random.default_rng(7)
    given = Given({f"{name}{seed}": random.standard_normal(500) for name in "ab" for seed in (0, 1)})
    scores = {"a": [5.0, 5.1], "b": [9.0, 9.1]}
    both = only(leading_groups(table(scores), FD, [given]))
    assert (both.rule, both.images) == (
        "seeds and images",
        500,
    ) and "2 common training seeds and 500 images" in both.said
    del given.values["b1"]
    one = only(leading_groups(table(scores), FD, [given]))
    assert one.rule == "seeds" and "does not include which images were sampled" in one.said


def test_incomplete_methods_are_named_and_not_compared():
    rows = table({"a": [1.0, None], "b": [5.0, 5.1], "c": [9.0, 9.1], "d": [None, None]})
    rows.loc[rows.key == "c1", "fd"] = None
    group = only(leading_groups(rows, FD))
    assert labels(group.leaders) == ["b"] and not group.leads and group.rule == "none"
    assert group.left_out == {
        "a": "incomplete: 1 of 2 rows are ok", "c": "incomplete: 1 of 2 rows without a score", "d": "failed",
    }  # fmt: skip
    assert group.said == "There is no other method to compare with."


def test_only_common_seeds_are_compared():
    group = only(leading_groups(table({"a": [1.0, 1.1, 50.0], "b": [2.0, 2.1]}), FD))
    assert group.training_seeds == 2 and group.best.label == "a" and group.best.mean == pytest.approx(1.05)
    assert [one.difference for one in (*group.leaders, *group.trailing)] == [None, pytest.approx(1.0)]
    other = table({"b": [2.0, 2.1]}).assign(training_seed=[7, 8])
    apart = only(leading_groups(pd.concat([table({"a": [1.0, 1.1]}), other]), FD))
    assert apart.rule == "none" and "no training seed and noise in common" in apart.said


def test_groups_are_kept_apart_and_costs_can_be_compared():
    one, two = table({"a": [1.0, 1.1], "b": [5.0, 5.1]}), table({"a": [1.0, 1.1], "b": [5.0, 5.1]}, nfe=2)
    rows = pd.concat([one, two, table({"teacher:ddim": [0.1]}, training_seed=None)])
    rows["train_seconds"] = 100.0 + np.arange(len(rows))
    groups = leading_groups(rows, FD | {"train_seconds": "lower"})
    assert [(group.group["nfe"], group.score) for group in groups] == [
        (1, "fd"), (1, "train_seconds"), (2, "fd"), (2, "train_seconds"),
    ]  # fmt: skip
    assert groups[1].said == "Pairwise comparison, corrected for all pairs, over 2 common training seeds."


def test_influences_are_read_from_the_runs_folder(tmp_path):
    values = torch.arange(5.0)
    file = run_file(tmp_path, "abc")
    file.parent.mkdir()
    save_file({tensor_name(1, 0, "fd"): values}, file)
    files = InfluenceFiles(tmp_path)
    assert files.of("abc", 1, 0, "fd").tolist() == values.tolist()
    assert files.of("abc", 2, 0, "fd") is None and files.of("abd", 1, 0, "fd") is None
    assert files.of("../influences/abc", 1, 0, "fd") is None
    file.write_bytes(b"damaged")
    assert files.of("abc", 1, 0, "fd") is None
