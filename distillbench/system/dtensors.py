"""Tensors that are sharded over ranks (DTensor, along the first dimension): local shards, full tensors, and back.

Nothing here imports ``torch.distributed.tensor``, which takes seconds, unless a module has been sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

DTENSORS, MODULES = "torch.distributed.tensor", "torch.distributed.fsdp"


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of `tensor`."""
    loaded = sys.modules.get(DTENSORS)
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class as it was written: a sharded module has one that torch derives from it."""
    kind, loaded = type(module), sys.modules.get(MODULES)
    return kind.__bases__[1] if loaded is not None and loaded.FSDPModule in kind.__bases__ else kind


@torch.no_grad()
def local_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's shard of each tensor, in the same memory; a tensor that is not sharded as it is."""
    return [_local(tensor) if is_sharded(tensor) else tensor for tensor in tensors]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local()


def gather_full(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All tensors, the sharded ones gathered to full ones on the CPU; {} without `keep`.

    Every rank must call it, with the same names in the same order. They are gathered one by one.
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
    """`full` itself, or this rank's shard of it if `tensor` is sharded. Sends no message."""
    if not is_sharded(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    like: Any = tensor
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_full(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a state dict of full tensors into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict({n: shard_like(own[n], full) if n in own else full for n, full in tensors.items()})
