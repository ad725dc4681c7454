"""Distributions of x_0 whose optimal denoiser is known in closed form: teachers without a trained network.

With V = alpha^2 v + sigma^2, taken along each eigenvector of a covariance, where v is its eigenvalue:

| distribution of x_0           | denoiser f = E[x_0 given x_t]   | probability-flow map, x_t to x_s              |
|-------------------------------|---------------------------------|-----------------------------------------------|
| N(m, S)                       | m + alpha v / V (x_t - alpha m) | alpha_s m + sqrt(V_s / V_t) (x_t - alpha_t m) |
| sum_k w_k N(m_k, diag(s_k^2)) | sum_k r_k f_k, f_k as above     | D = 1: equal quantiles, F_s(x_s) = F_t(x_t)   |

| symbol       | meaning                                                    | shape and type |
|--------------|------------------------------------------------------------|----------------|
| D, K         | values of an image (C H W), components of a mixture        |                |
| x_t          | alpha_t x_0 + sigma_t eps                                  | (B,C,H,W)      |
| alpha, sigma | the schedule's coefficients                                | (B,1,1,1)      |
| m, S, v      | mean, covariance, eigenvalues of the covariance            | float64        |
| w, m_k, s_k  | weights, means, standard deviations of the components      | float64        |
| r_k          | responsibility, proportional to w_k N(x_t; alpha m_k, V_k) | (B,K)          |
| F_t          | cumulative distribution function of x_t                    |                |
| component    | the component that x_0 is of; K means "not conditioned"    | (B,) int64     |

Everything is computed in float64; results have the dtype and the device of x_t. The Gaussian's f and map follow from
f = (x_t + sigma^2 grad log p) / alpha and dx^/d(tau) = (x^ - f) / tau, x^ = x / alpha, tau = sigma / alpha (Karras et
al. 2022, eqs. 1 and 3). Equal quantiles: in one dimension a flow conserves mass and order, which determines it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.special import log_ndtr

from distillbench.diffusion.schedules import NoiseSchedule
from distillbench.errors import UserError, quoted

__all__ = ["Distribution", "Gaussian", "GaussianMixture", "mixture"]

SLACK = 1e-6  # of the weights' sum, and, relative to the largest entry, of a covariance's symmetry and sign
MOST_HALVINGS = 200  # enough for every float64 except values near 0
LARGEST_EXPONENT = 700.0  # exp of it is still finite in float64


@dataclass(frozen=True, eq=False)
class Distribution(ABC):
    """A distribution of x_0 and what follows from it exactly. Equal to another of the same class and parameters."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""

    @property
    @abstractmethod
    def components(self) -> int:
        """How many components it has: 1 for a Gaussian."""

    @property
    def has_map(self) -> bool:
        """Whether :meth:`transport` has a closed form."""
        return False

    @abstractmethod
    def denoise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, component: Tensor | None = None) -> Tensor:
        """E[x_0 given x_t], and given the component too where `component` (B,) is below `components`: (B,C,H,W)."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(x_0 (count,C,H,W) float64, component (count,) int64), on the generator's device."""

    @abstractmethod
    def moments(self) -> tuple[Tensor, Tensor]:
        """(mean (D,), covariance (D,D)), float64, on the CPU."""

    @abstractmethod
    def plain(self) -> dict[str, Any]:
        """What identifies the distribution, as JSON values."""

    def _map(self, x: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
        """:meth:`transport` for x (B,D) float64 and (alpha, sigma), (B,1) each, at its two ends."""
        raise NotImplementedError(f"{type(self).__name__} says has_map and has no _map")

    @torch.no_grad()
    def transport(self, schedule: NoiseSchedule, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """x_s (B,C,H,W) on the probability-flow trajectory through x_t; either of t and s may be the larger one.

        Exact: no ODE solver. Without gradient.
        """
        if not self.has_map:
            raise UserError(
                f"a mixture of {self.components} components in {math.prod(self.shape)} dimensions has no "
                "probability-flow map in closed form; one component, or one dimension, has"
            )
        start, end = _coefficients(schedule, t, x_t.device), _coefficients(schedule, s, x_t.device)
        return self._map(x_t.double().flatten(1), start, end).view(x_t.shape).to(x_t.dtype)

    def _on(self, device: torch.device, *names: str) -> list[Tensor]:
        """The attributes `names` on `device`; copies are cached."""
        if device.type == "cpu":
            return [getattr(self, name) for name in names]
        copies = self.__dict__.setdefault("_copies", {})
        with torch.inference_mode(False):  # copies must serve a backward pass later
            for name in names:
                if (name, device) not in copies:
                    copies[name, device] = getattr(self, name).to(device)
        return [copies[name, device] for name in names]

    def _parameters(self) -> list[Tensor]:
        return [getattr(self, f.name) for f in fields(self) if f.init]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(map(torch.equal, self._parameters(), other._parameters()))

    def __hash__(self) -> int:
        return hash((type(self), self.shape, *(value.sum().item() for value in self._parameters())))


@dataclass(frozen=True, eq=False)
class Gaussian(Distribution):
    """N(mean, covariance): mean (C,H,W), covariance (D,D) symmetric and positive semidefinite."""

    mean: Tensor
    covariance: Tensor
    _m: Tensor = field(init=False, repr=False)  # (D,)
    _v: Tensor = field(init=False, repr=False)  # (D,) eigenvalues
    _U: Tensor = field(init=False, repr=False)  # (D,D) eigenvectors, one a column

    def __post_init__(self) -> None:
        mean, S = _table(self.mean, "mean"), _table(self.covariance, "covariance")
        if mean.ndim != 3 or not mean.numel():
            raise UserError(f"mean: a shape (C,H,W) is needed, got {tuple(mean.shape)}")
        if S.shape != (mean.numel(), mean.numel()):
            raise UserError(
                f"covariance: {mean.numel()} x {mean.numel()} is needed for this mean, got {tuple(S.shape)}"
            )
        allowed = SLACK * S.abs().max()
        if (S - S.T).abs().max() > allowed:
            gap = (S - S.T).abs().max().item()
            raise UserError(f"covariance: a symmetric matrix is needed, got entries that differ by up to {gap:.3g}")
        S = (S + S.T) / 2
        v, U = torch.linalg.eigh(S)
        if v.min() < -allowed:
            raise UserError(f"covariance: eigenvalues of at least 0 are needed, got {v.min().item():.3g}")
        _set(self, mean=mean, covariance=S, _m=mean.flatten(), _v=v.clamp(min=0), _U=U)

    @property
    def shape(self) -> tuple[int, int, int]:
        C, H, W = self.mean.shape
        return C, H, W

    @property
    def components(self) -> int:
        return 1

    @property
    def has_map(self) -> bool:
        return True

    def denoise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, component: Tensor | None = None) -> Tensor:
        m, v, U = self._on(x_t.device, "_m", "_v", "_U")
        alpha, sigma = alpha.double().flatten(1), sigma.double().flatten(1)
        V = (alpha**2 * v + sigma**2).clamp(min=torch.finfo(torch.float64).tiny)  # 0 only where v and sigma are
        gain = alpha * v / V  # (B,D)
        f = m + ((x_t.double().flatten(1) - alpha * m) @ U * gain) @ U.T
        return f.view(x_t.shape).to(x_t.dtype)

    def _map(self, x: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
        m, v, U = self._on(x.device, "_m", "_v", "_U")
        V_t, V_s = (alpha**2 * v + sigma**2 for alpha, sigma in (start, end))
        return end[0] * m + ((x - start[0] * m) @ U * (V_s / V_t).sqrt()) @ U.T

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Through the symmetric square root of S, which does not depend on the choice of eigenvectors."""
        m, v, U = self._on(generator.device, "_m", "_v", "_U")
        z = torch.randn(count, len(m), generator=generator, dtype=torch.float64, device=generator.device)
        x_0 = m + (z @ U * v.sqrt()) @ U.T
        return x_0.view(count, *self.shape), torch.zeros(count, dtype=torch.int64, device=generator.device)

    def moments(self) -> tuple[Tensor, Tensor]:
        return self._m.clone(), self.covariance.clone()

    def plain(self) -> dict[str, Any]:
        return {
            "law": "gaussian",
            "shape": list(self.shape),
            "mean": self._m.tolist(),
            "covariance": self.covariance.tolist(),
        }


@dataclass(frozen=True, eq=False)
class GaussianMixture(Distribution):
    """sum_k w_k N(m_k, diag(s_k^2)).

    weights (K,), made to sum to exactly 1; means (K,C,H,W); stds a number, or (K,C,H,W) where any of the four may be 1.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    _log_w: Tensor = field(init=False, repr=False)  # (K,)
    _m: Tensor = field(init=False, repr=False)  # (K,D)
    _v: Tensor = field(init=False, repr=False)  # (K,D) variances

    def __post_init__(self) -> None:
        w, means, stds = (_table(getattr(self, name), name) for name in ("weights", "means", "stds"))
        if means.ndim != 4 or not means.numel():
            raise UserError(f"means: a shape (K,C,H,W) is needed, got {tuple(means.shape)}")
        if w.shape != (len(means),):
            raise UserError(f"weights: {len(means)} numbers are needed, one for each of means, got {_counted(w)}")
        if (w <= 0).any() or abs(w.sum().item() - 1) > SLACK:
            raise UserError(f"weights: positive numbers that sum to 1 are needed, got {w.tolist()} (sum {w.sum():.8g})")
        if stds.ndim not in (0, 4) or any(n not in (1, N) for n, N in zip(stds.shape, means.shape, strict=False)):
            raise UserError(
                f"stds: a shape that goes with means, {tuple(means.shape)}, is needed, got {tuple(stds.shape)}"
            )
        if (stds <= 0).any():
            raise UserError(f"stds: positive numbers are needed, got {stds.min().item():.3g}")
        w, stds = w / w.sum(), stds.expand(means.shape).contiguous()
        m, v = means.flatten(1), stds.flatten(1) ** 2
        _set(self, weights=w, means=means, stds=stds, _log_w=w.log(), _m=m, _v=v)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, C, H, W = self.means.shape
        return C, H, W

    @property
    def components(self) -> int:
        return len(self.means)

    @property
    def has_map(self) -> bool:
        return self.components == 1 or math.prod(self.shape) == 1

    def denoise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, component: Tensor | None = None) -> Tensor:
        log_w, m, v = self._on(x_t.device, "_log_w", "_m", "_v")
        alpha, sigma = alpha.double().reshape(-1, 1, 1), sigma.double().reshape(-1, 1, 1)
        V = alpha**2 * v + sigma**2  # (B,K,D)
        away = x_t.double().flatten(1)[:, None] - alpha * m  # (B,K,D)
        log_r = log_w - 0.5 * (away**2 / V + V.log()).sum(dim=2)  # (B,K), up to a term common to all k
        if component is not None:
            K = self.components
            chosen = torch.full((K + 1, K), -math.inf, dtype=torch.float64, device=x_t.device).fill_diagonal_(0)
            chosen = chosen.index_select(0, component)  # index_select refuses an index below 0 or above K
            log_r = torch.where((component == K)[:, None], log_r, chosen)
        f = (log_r.softmax(dim=1)[..., None] * (m + alpha * v / V * away)).sum(dim=1)
        return f.view(x_t.shape).to(x_t.dtype)

    def _map(self, x: Tensor, start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]) -> Tensor:
        """The components' own maps keep their z and enclose the mixture's: F_s <= F_t(x) at the least of them."""
        log_w, m, v = self._on(x.device, "_log_w", "_m", "_v")
        if self.components == 1:
            m, v = m[0], v[0]  # (D,)
        else:
            order = m[:, 0].argsort()
            log_w, m, v = log_w[order], m[order, 0], v[order, 0]  # (K,)
        d_t, d_s = ((alpha**2 * v + sigma**2).sqrt() for alpha, sigma in (start, end))
        z = (x - start[0] * m) / d_t
        x_s = end[0] * m + d_s * z
        if self.components == 1:
            return x_s
        excess = _excess(log_w, z)
        low, high = x_s.amin(dim=1, keepdim=True), x_s.amax(dim=1, keepdim=True)
        for _ in range(MOST_HALVINGS):
            middle = low + (high - low) / 2
            if not ((low < middle) & (middle < high)).any():
                break
            below = excess((middle - end[0] * m) / d_s) < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low + (high - low) / 2

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        w, means, stds = self._on(generator.device, "weights", "means", "stds")
        u = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
        k = torch.searchsorted(w.cumsum(0), u, right=True).clamp(max=self.components - 1)
        z = torch.randn(count, *self.shape, generator=generator, dtype=torch.float64, device=generator.device)
        return means[k] + stds[k] * z, k

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self.weights @ self._m
        away = self._m - mean
        return mean, (away.T * self.weights) @ away + torch.diag(self.weights @ self._v)

    def plain(self) -> dict[str, Any]:
        return {
            "law": "gaussian_mixture",
            "shape": list(self.shape),
            "weights": self.weights.tolist(),
            "means": self._m.tolist(),
            "stds": self.stds.flatten(1).tolist(),
        }


