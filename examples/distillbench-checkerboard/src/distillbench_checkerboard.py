"""The checkerboard, and its exact denoiser as a teacher: points that are uniform on the dark fields of a board.

Given the field, the two coordinates are independent. With x^ = x_t / alpha and tau = sigma / alpha, the posterior of a
coordinate is N(x^, tau^2) cut to the field's [a, b], whose mean is known:

    A = (a - x^) / tau,   B = (b - x^) / tau,   Z = Phi(B) - Phi(A)
    f_k = x^ + tau (phi(A) - phi(B)) / Z                                           (each coordinate)
    f   = sum_k r_k f_k,   r_k proportional to the product of Z over both coordinates

| symbol   | meaning                                                            | shape      |
|----------|--------------------------------------------------------------------|------------|
| x_0, x_t | a point as an image of two pixels, and noisy                       | (B,2,1,1)  |
| K        | dark fields; field k is class k, and K means "any"                 |            |
| a, b     | lower and upper ends of the fields                                 | (K,2)      |
| phi, Phi | density and distribution function of N(0, 1)                       |            |
| m        | Mills' ratio Phi(-z) / phi(z)                                      | (B,K,2)    |
| r        | probability of each field given x_t                                | (B,K)      |
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from distillbench import (
    Conditioning,
    Dataset,
    DatasetConfig,
    Denoiser,
    Progress,
    Teacher,
    TeacherConfig,
    TeacherPlan,
    TeacherSource,
    UserError,
    hookimpl,
    option,
)
from distillbench.diffusion import SCHEDULES, Distribution, ExactDenoiser
from distillbench.networks import ResidualMLP
from distillbench.options import require_between, require_one_of
from torch import Tensor, nn
from torch.special import erfcx, log_ndtr


@dataclass(frozen=True, eq=False)
class UniformOnFields(Distribution):
    """Uniform on K disjoint rectangles [a, b]: a and b (K,2) float64."""

    a: Tensor
    b: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        return 2, 1, 1

    @property
    def components(self) -> int:
        return len(self.a)

    def denoise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, component: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t], in float64 inside: within 1e-6 at every noise level."""
        a, b = self.a.to(x_t.device), self.b.to(x_t.device)
        alpha, sigma = alpha.double().view(-1, 1, 1), sigma.double().view(-1, 1, 1)
        x, tau = x_t.double().view(-1, 1, 2) / alpha, sigma / alpha
        A, B = (a - x) / tau, (b - x) / tau
        side = torch.where(A + B < 0, -1.0, 1.0)  # mirrored, so that x^ lies below the middle: no cancellation
        A, B = torch.minimum(side * A, side * B), torch.maximum(side * A, side * B)
        e = ((A - B) * (A + B) / 2).exp()  # phi(B) / phi(A)
        f_k = (x + side * tau * (1 - e) / (mills(A) - e * mills(B))).clamp(a, b)
        log_Z = log_ndtr(-A) + torch.log1p(-(log_ndtr(-B) - log_ndtr(-A)).exp())
        log_r = log_Z.sum(dim=2)
        if component is not None:
            asked = component[:, None] == torch.arange(self.components, device=x_t.device)
            log_r = torch.where(asked | (component == self.components)[:, None], log_r, -math.inf)
        return (log_r.softmax(dim=1)[..., None] * f_k).sum(dim=1).view(x_t.shape).to(x_t.dtype)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        areas = (self.b - self.a).prod(dim=1)
        k = torch.multinomial(areas, count, replacement=True, generator=generator) if count else torch.arange(0)
        u = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        return torch.lerp(self.a[k], self.b[k], u).view(count, *self.shape), k

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance: those of the middles of the fields, plus (b - a)^2 / 12 within each field."""
        w = (self.b - self.a).prod(dim=1)
        w, middle = w / w.sum(), (self.a + self.b) / 2
        mean = w @ middle
        within = torch.diag(w @ ((self.b - self.a) ** 2 / 12))
        return mean, (middle - mean).T @ (w[:, None] * (middle - mean)) + within

    def plain(self) -> dict[str, Any]:
        return {"law": "uniform_on_fields", "a": self.a.tolist(), "b": self.b.tolist()}


def mills(z: Tensor) -> Tensor:
    """Phi(-z) / phi(z), above 1e135 below z = -25. There it is constant: infinite ones have no finite gradients."""
    return math.sqrt(math.pi / 2) * erfcx(z.clamp(min=-25) / math.sqrt(2))


def sha256_of(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


class Checkerboard(Dataset):
    """Draws from the dark fields of a board of n x n, not rounded to 8 bits; a point's class is its field."""

    name = "checkerboard"
    licence = "none needed: drawn from a formula"

    @dataclass
    class Config(DatasetConfig):
        fields: int = option(4, "n, fields along a side of the board")
        reach: float = option(0.8, "half the side of the board; images lie in [-1, 1]")
        count: int = option(10_000, "points that are drawn; 0: only the distribution is known, for data-free methods")
        seed: int = option(0, "seed of the draws")

        def __post_init__(self) -> None:
            require_between(self, 2, 32, "fields")
            require_between(self, 0.01, 1, "reach")
            require_between(self, 0, 10_000_000, "count")
            require_between(self, 0, 2**63 - 1, "seed")

    def __init__(self, config: Config) -> None:
        n, size = config.fields, 2 * config.reach / config.fields
        dark = torch.tensor([(i, j) for i in range(n) for j in range(n) if (i + j) % 2 == 0], dtype=torch.float64)
        self.distribution = UniformOnFields(dark * size - config.reach, (dark + 1) * size - config.reach)
        self.shape, self.classes = self.distribution.shape, self.distribution.components
        self.points, self.field = self.distribution.draw(config.count, torch.Generator().manual_seed(config.seed))
        self.sha256 = sha256_of([self.distribution.plain(), config.count, config.seed])

    def __len__(self) -> int:
        return len(self.points)

    def read(self, indices: Tensor) -> Tensor:
        return self.points[indices]

    def labels(self, indices: Tensor) -> Tensor:
        return self.field[indices]


