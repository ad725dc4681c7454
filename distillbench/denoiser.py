"""One type of model for everything downstream: ``f(x_t, t) = E[x_0 | x_t]``.

A network may predict eps, x_0, v or a flow velocity; :class:`Denoiser` turns each into the data prediction, once.

| symbol | meaning                                        | shape      |
|--------|------------------------------------------------|------------|
| x_t    | noisy image, alpha_t x_0 + sigma_t eps         | (B,C,H,W)  |
| t      | time, float64                                  | (B,1,1,1)  |
| f, eps | data and noise prediction, x_t = alpha f + sigma eps | (B,C,H,W) |
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from distillbench.schedules import NoiseSchedule

# From the network's output to f. The row of v = alpha eps - sigma x_0 keeps its denominator, which is 1 only where
# alpha^2 + sigma^2 = 1.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "eps": lambda out, x_t, alpha, sigma: (x_t - sigma * out) / alpha,
    "x0": lambda out, x_t, alpha, sigma: out,
    "v": lambda out, x_t, alpha, sigma: (alpha * x_t - sigma * out) / (alpha**2 + sigma**2),
    "flow": lambda out, x_t, alpha, sigma: (x_t - sigma * out) / (alpha + sigma),  # u = eps - x_0
}

# What each of these networks is trained to output, from x_0 and eps.
TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "eps": lambda x_0, eps, alpha, sigma: eps,
    "x0": lambda x_0, eps, alpha, sigma: x_0,
    "v": lambda x_0, eps, alpha, sigma: alpha * eps - sigma * x_0,
    "flow": lambda x_0, eps, alpha, sigma: eps - x_0,
}


class Counter:
    """Rows (images) that went through the networks it is attached to. A copy of a network keeps the same counter."""

    def __init__(self) -> None:
        self.rows = 0

    def __deepcopy__(self, memo: dict) -> Counter:
        return self


class CountedNetwork(nn.Module):
    """A network and the counter of the rows that it has evaluated: nothing reaches the one without the other."""

    def __init__(self, network: nn.Module, counter: Counter) -> None:
        super().__init__()
        self.network = network
        self.counter = counter

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None = None) -> Tensor:
        self.counter.rows += len(x)
        return self.network(x, time, embedding)


class Denoiser(nn.Module):
    """A network, its schedule and its parameterisation, read as f(x_t, t) = E[x_0 | x_t].

    The network is called as ``network(x, time, embedding)`` with x (B,C,H,W), time (B,) and an optional embedding
    (B, network.embedding_channels) that is added to its embedding of time.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, prediction: str, counter: Counter | None = None):
        super().__init__()
        self.counted = CountedNetwork(network, counter or Counter())
        self.schedule = schedule
        self.prediction = prediction

    @property
    def network(self) -> nn.Module:
        return self.counted.network

    def forward(self, x_t: Tensor, t: Tensor, embedding: Tensor | None = None) -> Tensor:
        """f(x_t, t), shape (B,C,H,W)."""
        output = self.output(x_t, t, embedding)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return PREDICTIONS[self.prediction](output, x_t, alpha, sigma)

    def output(self, x_t: Tensor, t: Tensor, embedding: Tensor | None = None) -> Tensor:
        """What the network itself predicts (eps, x_0, v, ...), shape (B,C,H,W)."""
        return self.counted(x_t, t.flatten().to(x_t.dtype), embedding)

    def copy(self, counter: Counter) -> Denoiser:
        """An independent copy with its own weights, counted by `counter`."""
        twin = copy.deepcopy(self)
        twin.counted.counter = counter
        return twin

    def freeze(self) -> Denoiser:
        """In evaluation mode and without gradients to its weights (gradients to its input still flow)."""
        return self.eval().requires_grad_(False)


def implied_eps(x_t: Tensor, x_0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that x_t contains if its data is x_0: (x_t - alpha x_0) / sigma."""
    return (x_t - alpha * x_0) / sigma
