"""LPIPS, the distance of two images in VGG16's features (Zhang et al. 2018, arXiv:1801.03924), version 0.1.

    d(a, b) = sum over l of mean over h, w of sum over c of v_lc (u_lchw(a) - u_lchw(b))^2,   u = f / (|f| + 1e-10)

| symbol | meaning                                                                         | shape       |
|--------|---------------------------------------------------------------------------------|-------------|
| a, b   | images in [-1, 1], grey or in colour                                            | (B,C,H,W)   |
| f_l    | features: output of the last ReLU before VGG16's l-th pooling, for l = 1, ..., 5 | (B,c,h,w)   |
| u_l    | the same, of length 1 at each place                                             | (B,c,h,w)   |
| v_l    | weight of each channel, fitted to human judgement                               | (1,c,1,1)   |

Images are first resized as the form says, bilinearly, and normalised with ImageNet's mean and deviation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distillbench.diffusion.distances import LpipsForm

ENDS = (4, 9, 16, 23, 30)  # of the layers up to relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 in torchvision's VGG16
CHANNELS = (64, 128, 256, 512, 512)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and deviation of pixels in [-1, 1]
SMALLEST = 16  # pixels a side, for four poolings


class LpipsNetwork(nn.Module):
    """d(a, b) of each pair of images, (B,): frozen, and on the meta device until weights are loaded."""

    def __init__(self, form: LpipsForm) -> None:
        super().__init__()
        from torchvision.models import vgg16  # takes a second

        self.form = form
        with torch.device("meta"):
            layers = vgg16(weights=None, init_weights=False).features[: ENDS[-1]]
            self.channels = nn.ParameterList(torch.empty(1, width, 1, 1) for width in CHANNELS)
        if form.average_pooling:
            layers = nn.Sequential(*(nn.AvgPool2d(2) if isinstance(each, nn.MaxPool2d) else each for each in layers))
        self.features = layers
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    shift: Tensor
    scale: Tensor

    def load(self, vgg: Path, channels: Path) -> LpipsNetwork:
        """Take the weights from torchvision's file of VGG16 and from the file of LPIPS 0.1 for it."""
        state = torch.load(vgg, map_location="cpu", weights_only=True)
        names = {f"features.{name}": name for name in self.features.state_dict()}
        self.features.load_state_dict({name: state[key] for key, name in names.items()}, assign=True)
        state = torch.load(channels, map_location="cpu", weights_only=True)
        weights = {str(k): state[f"lin{k}.model.1.weight"] for k in range(len(CHANNELS))}
        self.channels.load_state_dict(weights, assign=True)
        return self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        x, y, start = self.prepared(a), self.prepared(b), 0
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for end, weight in zip(ENDS, self.channels, strict=True):
            block, start = self.features[start:end], end
            x, y = block(x), block(y)
            total = total + (weight * (unit(x) - unit(y)).square()).sum(dim=1).mean(dim=(1, 2))
        return total

    def prepared(self, images: Tensor) -> Tensor:
        """What the network gets, (B,3,h,w) in its own precision."""
        x, size = images.to(self.shift.dtype), self.form.size(*images.shape[-2:])
        if size != tuple(images.shape[-2:]):
            x = interpolate(x, size, mode="bilinear", align_corners=False)
        return (x.expand(-1, 3, -1, -1) - self.shift) / self.scale


def unit(f: Tensor) -> Tensor:
    """Features (B,c,h,w) of length 1 at each place."""
    return f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10)
