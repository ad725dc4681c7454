"""A file of random weights in the layout of the Inception network that FID is defined on; the real one is 91 MiB."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from distillbench.evaluation.pretrained_weights import WeightsFile
from distillbench.storage.files import sha256_file


class Blank(FeatureExtractorInceptionV3):
    """The network with the weights that its layers are made with."""

    def __init__(self) -> None:
        nothing = io.BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)

    def load_state_dict(self, state_dict) -> None:
        assert state_dict == {}


def pictures(count: int, side: int, contrast: float, seed: int) -> Tensor:
    """Smooth random colours (count,3,side,side) uint8, with standard deviation 50 `contrast` in each picture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    x = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    x = x + 0.2 * torch.randn(count, 3, side, side, generator=generator)
    x = x / x.std(dim=(1, 2, 3), keepdim=True)
    return (128 + 50 * contrast * x).clamp(0, 255).round().to(torch.uint8)


def write_random_weights(path: Path) -> WeightsFile:
    """Weights whose features and classes differ between pictures: norms are fitted to a batch, layer by layer."""
    torch.manual_seed(0)
    network = Blank()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0, 0.3)
            module.momentum = 1.0
    batch = pictures(12, 16, 1.0, 99)
    with torch.no_grad():
        network.train()
        network(batch)
        network.eval()
        _, logits = network(batch)
        network.fc.weight.mul_(2 / logits.std(dim=0).mean())
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return WeightsFile(path.name, sha256_file(path), "", "none", 91)
