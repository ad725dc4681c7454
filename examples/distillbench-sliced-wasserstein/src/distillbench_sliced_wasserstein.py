"""Sliced Wasserstein distance between the pixels of samples and of real images: no network, any number of pixels.

Bonneel, Rabin, Peyre & Pfister 2015, "Sliced and Radon Wasserstein Barycenters of Measures", J. Math. Imaging Vis. 51.

    SW^2 = mean over l of W^2(theta_l . x, theta_l . y),   theta_l fixed, uniform on the unit sphere
    W^2  = integral over u in (0, 1) of (F^-1(u) - G^-1(u))^2                                (one dimension)

Both quantile functions are steps, of width 1/N and 1/M, so the integral is a finite sum: nothing is interpolated, and
all images are used. Like every distance between samples it is above 0 for two samples of one distribution: by about the
same for all rows of a table, since these have equal numbers of images.

| symbol  | meaning                                                    | shape   |
|---------|------------------------------------------------------------|---------|
| D       | values of an image, C H W                                  |         |
| x, y    | samples and real images, in [-1, 1]                        | (N,D), (M,D) |
| theta   | L directions                                               | (L,D)   |
| F, G    | distribution functions of a projection of x, of y          |         |
| mass    | length of an interval of u on which both are constant      | (K,), K < N + M |
"""

from __future__ import annotations

import torch
from distillbench import Metric, Need, Samples, Unavailable, hookimpl
from distillbench.datasets import to_float
from torch import Tensor

L, SEED = 256, 0  # directions, and the seed that they are drawn from
CHUNK = 32  # directions at a time


class SlicedWasserstein(Metric):
    """Sliced 2-Wasserstein distance to all real images, over pixels clipped to [-1, 1]."""

    name = "sliced_wasserstein"
    unit = "pixel values in [-1, 1], along a unit direction"
    direction = "lower"
    protocol = f"sliced_wasserstein/1: order 2, exact in one dimension, {L} directions, seed {SEED}, all real images"
    needs = frozenset({Need.real_images})

    def score(self, samples: Samples) -> float:
        x = samples.x_0
        if tuple(x.shape[1:]) != samples.real.shape:
            raise Unavailable("samples and real images have different shapes")
        theta = directions(x[0].numel())
        y = samples.real.once(f"{self.name} sorted", lambda: project(samples.real.read(), theta))
        return sliced_wasserstein(project(x.split(1024), theta), y)


def directions(size: int) -> Tensor:
    """theta, (L, size) float64: the same on every machine."""
    theta = torch.randn(L, size, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    return theta / theta.norm(dim=1, keepdim=True)


def project(images, theta: Tensor) -> Tensor:
    """theta . x of batches of images (B,C,H,W), uint8 or in [-1, 1], each row sorted: (L,N) float64."""
    parts = [theta @ to_float(batch).double().cpu().flatten(1).T for batch in images]
    return torch.cat(parts, dim=1).sort(dim=1).values


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """SW of sorted projections x (L,N) and y (L,M)."""
    N, M = x.shape[1], y.shape[1]
    # u in units of 1/(N M), where the ends of all steps are integers
    ends = torch.cat([torch.arange(1, N + 1) * M, torch.arange(1, M + 1) * N]).unique()
    mass = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)).double() / (N * M)
    i, j = (ends - 1) // M, (ends - 1) // N  # the steps of F^-1 and G^-1 that end there, or later
    squares = [(a[:, i] - b[:, j]).square() @ mass for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True)]
    return torch.cat(squares).mean().sqrt().item()


@hookimpl(api=2)
def register_metrics(register) -> None:
    register(SlicedWasserstein)
