"""Networks that see time through low frequencies only, as methods that differentiate in time need.

A network turns its time into features phi, sines and cosines of frequencies up to 1000, and reads them by a linear
layer. What the fastest of them add to its output is small, but dominates its derivative in time. :func:`smooth_times`
replaces phi by polynomials of low degree, with v = -1 at the first time and 1 at the last:

    phi'(a) = sum_k C_k T_k(v),   C = argmin int |phi' - phi|^2 dv / sqrt(1 - v^2)

This C also minimises the error of W phi' for the weights W of the linear layer, which therefore stay as they are: what
the layer returns is as close to what it returned before as a polynomial of this degree can be.

| symbol | meaning                                                                | shape                |
|--------|------------------------------------------------------------------------|----------------------|
| a      | argument of the features: the network's time, or 1000 times it, ...    | (B,)                 |
| v      | a, or log a, mapped to [-1, 1]                                         | (B,)                 |
| phi    | features of the network as it was; phi' their replacement              | (B, channels)        |
| T_k    | Chebyshev polynomials, T_k(cos x) = cos(k x), k = 0, ..., degree       | (B, degree + 1)      |
| C      | coefficients                                                           | (degree + 1, channels) |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distillbench.diffusion.denoiser import INPUTS, Denoiser
from distillbench.diffusion.embeddings import TimedNetwork
from distillbench.errors import UserError
from distillbench.networks.edm import Fourier, SongUNet

__all__ = ["scale_fourier", "smooth_times"]

NODES = 8192  # times at which the features are fitted: several in each period of the fastest


class PolynomialFeatures(nn.Module):
    """The polynomials in `time`, or in its logarithm, that are closest to `features` for times from `low` to `high`.

    Like `features` it is called with times (B,) and returns (B, channels). Nothing of it is trained or saved:
    the coefficients are computed again with the network. They lie on `device`, on which `features` are too.
    """

    coefficients: Tensor

    def __init__(
        self, features: nn.Module, low: float, high: float, degree: int, logarithmic: bool, device: torch.device
    ) -> None:
        super().__init__()
        self.logarithmic, self.degree = logarithmic, degree
        ends = (math.log(low), math.log(high)) if logarithmic else (low, high)
        self.centre, self.radius = sum(ends) / 2, (ends[1] - ends[0]) / 2
        angles = (torch.arange(NODES, dtype=torch.float64, device=device) + 0.5) * (math.pi / NODES)
        at = self.centre + self.radius * angles.cos()
        with torch.no_grad():
            phi = features(at.exp() if logarithmic else at).double()
            products = torch.stack([(k * angles).cos() @ phi for k in range(degree + 1)]) * (2 / NODES)
        products[0] /= 2  # the T_k are orthogonal on the nodes, with squares that sum to NODES / 2, and NODES for k = 0
        self.register_buffer("coefficients", products.to(torch.get_default_dtype()), persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        v = ((time.log() if self.logarithmic else time) - self.centre) / self.radius
        terms = [torch.ones_like(v), v]
        while len(terms) <= self.degree:
            terms.append(2 * v * terms[-1] - terms[-2])
        T = torch.stack(terms[: self.degree + 1], dim=1)
        return (T[:, :, None] * self.coefficients).sum(dim=1)  # not a product of matrices: autocast would round it


def smooth_times(denoiser: Denoiser, degree: int = 8) -> Denoiser:
    """`denoiser`, whose network now sees time through polynomials up to `degree`; it is changed in place and returned.

    For a student, in a method's ``__init__``: ``self.student = smooth_times(teacher.student())``. The new features are
    the least-squares fit of the old ones over all times of the network's schedule, so the student starts near the
    teacher: only what it knew of time at higher frequencies is lost. No weight is added, removed or changed.

    Raises UserError if the network is not a :class:`TimedNetwork` with features that can be replaced, as the package's
    own networks, EDM's and those of diffusers are, and ValueError unless `degree` is at least 1.
    """
    if degree < 1:
        raise ValueError(f"degree must be at least 1, got {degree}")
    network = denoiser.network
    if not isinstance(network, TimedNetwork):
        raise UserError(
            f"the features of time of a {type(network).__name__} are not known, so they cannot be made smooth. "
            "Possible: mlp, unet, dit, EDM's networks, those of diffusers, and any that derives from "
            "networks.TimedNetwork"
        )
    placed, schedule = network.time_features(), denoiser.native
    device = next(network.parameters()).device
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    low, high = placed.argument(INPUTS[denoiser.prediction](ends, schedule)[-1]).tolist()
    for owner in placed.owners:
        features = owner.get_submodule(placed.name)
        owner.add_module(placed.name, PolynomialFeatures(features, low, high, degree, placed.logarithmic, device))
    return denoiser


def scale_fourier(denoiser: Denoiser, scale: float) -> Denoiser:
    """`denoiser`, whose random Fourier features of time get frequencies of standard deviation `scale`, not 16.

    It is changed in place and returned. For a student with random weights, as other weights have learned to read the
    frequencies that they were trained with: Song & Dhariwal 2023, arXiv:2310.14189, train from .02, with which the
    network changes slowly in time. The drawn frequencies are multiplied, so nothing else is drawn.

    Raises UserError for a network without Fourier features of EDM's kind, and ValueError unless `scale` is positive.
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    network = denoiser.network
    features = network.map_noise if isinstance(network, SongUNet) else None
    if not isinstance(features, Fourier):
        raise UserError(
            f"a {type(network).__name__} without EDM's Fourier features of time has no scale of them to set. Possible: "
            "NCSN++ (teacher=edm_cifar10_ve), or no setting for that scale (fourier_scale=0)"
        )
    features.freqs.mul_(scale / features.scale)
    features.scale = scale
    return denoiser
