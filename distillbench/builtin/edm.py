"""Teachers from the network pickles of NVIDIA's EDM release (Karras et al. 2022, arXiv:2206.00364).

The files are read without executing any code in them (:mod:`distillbench.storage.safe_pickle`), into this package's own
implementations of the same networks (:mod:`distillbench.networks.edm`). The names "vp" and "ve" stand for the two
architectures of Song et al. Both use EDM's preconditioning, so that all are teachers of one kind: they predict F at
noise levels between .002 and 80. Networks that were released in half precision compute in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillbench import Denoiser, Teacher, TeacherConfig, TeacherSource, UserError, hookimpl, option
from distillbench.diffusion.conditioning import Conditioning
from distillbench.diffusion.denoiser import SIGMA_DATA
from distillbench.diffusion.schedules import VE
from distillbench.errors import quoted
from distillbench.networks.edm import NETWORKS
from distillbench.options import require_fraction
from distillbench.storage.downloads import located
from distillbench.storage.files import canonical_json, git_lfs_pointer, sha256_tensors
from distillbench.storage.safe_pickle import PersistentObject, read_pickle
from distillbench.storage.source_messages import missing_teacher
from distillbench.storage.sources import Source, of_teacher
from distillbench.system.progress import Progress
from distillbench.teachers.teacher import TeacherPlan

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # range of noise levels in EDM's sampling (table 1)
PUBLISHED = {  # by dataset
    "cifar10": "edm-cifar10-32x32-uncond-vp.pkl",
    "ffhq": "edm-ffhq-64x64-uncond-vp.pkl",
    "afhqv2": "edm-afhqv2-64x64-uncond-vp.pkl",
    "imagenet64": "edm-imagenet-64x64-cond-adm.pkl",
}
LARGEST = 65536  # most that a number in a network's settings may be
LONGEST = 64  # most entries of a list in them, and most blocks


@dataclass(frozen=True)
class Description:
    """The description of a network in a file, as plain values."""

    network: str
    settings: dict[str, Any]  # arguments of the network's class
    sigma_min: float
    sigma_max: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """C,H,W of its images."""
        side = self.settings["img_resolution"]
        return self.settings["in_channels"], side, side

    @property
    def classes(self) -> int:
        return self.settings.get("label_dim", 0)

    def with_dropout(self, share: float) -> Description:
        return dataclasses.replace(self, settings=self.settings | {"dropout": share})

    def build(self) -> nn.Module:
        """The network with random weights."""
        return NETWORKS[self.network](**self.settings)


class Edm(TeacherSource):
    """A network pickle of NVIDIA's EDM release, or a snapshot of its training script."""

    name = "edm"

    @dataclass
    class Config(TeacherConfig):
        path: str = option("", f"the file, such as {PUBLISHED['ffhq']}; empty: a downloaded one", path=True)
        download: bool = option(False, "without teacher.path: download the released network that fits the dataset")
        release: str = option(
            "", "without teacher.path: a network by its name in `distillbench fetch`; empty: the one that fits"
        )
        dropout: float = option(0.0, "dropout of students in training (EDM trains with .05 to .25)")

        def __post_init__(self) -> None:
            require_fraction(self, "dropout")

    def notes(self) -> Sequence[str]:
        source = None if self.config.path else self._source()
        return [] if source is None else [f"{source.title}, by {source.publisher}, from {source.origin}"]

    def plan(self) -> TeacherPlan:
        self._check()
        return TeacherPlan(self._file.name)

    def untrained(self) -> Teacher:
        self._check()
        return self._teacher(self._description.build(), "untrained")

    def load(self, progress: Progress) -> Teacher:
        self._check()
        network, weights = self._description.build(), _weights(self._file, _model(self._file, tensors=True)[1])
        _check_shapes(self._file, network, weights)
        network.load_state_dict(weights)
        reading = canonical_json(dataclasses.asdict(self._description))
        identity = f"{sha256_tensors(network.state_dict())} {reading}"
        return self._teacher(network, hashlib.sha256(identity.encode()).hexdigest())

    def _teacher(self, network: nn.Module, sha256: str) -> Teacher:
        described = self._description
        return Teacher(
            self.name,
            Denoiser(network, VE(described.sigma_min, described.sigma_max), "edm").to(self.device),
            described.shape,
            sha256,
            {"file": self._file.name} | dataclasses.asdict(described),
            Conditioning(described.classes),
            blank=described.build,
        )

    @functools.cached_property
    def _file(self) -> Path:
        if not self.config.path:
            return self._downloaded()
        example = PUBLISHED.get(self.dataset.name, PUBLISHED["ffhq"])
        accepted = (
            f"Possible: a network of NVIDIA's EDM release ({', '.join(PUBLISHED.values())} and their variants; see "
            f"the README of NVlabs/edm on GitHub), or a snapshot of its training script: distillbench run "
            f"'methods=[boot,cm]' dataset={self.dataset.name} teacher=edm teacher.path=FOLDER/{example}"
        )
        file = Path(self.config.path)
        if file.is_dir():
            raise UserError(f"teacher.path: {self.config.path!r} is a folder, but teacher=edm reads a file. {accepted}")
        if not file.is_file():
            raise UserError(f"teacher.path: no file {self.config.path!r}. {accepted}")
        with open(file, "rb") as start:
            if why := git_lfs_pointer(start.read(64)):
                raise UserError(f"teacher.path: {file.name!r} cannot be read: {why}")
        return file

    def _source(self) -> Source | None:
        side, conditional = self.dataset.shape[-1], bool(self.conditioning.classes)
        return of_teacher(self.dataset.name, side, conditional, self.name, self.config.release)

    def _downloaded(self) -> Path:
        """The released network that fits the run, or the one that is named, if it was downloaded."""
        source = self._source()
        if source is None:
            name, side, conditional = self.dataset.name, self.dataset.shape[-1], bool(self.conditioning.classes)
            fitting = of_teacher(name, side, not conditional, self.name)
            hint = f" (for conditional={str(not conditional).lower()} there is {fitting.name})" if fitting else ""
            raise UserError(
                f"teacher=edm needs teacher.path=FILE: no released network is known for dataset={name} at "
                f"{side}x{side} and conditional={str(conditional).lower()}{hint}. teacher.release=NAME names one"
            )
        path = located(source)
        if path is None:
            raise UserError(missing_teacher(source))
        return path

    @functools.cached_property
    def _description(self) -> Description:
        """The description of the network in the file, after checking that its weights match."""
        described, model = _model(self._file, tensors=False)
        try:
            with torch.device("meta"):
                network = described.build()
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _unfit(self._file, f"its {described.network} cannot be built: {error}") from error
        _check_shapes(self._file, network, _weights(self._file, model))
        return described.with_dropout(self.config.dropout)

    def _check(self) -> None:
        """Raise UserError unless the file exists and fits the dataset and the run's conditioning."""
        theirs, classes, asked = self._description.shape, self._description.classes, self.conditioning
        if theirs != tuple(self.dataset.shape):
            raise UserError(
                f"the teacher does not fit the dataset: its images are (C,H,W) = {theirs}, the dataset's are "
                f"{tuple(self.dataset.shape)}"
            )
        if classes != asked.classes:
            wanted = f"conditional=true with {asked.classes} classes" if asked.classes else "conditional=false"
            raise UserError(
                f"the teacher in {self._file.name!r} has {classes or 'no'} classes and does not support {wanted}"
            )
        if asked.guided and not self._description.settings.get("label_dropout", 0):
            raise UserError(
                f"the teacher in {self._file.name!r} was trained without label dropout (label_dropout=0), so it has no "
                "unconditional prediction, which guidance needs. Possible: guidance=1"
            )


