"""The small networks that methods are checked on, which log every evaluation of themselves and of their copies.

| name   | network                                                  | images      | attention |
|--------|----------------------------------------------------------|-------------|-----------|
| `mlp`  | :class:`~distillbench.networks.architectures.ResidualMLP` | (B,2,4,4)   | no        |
| `unet` | diffusers' ``UNet2DModel``                               | (B,2,8,8)   | yes       |
| `dit`  | diffusers' ``DiTTransformer2DModel``                     | (B,2,8,8)   | yes       |
| `edm`  | :class:`~distillbench.networks.edm.SongUNet`              | (B,2,8,8)   | yes       |

The check `attention` has a quick network of its own, ``attention``: diffusers takes seconds to import.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn.functional import scaled_dot_product_attention

import distillbench
from distillbench.diffusion.autograd_levels import innermost, levels, needs_gradient, reaches_weights
from distillbench.diffusion.conditioning import UNCONDITIONAL, Condition
from distillbench.errors import UserError
from distillbench.networks.architectures import DiT, ResidualMLP, UNet
from distillbench.networks.edm import SongUNet
from distillbench.testing.checks import Fault

SHAPE = (2, 4, 4)  # of images for the mlp
LARGER = (2, 8, 8)  # for the others: attention over more than one pixel
RECOMPUTED_BLOCKS = 3  # fewer are not recomputed (distillbench.networks.calls)


@dataclass(frozen=True)
class Call:
    """One evaluation of a network on `rows` images."""

    network: nn.Module
    rows: int
    labels: Tensor | None
    with_gradient: bool
    trained: bool = False  # the gradient reaches the network's weights
    mask: Tensor | None = field(default=None, compare=False)  # of dropout; None: no dropout
    reached: list[None] = field(default_factory=list, compare=False)  # an entry for each gradient that reached it
    along: list[None] = field(default_factory=list, compare=False)  # for each that reached its forward-mode derivative
    line: str = field(default="", compare=False)  # the line outside of distillbench that asked for it, with a gradient


class Log(list[Call]):
    """The evaluations of a network and of all its copies: copies share the log."""

    def __deepcopy__(self, memo: dict) -> Log:
        return self


class LoggedNetwork(nn.Module):
    """Comes before a network's class: logs evaluations, and in training mode drops a share of the pixels.

    It is a base class and not a wrapper, so that a method finds the network's own attributes.
    """

    log: Log
    dropout: float
    labelled: bool  # it needs the class

    def watched(self, log: Log, dropout: float, labelled: bool) -> LoggedNetwork:
        """Itself, with random weights, none of them zero."""
        self.log, self.dropout, self.labelled = log, dropout, labelled
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)
        return self

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None = None, c: Condition = UNCONDITIONAL) -> Tensor:
        if self.labelled and c.labels is None:
            raise Fault("a conditional network was evaluated without a class: pass it batch.c, or the c of sample")
        if isinstance(x, FakeTensor):  # nothing is evaluated: Denoiser.feature_shapes
            shapes: Tensor = super().forward(x, time, embedding, c)
            return shapes
        mask = torch.nn.functional.dropout(torch.ones_like(x), self.dropout) if self.training and self.dropout else None
        out: Tensor = super().forward(x if mask is None else mask * x, time, embedding, c)
        with_gradient = needs_gradient(out)
        trained, line = with_gradient and reaches_weights(out, self), asked_by() if with_gradient else ""
        call = Call(self, len(x), c.labels, with_gradient, trained, mask, line=line)
        _note_gradients(innermost(out), call.reached)
        for level in levels(out):
            tangent = forward_ad.unpack_dual(level).tangent
            if tangent is not None:
                _note_gradients(innermost(tangent), call.along)
        self.log.append(call)
        return out


def _note_gradients(tensor: Tensor, reached: list[None]) -> None:
    """Add an entry to `reached` whenever a gradient reaches `tensor`."""
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: reached.append(None))


HOMES = tuple(str(Path(str(module.__file__)).parent) for module in (distillbench, torch))


def asked_by() -> str:
    """The innermost line of the running code that is in neither distillbench nor torch, as FILE:LINE."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(HOMES):
        if frame.f_back is None:
            return ""
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@dataclass(frozen=True)
class Architecture:
    """A kind of network: `new(cls, classes, depth)` makes a small one of the class `cls`, which derives from `base`."""

    base: type[nn.Module]
    shape: tuple[int, int, int]  # C,H,W of its images
    new: Callable[[Any, int, int], nn.Module]


