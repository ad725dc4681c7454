"""Overrides the forward of modules during one call of their network.

Hooks would not work: torch's compiler does not notice hooks that are added and removed, and recomputation in a backward
pass would not run them. An override is an attribute of the module, which the compiler looks up and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

FORWARD, ADDED = "forward", "added_embedding"
Overrides = Mapping[nn.Module, Mapping[str, Any]]  # attributes of modules, by name


@contextmanager
def overridden(overrides: Overrides) -> Iterator[None]:
    """In the block each module has these attributes instead of those of its class."""
    before = {module: {name: module.__dict__.get(name) for name in given} for module, given in overrides.items()}
    for module, given in overrides.items():
        module.__dict__.update(given)
    try:
        yield
    finally:
        for module, given in before.items():
            for name, value in given.items():
                if value is None:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = value


def overrides_below(module: nn.Module) -> Overrides:
    """The current overrides of `module` and its submodules."""
    found = {}
    for child in module.modules():
        if child is not module and FORWARD in child.__dict__:
            found[child] = {name: child.__dict__[name] for name in (FORWARD, ADDED) if name in child.__dict__}
    return found


def calling(forward: Callable[..., Any]) -> Mapping[str, Any]:
    """The override that calls `forward`."""
    return {FORWARD: forward}


def adding(module: nn.Module, embedding: Tensor) -> Mapping[str, Any]:
    """The override that adds `embedding` (B,D) to the output of `module`."""
    return {FORWARD: MethodType(_with_embedding, module), ADDED: embedding}


def _with_embedding(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return type(self).forward(self, *args, **kwargs) + self.__dict__[ADDED]
