"""The CLIP score against CLIP's own forward, with a small model of random weights and a byte vocabulary."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from distillbench import Unavailable
from distillbench.builtin.clip import ClipScore, ClipViTL14, network_input
from distillbench.builtin.clip_network import FOLDER
from distillbench.storage.files import sha256_file
from image_text_samples import PROMPTS, pictures, samples, write_vocabulary

transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")

REAL_VOCABULARY = Path(__file__).parents[3] / "shared" / "data" / "clip_tokenizer"


@pytest.fixture
def tiny(tmp_path) -> type[ClipScore]:
    """The score on a small model in `tmp_path`, in the layout of the real one."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    count = write_vocabulary(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**size, "vocab_size": count, "bos_token_id": count - 2, "eos_token_id": count - 1},
        vision_config={**size, "image_size": 224, "patch_size": 56}, projection_dim=16,
    )  # fmt: skip
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)
    model.save_pretrained(folder)

    def pinned(file):
        return replace(file, sha256=sha256_file(tmp_path / file.file))

    class TinyClip(ClipViTL14):
        weights, also = pinned(ClipViTL14.weights), tuple(pinned(file) for file in ClipViTL14.also)
        width, batch = 16, 3

    class TinyScore(ClipScore):
        network = TinyClip

    return TinyScore


def processed(images: Tensor) -> Tensor:
    """By transformers' processor that works with PIL: the only one in version 4, one of two in version 5."""
    version_5 = hasattr(transformers, "CLIPImageProcessorPil")
    processor = transformers.CLIPImageProcessorPil() if version_5 else transformers.CLIPImageProcessor()
    return processor([Image.fromarray(i.permute(1, 2, 0).numpy()) for i in images], return_tensors="pt")["pixel_values"]


def test_score_is_that_of_clips_own_forward(tiny, tmp_path):
    """Its logits are the cosines times exp(logit_scale); texts padded to the longest only, tokens by its tokenizer."""
    images = pictures(len(PROMPTS), 32, 32)
    folder = tmp_path / FOLDER
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    tokens = tokenizer(PROMPTS, padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape == (5, 77)
    with torch.inference_mode():
        logits = model(**tokens, pixel_values=processed(images)).logits_per_image / model.logit_scale.exp()
    cosines = logits.diag()
    assert cosines.min() < -0.05 and cosines.max() > 0.05  # negative ones count as 0
    found = tiny().score(samples(images, PROMPTS, tmp_path))
    assert found == pytest.approx(100 * cosines.clamp(min=0).mean().item(), rel=1e-4)


def test_score_depends_on_which_prompt_belongs_to_which_image(tiny, tmp_path):
    images = pictures(3, 32, 32)
    score = tiny().score(samples(images, PROMPTS[:3], tmp_path))
    assert score != pytest.approx(tiny().score(samples(images, PROMPTS[2::-1], tmp_path)), rel=1e-3)


def test_embeddings_have_length_one(tiny, tmp_path):
    network = tiny.network(tiny.network.locate(tmp_path), "cpu")
    with torch.inference_mode():
        images = network(pictures(2, 16, 16))
    texts = network.texts(PROMPTS)
    assert images.shape == (2, 16) and texts.shape == (5, 16)
    assert torch.allclose(images.norm(dim=1), torch.ones(2)) and torch.allclose(texts.norm(dim=1), torch.ones(5))
    assert torch.allclose(texts[0], texts[3]) and not torch.allclose(texts[0], texts[1])


@pytest.mark.parametrize("size", [(32, 32), (33, 20), (20, 33), (300, 250), (224, 224)])
def test_images_are_processed_as_by_transformers_with_pil(size):
    images = pictures(2, *size)
    torch.testing.assert_close(network_input(images), processed(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json", "merges.txt"])
def test_every_file_must_exist_and_be_unchanged(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    tiny.network.locate(tmp_path)
    file = tmp_path / FOLDER / name
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(
        Unavailable,
        match=rf"{name} is not the file .*distillbench fetch clip_vit_l14, or evaluation\.download=true in a run\)",
    ):
        tiny.network.locate(tmp_path)
    file.unlink()
    with pytest.raises(Unavailable, match=rf"not there: {FOLDER}/{name}"):
        tiny().score(samples(pictures(3, 16, 16), PROMPTS[:3], tmp_path))
    assert tiny.identity(tmp_path)["seen"]["weights_sha256"] is None


def test_without_transformers_the_reason_says_how_to_get_it(tiny, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(Unavailable, match=r"pip install distillbench\[text\]"):
        tiny().score(samples(pictures(3, 16, 16), PROMPTS[:3], tmp_path))
    assert tiny.identity(tmp_path)["seen"]["weights_sha256"] is None


@pytest.mark.skipif(not REAL_VOCABULARY.is_dir(), reason=f"CLIP's vocabulary is not at {REAL_VOCABULARY}")
def test_the_vocabulary_is_clips(tiny, tmp_path):
    pinned = {Path(file.file).name: file.sha256 for file in ClipViTL14.also}
    for name in ("vocab.json", "merges.txt"):
        assert sha256_file(REAL_VOCABULARY / name) == pinned[name]
    real = str(REAL_VOCABULARY / "vocab.json"), str(REAL_VOCABULARY / "merges.txt")
    ids = transformers.CLIPTokenizer(*real)("A photo of a cat!")["input_ids"]
    assert ids == [49406, 320, 1125, 539, 320, 2368, 256, 49407]


def test_a_file_that_lacks_weights_is_refused(tiny, tmp_path):
    """transformers would go on with random ones."""
    from safetensors.torch import load_file, save_file

    file = tmp_path / FOLDER / "model.safetensors"
    tensors = load_file(file)
    del tensors["visual_projection.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"lacks visual_projection\.weight"):
        tiny.network(file, "cpu")
