"""Which methods lead, and which cannot be told from the best: pairwise comparisons on common noise and common seeds.

The mean of a method over training seeds has two uncertainties. Another training seed would give another student, and
other noise would give other images. Both are compared in pairs: training seed s of one method with training seed s of
another, and image i of one with image i of another, which comes from the same noise. What all have in common cancels.

**Seeds.** The differences d_s of two methods have the variance v = var(d_s), with S - 1 degrees of freedom. For two
seeds that is one, and says little. It is therefore combined with the variances of all other pairs,

    moderated v = (P w^2 v0 + (S - 1) v) / (P + S - 1),    w = the larger of the two |means|, P = 2

v0 is the typical relative variance, such that the harmonic mean of all moderated v / w^2 is v0: the maximum likelihood
under the prior of Smyth (2004, doi:10.2202/1544-6115.1027), an inverse chi-squared distribution with P degrees of
freedom, which allows methods whose spread is several times that of others. P is given, not estimated: few methods with
two seeds do not determine it.

**Images.** The influence of image i on a score is by how much the score would move if that image had more weight; the
score's variance over noise is var(influence) / n. The differences of two methods' influences have the covariance
between training seeds in common. What differs between seeds is already in v.

**Correction.** The best is chosen by the data, so that all pairs count, not only those with the best: the largest of
all |difference| / error is compared with what it would be without differences (max-T). For seeds it is drawn from the
model above, for images from the normal distribution with the influences' covariance, which is the bootstrap with
Gaussian multipliers over images (Chernozhukov, Chetverikov & Kato 2013). The two are combined as

    half-width^2 = q_seeds^2 (moderated v) / S + q_images^2 (variance over images)

which is exact where one of the two dominates and too wide in between.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PRIOR = 2.0  # degrees of freedom of the prior of variances over seeds
DRAWS = 9999  # of the largest statistic without differences; p is at least 1 / (DRAWS + 1)
LEVEL = 0.95
_MOST = 2**22  # numbers in memory at a time
_CACHED = 2**15  # numbers that the processor's cache holds with their intermediate results


@dataclass(frozen=True, eq=False)
class Pairs:
    """The comparison of each pair of A methods, as matrices (A,A): row minus column.

    `half_width`: of the simultaneous 95 % intervals of the differences. `p`: corrected; 1 on the diagonal.
    """

    difference: Floats
    half_width: Floats
    p: Floats

    @property
    def apart(self) -> NDArray[np.bool_]:
        """(A,A) whether two methods can be told apart: p < 0.05, and 0 is not in the interval."""
        return np.abs(self.difference) > self.half_width


def compare(values: Floats, influences: Floats | None = None) -> Pairs | None:
    """Compare A >= 2 methods by their `values` (A,S) at S common training seeds.

    `influences` (A,S,n): of the same n images, or None if they are not known. None is returned if there is nothing that
    tells the uncertainty: one seed, and no influences.
    """
    A, S = values.shape
    if S < 2 and influences is None:
        return None
    first, second = _pairs(A)
    difference = (values[first] - values[second]).mean(axis=1)
    parts: list[
        tuple[Floats, Floats]
    ] = []  # draws of the largest statistic, squared and sorted; variances of the pairs
    if S >= 2:
        parts.append((_largest_over_seeds(A, S) ** 2, moderated(values) / S))
    if influences is not None:
        covariance = shared_covariance(influences)
        parts.append((_largest_over_images(covariance) ** 2, _variances_of_differences(covariance)))
    rank = int(LEVEL * (DRAWS + 1)) - 1
    half_width = np.sqrt(sum(draws[rank] * variances for draws, variances in parts))
    p = np.ones(len(difference))
    for k in np.flatnonzero(difference):
        above = (sum(draws * variances[k] for draws, variances in parts) >= difference[k] ** 2).sum()
        p[k] = (1 + above) / (DRAWS + 1)
    return Pairs(_matrix(difference, A, -1), _matrix(half_width, A), _matrix(p, A) + np.eye(A))


def moderated(values: Floats) -> Floats:
    """(..., A (A-1)/2) moderated variances over seeds of the differences of all pairs, of values (..., A, S >= 2)."""
    first, second = _pairs(values.shape[-2])
    freedom = values.shape[-1] - 1
    size = np.abs(values.mean(axis=-1))
    size = np.maximum(size[..., first], size[..., second]) ** 2
    own = (values[..., first, :] - values[..., second, :]).var(axis=-1, ddof=1)
    relative = np.divide(own, size, out=np.zeros_like(own), where=size > 0)
    typical = typical_variance(relative, freedom)[..., None]
    return size * (PRIOR * typical + freedom * relative) / (PRIOR + freedom)


def typical_variance(variances: Floats, freedom: int) -> Floats:
    """(...) the v0 of which (P v0 + freedom v) / (P + freedom) has the harmonic mean v0 over `variances` v (..., K).

    By Newton's method in log v0; its steps are limited, since the derivative vanishes far from the solution.
    """
    start = variances.mean(axis=-1)
    log = np.log(np.maximum(start, np.finfo(float).tiny))
    scaled = freedom * variances / PRIOR
    share = np.empty_like(scaled)
    for _ in range(12):
        np.multiply(scaled, np.exp(-log)[..., None], out=share)
        share += 1
        np.reciprocal(share, out=share)
        mean = share.mean(axis=-1)
        slope = mean - np.einsum("...k,...k->...", share, share) / share.shape[-1]  # of the mean of share, by log v0
        step = (PRIOR / (PRIOR + freedom) - mean) / np.maximum(slope, 1e-12)
        log = np.clip(log + np.clip(step, -2, 2), -600, 600)
        if np.abs(step).max() < 1e-6:  # the error after a step is of the order of its square
            break
    return np.where(start > 0, np.exp(log), 0.0)


def shared_covariance(influences: Floats) -> Floats:
    """(A,A) covariance of the methods' means over images, of influences (A,S,n), without what differs between seeds."""
    _, S, n = influences.shape
    centred = influences - influences.mean(axis=-1, keepdims=True)
    mean = centred.mean(axis=1)
    covariance = mean @ mean.T / (n * (n - 1))
    if S == 1:
        return covariance
    own = sum(centred[:, s] @ centred[:, s].T for s in range(S)) / (n * (n - 1) * S)  # of a single student
    shared = (S * covariance - own) / (S - 1)
    values, vectors = np.linalg.eigh((shared + shared.T) / 2)
    return (vectors * values.clip(min=0)) @ vectors.T


