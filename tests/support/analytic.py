"""Teachers with closed-form denoisers and maps, and helpers that tests of methods share.

With V = alpha^2 v + sigma^2:

| distribution of x_0       | denoiser f = E[x_0 given x_t]     | noise-to-data map, x_t to x_s                 |
|---------------------------|-----------------------------------|-----------------------------------------------|
| N(m, diag(v))             | m + alpha v / V (x_t - alpha m)   | alpha_s m + sqrt(V_s / V_t) (x_t - alpha_t m) |
| sum_k w_k N(m_k, s_k^2 I) | sum_k r_k(x_t) f_k(x_t)           | equal quantiles (one pixel)                   |
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from by_day import by_day
from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import SCHEDULES, NoiseSchedule, VPCosine
from distillbench.networks.architectures import ResidualMLP
from distillbench.system.progress import Progress, Step
from distillbench.teachers.teacher import Teacher
from distillbench.training.budget import BudgetConfig, Meter
from distillbench.training.loop import Loop, train
from distillbench.training.method import Batch, Method, Read
from distillbench.training.pairs import Workspace

MEAN, VARIANCE = (0.5, -0.3), (1.0, 0.09)  # the Gaussian of these tests: one wide and one narrow direction
WEIGHTS, CENTRES, SPREADS = (0.3, 0.5, 0.2), (-1.5, 0.4, 1.2), (0.25, 0.35, 0.2)  # the 1-D mixture


def column(values) -> Tensor:
    """(D,1,1) float64, to go with images (B,D,1,1)."""
    return torch.as_tensor(values, dtype=torch.float64).view(-1, 1, 1)


def time(value: float | Tensor) -> Tensor:
    """(B,1,1,1) float64."""
    return torch.as_tensor(value, dtype=torch.float64).reshape(-1, 1, 1, 1)


def schedules() -> list[str]:
    """Every registered schedule by name, for `pytest.mark.parametrize`."""
    return list(SCHEDULES)


def some_schedules() -> list[Any]:
    """The same for what depends on a schedule through alpha and sigma only: one of each family, the others nightly."""
    return by_day(SCHEDULES, ("vp_cosine", "ve", "flow_matching"))


def close(actual: Tensor, expected: Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Assert |actual - expected| <= atol + rtol |expected| (torch.testing would take seconds to import)."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.detach().numpy(), expected.detach().numpy(), rtol=rtol, atol=atol)


# --- the Gaussian ----------------------------------------------------------------------------------------------------


def marginal_variance(schedule: NoiseSchedule, t: Tensor, variance=VARIANCE) -> Tensor:
    """V = alpha^2 v + sigma^2, (B,D,1,1)."""
    return schedule.alpha(t) ** 2 * column(variance) + schedule.sigma(t) ** 2


def gaussian_map(schedule: NoiseSchedule, x_t: Tensor, t: Tensor, s: Tensor, mean=MEAN, variance=VARIANCE) -> Tensor:
    """x_s on the probability-flow trajectory through x_t: exact."""
    ratio = marginal_variance(schedule, s, variance) / marginal_variance(schedule, t, variance)
    return schedule.alpha(s) * column(mean) + ratio.sqrt() * (x_t - schedule.alpha(t) * column(mean))


def ddim_gain(schedule: NoiseSchedule, t: Tensor, s: Tensor, variance=VARIANCE) -> Tensor:
    """One DDIM step from t to s multiplies x_t - alpha_t m by this, (B,D,1,1)."""
    cross = schedule.alpha(s) * schedule.alpha(t) * column(variance) + schedule.sigma(s) * schedule.sigma(t)
    return cross / marginal_variance(schedule, t, variance)


def ddim_chain(schedule: NoiseSchedule, x_T: Tensor, times: Tensor, mean=MEAN, variance=VARIANCE) -> Tensor:
    """DDIM down `times` on the Gaussian, the last of them left out for the data prediction: a product of gains."""
    gain = torch.ones_like(x_T)
    for k in range(len(times) - 1, 1, -1):
        gain = gain * ddim_gain(schedule, time(times[k]), time(times[k - 1]), variance)
    first, last = time(times[1]), time(times[-1])
    gain = gain * schedule.alpha(first) * column(variance) / marginal_variance(schedule, first, variance)
    return column(mean) + gain * (x_T - schedule.alpha(last) * column(mean))


class GaussianNetwork(nn.Module):
    """E[x_0 given x_t] for x_0 ~ N(mean, diag(variance)), to be read with prediction "x0"."""

    embedding_channels = 4

    def __init__(self, schedule: NoiseSchedule, mean=MEAN, variance=VARIANCE) -> None:
        super().__init__()
        self.schedule, self.mean, self.variance = schedule, column(mean), column(variance)

    def forward(self, x: Tensor, t: Tensor, embedding: Tensor | None = None, c: Condition | None = None) -> Tensor:
        alpha, sigma = self.schedule.alpha(time(t)), self.schedule.sigma(time(t))
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        out = self.mean + gain * (x - alpha * self.mean)
        return out if embedding is None else out + embedding.sum(dim=1).view(-1, 1, 1, 1)


# --- the mixture -----------------------------------------------------------------------------------------------------


class MixtureNetwork(nn.Module):
    """E[x_0 given x_t] for x_0 ~ sum_k w_k N(m_k, s_k^2 I); `centres` are (K,) for one pixel or (K,D)."""

    embedding_channels = 4

    def __init__(self, schedule: NoiseSchedule, weights=WEIGHTS, centres=CENTRES, spreads=SPREADS) -> None:
        super().__init__()
        self.schedule = schedule
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.centres = torch.tensor(centres, dtype=torch.float64).view(len(weights), -1)
        self.spreads = torch.tensor(spreads, dtype=torch.float64)

    def forward(self, x: Tensor, t: Tensor, embedding: Tensor | None = None, c: Condition | None = None) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]  # (B,1)
        V = alpha**2 * self.spreads**2 + sigma**2  # (B,K)
        away = x.flatten(1)[:, None] - alpha[..., None] * self.centres  # (B,K,D)
        log_r = self.weights.log() - 0.5 * away.square().sum(-1) / V - 0.5 * self.centres.shape[1] * V.log()
        f = self.centres + (alpha * self.spreads**2 / V)[..., None] * away
        return (log_r.softmax(dim=1)[..., None] * f).sum(dim=1).view(x.shape)


def mixture_map(schedule: NoiseSchedule, x_t: Tensor, t: float, s: float) -> Tensor:
    """x_s with the same quantile as x_t under the 1-D mixture's marginals, by bisection: exact, no ODE solver."""
    weights, centres, spreads = (torch.tensor(v, dtype=torch.float64) for v in (WEIGHTS, CENTRES, SPREADS))

    def quantile(x: Tensor, at: float) -> Tensor:
        alpha, sigma = schedule.alpha(time(at)).double(), schedule.sigma(time(at)).double()
        deviation = (alpha.view(1) ** 2 * spreads**2 + sigma.view(1) ** 2).sqrt()
        return (weights * torch.special.ndtr((x.reshape(-1, 1) - alpha.view(1) * centres) / deviation)).sum(dim=1)

    wanted = quantile(x_t, t)
    reach = 10 * (schedule.alpha(time(s)) * 3 + schedule.sigma(time(s))).item()
    low, high = torch.full_like(wanted, -reach), torch.full_like(wanted, reach)
    for _ in range(100):
        middle = (low + high) / 2
        below = quantile(middle, s) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return ((low + high) / 2).view(x_t.shape)


