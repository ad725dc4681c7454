"""DINOv2 by timm against transformers' own, and its preprocessing against dgm-eval's definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from distillbench import Unavailable
from distillbench.builtin.dinov2 import (
    MEAN,
    STD,
    DinoV2,
    FdDinoV2,
    interpolated,
    network_input,
    vision_transformer,
)
from distillbench.evaluation.pretrained_weights import WeightsFile
from distillbench.storage.files import sha256_file

WIDTH, DEPTH, HEADS = 32, 2, 4


def official_layout(side: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights for a small network and images of `side` pixels, named as in the official file."""
    network = vision_transformer(WIDTH, DEPTH, HEADS, side)
    generator = torch.Generator().manual_seed(seed)
    tensors = {"mask_token": torch.zeros(1, WIDTH)}
    for name, tensor in network.state_dict().items():
        tensors[name] = 0.3 * torch.randn(tensor.shape, generator=generator) + (name.endswith("norm.weight"))
    return tensors


def by_transformers(tensors: dict[str, Tensor], side: int, x: Tensor) -> Tensor:
    """Class token (B,D) of transformers' network with the same weights, at its own size."""
    transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
    config = transformers.Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, image_size=side, patch_size=14
    )
    named = {
        "embeddings.cls_token": tensors["cls_token"],
        "embeddings.mask_token": tensors["mask_token"],
        "embeddings.position_embeddings": tensors["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": tensors["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": tensors["patch_embed.proj.bias"],
        "layernorm.weight": tensors["norm.weight"],
        "layernorm.bias": tensors["norm.bias"],
    }
    for i in range(DEPTH):
        ours, theirs = f"blocks.{i}.", f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            for j, part in enumerate(("query", "key", "value")):
                rows = tensors[f"{ours}attn.qkv.{kind}"][j * WIDTH : (j + 1) * WIDTH]
                named[f"{theirs}attention.attention.{part}.{kind}"] = rows
            named[f"{theirs}attention.output.dense.{kind}"] = tensors[f"{ours}attn.proj.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                named[f"{theirs}{name}.{kind}"] = tensors[f"{ours}{name}.{kind}"]
        for j in (1, 2):
            named[f"{theirs}layer_scale{j}.lambda1"] = tensors[f"{ours}ls{j}.gamma"]
    model, loaded = transformers.Dinov2Model.from_pretrained(
        None, config=config, state_dict=named, output_loading_info=True
    )
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    model.eval()
    with torch.inference_mode():
        return model(x).last_hidden_state[:, 0]


def pictures(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_network_is_transformers():
    tensors = official_layout(56)
    x = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    theirs = by_transformers(tensors, 56, x)
    network = vision_transformer(WIDTH, DEPTH, HEADS, 56).eval()
    network.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "mask_token"})
    with torch.inference_mode():
        ours = network(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.std(dim=0).mean() > 0.05


@pytest.fixture
def tiny(tmp_path) -> type[DinoV2]:
    """The class itself with a small network, whose weights have the official names and 37x37 positions."""
    torch.save(official_layout(37 * 14), tmp_path / "tiny.pth")

    class Tiny(DinoV2):
        width, depth, heads = WIDTH, DEPTH, HEADS
        weights = WeightsFile("tiny.pth", sha256_file(tmp_path / "tiny.pth"), "", "none", 1)

    return Tiny


def test_features_are_transformers_with_the_official_positions(tiny, tmp_path):
    tensors = torch.load(tmp_path / "tiny.pth", weights_only=True)
    tensors["pos_embed"] = interpolated(tensors["pos_embed"], 16)
    images = pictures(2, 24, 24)
    with torch.inference_mode():
        ours = tiny(tiny.locate(tmp_path), "cpu")(images)
    theirs = by_transformers(tensors, 224, network_input(images))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours.shape == (2, WIDTH) and ours.dtype is torch.float32


@pytest.mark.parametrize("spoil", [lambda t: t.pop("norm.bias"), lambda t: t.update(cls_token=torch.zeros(1, 1, 31))])
def test_weights_that_do_not_fit_are_refused(tiny, tmp_path, spoil):
    tensors = official_layout(37 * 14)
    spoil(tensors)
    torch.save(tensors, tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match=r"norm\.bias|cls_token"):
        tiny(tmp_path / "other.pth", "cpu")


def cubic(t: float) -> float:
    """The kernel of Keys (1981) with a = -3/4, which torch's bicubic uses."""
    a, t = -0.75, abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def test_positions_are_interpolated_as_the_official_network_does():
    """Bicubic at the centres of new patches of 37 / 16.1 old ones, edges repeated; the token's own stays."""
    positions = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(3))
    weights = np.zeros((16, 37))
    for i in range(16):
        at = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            weights[i, min(max(j, 0), 36)] += cubic(at - j)
    grid = positions[0, 1:].reshape(37, 37, 3).double().numpy()
    expected = np.einsum("ia,jb,abd->ijd", weights, weights, grid).reshape(256, 3)
    found = interpolated(positions, 16)
    assert found.shape == (1, 257, 3) and torch.equal(found[:, 0], positions[:, 0])
    np.testing.assert_allclose(found[0, 1:], expected, rtol=0, atol=1e-5)
    assert torch.equal(interpolated(positions, 37), positions)


@pytest.mark.parametrize("size", [(32, 32), (33, 20), (300, 250), (224, 224)])
def test_images_are_resized_as_dgm_eval_does(size):
    """torchvision's transforms of PIL images, bicubic to 224x224 whatever the shape: equal to the bit."""
    theirs = transforms.Compose([
        transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC), transforms.ToTensor(),
        transforms.Normalize(np.array(MEAN), np.array(STD)),
    ])  # fmt: skip
    images = pictures(2, *size)
    expected = torch.stack([theirs(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    assert torch.equal(network_input(images), expected)


def test_the_large_network_is_the_one_of_the_official_file():
    """343 tensors of 304,368,640 numbers, with the mask token and 37x37 positions; and timm's of that name."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours = vision_transformer(DinoV2.width, DinoV2.depth, DinoV2.heads, 37 * 14)
        theirs = timm.create_model("vit_large_patch14_dinov2", pretrained=False, num_classes=0)
    tensors = ours.state_dict()
    assert len(tensors) + 1 == 343
    assert sum(tensor.numel() for tensor in tensors.values()) + DinoV2.width == 304_368_640
    assert str(ours) == str(theirs)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_without_weights_the_reason_has_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(Unavailable, match=r"distillbench fetch dinov2, or evaluation\.download=true"):
        DinoV2.locate(tmp_path)
    assert FdDinoV2.identity(tmp_path)["seen"]["weights_sha256"] is None
