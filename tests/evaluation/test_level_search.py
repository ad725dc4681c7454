"""The ternary search finds the minimum of unimodal scores, and says what it cost."""

import math

import pytest

from distillbench.evaluation.level_search import is_unimodal, ternary_search


class Counted:
    """Scores of indices; `asked` lists those that were computed."""

    def __init__(self, score):
        self.score, self.asked = score, []

    def __call__(self, index):
        self.asked.append(index)
        return self.score(index)


@pytest.mark.parametrize("count", [*range(1, 20), 40, 199])
def test_the_minimum_of_a_quadratic_is_found_wherever_it_lies(count):
    """Between two candidates, on one, or beyond the ends; each candidate is scored at most once."""
    for lowest in [*(index + shift for index in range(count) for shift in (-0.3, 0.0, 0.4)), -5.0, count + 5.0]:
        score = Counted(lambda index, lowest=lowest: (index - lowest) ** 2)
        expected = min(range(count), key=lambda index: abs(index - lowest))
        assert ternary_search(score, count) == expected
        assert len(score.asked) == len(set(score.asked)) <= 2 * math.ceil(math.log(count, 1.5)) + 3


@pytest.mark.parametrize("shape", [lambda d: d if d > 0 else -9 * d, lambda d: max(0, abs(d) - 1), lambda d: d**4])
def test_unimodal_scores_need_not_be_symmetric_or_strict(shape):
    for lowest in range(30):
        found = ternary_search(lambda index, lowest=lowest: shape(index - lowest), 30)
        assert shape(found - lowest) == 0


def test_a_score_that_is_not_finite_is_worse_than_any():
    assert ternary_search(lambda index: math.inf if index < 9 else index - 9, 16) == 9


def test_what_was_tried_tells_whether_there_was_one_minimum():
    assert (
        is_unimodal([3, 2, 1, 2, 5]) and is_unimodal([1]) and is_unimodal([1, 1, 2]) and is_unimodal([2, 1, math.inf])
    )
    assert not is_unimodal([3, 1, 2, 1.5]) and not is_unimodal([1, 3, 2]) and not is_unimodal([2, 3, 1])
