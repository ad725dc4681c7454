"""What students are: copies of the teacher's network, adapters of it (LoRA), or another, smaller network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillbench.diffusion.conditioning import Conditioning
from distillbench.diffusion.denoiser import INPUTS, Denoiser
from distillbench.errors import UserError
from distillbench.networks.adapters import Adapters
from distillbench.options import option, require_between, require_positive
from distillbench.storage.files import key_of

DIGITS = 8  # of the hash in an architecture's label
LARGEST_TIME = 1000.0  # that a network of diffusers is given: it is made for timesteps up to 1000


@dataclass
class StudentConfig:
    """The network of the students of every method."""

    lora_rank: int = option(0, "rank of adapters (LoRA) of the teacher's network; 0: all its weights are trained")
    lora_alpha: float | None = option(None, "alpha of the adapters, which are scaled by alpha / rank; null: the rank")
    lora_targets: list[str] = option(
        [], "adapted layers: names, ends of names or regular expressions of names; empty: all Linear and Conv2d layers"
    )
    architecture: str = option(
        "",
        "config.json of a diffusers UNet2DModel or DiTTransformer2DModel: another network, with random weights",
        path=True,
    )

    def __post_init__(self) -> None:
        require_between(self, 0, 65536, "lora_rank")
        if self.lora_alpha is not None:
            require_positive(self, "lora_alpha")
        if not self.lora_rank and (self.lora_alpha is not None or self.lora_targets):
            name = "lora_targets" if self.lora_targets else "lora_alpha"
            raise UserError(f"{name} needs lora_rank above 0: without adapters all weights are trained")
        if self.lora_rank and self.architecture:
            raise UserError("lora_rank adapts the teacher's network, and architecture replaces it: use one of them")


@dataclass(frozen=True)
class StudentForm:
    """The network of students: with `adapters`, of another `architecture` (a diffusers config), or as the teacher's."""

    adapters: Adapters | None = None
    architecture: Mapping[str, Any] | None = None

    @staticmethod
    def of(config: StudentConfig) -> StudentForm:
        """By the settings. Raises UserError if the file of the architecture cannot be read."""
        if config.architecture:
            from distillbench.networks.architectures import read_architecture

            return StudentForm(architecture=read_architecture(Path(config.architecture), "student.architecture"))
        if not config.lora_rank:
            return AS_TEACHER
        alpha = float(config.lora_rank) if config.lora_alpha is None else config.lora_alpha
        return StudentForm(Adapters(config.lora_rank, alpha, tuple(config.lora_targets)))

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> StudentForm:
        """From the result of :meth:`plain`, as the records of trainings have it."""
        if not plain:
            return AS_TEACHER
        if "architecture" in plain:
            return StudentForm(architecture=plain["architecture"])
        return StudentForm(Adapters(plain["lora_rank"], plain["lora_alpha"], tuple(plain["lora_targets"])))

    def plain(self) -> dict[str, Any]:
        """Everything that it changes, as plain values; {} for the teacher's network."""
        if self.architecture is not None:
            return {"architecture": dict(self.architecture)}
        if self.adapters is None:
            return {}
        rank, alpha, targets = self.adapters.rank, self.adapters.alpha, list(self.adapters.targets)
        return {"lora_rank": rank, "lora_alpha": alpha, "lora_targets": targets}

    @property
    def rank(self) -> int | None:
        """The rank of the adapters; None without adapters."""
        return None if self.adapters is None else self.adapters.rank

    @property
    def architecture_label(self) -> str:
        """The class of another architecture and the first digits of the hash of its config; "" for the teacher's."""
        if self.architecture is None:
            return ""
        return f"{self.architecture.get('_class_name')}-{key_of(dict(self.architecture))[:DIGITS]}"

    def network(self, shape: tuple[int, int, int], like: Denoiser, conditioning: Conditioning) -> nn.Module:
        """The other architecture with random weights from torch's global generator, for the inputs of `like`.

        Raises UserError if it does not fit `shape` (C,H,W) or the conditioning.
        """
        from distillbench.networks.architectures import OfDiffusers

        assert self.architecture is not None
        config = dict(self.architecture)
        low, high = _times(like)
        if config.get("time_embedding_type") == "fourier" and low <= 0:
            raise UserError(
                f"student.architecture: time_embedding_type=fourier embeds the logarithm of the time, and the times of "
                f"this teacher begin at {low:g}. Possible: positional"
            )
        try:
            _check_conditioning(config, conditioning)
            return OfDiffusers(shape, config, conditioning.classes, LARGEST_TIME / max(abs(low), abs(high)))
        except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"student.architecture: {why}") from error


AS_TEACHER = StudentForm()


def _times(denoiser: Denoiser) -> tuple[float, float]:
    """The smallest and the largest time that its network is given."""
    schedule = denoiser.native
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
    low, high = INPUTS[denoiser.prediction](ends, schedule)[-1].tolist()
    if not math.isfinite(high - low) or low == high:
        raise UserError(f"student.architecture: the times of this teacher, {low:g} to {high:g}, cannot be scaled")
    return low, high


def _check_conditioning(config: dict[str, Any], conditioning: Conditioning) -> None:
    """Raise UserError unless a network of `config` takes the classes of `conditioning`, and no text and no image."""
    from distillbench.networks.architectures import TRAINABLE
    from distillbench.networks.diffusers_wrappers import NETWORKS

    if conditioning.texts is not None or conditioning.small is not None:
        raise UserError(
            f"student.architecture: {' and '.join(TRAINABLE)} take no texts and no images to enlarge. Students of this "
            "teacher can be adapters instead (student.lora_rank)"
        )
    name, classes = str(config.get("_class_name")), conditioning.classes
    if name not in TRAINABLE:
        return  # its constructor says what is possible
    serves = NETWORKS[name].serves(config)
    if not serves.get(classes, False) and (classes or classes not in serves):
        known = " or ".join(str(number or "no") for number in serves)
        wanted = f"{classes} classes and a row for no class" if classes else "no classes"
        raise UserError(f"student.architecture: a {name} of {known} classes, and the teacher has {wanted}")
