"""Every kind of network that ships, small: the package's own, EDM's and diffusers', also with classes and texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from analytic import time
from distillbench import Condition
from distillbench.diffusion import VE, VPCosine
from distillbench.diffusion.denoiser import Denoiser
from distillbench.networks import DiT, ResidualMLP, UNet
from distillbench.networks.edm import DhariwalUNet, SongUNet
from small_diffusers_networks import dit, pixel_unet, text_unet

SIZES = {"model_channels": 16, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": (1, 3, 3, 1)}
ADM = SIZES | {"model_channels": 32, "channel_mult": (1, 2)}  # 64 channels: one head of attention
NETWORKS = {
    "mlp": lambda: (ResidualMLP((3, 8, 8), width=16, depth=1, classes=2), VPCosine(), "v"),
    "unet": lambda: (UNet((3, 8, 8), width=8, depth=1, classes=2), VPCosine(), "v"),
    "dit": lambda: (DiT((3, 8, 8), width=16, depth=1), VPCosine(), "v"),
    "edm, ddpm++": lambda: (SongUNet(8, 3, 3, label_dim=2, **SIZES), VE(), "edm"),
    "edm, ncsn++": lambda: (SongUNet(8, 3, 3, **SIZES, **NCSN), VE(), "edm"),
    "edm, adm": lambda: (DhariwalUNet(8, 3, 3, label_dim=2, **ADM), VE(), "edm"),
    "diffusers, pixels": lambda: (pixel_unet(), VPCosine(), "eps"),
    "diffusers, classes": lambda: (pixel_unet(num_class_embeds=3), VPCosine(), "eps"),
    "diffusers, text": lambda: (text_unet(), VPCosine(), "eps"),
    "diffusers, dit": lambda: (dit(), VPCosine(), "eps"),
}
LAYERS = {  # a submodule in the middle of each
    "mlp": "blocks.0.inner",
    "unet": "unet.mid_block",
    "dit": "inner.transformer.transformer_blocks.0.ff",
    "edm, ddpm++": "dec.4x4_in1",
    "edm, ncsn++": "enc.4x4_aux_residual",
    "edm, adm": "dec.4x4_in0",
    "diffusers, pixels": "unet.mid_block",
    "diffusers, classes": "unet.down_blocks.1.resnets.0",
    "diffusers, text": "unet.mid_block",
    "diffusers, dit": "transformer.transformer_blocks.1",
}


def denoiser(name: str) -> Denoiser:
    """With random weights, none of them zero, frozen and in evaluation mode."""
    torch.manual_seed(0)
    network, schedule, prediction = NETWORKS[name]()
    for weight in network.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    return Denoiser(network, schedule, prediction).freeze()


def image_shape(name: str) -> tuple[int, int, int]:
    return (4 if name in ("diffusers, text", "diffusers, dit") else 3), 8, 8


def inputs(name: str, f: Denoiser) -> tuple[Tensor, Tensor, Tensor, Condition]:
    """x_t, t, a second time, and a condition of three images with classes and texts."""
    generator, schedule = torch.Generator().manual_seed(1), f.schedule
    t, s = schedule.t_of_lam(time([-1.0, 0.5, 2.0])), schedule.t_of_lam(time([-4.0, 0.4, -2.0]))
    c = Condition(torch.tensor([0, 1, 0]), text=torch.randn(3, 5, 6, generator=generator))
    return torch.randn(3, *image_shape(name), generator=generator), t, s, c
