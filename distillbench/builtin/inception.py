"""FID, KID, the Inception Score and other scores on the Inception network of 2015, which defines them.

The network is torch-fidelity's port of TensorFlow's graph ``inception-2015-12-05``. Its weights are one file, checked
by its SHA-256. Without it these columns are empty with a reason, because no other weights give comparable values.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from distillbench import Samples, Unavailable, hookimpl
from distillbench.evaluation import feature_metrics
from distillbench.evaluation.features import FeatureNetwork, resized
from distillbench.evaluation.metric import Need
from distillbench.evaluation.pretrained_weights import WeightsFile


class InceptionV3(FeatureNetwork):
    """torch-fidelity's ``inception-v3-compat``: 2048 pooled features (Heusel et al. 2017, arXiv:1706.08500)."""

    name, label, title = "inception", "Inception", "Inception-V3"
    protocol = (
        "inception/1: 8-bit images; grey repeated to 3 channels; bilinear resize to 299 as TensorFlow 1 does it; "
        "(x - 128) / 128; torch-fidelity 0.4 inception-v3-compat, float32; 2048 pooled features"
    )
    width = 2048
    weights = WeightsFile(
        file="weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        licence="Apache-2.0",
        mib=91,
        others=("pt_inception-2015-12-05-6726825d.pth",),  # pytorch-fid's name
    )
    batch = 64

    def __init__(self, file: Path, device: str) -> None:
        """torch-fidelity would unpickle anything in the file, so only its tensors are read and passed on as a copy."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        tensors = io.BytesIO()
        torch.save(torch.load(file, map_location="cpu", weights_only=True), tensors)
        tensors.seek(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=tensors)
        self.network = network.to(device)
        children = [child for name, child in network.named_children() if name != "fc"]
        self.body = nn.Sequential(*children, nn.Flatten())  # (B,3,299,299) to (B,2048), as in forward()

    def __call__(self, images: Tensor) -> Tensor:
        return self.network(images)[0]

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N,1008) of features (N,2048) without the bias, as in the Inception Score, on the CPU."""
        return features.cpu() @ self.network.fc.weight.T.cpu()


class InceptionV3Clean(InceptionV3):
    """The same network with clean-fid's resizing (Parmar et al. 2022, arXiv:2104.11222): antialiased, not rounded."""

    name, label, title = "inception_clean", "Inception, clean", "Inception-V3 (clean-fid's resizing)"
    protocol = (
        "inception_clean/1: 8-bit images; grey repeated to 3 channels; clean-fid 0.1.35's resize to 299 (mode clean: "
        "PIL bicubic in float, each channel by itself, clipped to [0, 255]); (x - 128) / 128; the body of "
        "torch-fidelity 0.4 inception-v3-compat, float32; 2048 pooled features"
    )

    @classmethod
    def locate(cls, folder: Path) -> Path:
        """The same file as :class:`InceptionV3`."""
        return InceptionV3.locate(folder)

    def __call__(self, images: Tensor) -> Tensor:
        from cleanfid.resize import build_resizer

        return self.body((resized(images, build_resizer("clean")) - 128) / 128)


class Fid(feature_metrics.FrechetDistance):
    name, network = "fid", InceptionV3
    label, title = "FID", "Fréchet Inception distance"


class FidInfinity(feature_metrics.FrechetDistanceExtrapolated):
    name, network = "fid_infinity", InceptionV3
    label, title = "FID∞", "Fréchet Inception distance, extrapolated to infinitely many samples"


class FidClean(feature_metrics.FrechetDistance):
    name, network = "fid_clean", InceptionV3Clean
    label, title = "clean FID", "Fréchet Inception distance with clean-fid's resizing"


class FdTeacherInception(feature_metrics.FrechetDistanceToTeacher):
    name, network = "fd_teacher_inception", InceptionV3


class Kid(feature_metrics.KernelDistance):
    name, network = "kid", InceptionV3
    label, title = "KID", "kernel Inception distance"


class InceptionScore(feature_metrics.FeatureMetric):
    """exp of the mean KL divergence of p(class | image) from p(class) (Salimans et al. 2016, arXiv:1606.03498).

    Real images are not used. It grows with the number of images in a split: compare only equal numbers.
    """

    name, network = "inception_score", InceptionV3
    label, title = "IS", "Inception Score"
    unit = "effective number of classes"
    direction = "higher"
    protocol = (
        "inception_score/1: torch-fidelity, unbiased logits, mean over 10 splits, shuffled, "
        f"seed {feature_metrics.SEED}"
    )
    needs = frozenset({Need.features})
    splits, fewest = 10, 1000  # at least 100 images per split

    def score(self, samples: Samples) -> float:
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

        features = samples.images.features(self.network)
        if len(features) < self.fewest:
            raise Unavailable(f"an Inception Score needs at least {self.fewest} images, got {len(features)}")
        network = samples.images.networks.get(self.network)
        assert isinstance(network, InceptionV3)
        logits = network.logits(features)
        return isc_features_to_metric(logits, self.splits, shuffle=True, rng_seed=feature_metrics.SEED)[
            KEY_METRIC_ISC_MEAN
        ]


class PrecisionInception(feature_metrics.Precision):
    name, network = "precision_inception", InceptionV3


class RecallInception(feature_metrics.Recall):
    name, network = "recall_inception", InceptionV3


class DensityInception(feature_metrics.Density):
    name, network = "density_inception", InceptionV3


class CoverageInception(feature_metrics.Coverage):
    name, network = "coverage_inception", InceptionV3


class TeacherDistanceInception(feature_metrics.FeatureDistanceToTeacher):
    name, network = "teacher_distance_inception", InceptionV3


class SpreadInception(feature_metrics.FeatureSpread):
    name, network = "spread_inception", InceptionV3


class NearestRealInception(feature_metrics.NearestReal):
    name, network = "nearest_real_inception", InceptionV3


@hookimpl(api=2)
def register_metrics(register) -> None:
    register(Fid)
    register(FidInfinity)
    register(FidClean)
    register(FdTeacherInception)
    register(Kid)
    register(InceptionScore)
    register(PrecisionInception)
    register(RecallInception)
    register(DensityInception)
    register(CoverageInception)
    register(TeacherDistanceInception)
    register(SpreadInception)
    register(NearestRealInception)
