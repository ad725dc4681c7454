"""Networks that do not fit on one device (FSDP): weights, gradients and moments are sharded over all ranks.

torch's ``fully_shard`` gathers the weights of one block at a time in forward and backward passes and frees them
afterwards; gradients are summed in the backward pass. Modules outside the network, such as the embedding of a guidance
weight, are small and replicated on every rank.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distillbench.errors import UserError
from distillbench.networks.calls import networks_below, repeated_blocks
from distillbench.networks.diffusers_wrappers import DiT
from distillbench.teachers.teacher import Teacher
from distillbench.training.compute import ComputeConfig, device_type
from distillbench.training.data_parallel import Ranks
from distillbench.training.method import Method

OLDEST_TORCH = (2, 15)  # the oldest version that this was run with


def check_sharding(config: ComputeConfig, count: int) -> None:
    """Raise UserError if `config` asks for sharding and `count` ranks or this torch do not support it."""
    if not config.shard:
        return
    if count == 1:
        raise UserError(
            "compute.shard=true shards networks over several ranks, and this is a single process. Start one for each "
            "GPU with `torchrun --nproc-per-node=2 -m distillbench run ...`, or leave compute.shard out"
        )
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise UserError(f"compute.shard=true needs torch {wanted} or newer, this is torch {torch.__version__}")


@contextmanager
def copied_for_sharding(teacher: Teacher) -> Iterator[Teacher]:
    """A copy of `teacher` on the CPU, whose networks may be sharded; `teacher` itself is offloaded during the block.

    Its students are built on the CPU too, so that no device ever holds a full copy.
    """
    own = teacher.denoiser, teacher.start
    devices = [None if one is None else _device(one) for one in own]
    try:
        for one in own:
            if one is not None:
                one.to("cpu")
        denoiser, start = copy.deepcopy(own)
        yield dataclasses.replace(teacher, denoiser=denoiser, start=start)
    finally:
        for one, device in zip(own, devices, strict=True):
            if one is not None and device is not None:
                one.to(device)


def _device(module: nn.Module) -> torch.device:
    return next((weight.device for weight in module.parameters()), torch.device("cpu"))


class Sharded:
    """Shards the networks of a method and of its teacher over `ranks`, in place.

    With `averaged`, `average` is a copy of the student for its average: a sharded network cannot be copied.
    """

    def __init__(self, method: Method, averaged: bool, ranks: Ranks, device: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.average = copy.deepcopy(method.student).eval().requires_grad_(False) if averaged else None
        self._mesh = init_device_mesh(device_type(device), (ranks.count,))
        roots = [method, method.teacher.denoiser, *([] if self.average is None else [self.average])]
        networks = {id(counted.network): counted.network for counted in networks_below(*roots)}
        for network in networks.values():
            if any(weight.ndim for weight in network.parameters()):
                self._shard(network)
        for root in roots:
            _to_device(root, device)
        ranks.broadcast_module(method)

    def _shard(self, network: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        ignored = {weight for weight in network.parameters() if not weight.ndim}  # scalars cannot be sharded
        ignored.update(weight for module in _called_from_elsewhere(network) for weight in module.parameters())
        for module in [*repeated_blocks(network), network]:
            sharded = fully_shard(module, mesh=self._mesh, reshard_after_forward=True, ignored_params=ignored)
            # A plain sum: losses are already weighted by the share of this rank.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        network.register_forward_hook(_reset_order)


def _called_from_elsewhere(network: nn.Module) -> list[nn.Module]:
    """Modules within blocks that the network also calls outside of them, so they are not sharded."""
    return [m.wrapped.transformer_blocks[0].norm1.emb for m in network.modules() if isinstance(m, DiT)]


def _reset_order(network: Any, *inputs_and_output: object) -> None:  # an nn.Module and FSDPModule
    """Empty torch's list of forward passes after one of a frozen network; otherwise only a backward pass empties it.

    It drops gradients too, so it must not be called for a network in training.
    """
    if not torch.is_grad_enabled() and not any(weight.requires_grad for weight in network.parameters()):
        network.reset_iter_state()


def _to_device(root: nn.Module, device: str) -> None:
    """Move all tensors that are not sharded; shards are already on the device."""
    for module in root.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        for weight in module.parameters(recurse=False):
            if device_type(str(weight.device)) != device_type(device):
                weight.data = weight.data.to(device)
