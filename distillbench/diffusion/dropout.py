"""One dropout mask for several evaluations, so that a loss does not compare different masks.

:class:`distillbench.diffusion.denoiser.CountedNetwork` decides in which evaluations dropout acts. Dropout draws from
torch's default generator of the device: the same state gives the same masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distillbench.diffusion.denoiser import CountedNetwork
from distillbench.diffusion.noise import stream_key

__all__ = ["one_mask"]


def seed_masks(seed: int, process: int) -> None:
    """Before a training: seed the generator of its masks, differently in each process."""
    torch.manual_seed(stream_key(f"dropout of process {process}", seed))


@contextmanager
def one_mask(*networks: nn.Module) -> Iterator[None]:
    """In the block every evaluation of `networks` drops the same features, also without gradients or frozen.

    For losses that compare two evaluations of the network that is trained, or of it and its average: the student and
    the target network of a consistency model (Song et al. 2023, as released). The evaluations must have equally many
    images, and the networks one architecture. After the block the generator is as after the last evaluation alone.

    A network in evaluation mode drops nothing here either. Raises RuntimeError if train_step yields within the block.
    """
    counted = [found for network in networks for found in _counted(network)]
    device = next((str(weight.device) for network in networks for weight in network.parameters()), "cpu")
    state = _get_state(device)

    def mask() -> None:
        _set_state(state, device)

    before = [one.mask for one in counted]
    try:
        for one in counted:
            one.mask = mask
        yield
        if any(one.mask is not mask for one in counted):
            raise RuntimeError("train_step must not yield within a block of one_mask: end the block before the yield")
    finally:
        for one, other in zip(counted, before, strict=True):
            one.mask = other


def _counted(module: nn.Module) -> Iterator[CountedNetwork]:
    """The counted networks in `module`."""
    if isinstance(module, CountedNetwork):
        yield module
        return
    for child in module.children():
        yield from _counted(child)


def _get_state(device: str) -> Tensor:
    """Of torch's default generator on `device`."""
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state(device)


def _set_state(state: Tensor, device: str) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
