"""Networks that do not fit into one process (FSDP): weights, gradients and moments are spread over all of them.

torch's ``fully_shard`` gathers the weights of one block at a time, in forward and in backward, and spreads them again;
gradients are summed on the way back. What stands round a network, such as an embedding of a guidance weight, is small
and is whole in every process.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from distillbench.compute import ComputeConfig, kind_of
from distillbench.diffusers_networks import DiT
from distillbench.errors import UserError
from distillbench.method import Method
from distillbench.network_calls import networks_below, repeated_blocks
from distillbench.ranks import Ranks
from distillbench.teachers import Teacher

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

TORCH = (2, 15)  # the oldest that this was run with


def check_shared(config: ComputeConfig, count: int) -> None:
    """Raise UserError where networks are to be spread over `count` processes and cannot be."""
    if not config.shard:
        return
    if count == 1:
        raise UserError(
            "compute.shard=true spreads networks over several processes, and this is one alone. Start as many as there "
            "are GPUs, by `torchrun --nproc-per-node=2 -m distillbench run ...`, or leave compute.shard out"
        )
    version = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if version < TORCH:
        wanted = ".".join(map(str, TORCH))
        raise UserError(f"compute.shard=true needs torch {wanted} or newer, this is torch {torch.__version__}")


@contextmanager
def trained_from(teacher: Teacher) -> Iterator[Teacher]:
    """A copy of `teacher` on the CPU, whose networks may be spread; `teacher` itself waits on the CPU meanwhile.

    Its students are made on the CPU too, so that no device ever holds them whole.
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
    """The networks of a method and of its teacher, spread over `ranks` from now on.

    With `averaged` there is a copy of the student for its average: a spread network cannot be copied.
    """

    def __init__(self, method: Method, averaged: bool, ranks: Ranks, device: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.average = copy.deepcopy(method.student).eval().requires_grad_(False) if averaged else None
        self._mesh = init_device_mesh(kind_of(device), (ranks.count,))
        roots = [method, method.teacher.denoiser, *([] if self.average is None else [self.average])]
        networks = {id(counted.network): counted.network for counted in networks_below(*roots)}
        for network in networks.values():
            if any(weight.ndim for weight in network.parameters()):
                self._spread(network)
        for root in roots:
            _to_device(root, device)
        ranks.broadcast_module(method)

    def _spread(self, network: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        ignored = {weight for weight in network.parameters() if not weight.ndim}  # numbers cannot be cut
        ignored.update(weight for module in _called_from_elsewhere(network) for weight in module.parameters())
        for module in [*repeated_blocks(network), network]:
            spread = fully_shard(module, mesh=self._mesh, reshard_after_forward=True, ignored_params=ignored)
            spread.set_gradient_divide_factor(1.0)  # losses are weighted by this process's share already:
            spread.set_force_sum_reduction_for_comms(True)  # a plain sum
        network.register_forward_hook(_forget)


def _called_from_elsewhere(network: nn.Module) -> list[nn.Module]:
    """Parts of blocks that a network also calls outside them: they stay whole."""
    return [m.wrapped.transformer_blocks[0].norm1.emb for m in network.modules() if isinstance(m, DiT)]


def _forget(network: FSDPModule, *of_forward: object) -> None:
    """After a forward of a frozen network: torch keeps their order in a list that only a backward pass empties.

    It forgets gradients too, so it is not for a network that is trained.
    """
    if not torch.is_grad_enabled() and not any(weight.requires_grad for weight in network.parameters()):
        network.reset_iter_state()


def _to_device(root: nn.Module, device: str) -> None:
    """What is not spread; the rest is there."""
    for module in root.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        for weight in module.parameters(recurse=False):
            if kind_of(str(weight.device)) != kind_of(device):
                weight.data = weight.data.to(device)
