"""Ternary search for the noise level with the best score, among candidates in order.

Song et al. 2023, arXiv:2303.01469: levels of multistep sampling are found one after the other, from the highest down,
each by a ternary search. That assumes that the score is unimodal in each level: it has one minimum, and no other dip.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence


def ternary_search(score: Callable[[int], float], count: int) -> int:
    """The index below `count` with the lowest score among those that were scored; the minimum if that is the only dip.

    Each step scores two indices and leaves two thirds of the others, so about 3.4 ln `count` are scored.
    """
    scores: dict[int, float] = {}

    def scored(index: int) -> float:
        if index not in scores:
            scores[index] = score(index)
        return scores[index]

    low, high = 0, count - 1
    while high - low > 2:
        left, right = low + (high - low) // 3, high - (high - low) // 3
        if scored(left) < scored(right):
            high = right - 1  # the minimum is below the right one
        else:
            low = left + 1
    for index in range(low, high + 1):
        scored(index)
    return min(scores, key=lambda index: scores[index])


def is_unimodal(scores: Sequence[float]) -> bool:
    """Whether scores, in the order of their levels, fall and then rise."""
    best = scores.index(min(scores))
    falls = all(a >= b for a, b in itertools.pairwise(scores[: best + 1]))
    return falls and all(a <= b for a, b in itertools.pairwise(scores[best:]))