# --- from the pickle to a description and weights --------------------------------------------------------------------


def _unfit(file: Path, why: str) -> UserError:
    return UserError(f"teacher.path: {file.name!r} is not an EDM network: {why}")


def _model(file: Path, tensors: bool) -> tuple[Description, PersistentObject]:
    """The description of the network in `file`, and the network's attributes."""
    content = read_pickle(file, tensors)
    wrapper = content.get("ema") if isinstance(content, dict) else None
    if not isinstance(wrapper, PersistentObject):
        raise _unfit(file, "it is not a dict with a network as 'ema'")
    if wrapper.class_name != "EDMPrecond":
        raise _unfit(file, f"its preconditioning is {quoted(wrapper.class_name)}. Possible: EDMPrecond")
    modules = wrapper.state.get("_modules")
    model = modules.get("model") if isinstance(modules, dict) else None
    if not isinstance(model, PersistentObject) or model.class_name not in NETWORKS:
        got = quoted(model.class_name) if isinstance(model, PersistentObject) else "none"
        raise _unfit(file, f"its architecture is {got}. Possible: {', '.join(NETWORKS)}")
    sigma_data = _number(file, wrapper, "sigma_data", SIGMA_DATA)
    if sigma_data != SIGMA_DATA:
        raise _unfit(file, f"its sigma_data is {sigma_data:g}. Possible: {SIGMA_DATA:g}")
    low = max(SIGMA_MIN, _number(file, wrapper, "sigma_min", 0.0))
    high = min(SIGMA_MAX, _number(file, wrapper, "sigma_max", math.inf))
    if not low < high:
        raise _unfit(file, f"its noise levels do not overlap {SIGMA_MIN:g} to {SIGMA_MAX:g}")
    return Description(model.class_name, _settings(file, model), low, high), model


