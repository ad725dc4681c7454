"""CLIP score: how well images match their prompts (Hessel et al. 2021, arXiv:2104.08718); registers HPSv2 too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from distillbench import Samples, hookimpl
from distillbench.builtin.clip_network import MEAN, SIDE, STD, VOCABULARY, ClipNetwork, cosines, openai_file
from distillbench.builtin.hpsv2 import Hpsv2, Hpsv21
from distillbench.evaluation import feature_metrics
from distillbench.evaluation.features import resized
from distillbench.evaluation.metric import Need


class ClipViTL14(ClipNetwork):
    """OpenAI's CLIP ViT-L/14 (Radford et al. 2021, arXiv:2103.00020): 768 values.

    The folder has transformers' layout, and each file is checked by its SHA-256.
    """

    name, label, title = "clip_vit_l14", "CLIP L/14", "CLIP ViT-L/14"
    protocol = (
        "clip_vit_l14/1: 8-bit images; grey repeated to 3 channels; PIL bicubic resize of the shorter side to 224, "
        "rounded to 8 bits, middle 224x224; CLIP's mean and deviation; openai/clip-vit-large-patch14, float32; "
        "projected embeddings of length 1; texts cut at 77 tokens"
    )
    width = 768
    weights = openai_file("model.safetensors", "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb", 1632)
    also = (
        openai_file("config.json", "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a", 1),
        *VOCABULARY,
    )

    def __init__(self, file: Path, device: str) -> None:
        from transformers import CLIPModel

        with _no_progress_bar():
            found: Any = CLIPModel.from_pretrained(
                file.parent, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        model, loaded = found
        if loaded["missing_keys"]:  # transformers would continue with random weights
            raise RuntimeError(f"{file} lacks {', '.join(sorted(loaded['missing_keys']))}")
        self.use(model, self.root(file), device)

    def network_input(self, images: Tensor) -> Tensor:
        return network_input(images)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the progress bar of transformers, which would disturb our own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def network_input(images: Tensor) -> Tensor:
    """uint8 images (B,3,H,W) to the network's input (B,3,224,224).

    Resized by PIL, as in OpenAI's code: results of transformers' processors differ slightly between versions.
    """
    x = resized(images, _middle) / 255
    return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


def _middle(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    short = min(height, width)
    size = (SIDE * width // short, SIDE * height // short)
    resized_picture = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
    return np.asarray(resized_picture.crop((left, top, left + SIDE, top + SIDE)))


class ClipScore(feature_metrics.FeatureMetric):
    """Mean of 100 max(cos, 0) between an image and its prompt, as in torchmetrics and diffusers' guide.

    Hessel et al. multiply by 2.5 instead of 100 and use ViT-B/32. Papers use different networks, so the column names
    the network.
    """

    name, network = "clip_score_vit_l14", ClipViTL14
    label, title = "CLIP score", "agreement of images with their prompts by {network}"
    unit = "100 x cosine"
    direction = "higher"
    protocol = "clip_score/1: mean over samples of 100 max(cos(image, prompt), 0)"
    needs = frozenset({Need.prompts, Need.features})

    def score(self, samples: Samples) -> float:
        return 100 * cosines(samples, self.network).clamp(min=0).mean().item()

    def influence(self, samples: Samples) -> Tensor:
        values = 100 * cosines(samples, self.network).clamp(min=0)
        return values - values.mean()


@hookimpl(api=2)
def register_metrics(register) -> None:
    register(ClipScore)
    register(Hpsv2)
    register(Hpsv21)
