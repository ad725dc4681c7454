"""Small networks of diffusers with weights of a fixed seed, in our call."""

from __future__ import annotations

import pytest
import torch

from distillbench.networks.diffusers_calls import Call
from distillbench.networks.diffusers_wrappers import DiT, PixelUNet, TextUNet

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

CALL = Call(1000.0, -1.0)
SMALL = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}


def pixel_unet(**settings) -> PixelUNet:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return PixelUNet(diffusers.UNet2DModel(sample_size=8, **SMALL, **blocks, **settings), CALL).eval()


def text_unet(noise_level: int = 0, **settings) -> TextUNet:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=6, **SMALL, **blocks, **settings)
    return TextUNet(unet, CALL, noise_level).eval()


def dit(**settings) -> DiT:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    transformer = diffusers.DiTTransformer2DModel(
        in_channels=4, out_channels=8, num_embeds_ada_norm=10, **sizes, **settings
    )
    return DiT(transformer, CALL).eval()
