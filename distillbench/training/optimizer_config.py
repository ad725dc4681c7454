"""Settings of the optimisers and of the average, for a method and for each of its further networks."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distillbench.errors import UserError
from distillbench.options import (
    Among,
    Around,
    added_option,
    option,
    require_between,
    require_fraction,
    require_one_of,
    require_positive,
)

__all__ = ["NetworkConfig", "OptimizerConfig"]

OPTIMIZERS = ("adamw", "adam", "radam", "adamw8bit")
LIBRARIES = {"adamw8bit": ("bitsandbytes", "adam8bit")}  # optimisers of optional libraries, and the extra for each
AROUND = Around(5.0, of_zero=Among([0.0, 2.0, 10.0, 50.0]))  # where a search looks: 1.4 decades, or with and without
WIDEST_POWER = 12**-0.5  # sigma_rel of the mean of all updates, gamma = 0


@dataclass
class OptimizerConfig:
    """How the harness optimises and averages a network.

    - ``optimizer``: adamw is ``torch.optim.AdamW``, with decoupled weight decay: an update shrinks the weights by lr *
      weight_decay. adam is ``torch.optim.Adam``, which adds weight_decay times the weight to its gradient. radam is
      ``torch.optim.RAdam`` (Liu et al. 2020, arXiv:1908.03265) with decoupled weight decay. Without weight decay adam
      and adamw are the same. adamw8bit is ``bitsandbytes.optim.AdamW8bit`` (Dettmers et al. 2021, arXiv:2110.02861):
      adamw whose moments take 8 bits an element, in blocks of 256, for weights of at least 4096 elements.
    - ``lr_decay=inverse_sqrt`` is that of EDM2 (Karras et al. 2024, arXiv:2312.02696): lr / sqrt(max(p / p_0, 1)) at
      the share p of the phase, with p_0 = ``lr_decay_start``.
    - The average keeps 2^(-n / halflife) of itself at an update of n images (``ema_start=constant``). With ``rampup``
      the half-life is at most 5 % of the images seen (Karras et al. 2022, arXiv:2206.00364); with ``bias_corrected``
      the weights of all updates are divided by their sum, so the initial network has none (TRACT). ``ema_sigma_rel``
      replaces both by EDM2's power-function average (:func:`distillbench.networks.averaging.power_exponent`).
    - ``grad_nan_to_num`` replaces NaN by 0 and infinities by 1e5 or -1e5, as EDM's code does. Such updates are counted
      in `nonfinite_steps`. With fp16 the loss scaler skips them instead. A loss that is not finite ends the training.
    """

    lr: float = option(1e-3, "peak learning rate of Adam", search=AROUND)
    optimizer: str = added_option(
        "adamw", "adamw, adam (weight decay is added to the gradient), radam or adamw8bit (an extra)"
    )
    lr_warmup: float = option(0.05, "share of a phase over which the learning rate rises from 0")
    lr_decay: str = option("cosine", "then: constant; linear or cosine, to 0 at the end of the phase; or inverse_sqrt")
    lr_decay_start: float = added_option(0.1, "share of a phase after which inverse_sqrt decays")
    beta1: float = option(0.9, "Adam's first decay rate")
    beta2: float = option(0.999, "Adam's second decay rate")
    eps: float = added_option(1e-8, "Adam's epsilon, added to the root of the second moment")
    weight_decay: float = option(0.0, "weight decay, decoupled unless optimizer=adam")
    grad_clip: float = option(1.0, "largest norm of a network's gradients; 0: they are not clipped")
    grad_clip_by: str = added_option("norm", "what grad_clip limits: the norm, or the value of each element")
    grad_nan_to_num: bool = added_option(False, "in gradients NaN becomes 0, infinity 1e5 (EDM's code)")
    ema_halflife_kimg: float = option(
        10.0, "half-life of the weights' average in 1000 images; 0: no average", search=AROUND
    )
    ema_start: str = added_option(
        "rampup", "rampup (half-life at most 5 % of the images seen), bias_corrected or constant"
    )
    ema_sigma_rel: float = added_option(0.0, "relative width of a power-function average (EDM2); 0: by half-life")

    def __post_init__(self) -> None:
        require_positive(self, "lr")
        require_between(self, 0, 1, "lr_warmup")
        require_fraction(self, "beta1", "beta2")
        require_positive(self, "lr_decay_start", "eps")
        require_between(self, 0, 1, "lr_decay_start")
        require_between(self, 0, float("inf"), "weight_decay", "grad_clip", "ema_halflife_kimg")
        require_between(self, 0, WIDEST_POWER, "ema_sigma_rel")
        require_one_of(self, "optimizer", OPTIMIZERS)
        require_one_of(self, "lr_decay", ("constant", "linear", "cosine", "inverse_sqrt"))
        require_one_of(self, "grad_clip_by", ("norm", "value"))
        require_one_of(self, "ema_start", ("rampup", "bias_corrected", "constant"))

    @property
    def averaged(self) -> bool:
        """Whether there is an average of the weights."""
        return self.ema_halflife_kimg > 0 or self.ema_sigma_rel > 0


@dataclass
class NetworkConfig:
    """Settings of the optimiser of one network, where they differ from those of the method.

    A method's Config has one for each such network, under the name of the method's attribute: ``fake: NetworkConfig =
    option(NetworkConfig(grad_clip=0), "of the fake score")`` is for ``self.fake``. Warm-up and decay are the same for
    all networks of a method, and only the student is averaged.
    """

    lr: float | None = option(None, "its peak learning rate; null: the method's")
    optimizer: str | None = added_option(None, "its optimiser: adamw, adam, radam or adamw8bit; null: the method's")
    beta1: float | None = option(None, "Adam's first decay rate for it; null: the method's")
    beta2: float | None = option(None, "Adam's second decay rate for it; null: the method's")
    eps: float | None = added_option(None, "Adam's epsilon for it; null: the method's")
    weight_decay: float | None = option(None, "its weight decay; null: the method's")
    grad_clip: float | None = option(None, "largest norm of its gradients; 0: not clipped; null: the method's")
    grad_clip_by: str | None = added_option(None, "what its grad_clip limits: norm or value; null: the method's")
    grad_nan_to_num: bool | None = added_option(None, "NaN becomes 0 in its gradients; null: the method's")

    def __post_init__(self) -> None:
        OptimizerConfig(**self._own())

    def _own(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def over(self, config: OptimizerConfig) -> OptimizerConfig:
        """The settings of `config`, replaced by those that are set here."""
        shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(OptimizerConfig)}
        return OptimizerConfig(**shared | self._own())


def optimizers_of(config: OptimizerConfig) -> dict[str, str]:
    """The optimisers of a method, by the settings that choose them: `optimizer`, and `NAME.optimizer` of networks."""
    own = {name: value for name, value in vars(config).items() if isinstance(value, NetworkConfig)}
    chosen = {f"{name}.optimizer": value.optimizer for name, value in own.items() if value.optimizer is not None}
    return {"optimizer": config.optimizer} | chosen


def check_optimizers(config: OptimizerConfig, prefix: str, compute: Mapping[str, bool]) -> None:
    """Raise UserError if the library of an optimiser is missing, or does not go with a true setting of `compute`.

    `prefix` is that of the settings' names. bitsandbytes' kernels on a GPU get pointers to whole tensors: with sharded
    ones, and with channels_last, it was not tested.
    """
    for setting, optimizer in optimizers_of(config).items():
        if optimizer not in LIBRARIES:
            continue
        if importlib.util.find_spec(LIBRARIES[optimizer][0]) is None:
            raise missing_library(f"{prefix}{setting}", optimizer)
        refused = next((name for name, value in compute.items() if value), "")
        if refused:
            raise UserError(
                f"{prefix}{setting}={optimizer} does not go with {refused}=true: it keeps moments of whole, contiguous "
                "weights. Use optimizer=adamw, or leave that setting out"
            )


def missing_library(setting: str, optimizer: str) -> UserError:
    library, extra = LIBRARIES[optimizer]
    return UserError(f"{setting}={optimizer} needs the library {library}: pip install 'distillbench[{extra}]'")
