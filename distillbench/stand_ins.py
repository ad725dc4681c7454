"""What stands for the forward of a module during one call of its network, and is gone after it.

Not a hook: torch's compiler does not notice hooks that come and go, and what is computed again in a backward pass would
miss them. What stands for a forward is an attribute of the module, which is looked up and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

FORWARD, ADDED = "forward", "added_embedding"
StandIns = Mapping[nn.Module, Mapping[str, Any]]  # attributes, by name


@contextmanager
def standing_in(attributes: StandIns) -> Iterator[None]:
    """In the block each module has these attributes, before those of its class."""
    before = {module: {name: module.__dict__.get(name) for name in given} for module, given in attributes.items()}
    for module, given in attributes.items():
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


def standing_below(module: nn.Module) -> StandIns:
    """What stands in modules below `module` now, for :func:`standing_in` later."""
    found = {}
    for child in module.modules():
        if child is not module and FORWARD in child.__dict__:
            found[child] = {name: child.__dict__[name] for name in (FORWARD, ADDED) if name in child.__dict__}
    return found


def instead(forward: Callable[..., Any]) -> Mapping[str, Any]:
    """The attribute for which `forward` is called."""
    return {FORWARD: forward}


def adding(module: nn.Module, embedding: Tensor) -> Mapping[str, Any]:
    """The attributes with which `module` adds `embedding` (B,D) to what it gives."""
    return {FORWARD: MethodType(_with_embedding, module), ADDED: embedding}


def _with_embedding(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return type(self).forward(self, *args, **kwargs) + self.__dict__[ADDED]
