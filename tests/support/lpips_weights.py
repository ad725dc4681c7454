"""Files of random weights in the layouts of torchvision's VGG16 and of LPIPS 0.1; the real ones have 528 MiB."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import vgg16

from distillbench.diffusion.distances import LPIPS, LpipsForm
from distillbench.evaluation.pretrained_weights import VARIABLE, WeightsFile
from distillbench.networks.lpips import CHANNELS
from distillbench.runs.distances import Lpips
from distillbench.storage.files import sha256_file

VGG, LINEAR = "vgg16-397923af.pth", "lpips-0.1-vgg.pth"


def write_random_weights(folder: Path) -> None:
    """VGG16's features, and one tensor of its classifier, which LPIPS does not use; weights of channels in [0, 1)."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = vgg16(weights=None, init_weights=False).features.state_dict()
    state = {"classifier.0.bias": torch.zeros(4096)}
    for name, shape in shapes.items():
        spread = (2 / shape[0].numel()) ** 0.5 if shape.dim() > 1 else 0.1
        state[f"features.{name}"] = spread * torch.randn(shape.shape, generator=generator)
    torch.save(state, folder / VGG)
    channels = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for k, c in enumerate(CHANNELS)}
    torch.save(channels, folder / LINEAR)


def use_random_weights(folder: Path, patch: pytest.MonkeyPatch, side: int = 16) -> None:
    """Let LPIPS have the files in `folder`, and resize to `side`: 224 pixels take seconds on a CPU."""
    for name, place in ((VGG, "weights"), (LINEAR, "also")):
        file = WeightsFile(name, sha256_file(folder / name), "", "none", 1)
        patch.setattr(Lpips, place, file if place == "weights" else (file,))
    patch.setenv(VARIABLE, str(folder))
    for name, form in list(LPIPS.items()):
        patch.setitem(LPIPS, name, LpipsForm(form.average_pooling, side if form.side else 0))
