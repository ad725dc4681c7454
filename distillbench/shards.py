"""Tensors that are spread over processes: what of them is here, and how they are made whole and spread again.

A spread tensor is torch's DTensor, cut along its first dimension. Where no module has been spread there are none, and
nothing of ``torch.distributed.tensor``, which takes seconds to import, is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

DTENSORS, MODULES = "torch.distributed.tensor", "torch.distributed.fsdp"


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has a part of it only."""
    loaded = sys.modules.get(DTENSORS)
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class as it was written: a spread module has one of torch's that derives from it."""
    kind, loaded = type(module), sys.modules.get(MODULES)
    return kind.__bases__[1] if loaded is not None and loaded.FSDPModule in kind.__bases__ else kind


@torch.no_grad()
def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process has of each, in the same memory."""
    return [_local(tensor) if is_sharded(tensor) else tensor for tensor in tensors]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local()


def gather_full(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All tensors, the spread ones whole and on the CPU; {} where not `keep`.

    Every process must call it, with the same names in the same order. They are gathered one by one.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = _gathered(tensor) if is_sharded(tensor) else tensor
        if keep:
            gathered[name] = full
    return gathered


def _gathered(tensor: Any) -> Tensor:
    return tensor.detach().full_tensor().cpu()


def shard_like(tensor: Tensor, full: Tensor) -> Tensor:
    """`full` itself, or this process's part of it if `tensor` is spread. No message is sent."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    like: Any = tensor
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_full(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole tensors."""
    own = module.state_dict()
    module.load_state_dict({n: shard_like(own[n], full) if n in own else full for n, full in tensors.items()})