def mixture(weights: Any, means: Any, stds: Any, shape: Any = None) -> GaussianMixture:
    """A mixture from the lists of a configuration; an error names the wrong setting.

    weights: K numbers; means: K rows of D numbers; stds: K rows of 1 or D numbers; shape: C, H, W (default D, 1, 1).
    """
    w, m, s = _row(weights, "weights"), _rows(means, "means"), _rows(stds, "stds")
    K, D = len(m), len(m[0])
    if len(s) != K or len(s[0]) not in (1, D):
        raise UserError(f"stds: {K} rows of 1 or {D} numbers are needed, to go with means, got {len(s)} of {len(s[0])}")
    size = (D, 1, 1) if shape is None else tuple(_row(shape, "shape"))
    if len(size) != 3 or any(n < 1 or n != int(n) for n in size) or math.prod(size) != D:
        raise UserError(
            f"shape: C, H and W with a product of {D}, the length of a row of means, are needed, got {size}"
        )
    size = tuple(map(int, size))
    table = torch.tensor(s, dtype=torch.float64)
    table = table.view(K, *size) if len(s[0]) == D else table.view(K, 1, 1, 1)
    return GaussianMixture(
        torch.tensor(w, dtype=torch.float64), torch.tensor(m, dtype=torch.float64).view(K, *size), table
    )


