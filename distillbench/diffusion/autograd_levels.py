"""Whether a tensor needs a gradient or has a tangent, also within ``torch.func.jvp``, ``vjp`` and ``grad``.

torch.func wraps a tensor once for each transform that it is in. ``requires_grad`` of the wrapper is that of the
transform alone: within ``jvp`` it is False although the tensor below it is differentiated by ``backward()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.autograd import forward_ad

try:  # in torch 2.1 and later, but not a documented interface
    from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

    is_wrapped: Callable[[Tensor], bool] = is_functorch_wrapped_tensor
    unwrapped: Callable[[Tensor], Tensor] = get_unwrapped
except ImportError:  # then only what is visible in the outermost transform is found

    def is_wrapped(tensor: Tensor) -> bool:
        return False

    def unwrapped(tensor: Tensor) -> Tensor:
        return tensor


def levels(tensor: Tensor) -> Iterator[Tensor]:
    """`tensor`, and what it wraps, down to the tensor that ``backward()`` sees."""
    yield tensor
    while is_wrapped(tensor):
        tensor = unwrapped(tensor)
        yield tensor


def innermost(tensor: Tensor) -> Tensor:
    """The tensor that ``backward()`` sees."""
    *_, last = levels(tensor)
    return last


def needs_gradient(tensor: Tensor) -> bool:
    """Whether a reverse pass of any level may reach `tensor`."""
    return any(level.requires_grad for level in levels(tensor))


def has_tangent(tensor: Tensor) -> bool:
    """Whether a derivative along a direction is computed with `tensor` (forward mode)."""
    return any(forward_ad.unpack_dual(level).tangent is not None for level in levels(tensor))


def reaches_weights(output: Tensor, network: nn.Module) -> bool:
    """Whether a reverse pass from `output` of `network` reaches weights of it.

    ``torch.func.vjp`` in the input alone reaches none, although the weights are trainable.
    """
    below = innermost(output).requires_grad
    return any(weight.requires_grad and (below or is_wrapped(weight)) for weight in network.parameters())