class CheckerboardTeacher(TeacherSource):
    """The exact denoiser of ``dataset=checkerboard``. It has no weights, so students start from random weights."""

    name = "checkerboard"

    @dataclass
    class Config(TeacherConfig):
        schedule: str = option("vp_cosine", f"noise schedule: {', '.join(SCHEDULES)}")
        width: int = option(256, "channels of the students' perceptron")
        depth: int = option(4, "its residual blocks")
        seed: int = option(0, "seed of the students' initial weights")

        def __post_init__(self) -> None:
            require_one_of(self, "schedule", SCHEDULES)
            require_between(self, 1, 65536, "width", "depth")
            require_between(self, 0, 2**63 - 1, "seed")

    def plan(self) -> TeacherPlan:
        if not isinstance(self.dataset.distribution, UniformOnFields):
            raise UserError(f"teacher=checkerboard needs dataset=checkerboard, got {self.dataset.name}")
        return TeacherPlan("in closed form")

    def untrained(self) -> Teacher:
        return self.exact("untrained")

    def load(self, progress: Progress) -> Teacher:
        return self.exact(sha256_of([self.provenance(), self.conditioning.classes]))

    def provenance(self) -> dict[str, Any]:
        self.plan()
        return {
            name: value for name, value in vars(self.config).items() if name != "kind"
        } | self.dataset.distribution.plain()

    def exact(self, sha256: str) -> Teacher:
        """The closed form, and a network with random weights for students."""
        provenance, distribution, schedule = (
            self.provenance(),
            self.dataset.distribution,
            SCHEDULES[self.config.schedule](),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            start = Denoiser(self.blank().to(self.device), schedule, "v")
        denoiser, conditioning = (
            ExactDenoiser(distribution, schedule).to(self.device),
            Conditioning(self.conditioning.classes),
        )
        return Teacher(self.name, denoiser, distribution.shape, sha256, provenance, conditioning, start, self.blank)

    def blank(self) -> nn.Module:
        """A student's network with random weights from torch's global generator."""
        return ResidualMLP((2, 1, 1), self.config.width, self.config.depth, self.conditioning.classes)


@hookimpl(api=2)
def register_datasets(register) -> None:
    register(Checkerboard)


@hookimpl(api=2)
def register_teachers(register) -> None:
    register(CheckerboardTeacher)
