"""Small images with prompts, and a vocabulary of bytes, for metrics that compare images and texts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from distillbench.evaluation.features import ImageSet, Networks
from distillbench.evaluation.metric import Samples

PROMPTS = ["a cat", "a photo of a CAT, sitting.", "42 apples", "a cat", "word " * 100]


def write_vocabulary(folder: Path) -> int:
    """Bytes, bytes that end a word, two merges, start and end; returns their number."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return len(tokens)


def pictures(count: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randint(0, 256, (count, 3, 3, 3), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, size=(height, width)).to(torch.uint8)


def samples(images: Tensor, prompts: list[str], folder: Path) -> Samples:
    x = torch.zeros(len(images), 3, 1, 1)
    seen = ImageSet(lambda: [images], len(images), tuple(images.shape[1:]), Networks(folder, "cpu"))
    return Samples(x, x, seen, seen, seen, True, prompts=prompts)
