"""The contract of a metric, and how samples are drawn, scored and timed.

It may import `training` and below.

The names in ``__all__`` are public: the plugin contract covers them. They load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distillbench._lazy import load

if TYPE_CHECKING:
    from distillbench.evaluation.feature_metrics import Coverage as Coverage
    from distillbench.evaluation.feature_metrics import Density as Density
    from distillbench.evaluation.feature_metrics import FeatureDistanceToTeacher as FeatureDistanceToTeacher
    from distillbench.evaluation.feature_metrics import FeatureMetric as FeatureMetric
    from distillbench.evaluation.feature_metrics import FeatureSpread as FeatureSpread
    from distillbench.evaluation.feature_metrics import FrechetDistance as FrechetDistance
    from distillbench.evaluation.feature_metrics import FrechetDistanceExtrapolated as FrechetDistanceExtrapolated
    from distillbench.evaluation.feature_metrics import FrechetDistanceToTeacher as FrechetDistanceToTeacher
    from distillbench.evaluation.feature_metrics import KernelDistance as KernelDistance
    from distillbench.evaluation.feature_metrics import NearestReal as NearestReal
    from distillbench.evaluation.feature_metrics import Precision as Precision
    from distillbench.evaluation.feature_metrics import Recall as Recall
    from distillbench.evaluation.feature_metrics import density_and_coverage as density_and_coverage
    from distillbench.evaluation.feature_metrics import nearest as nearest
    from distillbench.evaluation.feature_metrics import precision_and_recall as precision_and_recall
    from distillbench.evaluation.feature_metrics import spread_ratio as spread_ratio
    from distillbench.evaluation.features import ImageSet as ImageSet
    from distillbench.evaluation.features import full_precision as full_precision
    from distillbench.evaluation.features import resized as resized
    from distillbench.evaluation.metric import DIRECTIONS as DIRECTIONS
    from distillbench.evaluation.pretrained_weights import locate as locate

__all__ = [
    "DIRECTIONS",
    "Coverage",
    "Density",
    "FeatureDistanceToTeacher",
    "FeatureMetric",
    "FeatureSpread",
    "FrechetDistance",
    "FrechetDistanceExtrapolated",
    "FrechetDistanceToTeacher",
    "ImageSet",
    "KernelDistance",
    "NearestReal",
    "Precision",
    "Recall",
    "density_and_coverage",
    "full_precision",
    "locate",
    "nearest",
    "precision_and_recall",
    "resized",
    "spread_ratio",
]

_HOMES = {
    "DIRECTIONS": "distillbench.evaluation.metric",
    "Coverage": "distillbench.evaluation.feature_metrics",
    "Density": "distillbench.evaluation.feature_metrics",
    "FeatureDistanceToTeacher": "distillbench.evaluation.feature_metrics",
    "FeatureMetric": "distillbench.evaluation.feature_metrics",
    "FeatureSpread": "distillbench.evaluation.feature_metrics",
    "FrechetDistance": "distillbench.evaluation.feature_metrics",
    "FrechetDistanceExtrapolated": "distillbench.evaluation.feature_metrics",
    "FrechetDistanceToTeacher": "distillbench.evaluation.feature_metrics",
    "ImageSet": "distillbench.evaluation.features",
    "KernelDistance": "distillbench.evaluation.feature_metrics",
    "NearestReal": "distillbench.evaluation.feature_metrics",
    "Precision": "distillbench.evaluation.feature_metrics",
    "Recall": "distillbench.evaluation.feature_metrics",
    "density_and_coverage": "distillbench.evaluation.feature_metrics",
    "full_precision": "distillbench.evaluation.features",
    "locate": "distillbench.evaluation.pretrained_weights",
    "nearest": "distillbench.evaluation.feature_metrics",
    "precision_and_recall": "distillbench.evaluation.feature_metrics",
    "resized": "distillbench.evaluation.features",
    "spread_ratio": "distillbench.evaluation.feature_metrics",
}


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)
