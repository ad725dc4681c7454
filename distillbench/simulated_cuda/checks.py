"""The rules of CUDA for each operator on a simulated GPU: devices, waits and copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from distillbench.simulated_cuda.devices import DEVICES, Generator, OfDevice
from distillbench.simulated_cuda.record import Place, add_copy, add_wait, place

H2D, D2H, D2D = "host to device", "device to host", "device to device"
# Operators that need a result on the host: a size, a number or an error code.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "allclose", "is_nonzero", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive", "bincount", "histc", "_linalg_eigh", "_linalg_svd",
    "_linalg_check_errors", "linalg_eig", "linalg_lstsq", "_linalg_solve_ex", "linalg_cholesky", "linalg_inv",
}  # fmt: skip
INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
# Pointwise operators that accept a CPU tensor without dimensions as one operand.
TAKES_SCALARS = {"copy_", "fill_", "masked_fill", "masked_fill_", "addcmul_", "addcdiv_", "lerp_", "scalar_tensor"}


@dataclass(frozen=True)
class Operator:
    """Properties of an operator."""

    name: str
    is_view: bool
    takes_scalars: bool  # accepts CPU tensors without dimensions
    draws: bool  # uses random numbers
    takes_generator: bool


@cache
def operator_of(func: Any) -> Operator:
    name = func._schema.name.split("::")[1]
    pointwise = torch.Tag.pointwise in func.tags or name.startswith("_foreach_") or name in TAKES_SCALARS
    return Operator(
        name,
        func.is_view or name in ("_unsafe_view", "_reshape_alias"),
        pointwise or name.startswith("_fused_"),
        torch.Tag.nondeterministic_seeded in func.tags,
        any(argument.name == "generator" for argument in func._schema.arguments),
    )


class DevicesMixed(RuntimeError):
    """Tensors of several devices in one operator. torch raises a plain RuntimeError with the same message."""

    def __init__(self, devices: str, where: str, place: Place) -> None:
        super().__init__(
            f"Expected all tensors to be on the same device, but found at least two devices, {devices}! "
            f"({where} at {place})"
        )
        self.devices, self.where, self.place = devices, where, place


def home(tensor: Tensor) -> int | None:
    """The index of the device; None for the CPU."""
    return tensor.index if isinstance(tensor, OfDevice) else None


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_of(value)
    return found


def unwrapped(value: Any) -> Any:
    """`value` with the CPU tensors of all simulated ones."""
    if isinstance(value, OfDevice):
        return value.elem
    if isinstance(value, list | tuple):
        return type(value)(map(unwrapped, value))
    if isinstance(value, dict):
        return {name: unwrapped(part) for name, part in value.items()}
    return value


# --- devices ---------------------------------------------------------------------------------------------------------


def check_devices(func: Any, operator: Operator, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
    """Record a copy; raise DevicesMixed if the operator does not accept tensors of these devices together."""
    if operator.name == "copy_":
        note_copy(args[0], args[1], bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking", False)))
        return
    if operator.name in INDEXING and isinstance(args[0], OfDevice):
        indices = [index for index in args[1] if index is not None]
        values = [value for value in args[2:3] if isinstance(value, Tensor) and value.ndim]
        if all(home(value) == args[0].index for value in values) and all(
            home(index) in (None, args[0].index) for index in indices
        ):
            for index in (index for index in indices if home(index) is None):
                note_copy_from_host(index.numel() * index.element_size(), DEVICES.is_pinned(index), True)
            return
    elif operator.takes_scalars:
        listed = tensors_of(value for value in args if isinstance(value, list | tuple))
        of_devices = {home(tensor) for tensor in tensors if tensor.ndim or any(tensor is one for one in listed)}
        of_devices |= {home(tensor) for tensor in tensors} - {None}
        if len(of_devices) <= 1:
            return
    raise mixed(tensors, f"operator aten::{operator.name}")


def mixed(tensors: list[Tensor], where: str) -> DevicesMixed:
    """The error for tensors that are not on one device."""
    return DevicesMixed(_in_words(tensors), where, place())


def _in_words(tensors: list[Tensor]) -> str:
    """The devices, and the shape of the first tensor on each."""
    first = {str(tensor.device): tuple(tensor.shape) for tensor in reversed(tensors)}
    names = [f"{device} {shape}" for device, shape in sorted(first.items(), reverse=True)]
    return ", ".join(names[:-1]) + " and " + names[-1]


def check_generator(generator: Any, index: int | None) -> None:
    """Raise RuntimeError for a generator of another device than `index`; None is the CPU."""
    if generator is None:
        return
    found_index = generator.index if isinstance(generator, Generator) else None
    if found_index != index:
        wanted, found = ("cpu" if one is None else f"cuda:{one}" for one in (index, found_index))
        if found_index is None or index is None:  # CPU against GPU
            wanted, found = wanted.split(":")[0], found.split(":")[0]
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{found}' (at {place()})")
    capture = DEVICES.capture
    if capture is None or index is None or generator in (DEVICES.generators[index], *capture.generators):
        return
    raise RuntimeError(
        "Attempt to increase offset for a CUDA generator not in capture mode: register it with "
        f"CUDAGraph.register_generator_state (at {place()})"
    )


# --- waits and copies ------------------------------------------------------------------------------------------------


def check_waits(operator: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Record a wait if CUDA waits for the device in this operator."""
    name = operator.name
    masked = name in INDEXING and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    )
    sized = name == "repeat_interleave" and kwargs.get("output_size") is None
    if name in WAITING or masked or sized:
        what = "item" if name == "_local_scalar_dense" else "a mask as an index" if masked else name
        DEVICES.refuse_while_capturing(what)
        add_wait(what)


def note_copy_from_host(size: int, pinned: bool, blocking: bool) -> None:
    """Record a copy from the host to a device; from pageable memory it is always blocking."""
    if not pinned or blocking:
        DEVICES.refuse_while_capturing("copy from the host")
    add_copy(H2D, size, pinned, blocking or not pinned)


def note_copy(target: Tensor, source: Tensor, non_blocking: bool) -> None:
    size = source.numel() * source.element_size()
    if isinstance(target, OfDevice) and isinstance(source, OfDevice):
        add_copy(D2D, size, False, False)
    elif isinstance(target, OfDevice):
        pinned = DEVICES.is_pinned(source)
        note_copy_from_host(size, pinned, not non_blocking)
    else:
        pinned = DEVICES.is_pinned(target)
        if not (pinned and non_blocking):
            DEVICES.refuse_while_capturing("copy to the host")
        add_copy(D2H, size, pinned, not (pinned and non_blocking))
