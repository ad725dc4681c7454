"""CLIP score: how well images match their prompts (Hessel et al. 2021, arXiv:2104.08718)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from distillbench import Samples, Unavailable, hookimpl
from distillbench.evaluation import feature_metrics
from distillbench.evaluation.features import FeatureNetwork, full_precision, resized
from distillbench.evaluation.metric import Need
from distillbench.evaluation.pretrained_weights import WeightsFile, locate

SIDE = 224  # pixels of the input
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images
TOKENS = 77  # of a text, with start and end tokens
FOLDER = "clip-vit-large-patch14"
SOURCE = f"https://huggingface.co/openai/{FOLDER}/resolve/32bd64288804d66eefd0ccbe215aa642df71cc41"


def _file(name: str, sha256: str, mib: int) -> WeightsFile:
    return WeightsFile(f"{FOLDER}/{name}", sha256, f"{SOURCE}/{name}", "MIT", mib)


class ClipViTL14(FeatureNetwork):
    """OpenAI's CLIP ViT-L/14 (Radford et al. 2021, arXiv:2103.00020): unit vectors of images and texts, 768 each.

    Needs the extra package transformers. The folder has transformers' layout, and each file is checked by its SHA-256.
    """

    name, label, title = "clip_vit_l14", "CLIP L/14", "CLIP ViT-L/14"
    protocol = (
        "clip_vit_l14/1: 8-bit images; grey repeated to 3 channels; PIL bicubic resize of the shorter side to 224, "
        "rounded to 8 bits, middle 224x224; CLIP's mean and deviation; openai/clip-vit-large-patch14, float32; "
        "projected embeddings of length 1; texts cut at 77 tokens"
    )
    width = 768
    weights = _file("model.safetensors", "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb", 1632)
    also = (
        _file("config.json", "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a", 1),
        _file("vocab.json", "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69", 1),
        _file("merges.txt", "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a", 1),
    )
    batch = 64

    @classmethod
    def locate(cls, folder: Path) -> Path:
        """The file of weights; the other files must be in the same folder."""
        if importlib.util.find_spec("transformers") is None:
            raise Unavailable(f"{cls.name} needs transformers (pip install distillbench[text])")
        path = super().locate(folder)
        for file in cls.also:
            if locate(cls.name, file, folder).parent != path.parent:
                raise Unavailable(f"the files of {cls.name} are in different folders: {path.parent} lacks {file.file}")
        return path

    def __init__(self, file: Path, device: str) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        folder = file.parent
        with _no_progress_bar():
            found: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        model, loaded = found
        if loaded["missing_keys"]:  # transformers would continue with random weights
            raise RuntimeError(f"{file} lacks {', '.join(sorted(loaded['missing_keys']))}")
        self.model = model.float().eval().requires_grad_(False).to(device)
        self.tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        self.device = device

    def __call__(self, images: Tensor) -> Tensor:
        seen = self.model.vision_model(pixel_values=network_input(images)).pooler_output
        return normalize(self.model.visual_projection(seen))

    def texts(self, prompts: list[str]) -> Tensor:
        """Unit vectors (N,768) of texts, float32, on the CPU."""
        found = []
        with torch.inference_mode(), full_precision():
            for first in range(0, len(prompts), self.batch):
                tokens = self.tokenizer(
                    prompts[first : first + self.batch], padding="max_length", max_length=TOKENS, truncation=True,
                    return_tensors="pt",
                ).to(self.device)  # fmt: skip
                read = self.model.text_model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
                found.append(normalize(self.model.text_projection(read)).cpu())
        return torch.cat(found)


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
        return self._cosines(samples).mean().item()

    def influence(self, samples: Samples) -> Tensor:
        cosines = self._cosines(samples)
        return cosines - cosines.mean()

    def _cosines(self, samples: Samples) -> Tensor:
        """(N,) 100 max(cos, 0)."""
        assert samples.prompts is not None
        prompts = samples.prompts
        images = samples.images.features(self.network)
        network = samples.images.networks.get(self.network)
        assert isinstance(network, ClipViTL14)
        texts = samples.teacher.once(f"prompts {network.name}", lambda: network.texts(prompts))
        return 100 * (images.double() * texts.double()).sum(dim=1).clamp(min=0)


@hookimpl(api=2)
def register_metrics(register) -> None:
    register(ClipScore)
