"""Networks of teachers and students. Each is called as ``network(x, time, embedding, c)``.

| argument  | meaning                                                        | shape                         |
|-----------|----------------------------------------------------------------|-------------------------------|
| x         | noisy image                                                    | (B,C,H,W)                     |
| time      | time of the schedule                                           | (B,)                          |
| embedding | optional, added to the embedding of time (a second time, ...)  | (B, embedding_channels)       |
| c         | condition: classes, texts                                      | of a batch                    |
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import silu

from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.diffusion.embeddings import PlacedFeatures, TimedNetwork, TimeEmbedding
from distillbench.errors import UserError

__all__ = ["NETWORKS", "SIZED", "DiT", "OfDiffusers", "ResidualMLP", "UNet"]


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


class ResidualMLP(TimedNetwork):
    """A residual perceptron over flattened pixels, modulated by time: a cheap network for very small images."""

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

    def time_features(self) -> PlacedFeatures:
        return PlacedFeatures([self.time], "0")


class UNet(TimedNetwork):
    """diffusers' ``UNet2DModel``: `width`, 2 `width`, 2 `width` channels, `depth` blocks a level, attention at 1/4."""

    def __init__(self, shape: tuple[int, int, int], width: int = 64, depth: int = 2, classes: int = 0) -> None:
        from diffusers import UNet2DModel  # seconds to import, and most runs on small images never need it

        super().__init__()
        channels, height, image_width = shape
        if height % 4 or image_width % 4:
            raise ValueError(f"a U-Net of three levels needs sides that are multiples of 4, got {height}x{image_width}")
        self.unet: Any = UNet2DModel(
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

    def time_features(self) -> PlacedFeatures:
        return PlacedFeatures([self.unet], "time_proj", lambda time: 1000 * time)


class OfDiffusers(TimedNetwork):
    """Any UNet2DModel or DiTTransformer2DModel: `config` is the content of its config.json, with `_class_name`.

    The config's sizes must be those of the images. Its class embedding needs a row for each class and one for no class;
    without classes a UNet2DModel needs none, and a DiTTransformer2DModel one class (``num_embeds_ada_norm: 1``).
    The network of diffusers gets `scale` times the time.
    """

    def __init__(
        self, shape: tuple[int, int, int], config: dict[str, Any], classes: int = 0, scale: float = 1000.0
    ) -> None:
        import diffusers

        from distillbench.networks.diffusers_calls import Call
        from distillbench.networks.diffusers_wrappers import NETWORKS, check_classes

        super().__init__()
        name = str(config.get("_class_name"))
        if name not in TRAINABLE:
            raise ValueError(f"_class_name must be one of {', '.join(TRAINABLE)}, got {name!r}")
        channels, height, width = shape
        size = config.get("sample_size")
        sides = (size, size) if isinstance(size, int) else tuple(size or ())
        if config.get("in_channels") != channels or config.get("out_channels") != channels or sides != (height, width):
            theirs = f"{config.get('in_channels')} to {config.get('out_channels')} channels, {size}"
            raise ValueError(f"an architecture of {theirs} does not fit images of (C,H,W) = {shape}")
        check_classes(NETWORKS[name].serves(config), classes, classes > 0, "teacher.architecture")
        module = getattr(diffusers, name).from_config(config)
        self.inner = NETWORKS[name](module, Call(scale=scale))
        self.embedding_channels = self.inner.embedding_channels

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None = None, c: Condition = UNCONDITIONAL) -> Tensor:
        return self.inner(x, time, embedding, c)

    def time_features(self) -> PlacedFeatures:
        return self.inner.time_features()


def read_architecture(file: Path, setting: str) -> dict[str, Any]:
    """The settings in a diffusers config.json, without its metadata. A UserError names `setting`."""
    try:
        config = json.loads(file.read_text())
        return {name: value for name, value in config.items() if name == "_class_name" or name[:1] != "_"}
    except OSError as error:
        raise UserError(f"{setting}: cannot read {str(file)!r}: {error.strerror}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{setting}: {file.name!r} is not a diffusers config.json") from error


TRAINABLE = ("UNet2DModel", "DiTTransformer2DModel")  # architectures of diffusers


class DiT(TimedNetwork):
    """diffusers' ``DiTTransformer2DModel``: `depth` blocks of `width` channels on patches of 2x2 pixels."""

    def __init__(self, shape: tuple[int, int, int], width: int = 384, depth: int = 8, classes: int = 0) -> None:
        from diffusers import DiTTransformer2DModel

        from distillbench.networks.diffusers_calls import Call
        from distillbench.networks.diffusers_wrappers import DiT as Wrapped

        super().__init__()
        channels, height, image_width = shape
        if height != image_width or height % 2:
            raise ValueError(f"a DiT needs squares with an even side, got {height}x{image_width}")
        heads = max(1, width // 64)
        transformer = DiTTransformer2DModel(
            sample_size=height,
            in_channels=channels,
            out_channels=channels,
            patch_size=2,
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            num_layers=depth,
            num_embeds_ada_norm=max(classes, 1),
            norm_num_groups=1,
        )
        self.inner = Wrapped(transformer, Call(scale=1000.0))
        self.embedding_channels = self.inner.embedding_channels
        self.conditional = classes > 0

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None = None, c: Condition = UNCONDITIONAL) -> Tensor:
        return self.inner(x, time, embedding, c if self.conditional else UNCONDITIONAL)

    def time_features(self) -> PlacedFeatures:
        return self.inner.time_features()


SIZED = ("mlp", "unet", "dit")  # those of a width and a depth
NETWORKS: dict[str, type[nn.Module]] = {"mlp": ResidualMLP, "unet": UNet, "dit": DiT, "diffusers": OfDiffusers}