# --- teachers --------------------------------------------------------------------------------------------------------


def gaussian_teacher(schedule: NoiseSchedule | None = None, mean=MEAN, variance=VARIANCE) -> Teacher:
    schedule = schedule or VPCosine()
    network = GaussianNetwork(schedule, mean, variance)
    return Teacher("gaussian", Denoiser(network, schedule, "x0"), (len(mean), 1, 1), "gaussian")


def mixture_teacher(schedule: NoiseSchedule | None = None, **distribution) -> Teacher:
    schedule = schedule or VPCosine()
    network = MixtureNetwork(schedule, **distribution)
    return Teacher("mixture", Denoiser(network, schedule, "x0"), (network.centres.shape[1], 1, 1), "mixture")


def mlp_teacher(schedule: NoiseSchedule | None = None, prediction: str = "v", seed: int = 0) -> Teacher:
    """The package's own small network with random weights, none of them zero."""
    torch.manual_seed(seed)
    network = ResidualMLP((2, 1, 1), width=16, depth=1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return Teacher("mlp", Denoiser(network, schedule or VPCosine(), prediction), (2, 1, 1), f"mlp-{seed}")


class AffineTable(nn.Module):
    """An affine map of x for each of `times`, D pixels each on its own; an embedding shifts gain and bias."""

    embedding_channels = 32

    def __init__(self, times: Tensor, gain: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("times", times.double())
        self.gain, self.bias = nn.Parameter(gain.clone()), nn.Parameter(bias.clone())  # (K,D)
        self.mix = nn.Linear(self.embedding_channels, 2 * gain.shape[1], bias=False)

    def forward(self, x: Tensor, t: Tensor, embedding: Tensor | None = None, c: Condition | None = None) -> Tensor:
        k = (self.times - t.double()[:, None]).abs().argmin(dim=1)
        gain, bias = self.gain[k], self.bias[k]
        if embedding is not None:
            more = self.mix(embedding)
            gain, bias = gain + more[:, : gain.shape[1]], bias + more[:, gain.shape[1] :]
        return (gain * x.flatten(1) + bias).view(x.shape)


def table_teacher(times: Tensor, schedule: NoiseSchedule | None = None) -> Teacher:
    """The Gaussian teacher, exact at `times`, with weights that a student can train."""
    schedule = schedule or VPCosine()
    t = time(times)
    gain = schedule.alpha(t) * column(VARIANCE) / marginal_variance(schedule, t)
    bias = column(MEAN) * (1 - gain * schedule.alpha(t))
    torch.manual_seed(0)
    table = AffineTable(times, gain.flatten(1), bias.flatten(1))
    return Teacher("table", Denoiser(table, schedule, "x0"), (2, 1, 1), "table")


# --- what a method is given ------------------------------------------------------------------------------------------


class LearnableGaussian(nn.Module):
    """E[x_0 given x_t] for x_0 ~ N(m, e^l), with m and l to be trained: every denoiser of a one-pixel Gaussian."""

    embedding_channels = 4

    def __init__(self, schedule, mean: float, variance: float) -> None:
        super().__init__()
        self.schedule = schedule
        self.m, self.l = nn.Parameter(torch.tensor([mean])), nn.Parameter(torch.tensor([math.log(variance)]))

    def forward(self, x: Tensor, t: Tensor, embedding: Tensor | None = None, c: Condition | None = None) -> Tensor:
        alpha, sigma, v = self.schedule.alpha(time(t)), self.schedule.sigma(time(t)), self.l.exp()
        return self.m + alpha * v / (alpha**2 * v + sigma**2) * (x - alpha * self.m)


def learnable_teacher(schedule, mean: float = 0.3, variance: float = 0.25) -> Teacher:
    network = LearnableGaussian(schedule, mean, variance)
    return Teacher("learnable", Denoiser(network, schedule, "x0"), (1, 1, 1), "learnable")


def gaussian_images(seed: int = 0, mean=MEAN, variance=VARIANCE) -> Read:
    """read(n): n images of the Gaussian distribution, without labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(mean), 1, 1)
    deviation = column(variance).sqrt()
    draw = lambda n: torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return lambda n: (column(mean) + deviation * draw(n), None)


def make_batch(size: int, shape=(2, 1, 1), seed: int = 0, read=None, step: int = 0) -> Batch:
    return Batch(size, shape, torch.Generator().manual_seed(seed), "cpu", read, step=step)


def make_workspace(teacher: Teacher, folder, budget: BudgetConfig | None = None, seed: int = 0, dry: bool = False):
    meter = Meter(budget or BudgetConfig(), teacher, "cpu")
    return Workspace(teacher, meter, folder, "cpu", seed, Progress(None), dry)


def loss_of(method, batch: Batch) -> Tensor:
    """The loss of a method that yields once."""
    ((network, loss),) = method.train_step(batch)
    assert network is method.student
    return loss


def slope(errors: list[float]) -> float:
    """Order of convergence from the errors at the last two doublings of the number of steps."""
    e = torch.tensor(errors[-3:], dtype=torch.float64).log2()
    return ((e[0] - e[2]) / 2).item()


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy({name: value.detach() for name, value in module.state_dict().items()})


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def minimised(module: nn.Module, loss: Callable[[int], Tensor], steps: int = 300, lr: float = 0.02) -> None:
    """Adam on `loss`, a function of the step, with a learning rate that falls to 0. Changes the weights of `module`."""
    optimizer = torch.optim.Adam(module.parameters(), lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        decay.step()


def trained(method: Method, folder, steps: int, batch: int, seed: int = 0) -> Method:
    """`method` after `steps` steps of the harness, on the Gaussian's images if it reads any."""
    workspace = make_workspace(method.teacher, folder, BudgetConfig(images=steps * batch), seed)
    read = gaussian_images(seed) if method.reads_data(method.config) else None
    train(method, method.config, workspace, read, Loop(batch), Step(lambda fraction, note: None))
    return method


def perturbed(method, std: float = 0.1):
    """Student and fake score moved off the teacher's weights, each its own way: at the start they are equal."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (*method.student.parameters(), *method.fake.parameters()):
            parameter.add_(std * torch.randn_like(parameter))
    return method


def assert_target_is_a_moving_average(method, mu: float) -> None:
    """With the student moved away by d and held there, the target is d (1 - mu^k) on its way after k steps."""
    before = weights_of(method.target)
    assert same_weights(before, weights_of(method.student))
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(2.0)
    for _ in range(3):
        method.after_step()
    for (name, value), student in zip(method.target.named_parameters(), method.student.parameters(), strict=True):
        close(value, before[name] + 2.0 * (1 - mu**3), rtol=1e-12)
        close(student, before[name] + 2.0)
