"""distillbench: compare methods that distil diffusion models on one frozen teacher, one budget and one evaluator.

What a plugin author needs is importable from here, and from ``__all__`` of the modules in ``PUBLIC_MODULES``: that is
what the version of the plugin contract covers. Everything else is private and may change with every release. The names
load on first use, so that ``distillbench --help`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

PUBLIC_MODULES = (
    "conditions",
    "consistency",
    "datasets",
    "denoiser",
    "dropout",
    "errors",
    "exact",
    "features",
    "files",
    "image_files",
    "laws",
    "losses",
    "method",
    "metrics",
    "networks",
    "options",
    "pairs",
    "pretrained",
    "progress",
    "samplers",
    "schedules",
    "scores",
    "teachers",
    "testing",
)

if TYPE_CHECKING:
    from distillbench.conditions import Condition, Conditioning
    from distillbench.datasets import Dataset, DatasetConfig
    from distillbench.denoiser import Denoiser
    from distillbench.errors import DivergedError, Unavailable, UserError
    from distillbench.features import FeatureNetwork
    from distillbench.hookspecs import hookimpl
    from distillbench.method import Batch, Method, MethodConfig, NetworkConfig, OptimizerConfig, Phase
    from distillbench.metrics import Metric, Need, Samples
    from distillbench.noise import Noise
    from distillbench.options import option
    from distillbench.pairs import PairStore, Workspace
    from distillbench.pretrained import WeightsFile
    from distillbench.progress import Progress
    from distillbench.teachers import Teacher, TeacherConfig, TeacherPlan, TeacherSource

_HOME = {
    "Batch": "method",
    "Condition": "conditions",
    "Conditioning": "conditions",
    "Dataset": "datasets",
    "DatasetConfig": "datasets",
    "Denoiser": "denoiser",
    "DivergedError": "errors",
    "FeatureNetwork": "features",
    "Method": "method",
    "MethodConfig": "method",
    "Metric": "metrics",
    "Need": "metrics",
    "NetworkConfig": "method",
    "Noise": "noise",
    "OptimizerConfig": "method",
    "PairStore": "pairs",
    "Phase": "method",
    "Progress": "progress",
    "Samples": "metrics",
    "Teacher": "teachers",
    "TeacherConfig": "teachers",
    "TeacherPlan": "teachers",
    "TeacherSource": "teachers",
    "Unavailable": "errors",
    "UserError": "errors",
    "WeightsFile": "pretrained",
    "Workspace": "pairs",
    "hookimpl": "hookspecs",
    "option": "options",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'distillbench' has no attribute '{name}'")
    return getattr(importlib.import_module(f"distillbench.{_HOME[name]}"), name)