def _pairs(count: int) -> tuple[Ints, Ints]:
    return np.triu_indices(count, 1)


def _matrix(values: Floats, size: int, sign: int = 1) -> Floats:
    """(A,A) with the values of pairs above the diagonal, and `sign` times them below."""
    whole = np.zeros((size, size))
    first, second = _pairs(size)
    whole[first, second], whole[second, first] = values, sign * values
    return whole


def _variances_of_differences(covariance: Floats) -> Floats:
    first, second = _pairs(len(covariance))
    diagonal = covariance.diagonal()
    return np.maximum(diagonal[first] + diagonal[second] - 2 * covariance[first, second], 0)


@functools.lru_cache(maxsize=64)
def _largest_over_seeds(methods: int, seeds: int) -> Floats:
    """(DRAWS,) sorted: the largest statistic of all pairs if all methods are equal.

    The standard deviation of each method is drawn from the prior.
    """
    random = np.random.default_rng(0)
    first, second = _pairs(methods)
    largest = []
    for count in _parts(len(first) * seeds):
        spread = np.sqrt(PRIOR / random.chisquare(PRIOR, (count, methods, 1)))
        values = np.ascontiguousarray(np.moveaxis(spread * random.standard_normal((count, methods, seeds)), -1, 0))
        size = max(1, _CACHED // len(first))
        for begin in range(0, count, size):
            some = values[:, begin : begin + size]
            largest.append(_largest_equal([one[:, first] - one[:, second] for one in some]))
    return np.sort(np.concatenate(largest))


def _largest_equal(differences: list[Floats]) -> Floats:
    """(D,) the largest statistic of D draws, of `differences` (D,pairs) at each seed; all methods have the same w.

    The variances are those of :func:`moderated`. Seeds are the outer axis: sums over a short inner one take long.
    """
    seeds, freedom = len(differences), len(differences) - 1
    mean = sum(differences) / seeds
    own = np.asarray(sum((one - mean) ** 2 for one in differences)) / freedom
    variance = (PRIOR * typical_variance(own, freedom)[:, None] + freedom * own) / (PRIOR + freedom)
    return np.sqrt((mean**2 / variance).max(axis=-1) * seeds)


def _largest_over_images(covariance: Floats) -> Floats:
    """(DRAWS,) sorted: the largest statistic of all pairs, of normal values with this covariance."""
    random = np.random.default_rng(0)
    first, second = _pairs(len(covariance))
    error = np.sqrt(_variances_of_differences(covariance))
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0))).T
    largest = []
    for count in _parts(len(first)):
        means = random.standard_normal((count, len(covariance))) @ root
        difference = np.abs(means[:, first] - means[:, second])
        ratios = np.divide(difference, error, out=np.zeros_like(difference), where=error > 0)
        largest.append(ratios.max(axis=-1))
    return np.sort(np.concatenate(largest))


def _parts(numbers: int) -> list[int]:
    """DRAWS in parts of which each takes `numbers` numbers per draw and fits into memory."""
    size = max(1, _MOST // numbers)
    return [min(size, DRAWS - begin) for begin in range(0, DRAWS, size)]
