"""Scores on DINOv2 features.

They agree with human judgement better than Inception's (Stein et al. 2023, arXiv:2306.04675). The network is timm's
with the official weights. Resizing and position embeddings are those of dgm-eval, the code of that paper, so that
values can be compared with its values.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distillbench import hookimpl
from distillbench.evaluation import feature_metrics
from distillbench.evaluation.features import FeatureNetwork, resized
from distillbench.evaluation.pretrained_weights import WeightsFile

SIDE, PATCH = 224, 14  # side in pixels of the input and of a patch
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's pixels in [0, 1]
OFFSET = 0.1  # that DINOv2 adds to the grid's side when it interpolates position embeddings


class DinoV2(FeatureNetwork):
    """DINOv2 ViT-L/14 without registers (Oquab et al. 2023, arXiv:2304.07193): the normalised class token, 1024."""

    name, label, title = "dinov2", "DINOv2", "DINOv2 ViT-L/14"
    protocol = (
        "dinov2/1: 8-bit images; grey repeated to 3 channels; PIL bicubic resize to 224x224, rounded to 8 bits; "
        "ImageNet mean and deviation; ViT-L/14 without registers, timm, float32; position embeddings interpolated as "
        "the official code does; 1024 values of the class token after the last norm. As dgm-eval without clean_resize"
    )
    width = 1024
    depth: ClassVar[int] = 24
    heads: ClassVar[int] = 16
    weights = WeightsFile(
        file="dinov2_vitl14_pretrain.pth",
        sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        licence="Apache-2.0",
        mib=1161,
    )
    batch = 64

    def __init__(self, file: Path, device: str) -> None:
        """timm uses the official names of tensors; every name and shape must match."""
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        del tensors["mask_token"]  # used only in training
        tensors["pos_embed"] = interpolated(tensors["pos_embed"], SIDE // PATCH)
        with torch.device("meta"):
            network = vision_transformer(self.width, self.depth, self.heads, SIDE)
        network.load_state_dict(tensors, assign=True)
        self.network = network.eval().requires_grad_(False).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(network_input(images))


def vision_transformer(width: int, depth: int, heads: int, side: int) -> nn.Module:
    """DINOv2's architecture for images of `side` pixels, which returns the normalised class token."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=side, patch_size=PATCH, embed_dim=width, depth=depth, num_heads=heads, init_values=1e-5,
        num_classes=0, global_pool="token",
    )  # fmt: skip


def interpolated(positions: Tensor, side: int) -> Tensor:
    """Position embeddings (1,1+n*n,D) of a class token and n x n patches, for side x side patches.

    Bicubic, not antialiased, with scale (side + 0.1) / n, as in the official network for images of another size. The
    class token's embedding is unchanged.
    """
    token, grid = positions[:, :1], positions[:, 1:]
    n = math.isqrt(grid.shape[1])
    if n == side:
        return positions
    grid = grid.unflatten(1, (n, n)).permute(0, 3, 1, 2)
    scale = (side + OFFSET) / n
    grid = interpolate(grid, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)


def network_input(images: Tensor) -> Tensor:
    """uint8 images (B,3,H,W) to the network's input (B,3,224,224)."""
    x = resized(images, _bicubic) / 255
    return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


def _bicubic(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


class FdDinoV2(feature_metrics.FrechetDistance):
    name, network = "fd_dinov2", DinoV2


class FdInfinityDinoV2(feature_metrics.FrechetDistanceExtrapolated):
    name, network = "fd_infinity_dinov2", DinoV2


class FdTeacherDinoV2(feature_metrics.FrechetDistanceToTeacher):
    name, network = "fd_teacher_dinov2", DinoV2


class KdDinoV2(feature_metrics.KernelDistance):
    name, network = "kd_dinov2", DinoV2


class PrecisionDinoV2(feature_metrics.Precision):
    name, network = "precision_dinov2", DinoV2


class RecallDinoV2(feature_metrics.Recall):
    name, network = "recall_dinov2", DinoV2


class DensityDinoV2(feature_metrics.Density):
    name, network = "density_dinov2", DinoV2


class CoverageDinoV2(feature_metrics.Coverage):
    name, network = "coverage_dinov2", DinoV2


@hookimpl(api=2)
def register_metrics(register) -> None:
    register(FdDinoV2)
    register(FdInfinityDinoV2)
    register(FdTeacherDinoV2)
    register(KdDinoV2)
    register(PrecisionDinoV2)
    register(RecallDinoV2)
    register(DensityDinoV2)
    register(CoverageDinoV2)