class AttentionMLP(ResidualMLP):
    """A ResidualMLP on pixels that attend to each other, by torch's fused attention as in `unet` and `dit`."""

    def __init__(self, shape: tuple[int, int, int], width: int, depth: int, classes: int) -> None:
        super().__init__(shape, width, depth, classes)
        self.qkv = nn.Linear(shape[0], 3 * shape[0])

    def forward(self, x: Tensor, time: Tensor, embedding: Tensor | None = None, c: Condition = UNCONDITIONAL) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)[:, None]  # (B, 1 head, H W, C)
        q, k, v = self.qkv(pixels).chunk(3, dim=-1)
        attended = scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        return super().forward(x + attended, time, embedding, c)


def _song_unet(cls: Any, classes: int, depth: int) -> nn.Module:
    channels, side, _ = LARGER
    return cls(side, channels, channels, classes, 0, 8, (1, 2), 2, depth, (side // 2,), 0.0)


NETWORKS = ("mlp", "unet", "dit", "edm")  # the choices
ARCHITECTURES = {
    "mlp": Architecture(ResidualMLP, SHAPE, lambda cls, classes, depth: cls(SHAPE, 16, depth, classes)),
    "attention": Architecture(AttentionMLP, SHAPE, lambda cls, classes, depth: cls(SHAPE, 16, depth, classes)),
    "unet": Architecture(UNet, LARGER, lambda cls, classes, depth: cls(LARGER, 8, 1, classes)),
    "dit": Architecture(DiT, LARGER, lambda cls, classes, depth: cls(LARGER, 16, depth, classes)),
    "edm": Architecture(SongUNet, LARGER, _song_unet),
}


PRECISIONS = ("fp32", "bf16")  # fp16 scales losses, which the first steps of a training skip


@dataclass(frozen=True)
class Computed:
    """The network of a bench's teacher and students, and how it is computed in training. Raises UserError."""

    network: str = "mlp"  # mlp, unet, dit or edm
    precision: str = "fp32"  # fp32 or bf16, as compute.precision
    recompute: bool = False  # activation checkpointing, as compute.recompute

    def __post_init__(self) -> None:
        for name, possible in (("network", ARCHITECTURES), ("precision", PRECISIONS)):
            if (given := getattr(self, name)) not in possible:
                listed = ", ".join(NETWORKS if name == "network" else PRECISIONS)
                raise UserError(f"{name} must be one of {listed}, got {given!r}")

    @property
    def configured(self) -> bool:
        """Whether networks are not just called as they are."""
        return self.precision != "fp32" or self.recompute


USUALLY_COMPUTED = Computed()


def new_network(name: str, classes: int, log: Log, dropout: float = 0.0, depth: int = 1) -> LoggedNetwork:
    """A small network of the architecture `name` for images of its shape, with random weights."""
    network = ARCHITECTURES[name].new(_logged(name), classes, depth)
    assert isinstance(network, LoggedNetwork)
    return network.watched(log, dropout, classes > 0)


@functools.cache
def _logged(name: str) -> type[nn.Module]:
    """The class of that architecture, preceded by LoggedNetwork."""
    base = ARCHITECTURES[name].base
    return type(f"Logged{base.__name__}", (LoggedNetwork, base), {})