def _coefficients(schedule: NoiseSchedule, t: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), (B,1) each, in float64 for any default dtype."""
    lam = schedule.lam(t).flatten(1)
    log_alpha = schedule._log_alpha(lam)
    return log_alpha.exp().to(device), (lam + log_alpha).exp().to(device)


def _excess(log_w: Tensor, z: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of other scores z' (B,K), with the sign of F(z') - F(z), where F(z) = sum_k w_k Phi(z_k): (B,1).

    For every j, and K components in the order of their means,

        F(z) - sum_{k<j} w_k = R - L,   R = sum_{k>=j} w_k Phi(z_k),   L = sum_{k<j} w_k Phi(-z_k)

    so F can be compared through R - L, and for the j with the smallest R + L no digits are lost: j = 0 in the lower
    tail, j = K in the upper one, and others in a gap between components. R and L are computed as logarithms.
    """
    from_right = (log_w + log_ndtr(z)).flip(1).logcumsumexp(dim=1).flip(1)
    from_left = (log_w + log_ndtr(-z)).logcumsumexp(dim=1)
    nothing = torch.full_like(z[:, :1], -math.inf)
    total = torch.logaddexp(torch.cat([from_right, nothing], dim=1), torch.cat([nothing, from_left], dim=1))  # (B,K+1)
    right = torch.arange(z.shape[1], device=z.device) >= total.argmin(dim=1, keepdim=True)  # (B,K)

    def two_sums(z: Tensor) -> tuple[Tensor, Tensor]:
        terms = log_w + log_ndtr(torch.where(right, z, -z))
        R, L = (terms.masked_fill(~side, -math.inf).logsumexp(dim=1, keepdim=True) for side in (right, ~right))
        return R, L

    R, L = two_sums(z)
    unit = torch.maximum(R, L)

    def difference(R: Tensor, L: Tensor) -> Tensor:
        """(exp R - exp L) / exp unit."""
        size = (torch.maximum(R, L) - unit).clamp(max=LARGEST_EXPONENT).exp()
        return torch.sign(R - L) * size * -torch.expm1(-(R - L).abs())

    wanted = difference(R, L)
    return lambda z: difference(*two_sums(z)) - wanted


