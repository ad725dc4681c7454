"""Network architectures, and how a network is called, averaged and captured in CUDA graphs.

It may import `diffusion` and below.

The names in ``__all__`` are public: the plugin contract covers them. They load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distillbench._lazy import load

if TYPE_CHECKING:
    from distillbench.diffusion.embeddings import GuidanceEmbedding as GuidanceEmbedding
    from distillbench.diffusion.embeddings import PlacedFeatures as PlacedFeatures
    from distillbench.diffusion.embeddings import ScalarEmbedding as ScalarEmbedding
    from distillbench.diffusion.embeddings import TimedNetwork as TimedNetwork
    from distillbench.diffusion.embeddings import TimeEmbedding as TimeEmbedding
    from distillbench.diffusion.embeddings import TimeFeatures as TimeFeatures
    from distillbench.diffusion.fake_scores import FakeScore as FakeScore
    from distillbench.diffusion.modes import evaluating as evaluating
    from distillbench.diffusion.modes import frozen_weights as frozen_weights
    from distillbench.diffusion.two_times import TwoTimes as TwoTimes
    from distillbench.networks.architectures import NETWORKS as NETWORKS
    from distillbench.networks.architectures import SIZED as SIZED
    from distillbench.networks.architectures import DiT as DiT
    from distillbench.networks.architectures import ResidualMLP as ResidualMLP
    from distillbench.networks.architectures import UNet as UNet
    from distillbench.networks.averaging import MovingAverage as MovingAverage
    from distillbench.networks.averaging import move_towards as move_towards
    from distillbench.networks.diffusers_wrappers import project_guidance as project_guidance
    from distillbench.networks.time_features import smooth_times as smooth_times

__all__ = [
    "NETWORKS",
    "SIZED",
    "DiT",
    "FakeScore",
    "GuidanceEmbedding",
    "MovingAverage",
    "PlacedFeatures",
    "ResidualMLP",
    "ScalarEmbedding",
    "TimeEmbedding",
    "TimeFeatures",
    "TimedNetwork",
    "TwoTimes",
    "UNet",
    "evaluating",
    "frozen_weights",
    "move_towards",
    "project_guidance",
    "smooth_times",
]

_HOMES = {
    "FakeScore": "distillbench.diffusion.fake_scores",
    "NETWORKS": "distillbench.networks.architectures",
    "SIZED": "distillbench.networks.architectures",
    "DiT": "distillbench.networks.architectures",
    "GuidanceEmbedding": "distillbench.diffusion.embeddings",
    "MovingAverage": "distillbench.networks.averaging",
    "PlacedFeatures": "distillbench.diffusion.embeddings",
    "ResidualMLP": "distillbench.networks.architectures",
    "ScalarEmbedding": "distillbench.diffusion.embeddings",
    "TimeEmbedding": "distillbench.diffusion.embeddings",
    "TimeFeatures": "distillbench.diffusion.embeddings",
    "TimedNetwork": "distillbench.diffusion.embeddings",
    "TwoTimes": "distillbench.diffusion.two_times",
    "UNet": "distillbench.networks.architectures",
    "evaluating": "distillbench.diffusion.modes",
    "frozen_weights": "distillbench.diffusion.modes",
    "move_towards": "distillbench.networks.averaging",
    "project_guidance": "distillbench.networks.diffusers_wrappers",
    "smooth_times": "distillbench.networks.time_features",
}


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)
