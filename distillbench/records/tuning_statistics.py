"""Statistics of a search for settings: what the best of k trials is expected to be, and which settings matter.

Trials that failed, diverged or were stopped early have no score. They count as trials, and as no better than the worst
score, so that a method whose trainings often fail does not look better for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import rankdata

from distillbench.errors import UserError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEWEST_TRIALS = 5  # for the sensitivity to a setting
PERMUTATIONS = 9999

Floats = NDArray[np.float64]
Scores = Sequence[float | None]  # of the trials in order; None: no score


def best_of(scores: Scores, direction: str) -> pd.DataFrame:
    """The distribution of the best score of k of the trials, drawn without replacement, for k = 1 to all n of them.

    One row for each k, with the columns `trials` (k), `mean`, `std` (of the distribution), `q05` to `q95` (quantiles:
    the smallest score that the best of k reaches or stays below with that probability) and `none_ok`, the probability
    that none of the k has a score. Trials without one count as the worst score here. Empty without any score.

    With x_1 the worst and x_n the best score, the best of k is x_i where the other k - 1 are among the i - 1 worse:
    P(best of k = x_i) = C(i - 1, k - 1) / C(n, k). Exact for trials in random order. A search that learns from its
    trials starts with worse ones, so its own path (:func:`best_so_far`) is behind this curve at first.

    `direction`: "lower" or "higher" is better; UserError for another.
    """
    worst_first, missing = _worst_first(scores, direction)
    n = len(worst_first)
    columns = ["trials", "mean", "std", *(_column(q) for q in QUANTILES), "none_ok"]
    if not n:
        return pd.DataFrame({name: pd.Series(dtype="int64" if name == "trials" else "float64") for name in columns})
    k, i = np.arange(1, n + 1)[:, None], np.arange(1, n + 1)[None, :]
    chosen = np.exp(_log_choose(i - 1, k - 1) - _log_choose(np.full_like(k, n), k))  # (k, i): P(best of k = x_i)
    mean = chosen @ worst_first
    std = np.sqrt((chosen * (worst_first - mean[:, None]) ** 2).sum(axis=1))
    rows = {"trials": k[:, 0], "mean": mean, "std": std}
    rising = slice(None) if worst_first[0] <= worst_first[-1] else slice(None, None, -1)
    reached = chosen[:, rising].cumsum(axis=1)
    for q in QUANTILES:
        rows[_column(q)] = worst_first[rising][(reached < q - 1e-12).sum(axis=1).clip(max=n - 1)]
    lost = np.where(k[:, 0] <= missing, np.exp(_log_choose(missing, k[:, 0]) - _log_choose(n, k[:, 0])), 0.0)
    return pd.DataFrame({**rows, "none_ok": lost}, columns=columns)


def best_so_far(scores: Scores, direction: str) -> list[float | None]:
    """The best score of the first 1, 2, ... trials, in the order in which they ran; None before the first score."""
    sign = _sign(direction)
    best: float | None = None
    found: list[float | None] = []
    for score in _finite(scores):
        if score is not None and (best is None or sign * score > sign * best):
            best = score
        found.append(best)
    return found


@dataclass(frozen=True)
class Sensitivity:
    """How much the scores of a search depend on one setting, by ranks.

    `share`: of the variance of the scores' ranks, what the setting alone explains: a parabola in the ranks of a number,
    the mean of each choice of anything else. `by_chance`: the mean share of a setting without any influence, which
    grows with the number of choices; `chance_95`: what such a setting stays below in 95 % of all orders of the trials.
    `p_value`: the share of random orders that explain as much (permutation test). Settings are tested one by one, and
    together they may hide each other: of 20 without influence one is expected below .05.
    """

    share: float
    by_chance: float
    chance_95: float
    p_value: float


def sensitivity(values: Sequence[Any], scores: Scores, direction: str, seed: int = 0) -> Sensitivity | None:
    """How the scores depend on one setting, which had these `values`; see :class:`Sensitivity`.

    Trials without a score rank below all others. None for fewer than FEWEST_TRIALS trials, for a setting that never
    changed, and if all scores are equal. `direction`: "lower" or "higher" is better; UserError for another.
    """
    sign = _sign(direction)
    if len(scores) < FEWEST_TRIALS:
        return None
    ranks = rankdata([-np.inf if score is None else sign * score for score in _finite(scores)])
    ranks = ranks - ranks.mean()
    spanned = _spanned(values)
    total = (ranks**2).sum()
    if total == 0 or not spanned.shape[1]:
        return None
    share = float(((ranks @ spanned) ** 2).sum() / total)
    orders = np.random.default_rng(seed).permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1)
    by_order = ((orders @ spanned) ** 2).sum(axis=1) / total
    p_value = (1 + (by_order >= share - 1e-12).sum()) / (1 + PERMUTATIONS)
    by_chance = spanned.shape[1] / (len(scores) - 1)
    return Sensitivity(share, by_chance, float(np.quantile(by_order, 0.95)), float(p_value))


# --- parts -----------------------------------------------------------------------------------------------------------


def _spanned(values: Sequence[Any]) -> Floats:
    """An orthonormal basis, (n, degrees of freedom), of what a function of the setting can be, less its mean."""
    if all(type(value) in (int, float) for value in values):
        rank = rankdata([float(value) for value in values])
        columns = np.stack([rank, (rank - rank.mean()) ** 2], axis=1)
    else:
        texts = [repr(value) for value in values]
        columns = np.array([[text == choice for choice in dict.fromkeys(texts)] for text in texts], dtype=np.float64)
    columns = columns - columns.mean(axis=0)
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, singular > 1e-9 * max(1.0, float(singular.max(initial=0.0)))]


def _worst_first(scores: Scores, direction: str) -> tuple[Floats, int]:
    """The scores from worst to best, missing ones as the worst, and how many are missing; none if all are missing."""
    sign = _sign(direction)
    known = sorted((score for score in _finite(scores) if score is not None), key=lambda score: sign * score)
    missing = len(scores) - len(known)
    return np.array(known[:1] * missing + known, dtype=np.float64), missing


def _log_choose(n: Any, k: Any) -> Floats:
    """ln C(n, k), -inf where k > n."""
    n, k = np.asarray(n, dtype=np.float64), np.asarray(k, dtype=np.float64)
    possible = k <= n
    inside = gammaln(n + 1) - gammaln(k + 1) - gammaln(np.where(possible, n - k, 0) + 1)
    return np.where(possible, inside, -np.inf)


def _finite(scores: Scores) -> list[float | None]:
    """The scores; None for those that are not finite, too."""
    return [None if score is None or not np.isfinite(score) else float(score) for score in scores]


def _sign(direction: str) -> int:
    if direction not in ("lower", "higher"):
        raise UserError(f"a search needs a score of which lower or higher is better, got direction {direction!r}")
    return 1 if direction == "higher" else -1


def _column(q: float) -> str:
    return f"q{round(100 * q):02d}"
