"""What metrics of images and their prompts have in common: a CLIP network with its tokenizer, and cosines."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from distillbench import Samples, Unavailable
from distillbench.evaluation.features import FeatureNetwork, full_precision
from distillbench.evaluation.pretrained_weights import WeightsFile, locate

SIDE = 224  # pixels of the input
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training images
TOKENS = 77  # of a text, with start and end tokens
FOLDER = "clip-vit-large-patch14"
SOURCE = f"https://huggingface.co/openai/{FOLDER}/resolve/32bd64288804d66eefd0ccbe215aa642df71cc41"


def openai_file(name: str, sha256: str, mib: int) -> WeightsFile:
    """A file of OpenAI's CLIP ViT-L/14."""
    return WeightsFile(f"{FOLDER}/{name}", sha256, f"{SOURCE}/{name}", "MIT", mib)


VOCABULARY = (  # of every CLIP
    openai_file("vocab.json", "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69", 1),
    openai_file("merges.txt", "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a", 1),
)


class ClipNetwork(FeatureNetwork):
    """A CLIP that transformers computes: unit vectors of images and texts. Needs that extra package."""

    batch = 64
    model: Any
    tokenizer: Any

    @classmethod
    def locate(cls, folder: Path) -> Path:
        """The file of weights; the other files must be below the same folder."""
        if importlib.util.find_spec("transformers") is None:
            raise Unavailable(f"{cls.name} needs transformers (pip install distillbench[text])")
        path = super().locate(folder)
        root = cls.root(path)
        for file in cls.also:
            if locate(cls.name, file, folder) != root / file.file:
                raise Unavailable(f"the files of {cls.name} are in different folders: {root} lacks {file.file}")
        return path

    @classmethod
    def root(cls, path: Path) -> Path:
        """The folder of weights that the file `path` is below."""
        return path.parents[len(Path(cls.weights.file).parts) - 1]

    def use(self, model: Any, root: Path, device: str) -> None:
        """Compute with `model`, and with the tokenizer below the folder `root`."""
        from transformers import CLIPTokenizer

        self.model = model.float().eval().requires_grad_(False).to(device)
        self.tokenizer = CLIPTokenizer(*(str(root / file.file) for file in VOCABULARY))
        self.device = device

    @abstractmethod
    def network_input(self, images: Tensor) -> Tensor:
        """uint8 images (B,3,H,W) to the network's input (B,3,224,224)."""

    def __call__(self, images: Tensor) -> Tensor:
        seen = self.model.vision_model(pixel_values=self.network_input(images)).pooler_output
        return normalize(self.model.visual_projection(seen))

    def texts(self, prompts: list[str]) -> Tensor:
        """Unit vectors (N,D) of texts, float32, on the CPU."""
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


def cosines(samples: Samples, clip: type[FeatureNetwork]) -> Tensor:
    """The cosine of each image and its prompt, (N,) float64."""
    assert samples.prompts is not None
    prompts = samples.prompts
    images = samples.images.features(clip)
    network = samples.images.networks.get(clip)
    assert isinstance(network, ClipNetwork)
    texts = samples.teacher.once(f"prompts {network.name}", lambda: network.texts(prompts))
    return (images.double() * texts.double()).sum(dim=1)
