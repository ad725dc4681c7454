"""Human Preference Score v2: how well people would like images for their prompts (Wu et al. 2023, arXiv:2306.09341).

A CLIP ViT-H/14 that was trained further on choices of people between images for the same prompt. The checkpoints have
open_clip's names of tensors; the network is transformers'.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from distillbench import Samples, Unavailable
from distillbench.builtin.clip_network import MEAN, SIDE, STD, VOCABULARY, ClipNetwork, cosines
from distillbench.evaluation import feature_metrics
from distillbench.evaluation.metric import Need
from distillbench.evaluation.pretrained_weights import WeightsFile

SOURCE = "https://huggingface.co/xswu/HPSv2/resolve/main"
PARTS = {  # of a block, in open_clip and in transformers
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OTHERS = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
UNREADABLE = RuntimeError, LookupError, TypeError, AttributeError, ValueError, EOFError, pickle.UnpicklingError


def _file(name: str) -> WeightsFile:
    """A checkpoint of the release. Its hash is not published; 986 million parameters of 2 bytes are 1,881 MiB."""
    return WeightsFile(name, "", f"{SOURCE}/{name}", "Apache-2.0", 1881)


class Hpsv2Network(ClipNetwork):
    """HPSv2's CLIP ViT-H/14: unit vectors of images and texts, 1024 values."""

    name = "hpsv2"
    protocol = (
        "hpsv2/1: 8-bit images in [0, 1]; grey repeated to 3 channels; bicubic resize of the longer side to 224, "
        "antialiased as by torchvision >= 0.17, padded to 224x224 with zeros; CLIP's mean and deviation; "
        "HPS_v2_compressed, float32; projected embeddings of length 1; texts cut at 77 tokens"
    )
    width = 1024
    weights = _file("HPS_v2_compressed.pt")
    also = VOCABULARY
    text: ClassVar[dict[str, Any]] = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "hidden_act": "gelu", "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407,
    }  # fmt: skip
    vision: ClassVar[dict[str, Any]] = {
        "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
        "hidden_act": "gelu", "image_size": SIDE, "patch_size": 14,
    }  # fmt: skip

    def __init__(self, file: Path, device: str) -> None:
        from transformers import CLIPConfig, CLIPModel

        config: Any = CLIPConfig(text_config=self.text, vision_config=self.vision, projection_dim=self.width)
        with torch.device("meta"):
            model = CLIPModel(config)
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
            model.load_state_dict(converted(tensors), assign=True)
        except UNREADABLE as error:
            why = " ".join(str(error).split())[:200]
            raise Unavailable(f"{file.name} is no checkpoint of {self.name}: {why}") from error
        for part in (model.text_model, model.vision_model):  # not stored
            positions = torch.arange(part.embeddings.position_ids.shape[-1])
            part.embeddings.position_ids = positions.expand((1, -1))
        self.use(model, self.root(file), device)

    def network_input(self, images: Tensor) -> Tensor:
        return network_input(images)


class Hpsv21Network(Hpsv2Network):
    """The same network, trained further on more choices: version 2.1 of the release."""

    name = "hpsv2_1"
    protocol = Hpsv2Network.protocol.replace("hpsv2/1", "hpsv2_1/1").replace("HPS_v2_", "HPS_v2.1_")
    weights = _file("HPS_v2.1_compressed.pt")


def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of open_clip's CLIP under transformers' names, float32. A name that is not open_clip's stays."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.float()
        if name in TRANSPOSED:
            found[TRANSPOSED[name]] = tensor.T.contiguous()
        elif "transformer.resblocks." in name:
            found |= _of_block(name, tensor)
        else:
            found[OTHERS.get(name, name)] = tensor
    return found


def _of_block(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One tensor of a block; queries, keys and values are one tensor in open_clip and three in transformers."""
    model, _, rest = name.partition("transformer.resblocks.")
    index, _, part = rest.partition(".")
    block = f"{'vision_model' if model == 'visual.' else 'text_model'}.encoder.layers.{index}"
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        return {f"{block}.self_attn.{n}_proj.{kind}": each for n, each in zip("qkv", tensor.chunk(3), strict=True)}
    part, _, kind = part.rpartition(".")
    return {f"{block}.{PARTS.get(part, part)}.{kind}": tensor}


def network_input(images: Tensor) -> Tensor:
    """uint8 images (B,3,H,W) to the network's input (B,3,224,224): nothing is cropped, as in HPSv2's release."""
    x = images.float() / 255
    height, width = x.shape[-2:]
    scale = SIDE / max(height, width)
    if scale != 1:
        size = round(height * scale), round(width * scale)
        x = interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True)
        above, left = ((SIDE - side) // 2 for side in size)
        x = pad(x, (left, SIDE - size[1] - left, above, SIDE - size[0] - above))
    return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)


class Hpsv2(feature_metrics.FeatureMetric):
    """Mean of 100 times the cosine between an image and its prompt, as HPSv2's benchmark prints it.

    Published values are of the benchmark's own prompts, 800 in each of four styles.
    """

    name, network = "hpsv2", Hpsv2Network
    unit = "100 x cosine"
    direction = "higher"
    protocol = "hpsv2/1: mean over samples of 100 cos(image, prompt)"
    needs = frozenset({Need.prompts, Need.features})

    def score(self, samples: Samples) -> float:
        return 100 * cosines(samples, self.network).mean().item()


class Hpsv21(Hpsv2):
    """The same with version 2.1 of the network. Its values are not comparable with those of version 2."""

    name, network = "hpsv2_1", Hpsv21Network
