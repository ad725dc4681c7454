"""Fake scores: denoisers of what a student generates, with which distribution matching compares the teacher.

| symbol     | meaning                                                       | shape             |
|------------|---------------------------------------------------------------|-------------------|
| x_t        | noised images of the student, or real ones                    | (B,C,H,W)         |
| t          | time                                                          | (B,1,1,1) float64 |
| D_psi      | fake score, E[x | x_t, c] of generated images x               | (B,C,H,W)         |
| h          | logit of the discriminator, log p_data / p_G where it is best | (B,1)             |
"""

from __future__ import annotations

import math
from typing import cast

from torch import Tensor, nn

from distillbench.diffusion.conditioning import UNCONDITIONAL, WITHOUT_CLASSES, Condition, Conditioning
from distillbench.diffusion.denoiser import Denoiser
from distillbench.diffusion.schedules import NoiseSchedule

__all__ = ["FakeScore"]

WIDTH = 64  # of the discriminator's hidden layer


class FakeScore(nn.Module):
    """D_psi(x_t, t, c); with the name of a `layer` also a discriminator on what this submodule of its network returns.

    The discriminator (Yin et al. 2024, DMD2, arXiv:2405.14867, section 4.3) is trained with the denoiser, as one
    network: its gradients reach the layers below. `shape` and `conditioning` are the teacher's. Raises UserError for a
    submodule that there is not.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        layer: str | None = None,
        shape: tuple[int, int, int] = (1, 1, 1),
        conditioning: Conditioning = WITHOUT_CLASSES,
    ) -> None:
        super().__init__()
        self.denoiser, self.layers = denoiser, [] if layer is None else [layer]
        if layer is not None:
            features = math.prod(denoiser.feature_shapes([layer], shape, conditioning)[layer])
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(features, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def forward(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        return cast(Tensor, self.denoiser(x_t, t, c))

    def logits(self, x_t: Tensor, t: Tensor, c: Condition = UNCONDITIONAL) -> Tensor:
        """h(x_t, t, c), (B,1). What comes after the layer in the network is not used."""
        _, features = self.denoiser.features(self.layers, x_t, t, c, f_gradient=False)
        return cast(Tensor, self.head(features[self.layers[0]]))
