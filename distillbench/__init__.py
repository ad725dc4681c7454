"""distillbench: compare methods that distil diffusion models on one frozen teacher, one budget and one evaluator.

What a plugin author needs is importable from here and from the packages in ``PUBLIC_PACKAGES``: the version of the
plugin contract covers the names in their ``__all__``. Everything else is private and may change with every release.
The names load on first use, so that ``distillbench --help`` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distillbench._lazy import load
from distillbench._version import __version__ as __version__

if TYPE_CHECKING:
    from distillbench.datasets.dataset import Dataset as Dataset
    from distillbench.datasets.dataset import DatasetConfig as DatasetConfig
    from distillbench.diffusion.conditioning import Condition as Condition
    from distillbench.diffusion.conditioning import Conditioning as Conditioning
    from distillbench.diffusion.denoiser import Denoiser as Denoiser
    from distillbench.diffusion.noise import Noise as Noise
    from distillbench.errors import DivergedError as DivergedError
    from distillbench.errors import Unavailable as Unavailable
    from distillbench.errors import UserError as UserError
    from distillbench.errors import quoted as quoted
    from distillbench.errors import unknown as unknown
    from distillbench.evaluation.features import FeatureNetwork as FeatureNetwork
    from distillbench.evaluation.metric import Metric as Metric
    from distillbench.evaluation.metric import Need as Need
    from distillbench.evaluation.metric import Samples as Samples
    from distillbench.evaluation.pretrained_weights import WeightsFile as WeightsFile
    from distillbench.hookspecs import hookimpl as hookimpl
    from distillbench.options import option as option
    from distillbench.storage.files import canonical_json as canonical_json
    from distillbench.storage.files import key_of as key_of
    from distillbench.storage.files import sha256_file as sha256_file
    from distillbench.storage.files import sha256_tensors as sha256_tensors
    from distillbench.storage.files import signed as signed
    from distillbench.storage.files import write_atomically as write_atomically
    from distillbench.system.progress import Progress as Progress
    from distillbench.teachers.teacher import Clip as Clip
    from distillbench.teachers.teacher import Teacher as Teacher
    from distillbench.teachers.teacher import TeacherConfig as TeacherConfig
    from distillbench.teachers.teacher import TeacherPlan as TeacherPlan
    from distillbench.teachers.teacher import TeacherSource as TeacherSource
    from distillbench.training.method import Batch as Batch
    from distillbench.training.method import Method as Method
    from distillbench.training.method import MethodConfig as MethodConfig
    from distillbench.training.method import Phase as Phase
    from distillbench.training.multistep import MultistepMethod as MultistepMethod
    from distillbench.training.multistep import SegmentedMethod as SegmentedMethod
    from distillbench.training.optimizer_config import NetworkConfig as NetworkConfig
    from distillbench.training.optimizer_config import OptimizerConfig as OptimizerConfig
    from distillbench.training.pairs import PairStore as PairStore
    from distillbench.training.pairs import Workspace as Workspace

PUBLIC_PACKAGES = ("datasets", "diffusion", "evaluation", "networks", "options", "testing")

__all__ = [
    "Batch",
    "Clip",
    "Condition",
    "Conditioning",
    "Dataset",
    "DatasetConfig",
    "Denoiser",
    "DivergedError",
    "FeatureNetwork",
    "Method",
    "MethodConfig",
    "Metric",
    "MultistepMethod",
    "Need",
    "NetworkConfig",
    "Noise",
    "OptimizerConfig",
    "PairStore",
    "Phase",
    "Progress",
    "Samples",
    "SegmentedMethod",
    "Teacher",
    "TeacherConfig",
    "TeacherPlan",
    "TeacherSource",
    "Unavailable",
    "UserError",
    "WeightsFile",
    "Workspace",
    "canonical_json",
    "hookimpl",
    "key_of",
    "option",
    "quoted",
    "sha256_file",
    "sha256_tensors",
    "signed",
    "unknown",
    "write_atomically",
]

_HOMES = {
    "Batch": "distillbench.training.method",
    "Clip": "distillbench.teachers.teacher",
    "Condition": "distillbench.diffusion.conditioning",
    "Conditioning": "distillbench.diffusion.conditioning",
    "Dataset": "distillbench.datasets.dataset",
    "DatasetConfig": "distillbench.datasets.dataset",
    "Denoiser": "distillbench.diffusion.denoiser",
    "DivergedError": "distillbench.errors",
    "FeatureNetwork": "distillbench.evaluation.features",
    "Method": "distillbench.training.method",
    "MethodConfig": "distillbench.training.method",
    "Metric": "distillbench.evaluation.metric",
    "MultistepMethod": "distillbench.training.multistep",
    "SegmentedMethod": "distillbench.training.multistep",
    "Need": "distillbench.evaluation.metric",
    "NetworkConfig": "distillbench.training.optimizer_config",
    "Noise": "distillbench.diffusion.noise",
    "OptimizerConfig": "distillbench.training.optimizer_config",
    "PairStore": "distillbench.training.pairs",
    "Phase": "distillbench.training.method",
    "Progress": "distillbench.system.progress",
    "Samples": "distillbench.evaluation.metric",
    "Teacher": "distillbench.teachers.teacher",
    "TeacherConfig": "distillbench.teachers.teacher",
    "TeacherPlan": "distillbench.teachers.teacher",
    "TeacherSource": "distillbench.teachers.teacher",
    "Unavailable": "distillbench.errors",
    "UserError": "distillbench.errors",
    "WeightsFile": "distillbench.evaluation.pretrained_weights",
    "Workspace": "distillbench.training.pairs",
    "canonical_json": "distillbench.storage.files",
    "hookimpl": "distillbench.hookspecs",
    "key_of": "distillbench.storage.files",
    "option": "distillbench.options",
    "quoted": "distillbench.errors",
    "sha256_file": "distillbench.storage.files",
    "sha256_tensors": "distillbench.storage.files",
    "signed": "distillbench.storage.files",
    "unknown": "distillbench.errors",
    "write_atomically": "distillbench.storage.files",
}


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)