def _number(file: Path, record: PersistentObject, name: str, default: float) -> float:
    value = record.state.get(name, default)
    if type(value) not in (int, float) or math.isnan(value):
        raise _unfit(file, f"its {name} is not a number")
    return float(value)


def _settings(file: Path, model: PersistentObject) -> dict[str, Any]:
    """The arguments of the network's class by name, checked to be plain and of plausible size."""
    args, kwargs = model.state.get("_init_args", ()), model.state.get("_init_kwargs", {})
    if not (isinstance(args, tuple | list) and isinstance(kwargs, dict) and all(isinstance(k, str) for k in kwargs)):
        raise _unfit(file, "it has no arguments of its class")
    try:
        settings = inspect.signature(NETWORKS[model.class_name]).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise _unfit(file, f"{model.class_name}: {error}") from error
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    for name, value in settings.items():
        for part in value if isinstance(value, list) else [value]:
            plain = type(part) is str or (type(part) in (int, float) and 0 <= part <= LARGEST)
            if not plain or (isinstance(value, list) and len(value) > LONGEST):
                raise _unfit(file, f"its {name} is {quoted(reprlib.repr(value))}")
    if settings["in_channels"] != settings["out_channels"]:
        raise _unfit(file, f"it has {settings['in_channels']} input and {settings['out_channels']} output channels")
    if settings.get("num_blocks", 0) not in range(LONGEST):
        raise _unfit(file, f"its num_blocks is {settings['num_blocks']}")
    return settings


def _weights(file: Path, model: PersistentObject) -> dict[str, Tensor]:
    try:
        return dict(_named_tensors(model, "", set()))
    except (AttributeError, RecursionError, TypeError) as error:
        raise _unfit(file, "its modules are not made of modules, parameters and buffers") from error


def _named_tensors(module: PersistentObject, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a module's parameters and buffers and of all below it, as its state_dict would name them."""
    if id(module) in seen:
        raise TypeError("a module occurs twice")
    seen.add(id(module))
    unsaved = module.state.get("_non_persistent_buffers_set", ())
    for group in ("_parameters", "_buffers"):
        for name, tensor in module.state.get(group, {}).items():
            if isinstance(tensor, Tensor) and name not in unsaved:
                yield f"{prefix}{name}", tensor
    for name, child in module.state.get("_modules", {}).items():
        if isinstance(child, PersistentObject):
            yield from _named_tensors(child, f"{prefix}{name}.", seen)


def _check_shapes(file: Path, network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise UserError unless `weights` are those of `network`, name by name and shape by shape."""
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in sorted(theirs.keys() ^ ours.keys()):
        lacks = "has no" if name in ours else "has a tensor"
        raise _unfit(file, f"it {lacks} {quoted(name)}, unlike the {type(network).__name__} that it describes")
    for name, shape in ours.items():
        if theirs[name] != shape:
            raise _unfit(file, f"its {name} has shape {theirs[name]}, expected {shape}")


@hookimpl(api=2)
def register_teachers(register) -> None:
    register(Edm)
