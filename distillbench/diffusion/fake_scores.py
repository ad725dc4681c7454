"""Fake scores: denoisers of what a student generates, with which distribution matching compares the teacher.

| symbol | meaning                                                    | shape             |
|--------|------------------------------------------------------------|-------------------|
| x      | images of the student                                      | (B,C,H,W)         |
| k      | the student's step that made them, 0, ..., N - 1           | (B,1,1,1) int64   |
| x_t, t | the same or real images, noised; time                      | (B,C,H,W)         |
| D_psi  | fake score, E[x given x_t, k, c]                           | (B,C,H,W)         |
| h      | logit of the discriminator; the best is log p_data / p_G,k | (B,1)             |
"""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn

from distillbench.diffusion.conditioning import UNCONDITIONAL, WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.embeddings import ScalarEmbedding

__all__ = ["FakeScore"]

WIDTH = 64  # of the discriminator's hidden layer


class FakeScore(nn.Module):
    """D_psi(x_t, t, k, c): `denoiser`, with an embedding of which of `steps` made the image, and a discriminator.

    Without the embedding (``steps=1``) D_psi is the denoiser of the mixture of what all steps make, so a student whose
    steps it trains matches the mixture only, and its last step need not match. The embedding starts at zero.

    With the name of a `layer`, h is a discriminator on what this submodule of the network returns (Yin et al. 2024,
    arXiv:2405.14867, section 4.3). It is trained with the denoiser, as one network. `shape` and `conditioning` are the
    teacher's. Raises UserError for a submodule that there is not.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        steps: int = 1,
        layer: str | None = None,
        shape: tuple[int, int, int] = (1, 1, 1),
        conditioning: Conditioning = WITHOUT_CLASSES,
    ) -> None:
        super().__init__()
        self.denoiser, self.layers = denoiser, [] if layer is None else [layer]
        self.step = ScalarEmbedding(denoiser.embedding_channels, 0, steps - 1) if steps > 1 else None
        if layer is not None:
            width = math.prod(denoiser.feature_shapes([layer], shape, conditioning)[layer])
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(width, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    def forward(self, x_t: Tensor, t: Tensor, k: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        return cast(Tensor, self.denoiser(x_t, t, c, self.embedding(k)))

    def logits(self, x_t: Tensor, t: Tensor, k: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        """h, (B,1). What comes after the layer in the network is not used."""
        _, features = self.denoiser.features(self.layers, x_t, t, c, self.embedding(k), f_gradient=False)
        return cast(Tensor, self.head(features[self.layers[0]]))

    def embedding(self, k: Tensor) -> Tensor | None:
        """Of the step, (B, embedding_channels), for the denoiser; None without."""
        return None if self.step is None else cast(Tensor, self.step(k))
