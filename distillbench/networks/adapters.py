"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv:2106.09685) of the layers of a network, by peft.

An adapted layer computes with W + (alpha / rank) B A. Only A and B are trained. B starts at zero, so that the network
computes what it did before. A layer X has these keys in a state dict; those of a merged layer are those of a plain one:

| adapted                                          | merged              |
|--------------------------------------------------|---------------------|
| X.base_layer.weight                              | X.weight            |
| X.base_layer.bias                                | X.bias              |
| X.lora_A.default.weight, X.lora_B.default.weight | added to X.weight   |

| symbol | meaning          | shape: Linear           | shape: Conv2d          |
|--------|------------------|-------------------------|------------------------|
| W      | weight, frozen   | (out, in)               | (out, in, h, w)        |
| A      | trained          | (rank, in)              | (rank, in, h, w)       |
| B      | trained          | (out, rank)             | (out, rank, 1, 1)      |
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillbench.errors import UserError, first_of, quoted
from distillbench.system.dtensors import class_of

INSTALL = "needs the library peft: pip install 'distillbench[lora]'"
BASE, A, B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"
SHOWN = 8  # names of layers in an error message


@dataclass(frozen=True)
class Adapters:
    """Adapters of one rank; `targets` are names, ends of names, or regular expressions of whole names of layers."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()  # empty: all layers that can be adapted

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def adaptable_layers(network: nn.Module) -> list[str]:
    """The names of all Linear and Conv2d layers of `network`, without convolutions that are dilated or grouped.

    A subclass may compute something else from its weight, and peft's convolutions are neither dilated nor grouped.
    """
    return [name for name, module in network.named_modules() if name and _can_be_adapted(module)]


def _can_be_adapted(module: nn.Module) -> bool:
    if class_of(module) is nn.Conv2d:
        assert isinstance(module, nn.Conv2d)
        return module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    return class_of(module) is nn.Linear


def chosen_layers(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of the layers that `targets` select; without targets, all that can be adapted.

    Raises UserError if a target selects none.
    """
    possible = adaptable_layers(network)
    if not possible:
        raise UserError(
            f"student.lora_rank: a {class_of(network).__name__} has no Linear or Conv2d layer that can be adapted"
        )
    for target in targets:
        if not any(_selects(target, name) for name in possible):
            raise UserError(
                f"student.lora_targets: {quoted(target)} is not a name, the end of a name or a regular expression of a "
                f"Linear or Conv2d layer. Possible: {first_of(possible, SHOWN)}"
            )
    return [name for name in possible if not targets or any(_selects(target, name) for target in targets)]


def _selects(target: str, name: str) -> bool:
    if name == target or name.endswith(f".{target}"):
        return True
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise UserError(f"student.lora_targets: {quoted(target)} is not a regular expression: {error}") from error


def inject(network: nn.Module, adapters: Adapters) -> None:
    """Put adapters into the layers of `network`, in place. Afterwards only the adapters require gradients.

    A is drawn from torch's global generator of the CPU. Raises UserError if peft is missing or nothing is adapted.
    """
    names = chosen_layers(network, adapters.targets)
    try:
        import peft  # takes seconds to import
    except ImportError as error:
        raise UserError(f"student.lora_rank={adapters.rank} {INSTALL}") from error
    settings: dict[str, Any] = {"r": adapters.rank, "lora_alpha": adapters.alpha}
    config = peft.LoraConfig(**settings, target_modules="|".join(re.escape(name) for name in names))
    peft.inject_adapter_in_model(config, network)
    for name, weight in network.named_parameters():
        weight.requires_grad_(name.endswith((A, B)))


def adapted_layers(state: Mapping[str, Any]) -> Iterator[str]:
    """The names of the layers with an adapter in a state dict."""
    return (key.removesuffix(A) for key in state if key.endswith(A))


def merged(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state dict of the same module without adapters, which are merged into the weights (in float64)."""
    layers = set(adapted_layers(state))
    plain: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer, base, name = key.rpartition(BASE)
        if not base or layer not in layers:
            if not key.endswith((A, B)):
                plain[key] = tensor
        elif name == "weight":
            plain[f"{layer}.weight"] = _sum(tensor, state[layer + A], state[layer + B], scale)
        else:
            plain[f"{layer}.{name}"] = tensor
    return plain


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A."""
    product = b.double().flatten(1) @ a.double().flatten(1)
    return torch.add(weight.double(), product.view_as(weight), alpha=scale).to(weight.dtype)


def adapters_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A and B alone, with the keys that peft and diffusers save: X.lora_A.weight and X.lora_B.weight."""
    end = ".default.weight"
    return {f"{key.removesuffix(end)}.weight": tensor for key, tensor in state.items() if key.endswith((A, B))}
