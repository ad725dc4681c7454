"""How a network is called: under autocast, in channels_last, compiled, recomputed in backward passes.

A network's class, state and copies are not changed. The forward of its modules is overridden during one call; compiled
forwards are functions of a class, which all networks of that class share.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter as Multiset
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distillbench.diffusion.conditioning import Condition
from distillbench.diffusion.denoiser import CountedNetwork, NetworkCall
from distillbench.networks.forward_overrides import Overrides, calling, overridden, overrides_below
from distillbench.system.dtensors import class_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEAST_REPEATS = 3  # of a class of modules in a network, for it to be its repeated block


def networks_below(*modules: nn.Module) -> list[CountedNetwork]:
    """Every counted network of `modules`, each once."""
    found = {id(m): m for module in modules for m in module.modules() if isinstance(m, CountedNetwork)}
    return list(found.values())


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of `network`, none of them within another.

    diffusers names those of its networks. In other networks they are the topmost modules with children whose class
    occurs at least three times. Containers of torch.nn do not count.
    """
    named = {name for module in network.modules() for name in getattr(class_of(module), "_repeated_blocks", None) or ()}
    counts = Multiset(class_of(module) for module in network.modules())

    def repeated(module: nn.Module) -> bool:
        if named:
            return class_of(module).__name__ in named
        own = not class_of(module).__module__.startswith("torch.nn.")
        return own and counts[class_of(module)] >= LEAST_REPEATS and any(True for _ in module.children())

    def below(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if repeated(child):
                yield child
            else:
                yield from below(child)

    return list(dict.fromkeys(below(network)))


def autocast(device: str, precision: str) -> AbstractContextManager[Any]:
    """Autocast to `precision`. With fp32 it is off, also within another autocast."""
    dtype = DTYPES.get(precision)
    return torch.autocast(device, dtype=dtype) if dtype else torch.autocast(device, enabled=False)


@functools.cache
def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, compiled separately for each shape of its inputs."""
    return torch.compile(forward, dynamic=False)


@dataclass(eq=False)
class ConfiguredCall(NetworkCall):
    """The call with the given settings. `plain` has, in plain values, the settings that differ from the default."""

    device: str  # kind: cpu, cuda
    precision: str = "fp32"
    channels_last: bool = False
    compile: str = "off"
    recompute: bool = False
    plain: Mapping[str, Any] = field(default_factory=dict)
    _blocks: WeakKeyDictionary[nn.Module, list[nn.Module]] = field(default_factory=WeakKeyDictionary)
    _converted: WeakSet[nn.Module] = field(default_factory=WeakSet)  # networks in channels_last
    observed: Collection[nn.Module] = ()  # modules whose forward hooks must run: what is compiled runs none

    def __call__(self, network: nn.Module, x: Tensor, time: Tensor, embedding: Tensor | None, c: Condition) -> Tensor:
        if not any(True for _ in network.parameters()):  # a closed-form denoiser
            return network(x, time, embedding, c)
        self.prepare(network)
        given = x.contiguous(memory_format=torch.channels_last) if self.channels_last else x
        with autocast(self.device, self.precision), self._changed(network):
            out = network(given, time, embedding, c)
        return out.to(x.dtype).contiguous()

    def prepare(self, network: nn.Module) -> None:
        """Convert its weights to their memory format, which copies of the network have too."""
        if self.channels_last and network not in self._converted:
            network.to(memory_format=torch.channels_last)
            self._converted.add(network)

    def in_float32(self) -> ConfiguredCall:
        """The same call without autocast; networks that either has converted are the same."""
        return dataclasses.replace(self, precision="fp32")

    def observing(self, modules: Collection[nn.Module]) -> ConfiguredCall:
        """The same call; the whole network, or the blocks, around one of `modules` are not compiled."""
        return dataclasses.replace(self, observed=list(modules))

    def undo(self) -> None:
        """Convert the weights back."""
        for network in self._converted:
            network.to(memory_format=torch.contiguous_format)
        self._converted.clear()

    def _changed(self, network: nn.Module) -> AbstractContextManager[Any]:
        """A block in which modules of `network` run compiled, or are recomputed in the backward pass."""
        recompute = self.recompute and torch.is_grad_enabled()
        if self.compile == "off" and not recompute:
            return nullcontext()
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        if self.compile == "blocks":
            blocks = self._blocks_of(network)
            forwards = {block: _compiled_forward(block) for block in blocks if not self._is_observed_within(block)}
        if recompute:
            blocks = self._blocks_of(network)
            inner = {block: forwards.get(block, block.forward) for block in blocks}
            forwards = {block: functools.partial(_checkpointed, block, forward) for block, forward in inner.items()}
        if self.compile == "whole" and not self.observed:
            forwards[network] = _compiled_forward(network)
        return overridden({module: calling(forward) for module, forward in forwards.items()})

    def _is_observed_within(self, block: nn.Module) -> bool:
        return any(module is not block and module in self.observed for module in block.modules())

    def _blocks_of(self, network: nn.Module) -> list[nn.Module]:
        if network not in self._blocks:
            self._blocks[network] = repeated_blocks(network)
        return self._blocks[network]


def _compiled_forward(module: nn.Module) -> Callable[..., Any]:
    return MethodType(compiled(type(module).forward), module)


def _checkpointed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """forward(...) under activation checkpointing: recomputed in the backward pass with its current weights and modes.

    Dropout draws the same masks again: torch's checkpoint restores the random generators' states.
    """
    modes = [(module, module.training) for module in block.modules()]
    contexts = functools.partial(_contexts, overrides_below(block), _weights(block), modes)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@dataclass(frozen=True)
class _Weight:
    """A weight of a module, and whether it needs a gradient.

    It may differ in the forward and in the backward pass: torch.func.functional_call replaces weights during a forward
    only, and a method may switch gradients off for one.
    """

    module: nn.Module
    name: str
    value: nn.Parameter | None
    needs_gradient: bool

    def put(self) -> None:
        if self.module._parameters[self.name] is not self.value:
            self.module._parameters[self.name] = self.value
        if self.value is not None and self.value.requires_grad is not self.needs_gradient:
            self.value.requires_grad_(self.needs_gradient)


def _weights(block: nn.Module) -> list[_Weight]:
    return [
        _Weight(module, name, value, value is not None and value.requires_grad)
        for module in block.modules()
        for name, value in module._parameters.items()
    ]


Modes = list[tuple[nn.Module, bool]]  # modules, and whether each is in training mode


def _contexts(
    overrides: Overrides, weights: list[_Weight], modes: Modes
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), _restored(overrides, weights, modes)


@contextmanager
def _restored(overrides: Overrides, weights: list[_Weight], modes: Modes) -> Iterator[None]:
    now = [
        _Weight(w.module, w.name, v := w.module._parameters[w.name], v is not None and v.requires_grad) for w in weights
    ]
    other = [module for module, training in modes if module.training is not training]
    with overridden(overrides):
        try:
            for weight in weights:
                weight.put()
            for module in other:
                module.training = not module.training
            yield
        finally:
            for weight in now:
                weight.put()
            for module in other:
                module.training = not module.training
