"""A Gaussian mixture as a dataset. Its distribution is known, so ``teacher=gmm`` is an exact denoiser for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillbench import Dataset, DatasetConfig, UserError, hookimpl, option
from distillbench.diffusion.distributions import mixture
from distillbench.options import require_between
from distillbench.storage.files import key_of


class Gmm(Dataset):
    """Samples of sum_k w_k N(m_k, diag(s_k^2)), not rounded to 8 bits. The class of an image is its component.

    The default is a mixture of three components in two dimensions, with five standard deviations within [-1, 1].
    """

    name = "gmm"
    licence = "none needed: drawn from a formula"

    @dataclass
    class Config(DatasetConfig):
        weights: list[float] = option([0.3, 0.5, 0.2], "w_k, K numbers with sum 1")
        means: list[Any] = option([[-0.5, 0.1], [0.13, -0.27], [0.4, 0.37]], "m_k, K rows of D = C H W numbers")
        stds: list[Any] = option([[0.083], [0.117], [0.067]], "s_k, K rows of D numbers, or of 1 for all")
        shape: list[int] = option([], "C,H,W of the images; empty: D,1,1")
        count: int = option(10_000, "number of images; 0: none, for data-free methods")
        seed: int = option(0, "seed of the random generator")

        def __post_init__(self) -> None:
            require_between(self, 0, 10_000_000, "count")
            require_between(self, 0, 2**63 - 1, "seed")

    def __init__(self, config: Config) -> None:
        try:
            distribution = mixture(config.weights, config.means, config.stds, config.shape or None)
        except UserError as error:
            raise UserError(f"dataset.{error}") from error
        reach = (distribution.means.abs() + 3 * distribution.stds).max().item()
        if reach > 1:
            raise UserError(f"dataset.means: images lie in [-1, 1], |m| + 3 s reaches {reach:.3g}: scale them down")
        self.distribution, self.shape, self.classes = distribution, distribution.shape, distribution.components
        self.images, self.components = distribution.draw(config.count, torch.Generator().manual_seed(config.seed))
        self.sha256 = key_of([distribution.plain(), config.count, config.seed])

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Tensor) -> Tensor:
        return self.images[indices]

    def labels(self, indices: Tensor) -> Tensor:
        return self.components[indices]


@hookimpl(api=2)
def register_datasets(register) -> None:
    register(Gmm)
