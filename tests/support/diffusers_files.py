"""A small network of diffusers, and the teacher of a pipeline's folder. Tests that import this need diffusers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distillbench.builtin.diffusers_pipelines import Diffusers
from distillbench.diffusion.conditioning import WITHOUT_CLASSES, Conditioning
from distillbench.teachers.teacher import TeacherSource

diffusers = pytest.importorskip("diffusers")
diffusers.logging.set_verbosity_error()

PIXELS = (3, 8, 8)  # the shape of an image


def unet(seed: int = 0, channels: int = 3, size: int = 8, **settings):
    """A UNet2DModel of two levels with random weights, of which none is zero."""
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=settings.pop("out_channels", channels),
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        **settings,
    ).eval()


def diffusers_source(
    folder: Path | str,
    shape: tuple[int, int, int] = PIXELS,
    family: type[Diffusers] = Diffusers,
    conditioning: Conditioning = WITHOUT_CLASSES,
    **settings,
) -> TeacherSource:
    """``teacher=diffusers``, or another family of it, with the folder of a pipeline."""
    config = family.Config(kind=family.name, path=str(folder), **settings)
    return family(config, SimpleNamespace(shape=shape), Path("cache"), "cpu", conditioning)
