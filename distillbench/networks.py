"""Networks that teachers and students are made of. Each is called as ``network(x, time, embedding, c)``.

| argument  | meaning                                                        | shape                         |
|-----------|----------------------------------------------------------------|-------------------------------|
| x         | noisy image                                                    | (B,C,H,W)                     |
| time      | time of the schedule                                           | (B,)                          |
| embedding | optional, added to the embedding of time (a second time, ...)  | (B, embedding_channels)       |
| c         | what is asked for: classes, texts                              | of a batch                    |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from distillbench.conditions import UNCONDITIONAL, Condition


class TimeFeatures(nn.Module):
    """Sines and cosines of `time` at frequencies from 1 to 1000: (B,) -> (B, channels)."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, math.log(1000), channels // 2)))

    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeEmbedding(nn.Sequential):
    """Two linear layers on :class:`TimeFeatures`: (B,) -> (B, channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__(TimeFeatures(), nn.Linear(64, channels), nn.SiLU(), nn.Linear(channels, channels))

    def zero_output(self) -> TimeEmbedding:
        """Makes the embedding zero at every time, until it is trained."""
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)
        return self


class GuidanceEmbedding(TimeEmbedding):
    """Of a guidance weight w in [low, high]: (B,1,1,1) -> (B, channels). Zero until it is trained."""

    def __init__(self, channels: int, low: float, high: float) -> None:
        super().__init__(channels)
        self.low, self.high = low, high
        self.zero_output()

    def forward(self, w: Tensor) -> Tensor:
        return super().forward((w.flatten() - self.low) / (self.high - self.low))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, embedding_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.modulation = nn.Linear(embedding_channels, 2 * channels)
        self.inner = nn.Linear(channels, channels)
        self.outer = nn.Linear(channels, channels)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=-1)
        return h + self.outer(silu(self.inner(self.norm(h) * (1 + scale) + shift)))


class ResidualMLP(nn.Module):
    """A residual perceptron over flattened pixels, modulated by time: the cheap network for very small images."""

    def __init__(self, shape: tuple[int, int, int], width: int = 256, depth: int = 4, classes: int = 0) -> None:
        super().__init__()
        pixels = math.prod(shape)
        self.embedding_channels = 128
        self.time = TimeEmbedding(self.embedding_channels)
        self.entry = nn.Linear(pixels, width)
        self.blocks = nn.ModuleList(_ResidualBlock(width, self.embedding_channels) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.exit = nn.Linear(width, pixels)
        nn.init.zeros_(self.exit.weight)
        self.classes = nn.Embedding(classes + 1, self.embedding_channels) if classes else None

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None = None, c: Condition = UNCONDITIONAL) -> Tensor:
        e = self.time(time)
        if self.classes is not None:
            e = e + self.classes(c.labels)
        e = silu(e if embedding is None else e + embedding)
        h = self.entry(x.flatten(1))
        for block in self.blocks:
            h = block(h, e)
        return self.exit(self.norm(h)).view(x.shape)


class UNet(nn.Module):
    """diffusers' ``UNet2DModel``: `width`, 2 `width`, 2 `width` channels, `depth` blocks a level, attention at 1/4."""

    def __init__(self, shape: tuple[int, int, int], width: int = 64, depth: int = 2, classes: int = 0) -> None:
        from diffusers import UNet2DModel  # seconds to import, and most runs on small images never need it

        super().__init__()
        channels, height, image_width = shape
        if height % 4 or image_width % 4:
            raise ValueError(f"a U-Net of three levels needs sides that are multiples of 4, got {height}x{image_width}")
        self.unet = UNet2DModel(
            sample_size=(height, image_width),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(width, 2 * width, 2 * width),
            layers_per_block=depth,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=math.gcd(32, width),
            attention_head_dim=min(64, 2 * width),
            class_embed_type="identity",
        )
        self.embedding_channels = 4 * width
        self.classes = nn.Embedding(classes + 1, self.embedding_channels) if classes else None

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None = None, c: Condition = UNCONDITIONAL) -> Tensor:
        if embedding is None:
            embedding = x.new_zeros(len(x), self.embedding_channels)
        if self.classes is not None:
            embedding = embedding + self.classes(c.labels)
        return self.unet(x, 1000 * time, class_labels=embedding).sample


NETWORKS: dict[str, type[nn.Module]] = {"mlp": ResidualMLP, "unet": UNet}