def _set(distribution: Distribution, **values: Tensor) -> None:
    """Set fields of a frozen dataclass."""
    for name, value in values.items():
        object.__setattr__(distribution, name, value)


def _table(value: Any, name: str) -> Tensor:
    """A float64 copy on the CPU, of finite numbers."""
    try:
        table = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().clone()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UserError(f"{name}: numbers are needed, in rows of equal length") from None
    if not table.isfinite().all():
        raise UserError(f"{name}: finite numbers are needed")
    return table


def _counted(table: Tensor) -> str:
    return str(len(table)) if table.ndim == 1 else f"a shape of {tuple(table.shape)}"


def _row(value: Any, name: str) -> list[float]:
    """A list of finite numbers, at least one."""
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not numbers or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise UserError(f"{name}: a list of numbers is needed, got {quoted(str(value))}")
    if not all(math.isfinite(n) for n in numbers):
        raise UserError(f"{name}: finite numbers are needed, got {quoted(str(value))}")
    return numbers


def _rows(value: Any, name: str) -> list[list[float]]:
    """A list of lists of finite numbers, all of one length."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{name}: a list of rows of numbers is needed, got {quoted(str(value))}")
    rows = [_row(row, f"{name}, row {i + 1}") for i, row in enumerate(value)]
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise UserError(f"{name}, row {i + 1}: {len(rows[0])} numbers are needed as in row 1, got {len(row)}")
    return rows
