"""The Fréchet distance between Gaussians fitted to features, and the moments that it needs, computed in one pass.

    d^2 = |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)     Dowson & Landau 1982; Heusel et al. 2017

| symbol | meaning                                             | shape        |
|--------|-----------------------------------------------------|--------------|
| m, S   | mean and covariance (divided by n - 1) of n features | (D,), (D,D) |
| R      | a factor of the covariance, S = R^T R               | (r,D)        |

With any factor R of S_a the last trace is the sum of the square roots of the eigenvalues of R S_b R^T. That matrix is
symmetric, so no complex numbers occur; if n < D, R has n rows and the matrix is n x n.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 4096  # features of which influences are computed at a time


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean and covariance of `n` features, float64. If n <= D, `rows` are stored instead of the covariance.

    `rows` are the centred features over sqrt(n - 1), (n,D), so that S = rows^T rows; otherwise `covariance` is given.
    """

    n: int
    mean: Tensor  # (D,)
    given: Tensor | None = None  # (D,D)
    rows: Tensor | None = None  # (n,D)

    @staticmethod
    def of(features: Tensor) -> GaussianStatistics:
        """Statistics of features (n,D), n >= 2."""
        moments = Moments()
        moments.add(features)
        return moments.statistics()

    @functools.cached_property
    def covariance(self) -> Tensor:
        """(D,D)."""
        if self.given is not None:
            return self.given
        assert self.rows is not None
        return self.rows.T @ self.rows

    @property
    def variance(self) -> float:
        """Trace of the covariance: the mean squared distance to the mean, times n / (n - 1)."""
        return self.covariance.trace().item() if self.rows is None else self.rows.square().sum().item()

    def to(self, device: str) -> GaussianStatistics:
        """The same on `device`; both sides of a distance must be on one."""
        given, rows = (None if part is None else part.to(device) for part in (self.given, self.rows))
        return GaussianStatistics(self.n, self.mean.to(device), given, rows)

    def dense(self) -> GaussianStatistics:
        """The same with its covariance as a matrix, as in files."""
        return GaussianStatistics(self.n, self.mean, given=self.covariance)

    @functools.cached_property
    def cholesky(self) -> Tensor | None:
        """R (D,D), upper triangular; None where S is singular."""
        upper, info = torch.linalg.cholesky_ex(self.covariance, upper=True)
        return upper if info == 0 else None

    @functools.cached_property
    def root(self) -> Tensor:
        """R (D,D) from the eigenvectors of S; S may be singular."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * values.clamp(min=0).sqrt()).T


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """The squared Fréchet distance d^2 (FID is this square); a negative rounding error becomes 0."""
    R, other = _factor(a, b)
    if other.rows is not None:
        half = R @ other.rows.T
        product = half @ half.T
    else:
        product = R @ other.covariance @ R.T
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt()
    distance = (a.mean - b.mean).square().sum().item() + a.variance + b.variance - 2 * roots.sum().item()
    return max(0.0, distance) if math.isfinite(distance) else distance


def _factor(a: GaussianStatistics, b: GaussianStatistics) -> tuple[Tensor, GaussianStatistics]:
    """The cheapest factor of one of them, and the other one: few rows, else Cholesky, else from eigenvectors."""
    with_rows = [s for s in (a, b) if s.rows is not None]
    if with_rows:
        first = min(with_rows, key=lambda s: s.n)
        assert first.rows is not None
        return first.rows, b if first is a else a
    for first, other in ((a, b), (b, a)):
        if first.cholesky is not None:
            return first.cholesky, other
    return a.root, b


def frechet_influence(features: Tensor, other: GaussianStatistics) -> Tensor:
    """(n,) influence of each of `features` (n,D) on their squared Fréchet distance to `other`, float64, with mean 0.

    It is the derivative by the weight of feature i (the infinitesimal jackknife). With mean m and covariance S:

        2 (m - m_b).(x_i - m) + n / (n - 1) (x_i - m)^T (I - T) (x_i - m) + constant,
        T = R^T (R S R^T)^-1/2 R for S_b = R^T R

    With the rows of X = (x_i - m) / sqrt(n - 1), the term in T is n - 1 times the diagonal of (X S_b X^T)^1/2. So no
    inverse is needed, and n <= D, where S is singular, is no special case: then that matrix is n x n, else D x D. The
    standard deviation of the distance is then overestimated, 1.1 to 1.4 times for n < 2 D and normal features (see the
    tests); for n >= 8 D it is right within 4 %.
    """
    n, D = features.shape
    device, mean = other.mean.device, features.mean(dim=0, dtype=torch.float64).to(other.mean.device)

    def centred(block: Tensor) -> Tensor:
        return block.to(device).double() - mean

    blocks = features.split(n if n <= D else AT_ONCE)
    if n <= D:
        x = centred(features)
        half = x if other.rows is None else x @ other.rows.T
        gram = (half @ other.covariance @ half.T if other.rows is None else half @ half.T) / (n - 1)
        values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
        roots = [(vectors.square() * values.clamp(min=0).sqrt()).sum(dim=1)]
    else:
        R = other.rows if other.rows is not None else other.root if other.cholesky is None else other.cholesky
        product = sum((y.T @ y for y in (centred(block) @ R.T for block in blocks)), start=R.new_zeros(len(R), len(R)))
        values, vectors = torch.linalg.eigh(product / (n - 1))
        known = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        turn = R.T @ vectors[:, known] / values[known] ** 0.25
        roots = [(centred(block) @ turn).square().sum(dim=1) / (n - 1) for block in blocks]
    parts = []
    for block, root in zip(blocks, roots, strict=True):
        x = centred(block)
        parts.append(2 * x @ (mean - other.mean) + n / (n - 1) * (x.square().sum(dim=1) - (n - 1) * root))
    result = torch.cat(parts)
    return result - result.mean()


class Moments:
    """Mean and covariance of features in blocks: one pass, float64, O(D x D) memory for any number of features.

    Blocks, and Moments of other processes, are merged by the update of Chan, Golub & LeVeque (1983), which is accurate
    even if the mean is large compared with the spread.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean: Tensor | None = None  # (D,)
        self._scatter: Tensor | None = None  # (D,D), sum of squared deviations of the folded features
        self._folded = 0  # number of folded features
        self._pending: list[Tensor] = []  # the others, at most D: one large product is faster than many small ones

    def add(self, features: Tensor) -> None:
        """Add a block (b,D)."""
        x = features.double()
        if self.n - self._folded + len(x) > x.shape[1]:
            self._fold()
        self._pending.append(x)
        self.n += len(x)
        if len(x) > x.shape[1]:
            self._fold()

    def merge(self, other: Moments) -> None:
        """Add the features of `other`."""
        for block in other._pending:
            self.add(block)
        if other._scatter is not None and other._mean is not None:
            self._fold()
            self._update(other._folded, other._mean, other._scatter)
            self.n += other._folded

    def statistics(self) -> GaussianStatistics:
        """Mean and covariance; raises ValueError for fewer than two features."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two features, got {self.n}")
        if self._scatter is None and self.n <= self._pending[0].shape[1]:
            x = torch.cat(self._pending)
            mean = x.mean(dim=0)
            return GaussianStatistics(self.n, mean, rows=(x - mean) / (self.n - 1) ** 0.5)
        self._fold()
        assert self._mean is not None and self._scatter is not None
        return GaussianStatistics(self.n, self._mean, given=self._scatter / (self.n - 1))

    def _fold(self) -> None:
        if self._pending:
            x = torch.cat(self._pending)
            mean = x.mean(dim=0)
            centred = x - mean
            self._pending = []
            self._update(len(x), mean, centred.T @ centred)

    def _update(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        total = self._folded + n
        if self._scatter is None or self._mean is None:
            self._mean, self._scatter = mean, scatter
        else:
            shift = mean - self._mean
            self._scatter = (self._scatter + scatter).addr(shift, shift, alpha=self._folded * n / total)
            self._mean = self._mean + shift * (n / total)
        self._folded = total
